"""Schedules as pure functions of the number of completed updates.

The threshold follows the cubic of Zhu & Gupta (2017, eq. 1; paper, section 5 and appendix). It has
its initial value for `initial_warmup * warmup_steps` updates, then moves, and has its final value
for the last `final_warmup * warmup_steps` updates, in which the model recovers. Lambda, the weight
of the penalty, is proportional to the threshold. The learning rate warms up and decays linearly.
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


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run of `total_step` updates; see `schedule_threshold`."""

    total_step: int
    warmup_steps: int
    initial_threshold: float
    final_threshold: float
    initial_warmup: float
    final_warmup: float
    final_lambda: float

    def threshold(self, step: int) -> tuple[float, float]:
        """Threshold and lambda for the update after `step` updates."""
        return schedule_threshold(step, **vars(self))

    def learning_rate(self, step: int) -> float:
        """The factor of the learning rates for that update."""
        return learning_rate_factor(step, self.total_step, self.warmup_steps)
