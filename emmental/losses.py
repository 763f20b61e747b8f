"""What fine-pruning adds to the loss of a task: penalties on the scores, and distillation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modules.masks import MaskedLayers, masked_layers
from .modules.methods import METHODS


def regularization(model: nn.Module | MaskedLayers, mode: str) -> Tensor:
    """The penalty on the scores, averaged over the matrices that they mask: a scalar in [0, 1].

    mode: the name of a penalty, such as `l1` (of soft movement) or `l0`; the penalty of the model's
    method comes first. Raises ValueError for an unknown name, and for a model without scores.
    """
    layers = masked_layers(model).layers
    methods = [*(layer.method for layer in layers[:1]), *METHODS.values()]
    fitting = [method for method in methods if method.penalty == mode]
    if mode is None or not fitting:
        known = ", ".join(penalties())
        raise ValueError(f"unknown regularization {mode!r}: choose one of {known}")
    scores = [layer.scores for layer in layers]
    if not scores or scores[0] is None:
        raise ValueError(f"regularization {mode} needs scores, and this model has none")
    return fitting[0].penalty_of(scores)


def penalties() -> list[str]:
    """The names of the penalties of all methods: the choices of `--regularization`."""
    return sorted({method.penalty for method in METHODS.values() if method.penalty})


def distillation_loss(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], temperature: float
) -> Tensor:
    """T^2 * KL(teacher/T || student/T), averaged over the batch and the tuple (Hinton et al. 2015).

    Both are tuples of logits (batch, classes). Raises ValueError when their shapes differ.
    """
    losses = []
    for s, t in _pairs(student, teacher):
        log_q, log_p = (F.log_softmax(logits / temperature, dim=-1) for logits in (s, t))
        losses.append(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
    return temperature**2 * torch.stack(losses).mean()


def regression_distillation_loss(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]
) -> Tensor:
    """Mean squared error between logits, averaged over the tuple: distillation of a regression."""
    return torch.stack([F.mse_loss(s, t) for s, t in _pairs(student, teacher)]).mean()


def _pairs(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    ours, theirs = [tuple(s.shape) for s in student], [tuple(t.shape) for t in teacher]
    if not student or ours != theirs:
        raise ValueError(f"student and teacher logits do not match: {ours} and {theirs}")
    return [(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)]
