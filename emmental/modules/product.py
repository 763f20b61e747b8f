"""W * M, the masked weights, and its gradients: here a gradient reaches the scores."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .granularity import apply_each
from .lists import apply_masks, cast
from .methods import Method


class MaskedWeights(torch.autograd.Function):
    """W * M of several matrices, in the dtype of the computation.

    With G = dL/d(W * M): dL/dW = G * M and dL/dM = G * W, from which the method makes dL/dS.

    MaskedWeights.apply(method, granularities, sampled, dtype, *weights, *masks, *scores, *expanded)
    expanded: the masks of all weights, or None to expand `masks`, those of the scores.
    """

    @staticmethod
    def forward(*inputs):  # named arguments would be bound by name, which takes longer
        _, granularities, _, dtype, *tensors = inputs
        weights, masks, _, expanded = _quarters(tensors)
        return tuple(multiply(granularities, weights, masks, expanded, dtype))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.method, ctx.granularities, ctx.sampled, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        used = [place for place, grad in enumerate(grads) if grad is not None]
        of_weights, of_scores, none = ([None] * len(grads) for _ in range(3))
        needed = _quarters(ctx.needs_input_grad[4:])
        if used:
            saved = _quarters(ctx.saved_tensors)
            weights, masks, scores, expanded = ([x[i] for i in used] for x in saved)
            granularities = [ctx.granularities[i] for i in used]
            gradients = cast([grads[i] for i in used], weights[0].dtype)  # G
        if used and any(needed[2]):
            products = torch._foreach_mul(gradients, weights)
            of_masks = apply_each("reduce", granularities, products)
            found = _scores_gradients(ctx.method, scores, masks, of_masks, ctx.sampled)
            for place, gradient in zip(used, found, strict=True):
                of_scores[place] = gradient
        if used and any(needed[0]):
            found = multiply(granularities, gradients, masks, expanded, weights[0].dtype)
            for place, gradient in zip(used, found, strict=True):
                of_weights[place] = gradient
        return None, None, None, None, *of_weights, *none, *of_scores, *none


def multiply(granularities, tensors, masks, expanded, dtype: torch.dtype) -> list[Tensor]:
    """The weights, or what has their shape, times their masks, in this dtype."""
    if expanded[0] is None:
        expanded = apply_each("expand", granularities, masks, [x.shape for x in tensors])
    return cast(apply_masks(tensors, expanded), dtype)


def _quarters(values: tuple) -> list[list]:
    size = len(values) // 4
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


def _scores_gradients(method, scores, masks, grads, sampled: bool) -> list[Tensor]:
    if type(method).scores_gradient is Method.scores_gradient:
        return grads
    if len(grads) == 1:
        return [method.scores_gradient(scores[0], masks[0], grads[0], sampled)]
    rows = [torch.cat([x.reshape(-1) for x in tensors]) for tensors in (scores, masks, grads)]
    parts = method.scores_gradient(*rows, sampled).split([grad.numel() for grad in grads])
    return [part.view(grad.shape) for part, grad in zip(parts, grads, strict=True)]
