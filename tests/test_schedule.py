"""Schedules against the formulas of the paper, written out."""

import itertools
import re
from fractions import Fraction

import pytest

from emmental.schedule import learning_rate_factor, plateaus_overlap, schedule_threshold

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
    assert max(map(abs, steps)) <= 3 * abs(v1 - v0) / (T - (i + f) * w) + 1e-12  # the cubic's steepest slope
    assert values[0] == v0 and values[-1] == pytest.approx(v1, abs=1e-12)


def test_plateaus_have_the_lengths_asked_for():
    values = [schedule_threshold(t, 100, 10, 1.0, 0.2, 1, 2, 0.0)[0] for t in range(100)]
    assert [t for t in range(100) if values[t] == 1.0] == list(range(11))
    assert [t for t in range(100) if values[t] == 0.2] == list(range(80, 100))


def test_step_is_the_only_state():
    assert schedule_threshold(30, 100, 10, 1.0, 0.2, 1, 2, 5.0) == schedule_threshold(30, 100, 10, 1.0, 0.2, 1, 2, 5.0)


@pytest.mark.parametrize("i, f", [(1, 2), (0, 1), (1, 0), (0.5, 1.5), (0.1, 0.2), (2.5, 0.7), (1, 1 / 3)])
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
