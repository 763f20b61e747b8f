"""Lambda steered so that a run ends at an asked density: `--target_remaining`. It has a memory, so it is no schedule."""

import math
from dataclasses import dataclass


@dataclass
class LambdaSteering:
    """Steers lambda so that a fraction `target` of the weights, in (0, 1), ends above the cut `last_cut`.

    The score that is to lie on the cut in the end starts at `first_cut`, where all scores start, and is led along the
    cubic of the threshold to `last_cut`: the reference. The fraction of weights above the reference is compared with
    the target, in log-odds; the error moves log(lambda), in proportion and through its integral over time (a PI
    controller). Time counts in units of the threshold's move, so that the gains suit runs of any length. The published
    ramp lambda = ... * threshold / final_threshold stays on top of it.

    A score below the cut hardly comes back, however small lambda gets. So the target is approached from above: it
    starts a unit of log-odds higher, and arrives when the learning rate has almost decayed.
    """

    target: float
    first_cut: float
    last_cut: float
    start: float  # of the threshold's move, in updates
    end: float
    total_step: int
    first_lambda: float
    integral: float = 0.0
    last_lambda: float = 0.0  # that `steer` returned

    PROPORTIONAL, INTEGRAL = 8.0, 60.0
    LARGEST_ERROR = 1.0
    RANGE = 100.0  # lambda stays within this factor of the first
    HEAD_START, ARRIVAL = 1.0, 0.95  # in log-odds; as a part of the run

    def reference(self, step: int) -> float:
        """The score that the asked fraction of the weights should be above after `step` updates."""
        left = 1 - min(1.0, max(0.0, (step - self.start) / max(1.0, self.end - self.start)))
        return self.last_cut + (self.first_cut - self.last_cut) * left**3

    def steer(self, step: int, fraction: float) -> float:
        """final_lambda for the update after `step` completed ones; `fraction` of the weights are above the reference."""
        self.last_lambda = self.first_lambda
        if step <= self.start:
            return self.last_lambda
        left = max(
            0.0, 1 - (step - self.start) / max(1.0, self.ARRIVAL * self.total_step - self.start)
        )
        error = _log_odds(fraction) - (_log_odds(self.target) + self.HEAD_START * left**2)
        error = min(self.LARGEST_ERROR, max(-self.LARGEST_ERROR, error))
        bound = math.log(self.RANGE)
        self.integral += self.INTEGRAL * error / max(1.0, self.end - self.start)
        self.integral = min(bound, max(-bound, self.integral))
        change = self.integral + self.PROPORTIONAL * error
        self.last_lambda *= math.exp(min(bound, max(-bound, change)))
        return self.last_lambda


def usual_lambda(target: float, penalty: str) -> float:
    """final_lambda that leaves about a fraction `target`: a fit to the paper's SQuAD runs without a teacher."""
    odds = (1 - target) / target
    return 140 * odds**0.65 if penalty == "l1" else 15 * odds**1.1


def _log_odds(fraction: float) -> float:
    fraction = min(1 - 1e-9, max(1e-9, fraction))
    return math.log(fraction / (1 - fraction))
