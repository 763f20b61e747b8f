"""Steer lambda so that a run ends with the fraction of weights of `--target_remaining`."""

import math
from dataclasses import dataclass


@dataclass
class LambdaSteering:
    """A PI controller of log(lambda): a fraction `target`, in (0, 1), of the weights is to remain.

    At the end, the weights with scores above `last_cut` remain. `reference` moves from `first_cut`,
    where all scores start, to `last_cut` along the threshold's cubic. The error is the fraction of
    weights above the reference, minus the target, in log-odds. Its integral runs over the time in
    which the threshold moves (`start` to `end`, in updates), so the gains suit runs of any length.
    The schedule of lambda (see `schedule_threshold`) multiplies the result.

    A score below the cut hardly returns, however small lambda becomes. The controller therefore
    approaches the target from above: it begins `HEAD_START` too high in log-odds, and arrives when
    the learning rate has almost decayed.
    """

    target: float
    first_cut: float
    last_cut: float
    start: float
    end: float
    total_step: int
    first_lambda: float
    integral: float = 0.0

    PROPORTIONAL, INTEGRAL = 8.0, 60.0
    LARGEST_ERROR = 1.0
    RANGE = 100.0  # the largest factor between lambda and first_lambda
    HEAD_START, ARRIVAL = 1.0, 0.95  # in log-odds; as a fraction of the run

    def reference(self, step: int) -> float:
        """The score that a fraction `target` of the weights should exceed after `step` updates."""
        left = 1 - _clamp((step - self.start) / max(1.0, self.end - self.start), 0.0, 1.0)
        return self.last_cut + (self.first_cut - self.last_cut) * left**3

    def steer(self, step: int, fraction: float) -> float:
        """final_lambda after `step` updates, with `fraction` of the weights above the reference."""
        if step <= self.start:
            return self.first_lambda
        arrival = max(1.0, self.ARRIVAL * self.total_step - self.start)
        left = max(0.0, 1 - (step - self.start) / arrival)
        error = _log_odds(fraction) - (_log_odds(self.target) + self.HEAD_START * left**2)
        error = _clamp(error, -self.LARGEST_ERROR, self.LARGEST_ERROR)
        bound = math.log(self.RANGE)
        self.integral += self.INTEGRAL * error / max(1.0, self.end - self.start)
        self.integral = _clamp(self.integral, -bound, bound)
        change = self.integral + self.PROPORTIONAL * error
        return self.first_lambda * math.exp(_clamp(change, -bound, bound))


def _clamp(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))


def _log_odds(fraction: float) -> float:
    fraction = _clamp(fraction, 1e-9, 1 - 1e-9)
    return math.log(fraction / (1 - fraction))
