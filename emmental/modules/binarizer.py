"""The published functions from scores (or weights) to a mask of the same shape and dtype."""

import torch
from torch import Tensor

from .methods import METHODS, find_method


class TopKBinarizer(torch.autograd.Function):
    """Movement pruning: `TopKBinarizer.apply(scores, threshold)` (paper, eq. 2).

    The mask is 1 for exactly the `int(threshold * n)` largest scores, also when scores tie. The
    gradient goes straight through to the scores. Raises ValueError for a threshold outside [0, 1].
    """

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: float) -> Tensor:
        return METHODS["topK"].masks([scores], threshold)[0].to(scores.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


class ThresholdBinarizer(torch.autograd.Function):
    """Soft movement pruning: `ThresholdBinarizer.apply(scores, threshold, sigmoid)` (section 4.2).

    The mask is 1 where scores, or with `sigmoid` their sigmoids, are above the threshold, and for
    at least `int(0.005 * n) + 1` scores. The gradient goes straight through to the scores, without
    the sigmoid's derivative. Raises ValueError for `sigmoid` with a threshold outside [0, 1].
    """

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: float, sigmoid: bool) -> Tensor:
        method = METHODS["sigmoied_threshold" if sigmoid else "threshold"]
        return method.masks([scores], threshold)[0].to(scores.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None, None


class MagnitudeBinarizer:
    """Magnitude pruning: `MagnitudeBinarizer.apply(weight, threshold)`.

    The mask is 1 for the `int(threshold * n)` largest absolute weights. No gradient flows through
    it. Raises ValueError for a threshold outside [0, 1].
    """

    @staticmethod
    def apply(weight: Tensor, threshold: float) -> Tensor:
        return METHODS["magnitude"].masks([weight.detach()], threshold)[0].to(weight.dtype)


@torch.no_grad()
def compute_mask(
    weight: Tensor,
    mask_scores: Tensor | None,
    pruning_method: str,
    threshold: float,
    training: bool = False,
) -> Tensor:
    """The mask of one matrix with a score per weight: boolean, or float in [0, 1] for l0.

    threshold: a fraction in [0, 1]; for the method `threshold`, any number; without use for l0.
    Raises ValueError for an unknown method or a fraction outside [0, 1].
    """
    method = find_method(pruning_method)
    return method.masks([mask_scores if method.scores else weight], threshold, training)[0]
