"""Schedules as pure functions of the number of completed updates.

The threshold follows the cubic of Zhu & Gupta (2017, eq. 1; paper, section 5 and appendix), after
its initial value for `initial_warmup * warmup_steps` updates, and before its final value for the
last `final_warmup * warmup_steps` updates, in which the model recovers. Lambda, the weight
of the penalty, is proportional to the threshold. The learning rate warms up and decays linearly.

With cycles, as in Kurtic et al. (2022), the learning rate falls to a tenth in each cycle. The
threshold then changes only when a cycle begins, from the second one on.
"""

from dataclasses import dataclass


def schedule_threshold(
    step: int,
    total_step: int,
    warmup_steps: int,
    initial_threshold: float,
    final_threshold: float,
    initial_warmup: float,
    final_warmup: float,
    final_lambda: float,
) -> tuple[float, float]:
    """Threshold and lambda for the update after `step` of `total_step` updates.

    lambda = final_lambda * threshold / final_threshold, or final_lambda if final_threshold is 0.
    """
    start = initial_warmup * warmup_steps
    end = total_step - final_warmup * warmup_steps
    if step <= start:
        threshold = initial_threshold
    elif step > end:
        threshold = final_threshold
    else:
        remaining = 1 - (step - start) / (end - start)
        threshold = final_threshold + (initial_threshold - final_threshold) * remaining**3
    if final_threshold == 0:
        return threshold, final_lambda
    return threshold, final_lambda * threshold / final_threshold


def learning_rate_factor(step: int, total_step: int, warmup_steps: int) -> float:
    """The factor in [0, 1] of the learning rates for the update after `step` updates."""
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_step - step) / max(1, total_step - warmup_steps))


CYCLE_END = 0.1  # fraction of the peak learning rate at the end of a cycle


def cycle_threshold(
    step: int,
    total_step: int,
    cycles: int,
    initial_threshold: float,
    first_cut: float,
    final_threshold: float,
) -> float:
    """The threshold for the update after `step` updates: one threshold for each cycle.

    The first cycle has the initial threshold, the second `first_cut`, the last the final threshold.
    The cycles between follow the cubic.
    """
    cycle = min(step, total_step - 1) * cycles // total_step
    if cycle == 0:
        return initial_threshold
    remaining = (cycles - 1 - cycle) / max(1, cycles - 2)
    return final_threshold + (first_cut - final_threshold) * remaining**3


def cycle_learning_rate_factor(step: int, total_step: int, warmup_steps: int, cycles: int) -> float:
    """The factor of the learning rates with cycles, for the update after `step` updates."""
    if step < warmup_steps:
        return step / warmup_steps
    length = total_step / cycles
    return 1 - (1 - CYCLE_END) * (step % length) / length


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run of `total_step` updates; see `schedule_threshold`.

    cycles, first_cut: see `cycle_threshold`. One cycle is the schedule of the paper.
    """

    total_step: int
    warmup_steps: int
    initial_threshold: float
    final_threshold: float
    initial_warmup: float
    final_warmup: float
    final_lambda: float
    cycles: int = 1
    first_cut: float = 0.3

    def threshold(self, step: int) -> tuple[float, float]:
        """Threshold and lambda for the update after `step` updates."""
        if self.cycles > 1:
            ends = self.initial_threshold, self.first_cut, self.final_threshold
            return cycle_threshold(step, self.total_step, self.cycles, *ends), self.final_lambda
        return schedule_threshold(
            step,
            self.total_step,
            self.warmup_steps,
            self.initial_threshold,
            self.final_threshold,
            self.initial_warmup,
            self.final_warmup,
            self.final_lambda,
        )

    def learning_rate(self, step: int) -> float:
        """The factor of the learning rates for the update after `step` updates."""
        if self.cycles > 1:
            lengths = self.total_step, self.warmup_steps, self.cycles
            return cycle_learning_rate_factor(step, *lengths)
        return learning_rate_factor(step, self.total_step, self.warmup_steps)
