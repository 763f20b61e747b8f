"""Schedules as pure functions of the number of completed updates.

The threshold follows the cubic of Zhu & Gupta (2017): it rests at its initial value for
`initial_warmup * warmup_steps` updates, moves, and rests at its final value for the last
`final_warmup * warmup_steps` updates, in which the model recovers. The coefficient of the penalty
follows the threshold. The learning rate warms up linearly and decays linearly to zero.

`LambdaSteering` is the one part with a memory: it finds the coefficient that leaves the asked fraction of weights.
"""

import math
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
    regularization_lambda = final_lambda * threshold / final_threshold if final_threshold else final_lambda
    return threshold, regularization_lambda


def plateaus_overlap(total_step: int, warmup_steps: int, initial_warmup: float, final_warmup: float) -> str | None:
    """Why the threshold could never reach its final value, with the remedy; None when it can."""
    plateaus = initial_warmup + final_warmup
    if warmup_steps == 0 or plateaus == 0 or total_step > plateaus * warmup_steps:
        return None
    largest = int(total_step / plateaus)
    while largest > 0 and total_step <= plateaus * largest:
        largest -= 1
    return (
        f"the threshold schedule does not fit: with T = {total_step} updates, the plateaus of "
        f"initial_warmup * warmup_steps = {initial_warmup:g} * {warmup_steps} and final_warmup * warmup_steps = "
        f"{final_warmup:g} * {warmup_steps} updates overlap; use --warmup_steps {largest} or less, or more updates"
    )


def learning_rate_factor(step: int, total_step: int, warmup_steps: int) -> float:
    """Factor of the learning rates after `step` completed updates: linear warm-up, then decay to 0."""
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_step - step) / max(1, total_step - warmup_steps))


@dataclass
class LambdaSteering:
    """Steers lambda so that a fraction `target` of the scores, in (0, 1), ends above `last_cut`.

    The score that is to lie on the cut in the end starts at `first_cut`, where all scores start, and is led along
    the cubic of the threshold to `last_cut`: the reference. What fraction of the scores lies above the reference
    is compared with the target, in log-odds, and moves log(lambda), in proportion and through its integral
    over time (a PI controller). Time counts in units of the threshold's move, so that the gains suit runs of any length.
    The published ramp lambda = ... * threshold / final_threshold stays on top of it.

    A score below the cut hardly comes back, however small lambda gets. So the target is approached from
    above: it starts a unit of log-odds higher, and gets there when the learning rate has almost decayed.
    """

    target: float
    first_cut: float
    last_cut: float
    start: float  # of the threshold's move, in updates
    end: float
    total_step: int
    first_lambda: float
    integral: float = 0.0

    PROPORTIONAL, INTEGRAL = 8.0, 60.0
    LARGEST_ERROR = 1.0
    RANGE = 100.0  # lambda stays within this factor of the first
    HEAD_START, ARRIVAL = 1.0, 0.95  # in log-odds; as a part of the run

    def reference(self, step: int) -> float:
        """The cut that the asked fraction of the scores should be above after `step` updates."""
        left = 1 - min(1.0, max(0.0, (step - self.start) / max(1.0, self.end - self.start)))
        return self.last_cut + (self.first_cut - self.last_cut) * left**3

    def steer(self, step: int, fraction: float) -> float:
        """final_lambda for the update after `step` completed ones; `fraction` of the scores are above the reference."""
        if step <= self.start:
            return self.first_lambda
        left = max(0.0, 1 - (step - self.start) / max(1.0, self.ARRIVAL * self.total_step - self.start))
        error = _log_odds(fraction) - (_log_odds(self.target) + self.HEAD_START * left**2)
        error = min(self.LARGEST_ERROR, max(-self.LARGEST_ERROR, error))
        bound = math.log(self.RANGE)
        self.integral += self.INTEGRAL * error / max(1.0, self.end - self.start)
        self.integral = min(bound, max(-bound, self.integral))
        change = self.integral + self.PROPORTIONAL * error
        return self.first_lambda * math.exp(min(bound, max(-bound, change)))


def usual_lambda(target: float, penalty: str) -> float:
    """final_lambda that leaves about a fraction `target`: a fit to the paper's SQuAD runs without a teacher."""
    odds = (1 - target) / target
    return 140 * odds**0.65 if penalty == "l1" else 15 * odds**1.1


def _log_odds(fraction: float) -> float:
    fraction = min(1 - 1e-9, max(1e-9, fraction))
    return math.log(fraction / (1 - fraction))
