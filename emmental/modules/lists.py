"""Elementwise work on many matrices: together on a GPU, one by one on a CPU.

A GPU pays for each operation that is started, and a step starts thousands. Therefore a GPU gets one
operation for a list of tensors (`torch._foreach_*`), or for a stack of tensors of one size. A CPU
pays for memory, and its cache holds one matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ONE_BY_ONE = {"cpu"}  # kinds of devices. benchmarks/launches.py empties the set, to count on a CPU


def together(tensor: Tensor) -> bool:
    """Whether the device of the tensor wants many matrices in one operation."""
    return tensor.device.type not in ONE_BY_ONE


def is_traced() -> bool:
    """Whether `torch.jit.trace`, `torch.export` or `torch.onnx` records this call."""
    # Not `is_exporting()`, which torch.compile of torch 2.11 takes for True.
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def stacks(tensors: list[Tensor]) -> list[tuple[list[int], Tensor]]:
    """The tensors as rows of matrices: those of one size together, or each alone (a view).

    Returns pairs of the places in the list and their rows, of shape (places, entries).
    """
    if not tensors or not together(tensors[0]):
        return [([place], tensor.reshape(1, -1)) for place, tensor in enumerate(tensors)]
    by_size: dict[int, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_size.setdefault(tensor.numel(), []).append(place)
    return [(p, torch.stack([tensors[i].reshape(-1) for i in p])) for p in by_size.values()]


def by_stack(function: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The rows that `function` makes of each stack, of the same size, as a list like `tensors`."""
    results = [None] * len(tensors)
    for places, stack in stacks(tensors):
        for place, row in zip(places, function(stack), strict=True):
            results[place] = row.view(tensors[place].shape)
    return results


def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in this dtype: copies, unless they have this dtype already."""
    if tensors[0].dtype == dtype:
        return tensors
    if is_traced() or torch.compiler.is_compiling():
        return [tensor.to(dtype) for tensor in tensors]
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def apply_masks(tensors: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """tensor * mask for each, in the dtype of the tensors. Masks broadcast to their tensors."""
    dtype = tensors[0].dtype
    if masks[0].dtype != torch.bool:
        return torch._foreach_mul(tensors, cast(masks, dtype))
    if is_traced() or torch.compiler.is_compiling():  # these lack views of another dtype
        return [tensor * mask.to(dtype) for tensor, mask in zip(tensors, masks, strict=True)]
    # A CPU converts bytes ten times as fast as booleans.
    factors = cast([mask.view(torch.int8) for mask in masks], dtype)
    if all(factor.shape == tensor.shape for factor, tensor in zip(factors, tensors, strict=True)):
        torch._foreach_mul_(factors, tensors)
        return factors
    return torch._foreach_mul(tensors, factors)
