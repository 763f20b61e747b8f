"""Schedules as pure functions of the number of completed updates.

The threshold follows the cubic of Zhu & Gupta (2017): it rests at its initial value for `initial_warmup *
warmup_steps` updates, moves, and rests at its final value for the last `final_warmup * warmup_steps` updates, in which
the model recovers. The coefficient of the penalty follows the threshold. The learning rate warms up linearly and
decays linearly to zero.
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
    """Threshold and lambda for the update after `step` completed ones, of `total_step` in all.

    Thresholds are in the units of the pruning method (fractions in [0, 1] for all but `threshold`).
    lambda = final_lambda * threshold / final_threshold (final_lambda when final_threshold is 0).
    Source: paper, section 5 and appendix; Zhu & Gupta 2017, eq. 1.
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
    regularization_lambda = (
        final_lambda * threshold / final_threshold if final_threshold else final_lambda
    )
    return threshold, regularization_lambda


def learning_rate_factor(step: int, total_step: int, warmup_steps: int) -> float:
    """Factor of the learning rates after `step` completed updates: linear warm-up, then decay to 0."""
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
        """Threshold and lambda for the update after `step` completed ones."""
        return schedule_threshold(step, **vars(self))

    def learning_rate(self, step: int) -> float:
        """Factor of the learning rates for that update."""
        return learning_rate_factor(step, self.total_step, self.warmup_steps)


def plateaus_overlap(
    total_step: int, warmup_steps: int, initial_warmup: float, final_warmup: float
) -> str | None:
    """Why the threshold could never reach its final value, with the remedy; None when it can."""
    plateaus = initial_warmup + final_warmup
    if warmup_steps == 0 or plateaus == 0 or total_step > plateaus * warmup_steps:
        return None
    largest = int(total_step / plateaus)
    while largest > 0 and total_step <= plateaus * largest:
        largest -= 1
    return (
        f"the threshold schedule does not fit: with T = {total_step} updates, the plateaus of "
        f"initial_warmup * warmup_steps = {initial_warmup:g} * {warmup_steps} and final_warmup * "
        f"warmup_steps = {final_warmup:g} * {warmup_steps} updates overlap; use --warmup_steps "
        f"{largest} or less, or more updates"
    )
