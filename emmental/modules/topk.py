"""Exact masks of the k largest entries, and of the entries above a cut-off."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .lists import by_stack, stacks, together
from .selection import largest_in_rows, select_largest

MIN_REMAINING = 0.005  # the floor: a threshold removes at most 99.5% of a matrix


def keep_largest(values: list[Tensor], counts: list[int], absolute: bool = False) -> list[Tensor]:
    """Boolean masks with exactly `counts[i]` ones on the largest (absolute) entries of `values[i]`.

    Among equal entries, the first in row-major order are kept. Tensors of one size have one count.
    """
    if not values or not together(values[0]):
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # NumPy releases the GIL
            return list(pool.map(select_largest, values, counts, itertools.repeat(absolute)))
    by_numel = {value.numel(): count for value, count in zip(values, counts, strict=True)}

    def select(rows: Tensor) -> Tensor:
        return largest_in_rows(rows.abs_() if absolute else rows, by_numel[rows.shape[1]])

    return by_stack(select, [value.detach() for value in values])


def keep_largest_together(
    values: list[Tensor], sizes: list[int], fraction: float, cutoff: float | None = None
) -> tuple[list[Tensor], float]:
    """Masks of all matrices ranked together, with the floor, and the lowest kept value.

    An entry of `values[i]` stands for `sizes[i]` weights. The first entries with `fraction`, in
    [0, 1], of all weights are kept; or, with a `cutoff` of an earlier call, those at or above it.
    Where the floor binds, more entries are kept.
    """
    if cutoff is not None:
        return keep_above(values, cutoff, torch.ge), cutoff
    everything = torch.cat([value.detach().reshape(-1) for value in values])
    numels = [value.numel() for value in values]
    if len(set(sizes)) == 1:
        kept = keep_largest([everything], [int(fraction * everything.numel())])[0]
    else:
        order = everything.argsort(descending=True, stable=True)
        weights = torch.tensor(sizes).repeat_interleave(torch.tensor(numels)).to(order.device)
        weights = weights[order].cumsum(0)
        kept = torch.zeros_like(everything, dtype=torch.bool)
        kept[order[weights <= int(fraction * weights[-1])]] = True
    cutoff = everything.masked_fill_(~kept, torch.inf).min().item()
    masks = [part.reshape(x.shape) for part, x in zip(kept.split(numels), values, strict=True)]
    return keep_floor(values, masks), cutoff


def keep_above(
    values: list[Tensor], cutoff: float, compare: Callable[..., Tensor] = torch.gt
) -> list[Tensor]:
    """Boolean masks of the entries above `cutoff` (with `torch.ge`: or at it), with the floor."""
    values = [value.detach() for value in values]
    if not values or not together(values[0]):
        return keep_floor(values, [compare(value, cutoff) for value in values])

    def select(rows: Tensor) -> Tensor:  # always with the floor: to count would be to wait
        floor = largest_in_rows(rows, floor_count(rows.shape[1]))
        return compare(rows, cutoff).logical_or_(floor)

    return by_stack(select, values)


def keep_floor(values: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Replace each mask with fewer than `floor_count(n)` ones by a mask of the largest entries."""
    floors = [floor_count(value.numel()) for value in values]
    short = [i for i, ones in enumerate(count_ones(masks)) if ones < floors[i]]
    largest = keep_largest([values[i] for i in short], [floors[i] for i in short])
    for i, mask in zip(short, largest, strict=True):
        masks[i] = mask
    return masks


def floor_count(numel: int) -> int:
    """The fewest entries that a threshold keeps of a matrix of `numel` entries."""
    return int(MIN_REMAINING * numel) + 1


def count_ones(masks: list[Tensor]) -> list[int]:
    """How many entries of each mask are not zero."""
    if not masks or not together(masks[0]):
        return [int(np.count_nonzero(mask.numpy())) for mask in masks]
    places, rows = zip(*stacks(masks), strict=True)
    ones = torch.cat([stack.count_nonzero(1) for stack in rows]).tolist()  # one synchronization
    by_place = dict(zip(itertools.chain(*places), ones, strict=True))
    return [by_place[place] for place in range(len(masks))]
