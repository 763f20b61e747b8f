"""Binarizers: from scores (or weights) to 0/1 masks, with straight-through gradients.

A mask keeps the entries of a matrix that pass one cut-off: the k-th largest score (movement pruning),
the k-th largest magnitude (magnitude pruning), the threshold itself, or its logit (soft movement).
The cut-off of a top-k mask comes from a selection, not a sort: the n log n order of the other entries
is never needed. Masks are not differentiable; the gradient passes "straight through" to the scores,
as if the mask were the scores themselves (paper, section 4; Bengio et al. 2013).

Thresholds are fractions in [0, 1], never percentages, except for the plain `threshold` method, whose
threshold lives on the scale of the scores.
"""

import math

import numpy as np
import torch
from torch import Tensor

MIN_REMAINING = 0.005  # a thresholded matrix never loses more than 99.5% of its weights


def kth_largest(values: list[Tensor], counts: list[int]) -> list[Tensor]:
    """The `counts[i]`-th largest entry of `values[i]` (any shape), as scalar tensors.

    A count of 0 gives +inf (nothing passes), a full count -inf (everything does). On a GPU the
    matrices are stacked by size, so that one call selects in all of them at once.
    """
    cutoffs: list[Tensor | None] = [None] * len(values)
    by_size: dict[tuple, list[int]] = {}
    for i, (value, count) in enumerate(zip(values, counts, strict=True)):
        if count <= 0 or count >= value.numel():
            bound = torch.inf if count <= 0 else -torch.inf
            cutoffs[i] = torch.tensor(bound, dtype=value.dtype, device=value.device)
        elif value.device.type == "cpu":
            flat = value.detach().to(torch.promote_types(value.dtype, torch.float32)).reshape(-1).numpy()
            kth = np.partition(flat, flat.size - count)[flat.size - count]
            cutoffs[i] = torch.tensor(kth, dtype=value.dtype)
        else:
            by_size.setdefault((value.numel(), count), []).append(i)
    for (size, count), members in by_size.items():
        stacked = torch.stack([values[i].detach().reshape(-1) for i in members])
        selected = torch.kthvalue(stacked, size - count + 1, dim=1).values
        for i, kth in zip(members, selected, strict=True):
            cutoffs[i] = kth
    return cutoffs


def keep_largest(values: list[Tensor], counts: list[int], cutoffs: list[Tensor] | None = None) -> list[Tensor]:
    """Boolean masks with exactly `counts[i]` ones on the largest entries of `values[i]`.

    Among equal entries the first in row-major order are kept, so the choice is deterministic.
    `cutoffs` are those of `kth_largest`, if they are known already.
    """
    cutoffs = kth_largest(values, counts) if cutoffs is None else cutoffs
    masks = [(value.detach() >= cutoff).contiguous() for value, cutoff in zip(values, cutoffs, strict=True)]
    kept = torch.stack([mask.sum() for mask in masks]).tolist()  # one synchronisation for all matrices
    for value, cutoff, mask, count, ones in zip(values, cutoffs, masks, counts, kept, strict=True):
        if ones > count:
            tied = (value.detach() == cutoff).reshape(-1).nonzero().squeeze(1)
            mask.view(-1)[tied[len(tied) - (ones - count) :]] = False
    return masks


def above_threshold(values: list[Tensor], cutoff: float, *, inclusive: bool = False) -> list[Tensor]:
    """Boolean masks of the entries above `cutoff`, but of at least `int(0.005 * n) + 1` per matrix."""
    compare = torch.ge if inclusive else torch.gt
    return keep_floor(values, [compare(value.detach(), cutoff) for value in values])


def keep_floor(values: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Replace masks that keep fewer than `floor_count(n)` entries by the top `floor_count(n)` ones."""
    kept = torch.stack([mask.sum() for mask in masks]).tolist()
    short = [i for i, ones in enumerate(kept) if ones < floor_count(values[i].numel())]
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
        return keep_largest([weight.detach().abs()], [count])[0].to(weight.dtype)
