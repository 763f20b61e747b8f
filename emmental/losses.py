"""Losses that fine-pruning adds to a task's own: penalties on the scores, and distillation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modules.masks import masked_layers
from .modules.methods import METHODS

PENALTIES = {
    m.penalty: m for m in sorted(METHODS.values(), key=lambda m: str(m.penalty)) if m.penalty
}


def regularization(model: nn.Module, mode: str) -> Tensor:
    """Penalty that pushes scores down, a scalar in [0, 1], averaged over the masked matrices.

    `l1`: the mean of sigmoid(S), which decides what soft movement keeps (paper, section 4.2).
    `l0`: the mean of sigmoid(S - b log(-l/r)), the probability that a hard concrete gate is open
    (Louizos et al. 2018, eq. 12). Raises ValueError for another mode, or a model without scores.
    """
    if mode not in PENALTIES:
        raise ValueError(f"unknown regularization {mode!r}: choose one of {', '.join(PENALTIES)}")
    scores = [
        layer.mask_scores
        for layer in masked_layers(model).values()
        if layer.mask_scores is not None
    ]
    if not scores:
        raise ValueError(f"regularization {mode} needs scores, and this model has none")
    return torch.stack([PENALTIES[mode].penalty_of(s) for s in scores]).mean()


def distillation_loss(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], temperature: float
) -> Tensor:
    """T^2 * KL(teacher/T || student/T), the mean over the batch, averaged over the tuple (Hinton et al. 2015).

    Both are tuples of logits (batch, classes); SQuAD passes (start, end). Raises ValueError when they
    do not fit together.
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


def regression_distillation_loss(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]
) -> Tensor:
    """Mean squared error between the logits, averaged over the tuple: distillation of a regression."""
    _check_pairs(student, teacher)
    return torch.stack(
        [F.mse_loss(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)]
    ).mean()


def _check_pairs(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> None:
    ours, theirs = [tuple(s.shape) for s in student], [tuple(t.shape) for t in teacher]
    if not student or ours != theirs:
        raise ValueError(f"student and teacher logits do not match: {ours} and {theirs}")
