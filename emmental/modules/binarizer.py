"""The published functions from scores (or weights) to masks, over `methods`."""

import torch
from torch import Tensor

from .granularity import Weight
from .methods import METHODS, find_method


class TopKBinarizer(torch.autograd.Function):
    """Mask of movement pruning: ones on the `int(threshold * n)` largest scores (paper, eq. 2).

    `TopKBinarizer.apply(scores, threshold)` returns a mask of the shape and dtype of `scores` with exactly that many
    ones, also when scores tie. Its gradient goes straight through to `scores`. Raises ValueError for a threshold
    outside [0, 1].
    """

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: float) -> Tensor:
        return METHODS["topK"].masks([scores], threshold)[0].to(scores.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


class ThresholdBinarizer(torch.autograd.Function):
    """Mask of soft movement pruning: ones where `scores > threshold` (paper, section 4.2).

    `ThresholdBinarizer.apply(scores, threshold, sigmoid)` compares sigmoid(scores) instead when `sigmoid` is true. At
    least `int(0.005 * n) + 1` ones remain. The gradient goes straight through, without the derivative of the sigmoid.
    Raises ValueError for `sigmoid` with a threshold outside [0, 1].
    """

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: float, sigmoid: bool) -> Tensor:
        method = METHODS["sigmoied_threshold" if sigmoid else "threshold"]
        return method.masks([scores], threshold)[0].to(scores.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None, None


class MagnitudeBinarizer:
    """Mask of magnitude pruning: ones on the `int(threshold * n)` largest absolute weights.

    `MagnitudeBinarizer.apply(weight, threshold)` returns a mask of the shape and dtype of `weight`, through which no
    gradient flows. Raises ValueError for a threshold outside [0, 1].
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

    `threshold` is a fraction in [0, 1] (the remaining weights for topK and magnitude, a cut on
    sigmoid(S) for sigmoied_threshold), a cut on S for threshold, and unused by l0. Raises ValueError
    for an unknown method or a fraction outside [0, 1].
    """
    method = find_method(pruning_method)
    source = mask_scores if method.scores else Weight().rank(weight)
    return method.masks([source], threshold, training)[0]
