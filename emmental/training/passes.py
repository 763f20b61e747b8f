"""Forward and backward over the batches of one update, and the means of its losses."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..losses import regularization
from ..models.inputs import input_names
from ..modules.lists import together
from ..modules.masked_nn import MaskedLinear
from ..modules.masks import MaskedLayers, masked_layers
from ..modules.methods import Method
from .distributed import World
from .hidden import hidden_distillation_loss, hidden_states, projection_of
from .state import TrainingState
from .task import Batch, Logits, Task


class Passes:
    """Forward and backward of a model, which the ranks share, and forward of its teacher."""

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

        shares: the part of the update's examples in each batch, which weighs its hidden states, and
        its other losses unless `task.weight` does: an update is a mean over all its examples.
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
                if last and penalty:  # depends on the scores alone: once per update
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


def observed_norms(layers: MaskedLayers) -> list[Tensor]:
    """The norms of the gradients of observed scores, which are not clipped."""
    grads = [x.mask_scores.grad for x in layers.observed if x.method.scores == "observed"]
    return list(torch._foreach_norm(grads)) if grads else []


@torch.no_grad()
def observe_scores(layers: MaskedLayers, scaler: torch.amp.GradScaler, skipped: bool) -> None:
    """Pass the gradients of scores to a method that observes them, unless the update is `skipped`.

    They are divided by the root of the number of weights that a score stands for, so that scores of
    all sizes compare: the square of a gradient, as in Fisher information, grows with that number.
    The optimizer has no observed scores: their gradients are not clipped, and go.
    """
    observed = layers.observed
    if not observed:
        return
    method = observed[0].method
    if not skipped:
        parts = [observed] if together(observed[0].weight) else [[layer] for layer in observed]
        for layers in parts:
            _observe(method, layers, scaler)
    if method.scores == "observed":
        for layer in observed:
            layer.mask_scores.grad = None


def _observe(method: Method, layers: list[MaskedLinear], scaler: torch.amp.GradScaler) -> None:
    scale = scaler.get_scale() if method.scores == "observed" else 1.0  # others are unscaled
    sizes = [sum(member.weights_per_score for member in layer.group) for layer in layers]
    grads = [layer.mask_scores.grad for layer in layers]
    scaled = torch._foreach_div(grads, [scale * size**0.5 for size in sizes])
    method.observe(layers, list(scaled))


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
        """The means over all ranks; they start again from nothing."""
        values = {"skipped_updates": self.skipped} if self.skipped else {}
        if self.count:
            means = torch.stack(list(self.sums.values())) / (self.count * self.world.size)
            values |= dict(zip(self.sums, self.world.sum(means).tolist(), strict=True))
        self.sums = defaultdict(float)
        self.count = self.skipped = 0
        return values
