"""Find the k largest entries, fast: on a CPU in one vector, on a GPU in the rows of a matrix.

Both narrow down, by a sample, which entries of a long vector can be the k-th largest. Rows of a few
million entries are left to `torch.topk`, which gives several blocks of a GPU to each row.
`benchmarks/selection.py` compares the candidates.
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
    above the two are kept, and only those between are partitioned. Where the two do not enclose the
    `count`-th (values that depend on their position, NaNs), the whole vector is partitioned.
    """
    if not 0 < count < values.size:
        return np.full(values.size, count > 0)
    mask, places, missing = np.zeros(values.size, bool), slice(None), count
    if values.size >= SAMPLED_SIZE:
        sample = values[::SAMPLE_STRIDE].copy()
        ranks = _enclosing_ranks(sample.size, 1 - count / values.size)
        sample.partition(ranks)
        low, high = sample[ranks[0]], sample[ranks[1]]
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


def _enclosing_ranks(size: int, fraction: float) -> tuple[int, int]:
    """Places in a sorted sample, almost surely below and above this quantile of all entries."""
    expected = size * fraction
    margin = 4 * math.sqrt(expected * (1 - fraction)) + 2  # four standard deviations
    return max(0, int(expected - margin)), min(size - 1, int(expected + margin))


def largest_in_rows(rows: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` largest entries of each row, of equal ones the first.

    Only rows too long for `torch.topk` make the host wait for a GPU.
    """
    if not 0 < count < rows.shape[1]:
        return torch.full_like(rows, count > 0, dtype=torch.bool)
    kth = kth_largest(rows, count)
    above, equal = rows > kth, rows == kth
    missing = count - above.sum(1, keepdim=True)
    return above.logical_or_(equal.logical_and_(equal.cumsum(1, dtype=torch.int32) <= missing))


def kth_largest(rows: Tensor, count: int) -> Tensor:
    """The `count`-th largest entry of each row, of shape (rows, 1); 0 < count < entries."""
    if len(rows) == 1 and rows.shape[1] >= SAMPLED_SIZE:  # one row alone would be sorted whole
        return _kth_of_a_long_row(rows[0], count).reshape(1, 1)
    rest = rows.shape[1] - count + 1
    if count <= rest:
        return rows.topk(count, sorted=False).values.amin(1, keepdim=True)
    return rows.topk(rest, largest=False, sorted=False).values.amax(1, keepdim=True)


def _kth_of_a_long_row(values: Tensor, count: int) -> Tensor:
    sample = values[::SAMPLE_STRIDE].sort().values
    low, high = sample[list(_enclosing_ranks(len(sample), 1 - count / len(values)))]
    candidates = values[(values >= low) & (values <= high)]
    rank = count - int((values > high).sum())
    if not 0 < rank <= len(candidates):
        candidates, rank = values, count
    return candidates.sort(descending=True).values[rank - 1]
