"""Forward and backward over the batches of one update, and the means of its losses."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..losses import regularization
from ..models.inputs import input_names
from ..modules.masks import masked_layers
from .distributed import World
from .hidden import hidden_distillation_loss, hidden_states, projection_of
from .state import TrainingState
from .task import Batch, Logits, Task


class Passes:
    """Forward and backward of a model that the ranks share, and forward of the teacher."""

    def __init__(self, task: Task, state: TrainingState, teacher: nn.Module | None):
        self.settings, self.world, self.scaler = state.settings, state.world, state.scaler
        self.task, self.layers = task, masked_layers(state.model)
        self.student, self.teacher, self.model = state.model, teacher, state.model
        if self.world.size > 1:
            self.model = DistributedDataParallel(self.student, gradient_as_bucket_view=True)
            self.model.broadcast_buffers = False  # at each forward: all ranks have the same

    def backward(
        self, batches: Iterable[Batch], shares: list[float], penalty_weight: float
    ) -> dict[str, Tensor]:
        """Add the gradients of one update to the parameters; returns its losses on this rank.

        shares: the part of the update's examples in each batch, which weighs the loss on hidden
        states, and other losses unless `task.weight` does. So an update is a mean over examples.
        """
        penalty, alpha = self.settings.regularization, self.settings.alpha_hidden
        if self.task.weight:
            batches = list(batches)
        weights = self._weigh(batches, shares) if self.task.weight else shares
        sums = defaultdict(float)
        for number, (batch, share, weight) in enumerate(zip(batches, shares, weights, strict=True)):
            last = number == len(shares) - 1
            weight *= self.world.size  # DDP takes the mean
            with nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                losses = self._losses(batch)
                objective = weight * losses["loss"]
                if "loss/hidden" in losses:
                    hidden = share * self.world.size * losses.pop("loss/hidden")
                    objective = objective + alpha * hidden
                    sums["loss/hidden"] += hidden.detach()
                if last and penalty:  # once per update, because it depends on the scores alone
                    loss = regularization(self.layers, penalty)
                    objective = objective + penalty_weight * loss
                    sums["loss/penalty"] = loss.detach()
                self.scaler.scale(objective).backward()
            for name, value in losses.items():
                sums[name] += weight * value.detach()
        if "loss/hidden" in sums:
            sums["loss"] += alpha * sums["loss/hidden"]
        if penalty:
            sums["loss"] += penalty_weight * sums["loss/penalty"]
        return sums

    def _weigh(self, batches: list[Batch], shares: list[float]) -> list[float]:
        weigh = self.task.weight
        weights = [weigh(batch) if share else 0.0 for batch, share in zip(batches, shares)]
        total = torch.tensor(sum(weights), dtype=torch.float64, device=self.world.device)
        total = self.world.sum(total).item() or 1.0
        return [weight / total for weight in weights]

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        settings = self.settings
        hidden = self.teacher is not None and settings.alpha_hidden > 0
        with hidden_states(self.student, hidden) as states:
            logits = forward(self.task, self.model, batch, settings.precision)
        loss = self.task.loss(logits, batch)
        if self.teacher is None:
            return {"loss": loss, "loss/task": loss}
        with torch.no_grad(), hidden_states(self.teacher, hidden) as targets:
            teacher_logits = forward(self.task, self.teacher, batch, settings.precision)
        distil = self.task.distillation_loss(logits, teacher_logits, batch, settings.temperature)
        total = settings.alpha_distil * distil + settings.alpha_ce * loss
        losses = {"loss": total, "loss/task": loss, "loss/distil": distil}
        if hidden:
            tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            projection = projection_of(self.student)
            losses["loss/hidden"] = hidden_distillation_loss(states, targets, tokens, projection)
        return losses


def forward(task: Task, model: nn.Module, batch: Batch, precision: torch.dtype | None) -> Logits:
    """The task's logits of a batch, which is on the model's device."""
    names = input_names(getattr(model, "module", model))
    with torch.autocast(batch["input_ids"].device.type, precision, enabled=precision is not None):
        outputs = model(**{name: batch[name] for name in names if name in batch})
    return task.logits(outputs, batch)


class Means:
    """Means of the losses over the updates since they were last taken."""

    def __init__(self, world: World):
        self.world = world
        self.sums = defaultdict(float)
        self.count = self.skipped = 0

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor, skipped: bool) -> None:
        """Add an update. If it was skipped, its losses may be infinite, and are left out."""
        self.skipped += skipped
        self.count += not skipped
        if not skipped:
            for name, value in (losses | {"gradient_norm": grad_norm.detach()}).items():
                self.sums[name] += value

    def take(self) -> dict[str, float]:
        """Return the means over all ranks, and start again from nothing."""
        values = {"skipped_updates": self.skipped} if self.skipped else {}
        if self.count:
            means = torch.stack(list(self.sums.values())) / (self.count * self.world.size)
            values |= dict(zip(self.sums, self.world.sum(means).tolist(), strict=True))
        self.sums = defaultdict(float)
        self.count = self.skipped = 0
        return values
