"""Losses that fine-pruning adds to a task's own: penalties on the scores, and distillation."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modules.masked_nn import L0_LEFT, L0_RIGHT, L0_TEMPERATURE, masked_layers

REGULARIZATIONS = ("l0", "l1")


def regularization(model: nn.Module, mode: str) -> Tensor:
    """Penalty that pushes scores down, a scalar in [0, 1], averaged over the masked matrices.

    `l1`: the mean of sigmoid(S), which decides what soft movement keeps (paper, section 4.2).
    `l0`: the mean of sigmoid(S - b log(-l/r)), the probability that a hard concrete gate is open
    (Louizos et al. 2018, eq. 12). Raises ValueError for another mode, or a model without scores.
    """
    if mode not in REGULARIZATIONS:
        raise ValueError(f"unknown regularization {mode!r}: choose one of {', '.join(REGULARIZATIONS)}")
    shift = L0_TEMPERATURE * math.log(-L0_LEFT / L0_RIGHT) if mode == "l0" else 0.0
    scores = [layer.mask_scores for layer in masked_layers(model).values() if layer.mask_scores is not None]
    if not scores:
        raise ValueError(f"regularization {mode} needs scores, and this model has none")
    return torch.stack([_MeanSigmoid.apply(s, shift) for s in scores]).mean()


class _MeanSigmoid(torch.autograd.Function):
    """mean(sigmoid(S - shift)), keeping S alone: the sigmoids of all matrices would be a second set of scores."""

    @staticmethod
    def forward(ctx, scores: Tensor, shift: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.shift = shift
        return _sigmoid(scores, shift).mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (scores,) = ctx.saved_tensors
        probability = _sigmoid(scores, ctx.shift)
        return torch.ops.aten.sigmoid_backward(grad / scores.numel(), probability, grad_input=probability), None


def _sigmoid(scores: Tensor, shift: float) -> Tensor:
    return (scores - shift).sigmoid_() if shift else scores.sigmoid()


def distillation_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], temperature: float) -> Tensor:
    """T^2 * KL(teacher/T || student/T), the mean over the batch, averaged over the tuple (Hinton et al. 2015).

    student, teacher: tuples of logits of equal length, each (batch, classes); SQuAD passes (start, end).
    Raises ValueError when the two do not fit together.
    """
    _check_pairs(student, teacher)
    losses = [
        F.kl_div(
            F.log_softmax(s.float() / temperature, dim=-1),
            F.log_softmax(t.float() / temperature, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        for s, t in zip(student, teacher, strict=True)
    ]
    return temperature**2 * torch.stack(losses).mean()


def regression_distillation_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean squared error between the logits, averaged over the tuple: distillation of a regression."""
    _check_pairs(student, teacher)
    return torch.stack([F.mse_loss(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)]).mean()


def _check_pairs(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> None:
    shapes = [tuple(s.shape) for s in student], [tuple(t.shape) for t in teacher]
    if not student or shapes[0] != shapes[1]:
        raise ValueError(f"student and teacher logits do not match: {shapes[0]} and {shapes[1]}")
