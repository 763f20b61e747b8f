"""Formulas of the scores: noise, the mean sigmoid of the penalties, fractions; and their checks."""

import math

import numpy as np
import torch
from torch import Tensor

from .lists import is_traced, stacks, together

NOT_IN_GRAPHS = (
    "masks cannot be found within a trace, an export or a full graph: open `with masked(model):` "
    "around it, or convert the model with bertarize.py first"
)


def check_values(weight: Tensor, scores: Tensor | None) -> None:
    """Raises ValueError where a mask cannot be found, because there are no values to compare."""
    if is_traced():
        raise ValueError(NOT_IN_GRAPHS)
    stored = weight if scores is None else scores
    if stored.is_meta or type(stored.detach()) is not Tensor or weight.dim() != 2:
        raise ValueError(
            "masks need all weights, but these are offloaded or sharded: keep them whole, as DDP "
            "does, or convert the model with bertarize.py first"
        )


def uniform_noise(scores: Tensor, generator: torch.Generator | None = None, margin: float = 1e-4):
    """Noise u ~ U(margin, 1 - margin) of the shape of `scores`."""
    if together(scores):
        return torch.empty_like(scores).uniform_(margin, 1 - margin, generator=generator)
    # On a CPU, NumPy's SFC64 is three times as fast as torch's generator, which gives the seed.
    seed = torch.randint(2**63 - 1, (), generator=generator).item()
    words = np.random.SFC64(seed).random_raw((scores.numel() + 1) // 2).view(np.int32)
    noise = torch.from_numpy(words[: scores.numel()]).to(scores.dtype).reshape(scores.shape)
    return noise.mul_(2.0**-32 * (1 - 2 * margin)).add_(0.5)


class MeanSigmoid(torch.autograd.Function):
    """mean(sigmoid(S - shift)) of each matrix, averaged over the matrices: a scalar.

    For the backward, the scores are saved, and no sigmoids.
    """

    @staticmethod
    def forward(ctx, shift: float, *scores: Tensor) -> Tensor:
        ctx.save_for_backward(*scores)
        ctx.shift = shift
        return torch.cat([_sigmoid(s, shift).mean(1) for _, s in stacks(list(scores))]).mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        scores = ctx.saved_tensors
        grad, gradients = grad / len(scores), [None] * len(scores)
        for places, stack in stacks(list(scores)):
            found = _sigmoid(stack, ctx.shift)
            torch.ops.aten.sigmoid_backward(grad / stack.shape[1], found, grad_input=found)
            for place, row in zip(places, found, strict=True):
                gradients[place] = row.view(scores[place].shape)
        return None, *gradients


def _sigmoid(scores: Tensor, shift: float) -> Tensor:
    return (scores - shift).sigmoid_() if shift else scores.sigmoid()


def logit(fraction: float) -> float:
    """Inverse of the sigmoid for a fraction in [0, 1]; infinite at 0 and 1."""
    if fraction in (0.0, 1.0):
        return math.inf if fraction else -math.inf
    return math.log(fraction) - math.log1p(-fraction)


def check_fraction(threshold: float) -> float:
    """`threshold` as a float. Raises ValueError outside [0, 1]."""
    if not 0.0 <= float(threshold) <= 1.0:
        raise ValueError(f"the threshold is a fraction and must lie in [0, 1], got {threshold}")
    return float(threshold)
