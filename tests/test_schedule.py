"""Schedules against the formulas of the paper, written out."""

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest

from emmental.modules.methods import METHODS
from emmental.schedule import Schedule, learning_rate_factor, schedule_threshold
from emmental.steering import LambdaSteering
from emmental.training.checks import plateaus_overlap

CASES = [
    (100, 10, 1, 2),  # T, w, i, f
    (100, 10, 0, 0),
    (100, 0, 1, 2),
    (57, 7, 2, 3),
    (10_000, 1_500, 1, 4),
    (40, 10, 0.5, 1.25),
    (31, 10, 1, 2),
]


def cubic(t, T, w, v0, v1, i, f):
    """Design, section 3, in exact arithmetic."""
    T, w, i, f, v0, v1 = map(Fraction, (T, w, i, f, v0, v1))
    if t <= i * w:
        return v0
    if t > T - f * w:
        return v1
    return v1 + (v0 - v1) * (1 - (t - i * w) / (T - (i + f) * w)) ** 3


@pytest.mark.parametrize("v0, v1", [(1.0, 0.15), (0.0, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("T, w, i, f", CASES)
def test_threshold_and_lambda(T, w, i, f, v0, v1):
    steps = range(T + 1) if T < 1000 else range(0, T + 1, 97)
    for t in steps:
        threshold, penalty = schedule_threshold(t, T, w, v0, v1, i, f, final_lambda=400.0)
        expected = float(cubic(t, T, w, v0, v1, i, f))
        assert threshold == pytest.approx(expected, abs=1e-12)
        if v1:
            assert penalty == pytest.approx(400.0 * expected / v1, abs=1e-9)


@pytest.mark.parametrize("v0, v1", [(1.0, 0.15), (0.0, 0.1)])
@pytest.mark.parametrize("T, w, i, f", CASES)
def test_threshold_is_monotone_without_jumps(T, w, i, f, v0, v1):
    values = [schedule_threshold(t, T, w, v0, v1, i, f, 0.0)[0] for t in range(T + 1)]
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert all(step * (v1 - v0) >= 0 for step in steps)
    assert (
        max(map(abs, steps)) <= 3 * abs(v1 - v0) / (T - (i + f) * w) + 1e-12
    )  # the cubic's steepest slope
    assert values[0] == v0 and values[-1] == pytest.approx(v1, abs=1e-12)


def test_plateaus_have_the_lengths_asked_for():
    values = [schedule_threshold(t, 100, 10, 1.0, 0.2, 1, 2, 0.0)[0] for t in range(100)]
    assert [t for t in range(100) if values[t] == 1.0] == list(range(11))
    assert [t for t in range(100) if values[t] == 0.2] == list(range(80, 100))


def test_step_is_the_only_state():
    assert schedule_threshold(30, 100, 10, 1.0, 0.2, 1, 2, 5.0) == schedule_threshold(
        30, 100, 10, 1.0, 0.2, 1, 2, 5.0
    )


@pytest.mark.parametrize(
    "i, f", [(1, 2), (0, 1), (1, 0), (0.5, 1.5), (0.1, 0.2), (2.5, 0.7), (1, 1 / 3)]
)
@pytest.mark.parametrize("T", [1, 2, 3, 10, 12, 30, 99, 5475])
def test_overlap_names_the_largest_warmup_that_fits(T, i, f):
    for w in {0, 1, 2, 3, 5, 10, 33, T // 3, T // 2, T}:
        problem = plateaus_overlap(T, w, i, f)
        assert (problem is not None) == (T <= (i + f) * w)
        if problem:
            largest = int(re.search(r"warmup_steps (\d+) or less", problem).group(1))
            assert T > (i + f) * largest
            assert T <= (i + f) * (largest + 1)
            assert plateaus_overlap(T, largest, i, f) is None
            assert plateaus_overlap(T, largest + 1, i, f) is not None


def test_overlap_names_all_values():
    problem = plateaus_overlap(100, 77, 1.5, 2)
    assert all(value in problem for value in ("100", "77", "1.5", "2 *", "28"))
    assert "--warmup_ratio below 1/3.5" in problem


def test_no_plateaus_never_overlap():
    assert plateaus_overlap(10, 1000, 0, 0) is None
    assert plateaus_overlap(10, 0, 1, 2) is None


@pytest.mark.parametrize("T, w", [(100, 10), (100, 0), (7, 7), (5, 10), (1, 0)])
def test_learning_rate_warms_up_and_decays(T, w):
    for t in range(T + 1):
        expected = t / w if t < w else max(0.0, (T - t) / (T - w)) if T > w else 0.0
        assert learning_rate_factor(t, T, w) == pytest.approx(expected)
    if w < T:
        assert learning_rate_factor(w, T, w) == 1.0 and learning_rate_factor(T, T, w) == 0.0


class Scores:
    """Scores under Adam: noise, a penalty that pushes them down, and a pull, weak once pruned."""

    def __init__(self, size=4000):
        self.rng = np.random.default_rng(0)
        self.pull = np.exp(-4 + 1.1 * self.rng.normal(size=size))
        self.scores, self.mean, self.square = (np.zeros(size) for _ in range(3))
        self.step = 0

    def move(self, weight, rate, cut):
        sigmoid = 1 / (1 + np.exp(-self.scores))
        push = 1.3e-3 * weight * sigmoid * (1 - sigmoid)
        gradient = (
            push
            - self.pull * np.where(self.scores > cut, 1.0, 0.05)
            + 0.25 * self.rng.normal(size=len(push))
        )
        self.step += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.step), self.square / (1 - 0.999**self.step)
        self.scores -= rate * mean / (np.sqrt(square) + 1e-8)


@pytest.mark.parametrize("target", [0.03, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("start", [1.0, 0.1, 4.0])
def test_steering_ends_at_its_target(target, start):
    """Wherever lambda starts, within 2% of the target; a constant one ends elsewhere."""
    total, warmup, cut, rate = 2000, 200, math.log(0.1 / 0.9), 3e-2
    steered, constant = Scores(), Scores()
    steering = LambdaSteering(
        target,
        0.0,
        cut,
        warmup,
        total - 4 * warmup,
        total,
        start * METHODS["sigmoied_threshold"].usual_lambda(target),
    )
    for step in range(total):
        threshold, ramp = schedule_threshold(step, total, warmup, 0.0, 0.1, 1, 4, 1.0)
        now = math.log(threshold / (1 - threshold)) if threshold else -math.inf
        factor = rate * learning_rate_factor(step, total, warmup)
        weight = ramp * steering.steer(step, np.mean(steered.scores > steering.reference(step)))
        steered.move(weight, factor, now)
        constant.move(ramp * steering.first_lambda, factor, now)
    assert np.mean(steered.scores > cut) == pytest.approx(target, rel=0.02)
    assert np.mean(constant.scores > cut) != pytest.approx(target, rel=0.02)


def test_steering_rests_until_the_threshold_moves_and_stays_in_bounds():
    steering = LambdaSteering(0.1, 0.0, -2.0, 10, 60, 100, 100.0)
    assert [steering.steer(step, 1.0) for step in (0, 5, 10)] == [
        100.0
    ] * 3 and steering.integral == 0.0
    assert (
        steering.reference(10) == 0.0 and steering.reference(60) == steering.reference(99) == -2.0
    )
    assert steering.reference(35) == pytest.approx(-2.0 * (1 - 0.5**3))
    values = [steering.steer(step, 1.0) for step in range(11, 100)]
    assert values == sorted(values) and values[-1] == pytest.approx(100.0 * 100)
    values = [steering.steer(99, 0.0) for _ in range(100)]
    assert values[-1] == pytest.approx(100.0 / 100)
    assert LambdaSteering(0.1, 0.0, -2.0, 0, 0, 1, 5.0).steer(1, 0.1) == pytest.approx(5.0)


@pytest.mark.parametrize(
    "method, remaining, published",
    [
        ("sigmoied_threshold", 0.139, 500),
        ("sigmoied_threshold", 0.040, 1100),
        ("sigmoied_threshold", 0.0256, 1400),
        ("l0", 0.148, 100),
        ("l0", 0.061, 300),
    ],
)
def test_where_steering_begins_is_near_the_paper(method, remaining, published):
    assert METHODS[method].usual_lambda(remaining) == pytest.approx(published, rel=0.15)


# ---- cycles


@pytest.mark.parametrize("cycles", [2, 3, 5, 8])
def test_cycles_cut_as_each_begins(cycles):
    total = 1003
    schedule = Schedule(total, 20, 1.0, 0.03, 1, 2, 0.0, cycles=cycles, first_cut=0.3)
    thresholds = [schedule.threshold(step)[0] for step in range(total + 1)]
    steps = [step for step in range(1, total) if thresholds[step] != thresholds[step - 1]]
    assert steps == [-(-total * cycle // cycles) for cycle in range(1, cycles)]
    assert thresholds[0] == 1.0 and thresholds[-1] == pytest.approx(0.03)
    assert thresholds[steps[0]] == pytest.approx(0.3 if cycles > 2 else 0.03)
    assert thresholds == sorted(thresholds, reverse=True)
    rates = [schedule.learning_rate(step) for step in range(total)]
    assert rates[0] == 0 and rates[10] == 0.5
    for step in steps:
        assert rates[step] > 0.99 and rates[step - 1] < 0.12  # rewound
    assert rates[-1] == pytest.approx(0.1, abs=0.01) and min(rates[20:]) >= 0.1


def test_one_cycle_is_the_schedule_of_the_paper():
    schedule = Schedule(1000, 100, 1.0, 0.1, 1, 2, 5.0)
    for step in range(0, 1001, 50):
        wanted = schedule_threshold(step, 1000, 100, 1.0, 0.1, 1, 2, 5.0)
        assert schedule.threshold(step) == wanted
