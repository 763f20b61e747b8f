"""AdamW with the update of the paper's runs, in three groups.

The update is  lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).  torch adds eps after the
bias correction of v: the same update with eps scaled by 1 / sqrt(1 - b2^t). The two updates agree
for weights, but not for scores, whose gradients are as small as eps.
"""

import torch
from torch import nn

from ..modules.masks import masked_layers


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with eps outside the bias correction (Kingma & Ba 2015, section 2)."""

    def __init__(self, params, lr: float, eps: float, weight_decay: float):
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # else the scaler could skip steps that we count
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
    """AdamW over the trainable parameters, in the groups `scores`, `weights` and `no_decay`.

    Only weights are decayed: neither scores nor bias and LayerNorm, which have one dimension.
    Scores that the pruning method observes are left out. `peak_lr` keeps the rate of a group.
    """
    layers = masked_layers(model).layers
    observed = {id(layer.scores) for layer in layers if layer.method.scores == "observed"}
    groups = {
        "scores": {"lr": mask_scores_learning_rate, "weight_decay": 0.0, "params": []},
        "weights": {"lr": learning_rate, "weight_decay": weight_decay, "params": []},
        "no_decay": {"lr": learning_rate, "weight_decay": 0.0, "params": []},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in observed:
            continue
        kind = "weights" if parameter.dim() >= 2 else "no_decay"
        kind = "scores" if name.endswith("mask_scores") else kind
        groups[kind]["params"].append(parameter)
    groups = [group | {"name": name, "peak_lr": group["lr"]} for name, group in groups.items()]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=learning_rate, eps=adam_epsilon, weight_decay=weight_decay)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that the optimizer trains, in the order of the model."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [parameter for parameter in model.parameters() if id(parameter) in trained]
