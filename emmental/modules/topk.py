"""Exact selections: masks of the k largest entries, and of the entries above a cut-off.

A mask keeps the entries that pass one cut-off. The cut-off of a top-k mask comes from a selection, not a sort: the
order of the other entries is never needed, and on a CPU a sample tells which few entries can be the k-th at all.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

MIN_REMAINING = 0.005  # a thresholded matrix never loses more than 99.5% of its entries
SAMPLED_SIZE = 100_000  # entries from which on a sample narrows a selection down
SAMPLE_STRIDE = 61  # a prime, so that a sample meets every column


def keep_largest(values: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Boolean masks with exactly `counts[i]` ones on the largest entries of `values[i]` (any shape).

    Among equal entries the first in row-major order are kept, so the choice is deterministic.
    """
    if all(value.device.type == "cpu" for value in values):
        vectors = map(_as_vector, values)
        threads = min(torch.get_num_threads(), len(values))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:  # NumPy releases the interpreter while it works
                kept = list(pool.map(_keep_largest, vectors, counts))
        else:
            kept = list(map(_keep_largest, vectors, counts))
        return [torch.from_numpy(mask).view(value.shape) for mask, value in zip(kept, values, strict=True)]
    values = [value.detach() for value in values]
    cutoffs = _kth_largest(values, counts)
    masks = [(value >= cutoff).contiguous() for value, cutoff in zip(values, cutoffs, strict=True)]
    for value, cutoff, mask, count, ones in zip(values, cutoffs, masks, counts, count_ones(masks), strict=True):
        if ones > count:
            tied = (value == cutoff).reshape(-1).nonzero().squeeze(1)
            mask.view(-1)[tied[len(tied) - (ones - count) :]] = False
    return masks


def keep_largest_together(
    values: list[Tensor], sizes: list[int], fraction: float, cutoff: float | None = None
) -> tuple[list[Tensor], float]:
    """Masks of all matrices ranked together, each with the floor, and the cut-off.

    An entry of `values[i]` stands for `sizes[i]` weights; `fraction`, in [0, 1], of all weights are kept. With a
    `cutoff` found earlier, the entries at or above it are kept instead: about, not exactly, the fraction.
    """
    if cutoff is not None:
        return keep_floor(values, [value.detach() >= cutoff for value in values]), cutoff
    everything = torch.cat([value.detach().reshape(-1) for value in values])
    if len(set(sizes)) == 1:
        kept = keep_largest([everything], [int(fraction * everything.numel())])[0]
    else:
        order = everything.argsort(descending=True, stable=True)
        numels = torch.tensor([value.numel() for value in values], device=order.device)
        weights = torch.tensor(sizes, device=order.device).repeat_interleave(numels)[order].cumsum(0)
        kept = torch.zeros_like(everything, dtype=torch.bool)
        kept[order[weights <= int(fraction * weights[-1])]] = True
    cutoff = everything.masked_fill_(~kept, torch.inf).min().item()  # the smallest of those that are kept
    parts = kept.split([value.numel() for value in values])
    return keep_floor(values, [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]), cutoff


def keep_above(values: list[Tensor], cutoff: float) -> list[Tensor]:
    """Boolean masks of the entries above `cutoff`, with the floor."""
    return keep_floor(values, [value.detach() > cutoff for value in values])


def keep_floor(values: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Replace masks that keep fewer than `floor_count(n)` entries by those of the top `floor_count(n)`."""
    short = [i for i, ones in enumerate(count_ones(masks)) if ones < floor_count(values[i].numel())]
    if short:
        floors = keep_largest([values[i] for i in short], [floor_count(values[i].numel()) for i in short])
        for i, mask in zip(short, floors, strict=True):
            masks[i] = mask
    return masks


def floor_count(numel: int) -> int:
    """The fewest entries that a thresholded matrix of `numel` entries keeps."""
    return int(MIN_REMAINING * numel) + 1


def count_ones(masks: list[Tensor]) -> list[int]:
    """How many entries of each mask are not zero."""
    if all(mask.device.type == "cpu" for mask in masks):
        return [int(np.count_nonzero(mask.numpy())) for mask in masks]
    return torch.stack([mask.count_nonzero() for mask in masks]).tolist()  # one synchronisation for all


def _as_vector(value: Tensor) -> np.ndarray:
    """Entries of a CPU tensor in row-major order; float32 at least, as NumPy knows no bfloat16."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32)).reshape(-1).numpy()


def _keep_largest(values: np.ndarray, count: int) -> np.ndarray:
    """Boolean mask of the `count` largest entries of a vector; of equal ones, the first.

    Two order statistics of a sample almost surely enclose the last entry to be kept: what lies above them stays,
    and only what lies between them is partitioned. Where they do not enclose it (values that follow their position,
    NaNs), the whole vector is partitioned.
    """
    if not 0 < count < values.size:
        return np.full(values.size, count > 0)
    mask, open_places, missing = np.zeros(values.size, bool), slice(None), count
    if values.size >= SAMPLED_SIZE:
        low, high = _enclose(values, count)
        above = values > high
        between = np.flatnonzero((values >= low) ^ above)
        missing_above = count - np.count_nonzero(above)
        if 0 < missing_above <= between.size:
            mask, open_places, missing = above, between, missing_above
    contenders = values[open_places]
    place = contenders.size - missing
    cutoff = np.partition(contenders, place)[place]
    chosen = contenders >= cutoff
    if (surplus := np.count_nonzero(chosen) - missing) > 0:
        chosen[np.flatnonzero(contenders == cutoff)[-surplus:]] = False
    mask[open_places] = chosen
    return mask


def _enclose(values: np.ndarray, count: int) -> tuple[np.floating, np.floating]:
    """Two values between which the `count`-th largest lies, if the sample is like the whole."""
    sample = values[::SAMPLE_STRIDE].copy()
    expected = sample.size * (1 - count / values.size)
    margin = 4 * math.sqrt(expected * count / values.size) + 2  # four standard deviations
    low, high = max(0, int(expected - margin)), min(sample.size - 1, int(expected + margin))
    sample.partition((low, high))
    return sample[low], sample[high]


def _kth_largest(values: list[Tensor], counts: list[int]) -> list[Tensor]:
    """The `counts[i]`-th largest entry of `values[i]`, as scalar tensors: +inf for 0, -inf for all entries.

    Matrices of one size are stacked, so that one call selects in all of them: alone, each would occupy
    one multiprocessor of a GPU.
    """
    cutoffs: list[Tensor | None] = [None] * len(values)
    by_size: dict[tuple, list[int]] = {}
    for i, (value, count) in enumerate(zip(values, counts, strict=True)):
        if 0 < count < value.numel():
            by_size.setdefault((value.numel(), count), []).append(i)
        else:
            cutoffs[i] = torch.tensor(torch.inf if count <= 0 else -torch.inf, dtype=value.dtype, device=value.device)
    for (size, count), members in by_size.items():
        stacked = torch.stack([values[i].reshape(-1) for i in members])
        selected = torch.kthvalue(stacked, size - count + 1, dim=1).values
        for i, kth in zip(members, selected, strict=True):
            cutoffs[i] = kth
    return cutoffs
