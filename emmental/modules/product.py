"""The product of an input with masked weights, and its gradients."""

import inspect

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .numeric import apply_mask, as_factor


class MaskedProduct(torch.autograd.Function):
    """x (W * M)^T + b. With G = dL/d(W * M): dL/dW = G * M, dL/dM = G * W, dL/dS from the method.

    It saves x, W and M, and computes W * M again in the backward: the masked weights of all layers
    would be a second model. Outputs are allocated before temporary tensors, so that those leave no
    holes in the memory of a CPU.
    """

    @staticmethod
    def forward(input, weight, scores, mask, bias, method, granularity, sampled):
        rows = input.reshape(-1, input.shape[-1])
        output = rows.new_empty(len(rows), len(weight))
        masked = apply_mask(weight, granularity.expand(mask, weight.shape))
        if torch.is_autocast_enabled(input.device.type):
            masked = masked.to(input.dtype)
            bias = bias if bias is None else bias.to(input.dtype)
        if bias is None:
            torch.mm(rows, masked.t(), out=output)
        else:
            torch.addmm(bias, rows, masked.t(), out=output)
        return output.view(*input.shape[:-1], len(weight))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, mask, _, ctx.method, ctx.granularity, ctx.sampled = inputs
        ctx.save_for_backward(input, weight, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        input, weight, mask = ctx.saved_tensors
        needs_input, needs_weight, needs_scores, _, needs_bias = ctx.needs_input_grad[:5]
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_scores = None
        expanded = ctx.granularity.expand(mask, weight.shape)
        if needs_weight or needs_scores:
            gradient = (rows.t() @ input.reshape(-1, input.shape[-1])).to(weight.dtype)  # G
            if needs_scores:
                grad_mask = ctx.granularity.reduce(gradient * weight)
                grad_scores = ctx.method.scores_gradient(mask, grad_mask, ctx.sampled)
            if needs_weight:
                grad_weight = gradient.mul_(as_factor(expanded, weight.dtype))
        grad_bias = rows.sum(0) if needs_bias else None
        if needs_input:
            grad_input = rows.new_empty(len(rows), input.shape[-1])
            torch.mm(rows, apply_mask(weight, expanded).to(rows.dtype), out=grad_input)
            grad_input = grad_input.view(input.shape)
        return grad_input, grad_weight, grad_scores, None, grad_bias, None, None, None


# torch binds the arguments of each call to the signature, which takes long to find.
MaskedProduct.forward.__signature__ = inspect.signature(MaskedProduct.forward)
