"""Binarizers: from scores (or weights) to 0/1 masks, with straight-through gradients.

A mask keeps the entries of a matrix that pass one cut-off: the k-th largest score (movement pruning),
the k-th largest magnitude (magnitude pruning), the threshold itself, or its logit (soft movement).
The cut-off of a top-k mask comes from a selection, not a sort: the n log n order of the other entries
is never needed, and on a CPU a sample tells which few entries can be the k-th at all. Masks are not differentiable; the gradient passes "straight through" to the scores,
as if the mask were the scores themselves (paper, section 4; Bengio et al. 2013).

Thresholds are fractions in [0, 1], never percentages, except for the plain `threshold` method, whose
threshold lives on the scale of the scores.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

MIN_REMAINING = 0.005  # a thresholded matrix never loses more than 99.5% of its weights
SAMPLED_SIZE = 100_000  # entries from which on a sample narrows a selection down
SAMPLE_STRIDE = 61  # a prime, so that a sample meets every column


def keep_largest(values: list[Tensor], counts: list[int], absolute: bool = False) -> list[Tensor]:
    """Boolean masks with exactly `counts[i]` ones on the largest entries of `values[i]` (any shape).

    absolute: rank by absolute value. Among equal entries the first in row-major order are kept, so the
    choice is deterministic.
    """
    if all(value.device.type == "cpu" for value in values):
        vectors, absolutes = map(_as_vector, values), itertools.repeat(absolute)
        threads = min(torch.get_num_threads(), len(values))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:  # NumPy lets go of the interpreter while it works
                kept = list(pool.map(_keep_largest, vectors, counts, absolutes))
        else:
            kept = list(map(_keep_largest, vectors, counts, absolutes))
        return [torch.from_numpy(mask).view(value.shape) for mask, value in zip(kept, values, strict=True)]
    values = [value.detach().abs() if absolute else value.detach() for value in values]
    cutoffs = _kth_largest(values, counts)
    masks = [(value >= cutoff).contiguous() for value, cutoff in zip(values, cutoffs, strict=True)]
    for value, cutoff, mask, count, ones in zip(values, cutoffs, masks, counts, _count_ones(masks), strict=True):
        if ones > count:
            tied = (value == cutoff).reshape(-1).nonzero().squeeze(1)
            mask.view(-1)[tied[len(tied) - (ones - count) :]] = False
    return masks


def _as_vector(value: Tensor) -> np.ndarray:
    """Entries of a CPU tensor in row-major order; float32 at least, as NumPy knows no bfloat16."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32)).reshape(-1).numpy()


def _keep_largest(values: np.ndarray, count: int, absolute: bool) -> np.ndarray:
    """Boolean mask of the `count` largest (absolute) entries of a vector; of equal ones, the first.

    Two order statistics of a sample enclose the last entry to be kept, almost surely: what lies above them
    stays, and only what lies between them is partitioned. Where they do not enclose it (values that follow
    their position, NaNs), everything is.
    """
    if not 0 < count < values.size:
        return np.full(values.size, count > 0)
    if absolute:
        values = np.abs(values)
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


def _count_ones(masks: list[Tensor]) -> list[int]:
    if all(mask.device.type == "cpu" for mask in masks):
        return [np.count_nonzero(mask.numpy()) for mask in masks]
    return torch.stack([mask.count_nonzero() for mask in masks]).tolist()  # one synchronisation for all


def above_threshold(values: list[Tensor], cutoff: float, *, inclusive: bool = False) -> list[Tensor]:
    """Boolean masks of the entries above `cutoff`, but of at least `int(0.005 * n) + 1` per matrix."""
    compare = torch.ge if inclusive else torch.gt
    return keep_floor(values, [compare(value.detach(), cutoff) for value in values])


def keep_floor(values: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Replace masks that keep fewer than `floor_count(n)` entries by the top `floor_count(n)` ones."""
    short = [i for i, ones in enumerate(_count_ones(masks)) if ones < floor_count(values[i].numel())]
    if short:
        floors = keep_largest([values[i] for i in short], [floor_count(values[i].numel()) for i in short])
        for i, mask in zip(short, floors, strict=True):
            masks[i] = mask
    return masks


def floor_count(numel: int) -> int:
    """Entries that a thresholded matrix of `numel` entries keeps at least."""
    return int(MIN_REMAINING * numel) + 1


def logit(threshold: float) -> float:
    """Inverse of the sigmoid; -inf at 0 and +inf at 1."""
    if threshold <= 0.0:
        return -math.inf
    if threshold >= 1.0:
        return math.inf
    return math.log(threshold) - math.log1p(-threshold)


def check_fraction(threshold: float) -> float:
    """`threshold` as a float. Raises ValueError outside [0, 1]."""
    threshold = float(threshold)
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"the threshold is a fraction of weights and must lie in [0, 1], got {threshold}")
    return threshold


class TopKBinarizer(torch.autograd.Function):
    """Mask of movement pruning: ones on the `int(threshold * n)` largest scores (paper, eq. 2).

    `TopKBinarizer.apply(scores, threshold)` returns a mask of the shape and dtype of `scores` with
    exactly that many ones, also when scores tie. Its gradient goes straight through to `scores`.
    Raises ValueError for a threshold outside [0, 1].
    """

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: float) -> Tensor:
        count = int(check_fraction(threshold) * scores.numel())
        return keep_largest([scores], [count])[0].to(scores.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


class ThresholdBinarizer(torch.autograd.Function):
    """Mask of soft movement pruning: ones where `scores > threshold` (paper, section 4.2).

    `ThresholdBinarizer.apply(scores, threshold, sigmoid)` compares sigmoid(scores) instead when
    `sigmoid` is true. At least `int(0.005 * n) + 1` ones remain. The gradient goes straight through,
    without the derivative of the sigmoid. Raises ValueError for `sigmoid` with a threshold outside
    [0, 1].
    """

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: float, sigmoid: bool) -> Tensor:
        cutoff = logit(check_fraction(threshold)) if sigmoid else float(threshold)
        return above_threshold([scores], cutoff)[0].to(scores.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None, None


class MagnitudeBinarizer:
    """Mask of magnitude pruning: ones on the `int(threshold * n)` largest absolute weights.

    `MagnitudeBinarizer.apply(weight, threshold)` returns a mask of the shape and dtype of `weight`,
    through which no gradient flows. Raises ValueError for a threshold outside [0, 1].
    """

    @staticmethod
    def apply(weight: Tensor, threshold: float) -> Tensor:
        count = int(check_fraction(threshold) * weight.numel())
        return keep_largest([weight], [count], absolute=True)[0].to(weight.dtype)
