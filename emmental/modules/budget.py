"""Choose heads and neurons within a time: the highest scores for what they cost."""

import numpy as np
import torch
from torch import Tensor

Times = dict[str, list[list[float]]]  # by "heads" and "neurons": numbers, and microseconds


def keep_within_time(
    scores: list[Tensor], sizes: list[int], kinds: list[str], times: Times, fraction: float
) -> list[Tensor]:
    """Boolean masks that keep the heads and neurons for which a fraction of the time suffices.

    scores: one-dimensional tensors, each for the heads, or the neurons, of a layer. sizes: for each
    tensor, the weights that a score stands for; the score counts for every weight, as with
    `--global_topk`. kinds: "heads" or "neurons", for each tensor. times: the time of a layer with
    so many heads or neurons, interpolated. fraction: in [0, 1], of the time with nothing pruned.

    A microsecond has a price. At a price, a layer keeps the n highest scores for which
    sum(scores) - price * time(n) is largest: a layer loses all scores if together they are not
    worth what the first one costs. The price is the lowest for which the time suffices, the
    Lagrange multiplier of the knapsack problem. The time that is then left goes to the first layer
    that would keep more at a lower price. If scores are negative, the lowest one counts as 0.
    """
    ranked = [score.detach().double().cpu().sort(descending=True, stable=True) for score in scores]
    sums = _gains([values.numpy() for values, _ in ranked], sizes)
    costs = [cost_table(times[kind], len(total) - 1) for kind, total in zip(kinds, sums)]
    budget = fraction * sum(cost[-1] for cost in costs) * (1 + 1e-9)
    masks = []
    for score, (_, order), size in zip(scores, ranked, _sizes(sums, costs, budget)):
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:size]] = True
        masks.append(mask.to(score.device))
    return masks


def cost_table(times: list[list[float]], most: int) -> np.ndarray:
    """The microseconds of 0 to `most` heads or neurons of a layer. More never take less."""
    counts, microseconds = times
    table = np.interp(np.arange(most + 1), counts, microseconds)
    return np.maximum.accumulate(table - table[0])


def _gains(ranked: list[np.ndarray], sizes: list[int]) -> list[np.ndarray]:
    """What the n highest scores of each layer are worth, for n = 0, 1, ..."""
    low = min(values[-1] for values in ranked)
    high = max(values[0] for values in ranked)
    if low == high:  # nothing is known yet: all are worth the same
        ranked, low = [np.ones_like(values) for values in ranked], 0.0
    worth = [size * np.cumsum(values - min(low, 0.0)) for values, size in zip(ranked, sizes)]
    return [np.concatenate([[0.0], values]) for values in worth]


def _sizes(sums: list[np.ndarray], costs: list[np.ndarray], budget: float) -> list[int]:
    """How many each layer keeps."""

    def at(price: float) -> list[int]:
        return [int(np.argmax(total - price * cost)) for total, cost in zip(sums, costs)]

    def time(sizes: list[int]) -> float:
        return sum(cost[size] for cost, size in zip(costs, sizes))

    everything = [len(total) - 1 for total in sums]
    if time(everything) <= budget:
        return everything
    low, high = 0.0, 1.0
    while time(at(high)) > budget:
        low, high = high, 2 * high
    middle = high / 2
    while low < middle < high:
        low, high = (low, middle) if time(at(middle)) <= budget else (middle, high)
        middle = (low + high) / 2
    sizes, more = at(high), at(low)
    for place, cost in enumerate(costs):
        left = budget - time(sizes) + cost[sizes[place]]
        affordable = int(np.searchsorted(cost, left, side="right")) - 1
        sizes[place] = max(sizes[place], min(more[place], affordable))
    return sizes
