"""Find the k largest entries, fast.

On a CPU, a sample narrows down which entries can be the k-th largest. On a GPU, one call selects in
all matrices of the same size.
"""

import math

import numpy as np
import torch
from torch import Tensor

SAMPLED_SIZE = 100_000  # the fewest entries for which sampling is faster
SAMPLE_STRIDE = 61  # a prime, so that a sample has entries of every column


def select_largest(value: Tensor, count: int, absolute: bool = False) -> Tensor:
    """Boolean mask of the `count` largest (absolute) entries of a CPU tensor, first ones first."""
    dtype = torch.promote_types(value.dtype, torch.float32)  # NumPy has no bfloat16
    vector = np.from_dlpack(value.detach().to(dtype).reshape(-1))  # numpy() would pin FSDP's memory
    vector = np.abs(vector) if absolute else vector
    return torch.from_numpy(_select_largest(vector, count)).view(value.shape)


def _select_largest(values: np.ndarray, count: int) -> np.ndarray:
    """Boolean mask of the `count` largest entries of a vector; among equal ones, the first.

    Two order statistics of a sample almost surely enclose the `count`-th largest entry. Entries
    above them are kept, and only those between them are partitioned. If they do not enclose it
    (values that depend on their position, NaNs), the whole vector is partitioned.
    """
    if not 0 < count < values.size:
        return np.full(values.size, count > 0)
    mask, places, missing = np.zeros(values.size, bool), slice(None), count
    if values.size >= SAMPLED_SIZE:
        low, high = _enclose(values, count)
        above = values > high
        between = np.flatnonzero((values >= low) ^ above)
        missing_above = count - np.count_nonzero(above)
        if 0 < missing_above <= between.size:
            mask, places, missing = above, between, missing_above
    candidates = values[places]
    place = candidates.size - missing
    cutoff = np.partition(candidates, place)[place]
    chosen = candidates >= cutoff
    if (surplus := np.count_nonzero(chosen) - missing) > 0:
        chosen[np.flatnonzero(candidates == cutoff)[-surplus:]] = False
    mask[places] = chosen
    return mask


def _enclose(values: np.ndarray, count: int) -> tuple[np.floating, np.floating]:
    """Two entries of a sample, almost surely below and above the `count`-th largest value."""
    sample = values[::SAMPLE_STRIDE].copy()
    expected = sample.size * (1 - count / values.size)
    margin = 4 * math.sqrt(expected * count / values.size) + 2  # four standard deviations
    low, high = max(0, int(expected - margin)), min(sample.size - 1, int(expected + margin))
    sample.partition((low, high))
    return sample[low], sample[high]


def kth_largest(values: list[Tensor], counts: list[int]) -> list[Tensor]:
    """The `counts[i]`-th largest entry of `values[i]`: +inf for 0, -inf for all entries."""
    cutoffs = [value.new_tensor(-torch.inf if n else torch.inf) for value, n in zip(values, counts)]
    by_size: dict[tuple, list[int]] = {}
    for i, (value, count) in enumerate(zip(values, counts, strict=True)):
        if 0 < count < value.numel():
            by_size.setdefault((value.numel(), count), []).append(i)
    for (size, count), members in by_size.items():  # one matrix uses only a small part of a GPU
        stacked = torch.stack([values[i].reshape(-1) for i in members])
        selected = torch.kthvalue(stacked, size - count + 1, dim=1).values
        for i, kth in zip(members, selected, strict=True):
            cutoffs[i] = kth
    return cutoffs
