"""Heads and neurons within a time: the best choice, by trying all; whole sublayers may go."""

import itertools

import numpy as np
import pytest
import torch

from emmental.modules.budget import cost_table, keep_within_time

TIMES = {"heads": [[0, 1, 4], [0.0, 20.0, 50.0]], "neurons": [[0, 8], [0.0, 40.0]]}


def time_of(masks, kinds, times=TIMES):
    sizes = [int(mask.sum()) for mask in masks]
    return sum(np.interp(size, *times[kind]) for size, kind in zip(sizes, kinds))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.2])
def test_no_choice_of_sizes_is_much_better(seed, fraction):
    """The multiplier finds the best sums of scores, but for what one layer may add."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ["heads", "neurons", "heads", "neurons"]
    scores = [torch.rand({"heads": 4, "neurons": 8}[kind], generator=generator) for kind in kinds]
    masks = keep_within_time(scores, [1] * 4, kinds, TIMES, fraction)
    budget = fraction * (2 * 50.0 + 2 * 40.0)
    assert time_of(masks, kinds) <= budget * (1 + 1e-6)
    value = sum(float(score[mask].sum()) for score, mask in zip(scores, masks))
    for score, mask in zip(scores, masks):
        if mask.any() and not mask.all():
            assert score[mask].min() >= score[~mask].max()
    best = 0.0
    for sizes in itertools.product(*(range(len(score) + 1) for score in scores)):
        if sum(np.interp(n, *TIMES[kind]) for n, kind in zip(sizes, kinds)) <= budget:
            kept = (score.sort(descending=True).values[:n] for score, n in zip(scores, sizes))
            best = max(best, sum(float(values.sum()) for values in kept))
    assert value >= best - max(float(score.max()) for score in scores) * 2


def test_a_layer_that_is_worth_nothing_goes_whole():
    scores = [torch.tensor([5.0, 4.0, 3.0, 2.0]), torch.tensor([0.3, 0.1, 0.1, 0.0])]
    masks = keep_within_time(scores, [1, 1], ["heads", "heads"], TIMES, 0.5)
    assert masks[0].all() and not masks[1].any()


def test_neurons_pay_for_their_time():
    """Equal scores: what costs less for a weight stays."""
    times = {"heads": [[0, 4], [0.0, 80.0]], "neurons": [[0, 8], [0.0, 8.0]]}
    scores, kinds = [torch.ones(4), torch.ones(8)], ["heads", "neurons"]
    heads, neurons = keep_within_time(scores, [1, 1], kinds, times, 0.1)
    assert not heads.any() and neurons.all()
    heads, neurons = keep_within_time(scores, [64, 1], kinds, times, 0.91)
    assert heads.all() and not neurons.any()  # 64 weights for 20 microseconds, and 1 for 1


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_the_time_is_used(fraction, shift):
    """Also of scores that are negative, or all alike."""
    generator = torch.Generator().manual_seed(3)
    kinds = ["heads", "neurons"] * 6
    times = {"heads": [[0, 12], [0.0, 120.0]], "neurons": [[0, 64], [0.0, 64.0]]}
    for spread in (1.0, 0.0):
        scores = [
            torch.rand({"heads": 12, "neurons": 64}[kind], generator=generator) * spread + shift
            for kind in kinds
        ]
        masks = keep_within_time(scores, [1] * 12, kinds, times, fraction)
        used = time_of(masks, kinds, times) / (6 * 184.0)
        assert fraction - 10.0 / (6 * 184.0) - 1e-9 <= used <= fraction + 1e-6
        assert [mask.shape for mask in masks] == [score.shape for score in scores]


def test_more_never_costs_less():
    noisy = cost_table([[0, 2, 4], [1.0, 5.0, 4.0]], 4)
    assert noisy.tolist() == [0.0, 2.0, 4.0, 4.0, 4.0]
