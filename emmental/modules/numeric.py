"""Elementwise functions that are faster, or need less memory, than the plain formula."""

import math

import numpy as np
import torch
from torch import Tensor

NOT_IN_GRAPHS = (
    "masks cannot be found within a trace, an export or a full graph: open `with masked(model):` "
    "around it, or convert the model with bertarize.py first"
)


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor * mask, in the dtype of `tensor`."""
    factor = as_factor(mask, tensor.dtype)
    own = factor is not mask and factor.shape == tensor.shape
    return factor.mul_(tensor) if own else tensor * factor


def as_factor(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in a floating dtype. A CPU converts bytes ten times as fast as booleans."""
    # TorchScript, ONNX and the compiler of torch 2.11 lack such views.
    as_bytes = mask.dtype == torch.bool and not is_traced() and not torch.compiler.is_compiling()
    return (mask.view(torch.int8) if as_bytes else mask).to(dtype)


def is_traced() -> bool:
    """Whether `torch.jit.trace`, `torch.export` or `torch.onnx` records this call."""
    # Not `is_exporting()`, which torch.compile of torch 2.11 takes for True.
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def check_values(weight: Tensor, scores: Tensor | None) -> None:
    """Raises ValueError where a mask cannot be found, as there are no values to compare."""
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
    if scores.device.type != "cpu":
        return torch.empty_like(scores).uniform_(margin, 1 - margin, generator=generator)
    # On a CPU, NumPy's SFC64 is three times as fast as torch's generator, which gives the seed.
    seed = torch.randint(2**63 - 1, (), generator=generator).item()
    words = np.random.SFC64(seed).random_raw((scores.numel() + 1) // 2).view(np.int32)
    noise = torch.from_numpy(words[: scores.numel()]).to(scores.dtype).reshape(scores.shape)
    return noise.mul_(2.0**-32 * (1 - 2 * margin)).add_(0.5)


class MeanSigmoid(torch.autograd.Function):
    """mean(sigmoid(S - shift)). It saves S for the backward, not a new tensor of sigmoids."""

    @staticmethod
    def forward(ctx, scores: Tensor, shift: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.shift = shift
        return _sigmoid(scores, shift).mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (scores,) = ctx.saved_tensors
        grad, probability = grad / scores.numel(), _sigmoid(scores, ctx.shift)
        return torch.ops.aten.sigmoid_backward(grad, probability, grad_input=probability), None


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
