"""Forward and backward over the batches of one update, and the means of what they find."""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..losses import regularization
from ..modules.masks import masked_layers
from .distributed import World
from .settings import Distillation, Precision
from .task import Task

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Passes:
    """The passes of one update.

    model: as the ranks share it (DistributedDataParallel, where there are several). penalty: l0, l1 or None.
    """

    def __init__(
        self,
        task: Task,
        world: World,
        model: nn.Module,
        teacher: nn.Module | None,
        penalty: str | None,
        distillation: Distillation,
        precision: Precision,
    ):
        self.task, self.world, self.model, self.teacher = task, world, model, teacher
        self.penalty, self.distillation, self.precision = penalty, distillation, precision

    def backward(
        self,
        batches: Iterable[dict[str, Tensor]],
        shares: list[float],
        penalty_weight: float,
        scaler,
    ) -> dict[str, Tensor]:
        """Gradients of one update, left in the parameters; its losses, of this rank's examples, by name.

        shares: the part of the update's examples that each batch holds. A batch weighs as much as it has examples (or
        as the task says), so that the update is the mean over all of its examples whatever the batches, the ranks and
        the remainder of an epoch.
        """
        if self.task.weight:
            batches = list(batches)
            shares = self._weigh(batches, shares)
        sums: dict[str, Tensor] = {}
        for place, (share, batch) in enumerate(zip(shares, batches, strict=True)):
            last = place == len(shares) - 1
            batch = {
                name: tensor.to(self.world.device, non_blocking=True)
                for name, tensor in batch.items()
            }
            with nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                parts = self._losses(batch)
                weight = share * self.world.size  # DistributedDataParallel averages over the ranks
                objective = weight * parts["loss"]
                if last and self.penalty:  # a function of the scores alone: once per update
                    parts["loss/penalty"] = regularization(self.model, self.penalty)
                    objective = objective + penalty_weight * parts["loss/penalty"]
                scaler.scale(objective).backward()
            for name, value in parts.items():
                value = value.detach() * (1.0 if name == "loss/penalty" else weight)
                sums[name] = sums[name] + value if name in sums else value
        if self.penalty:
            sums["loss"] = sums["loss"] + penalty_weight * sums["loss/penalty"]
        return sums

    def _weigh(self, batches: list[dict[str, Tensor]], shares: list[float]) -> list[float]:
        """The part of each batch in the update by the task's own weights; a batch without a share has none."""
        weights = [
            self.task.weight(batch) if share else 0.0
            for batch, share in zip(batches, shares, strict=True)
        ]
        total = self.world.sum(
            torch.tensor(sum(weights), dtype=torch.float64, device=self.world.device)
        ).item()
        return [weight / (total or 1.0) for weight in weights]

    def _losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self._logits(self.model, batch)
        task = self.task.loss(logits, batch)
        if self.teacher is None:
            return {"loss": task, "loss/task": task}
        with torch.no_grad():
            teacher_logits = self._logits(self.teacher, batch)
        weights = self.distillation
        distil = self.task.distillation_loss(logits, teacher_logits, batch, weights.temperature)
        return {
            "loss": weights.alpha_distil * distil + weights.alpha_ce * task,
            "loss/task": task,
            "loss/distil": distil,
        }

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return forward(self.task, model, batch, self.precision, self.world.device)


def forward(
    task: Task,
    model: nn.Module,
    batch: dict[str, Tensor],
    precision: Precision,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The task's logits of a batch."""
    with precision.autocast(device):
        outputs = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
    return task.logits(outputs, batch)


@torch.no_grad()
def observe_scores(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """Hand the gradients of observed scores to their method; neither clipping nor the optimiser sees them."""
    layers = [layer for layer in masked_layers(model).values() if layer.method.observe]
    grads = [layer.mask_scores.grad for layer in layers]
    if layers and torch.stack([grad.isfinite().all() for grad in grads]).all():
        for layer, grad in zip(layers, grads, strict=True):
            layer.method.observe(layer, grad / scaler.get_scale())
    for layer in layers:
        layer.mask_scores.grad = None


def halve_linears(teacher: nn.Module, precision: Precision) -> None:
    """Keep a teacher's linear layers in the precision that autocast would cast them to for every batch."""
    if precision.dtype is not None:
        for module in teacher.modules():
            if type(module) is nn.Linear:
                module.to(precision.dtype)


class Means:
    """Means of the losses over the updates since they were last taken."""

    def __init__(self, world: World):
        self.world = world
        self.sums: dict[str, Tensor] = {}
        self.count = self.skipped = 0

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor, skipped: bool) -> None:
        """Add an update; one that the gradient scaler skipped is counted only, as its losses may be infinite."""
        if skipped:
            self.skipped += 1
            return
        for name, value in (losses | {"gradient_norm": grad_norm.detach()}).items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means over all ranks, which start anew."""
        values = {"skipped_updates": self.skipped} if self.skipped else {}
        if self.count:
            means = self.world.sum(
                torch.stack(list(self.sums.values())) / (self.count * self.world.size)
            )
            values |= dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.count, self.skipped = {}, 0, 0
        return values
