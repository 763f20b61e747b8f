"""What stops a training before it does harm: signals, non-finite values, ranks that differ."""

import hashlib
import logging
import math
import signal
import time

import torch
from torch import Tensor, nn

from ..errors import Interrupted, TrainingError
from ..modules.masks import Masks
from .distributed import World
from .settings import Settings

logger = logging.getLogger(__name__)

SAME_SIGNAL = 3.0  # seconds: torchrun passes on a signal that the process group also got
PATIENCE_FP16 = 50  # updates in a row that the gradient scaler may skip


class StopSignals:
    """Notes SIGTERM or SIGINT in the block, so that the update can end; a later one interrupts."""

    def __enter__(self) -> "StopSignals":
        self.number = 0
        stops = signal.SIGTERM, signal.SIGINT
        self.before = {number: signal.signal(number, self._note) for number in stops}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if not self.number:
            self.number, self.time = number, time.monotonic()
            name = signal.Signals(number).name
            logger.warning("%s: stopping after this update, with a checkpoint", name)
        elif time.monotonic() - self.time >= SAME_SIGNAL:
            raise KeyboardInterrupt


def interruption(number: int, step: int, total: int) -> Interrupted:
    """The error that ends a run after a signal."""
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after update {step} of {total}: "
        "give the same command again with --resume_from_checkpoint latest to continue",
        number,
    )


class GradientGuard:
    """Stops a run with a non-finite gradient; with a gradient scaler, after many in a row."""

    def __init__(self, settings: Settings, world: World):
        self.settings, self.world = settings, world
        self.skipped = 0  # updates in a row

    def skips(self, step: int, grad_norm: Tensor, losses: dict[str, Tensor]) -> bool:
        """Whether the gradient scaler skips this update. Raises TrainingError to stop."""
        self.skipped = 0 if torch.isfinite(grad_norm) else self.skipped + 1
        patience = PATIENCE_FP16 if self.settings.precision.scales_gradients else 0
        if self.skipped <= patience:
            return self.skipped > 0
        values = {name: value.item() for name, value in losses.items() if name != "loss"}
        found = [
            f"{name} = {value} on rank {rank}"
            for rank, own in enumerate(self.world.gather(values))
            for name, value in own.items()
            if not math.isfinite(value)
        ] or ["the gradient is not finite, though every part of the loss is"]
        series = f" for {self.skipped} updates in a row" if patience else ""
        raise TrainingError(
            f"update {step + 1}{series}: {', '.join(found)}: training stops; lower the learning "
            f"rates or drop --fp16, and continue from the last checkpoint in "
            f"{self.settings.output_dir}"
        )


def check_weights(model: nn.Module, step: int) -> None:
    """Raises TrainingError for non-finite parameters, which must not replace good ones."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TrainingError(
                f"update {step}: {name} is not finite: nothing is saved; lower the learning rates, "
                "and continue from the last checkpoint"
            )


def check_ranks(model: nn.Module, masks: Masks | None, step: int, world: World) -> None:
    """Raises TrainingError if cut-off, masks or parameters differ between ranks in any bit."""
    tensors = dict(model.named_parameters())
    if masks:
        tensors |= {f"{name}.mask": mask for name, mask in masks.by_layer.items()}
    own = {"global cut-off": masks and masks.cutoff}
    for name, tensor in tensors.items():
        own[name] = hashlib.sha256(tensor.detach().cpu().numpy()).hexdigest()
    first, *others = world.gather(own)
    for rank, values in enumerate(others, 1):
        if differing := [name for name in own if values[name] != first[name]]:
            raise TrainingError(
                f"--check_ranks: after update {step}, {differing[0]} of rank {rank} "
                "is not that of rank 0"
            )
