"""AdamW as the paper's runs had it, in three groups.

The paper's update is  lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).  torch adds eps after the
bias correction of v, which is the same update with eps scaled by 1 / sqrt(1 - b2^t). For weights the
two agree; gradients of scores are as small as eps, and there they do not.
"""

import torch
from torch import nn

from ..modules.masks import masked_layers


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with eps outside the bias correction (Kingma & Ba 2015, end of section 2)."""

    def __init__(self, params, lr: float, eps: float, weight_decay: float):
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, fused=True)
        # The gradient scaler must not skip a step behind our back: we count them.
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            group.setdefault("paper_eps", group["eps"])
            group.setdefault("updates", 0)

    def step(self, closure=None):
        for group in self.param_groups:
            group["updates"] += 1
            group["eps"] = group["paper_eps"] / (1 - group["betas"][1] ** group["updates"]) ** 0.5
        return super().step(closure)


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    mask_scores_learning_rate: float,
    weight_decay: float,
    adam_epsilon: float,
) -> AdamW:
    """AdamW over the trainable parameters of `model`, in the groups `scores`, `weights`, `no_decay`.

    Scores learn at `mask_scores_learning_rate` without decay; weights are decayed; bias and LayerNorm, which have
    fewer than two dimensions, are not. Scores that the pruning method observes are left to it. Each group keeps its
    peak rate in `peak_lr`.
    """
    groups = {
        "scores": {"params": [], "lr": mask_scores_learning_rate, "weight_decay": 0.0},
        "weights": {"params": [], "lr": learning_rate, "weight_decay": weight_decay},
        "no_decay": {"params": [], "lr": learning_rate, "weight_decay": 0.0},
    }
    observed = {
        id(layer.mask_scores) for layer in masked_layers(model).values() if layer.method.observe
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in observed:
            continue
        if name.endswith("mask_scores"):
            kind = "scores"
        else:
            kind = "weights" if parameter.dim() >= 2 else "no_decay"
        groups[kind]["params"].append(parameter)
    named = [
        {"name": name, "peak_lr": group["lr"], **group}
        for name, group in groups.items()
        if group["params"]
    ]
    return AdamW(named, lr=learning_rate, eps=adam_epsilon, weight_decay=weight_decay)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
