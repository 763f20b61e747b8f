"""What stops a training before it does harm: signals, values that are not finite, ranks that differ."""

import hashlib
import logging
import math
import signal
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import Interrupted, TrainingError
from ..modules.masks import Masks
from .distributed import World
from .settings import Settings

logger = logging.getLogger(__name__)

SAME_SIGNAL = 3.0  # seconds in which a second signal is taken for the first
PATIENCE_FP16 = 50  # updates in a row that the gradient scaler may skip


class StopSignals:
    """SIGTERM and SIGINT while it is entered: noted, for the update to be finished. A later one interrupts at once.

    (One that follows soon is the same: a process group's, which torchrun passes on besides.)
    """

    def __init__(self):
        self.number, self.noted = 0, 0.0
        self.handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.number:
            if time.monotonic() - self.noted >= SAME_SIGNAL:
                raise KeyboardInterrupt
            return
        self.number, self.noted = number, time.monotonic()
        logger.warning(
            "%s: stopping after this update, with a checkpoint", signal.Signals(number).name
        )

    @staticmethod
    def interruption(number: int, step: int, total: int) -> Interrupted:
        """The error that ends a run which a signal stopped."""
        return Interrupted(
            f"stopped by {signal.Signals(number).name} after update {step} of {total}: give the same command again with "
            "--resume_from_checkpoint latest to continue",
            number,
        )


class GradientGuard:
    """Stops a run whose gradients are not finite; with a gradient scaler, once they have not been for a while."""

    def __init__(self, settings: Settings, world: World):
        self.scaled = settings.precision.scales_gradients
        self.output_dir, self.world = settings.output_dir, world
        self.skipped = 0  # updates in a row

    def skips(self, step: int, grad_norm: Tensor, losses: dict[str, Tensor]) -> bool:
        """Whether the gradient scaler skips this update. Raises TrainingError when training must stop."""
        self.skipped = 0 if torch.isfinite(grad_norm) else self.skipped + 1
        if self.skipped > (PATIENCE_FP16 if self.scaled else 0):
            raise TrainingError(self._explain(step, losses))
        return self.skipped > 0

    def _explain(self, step: int, losses: dict[str, Tensor]) -> str:
        values = {name: value.item() for name, value in losses.items()}
        found = [
            f"{name} = {value:.4g} on rank {rank}"
            for rank, part in enumerate(self.world.gather(values))
            for name, value in part.items()
            if name != "loss" and not math.isfinite(value)
        ]
        what = (
            f"{', '.join(found)}"
            if found
            else "the gradient is not finite, though every part of the loss is"
        )
        series = f" for {PATIENCE_FP16 + 1} updates in a row" if self.scaled else ""
        return (
            f"update {step + 1}{series}: {what}: training stops; lower the learning rates or do without --fp16, and "
            f"continue from the last checkpoint in {self.output_dir}"
        )


def check_weights(model: nn.Module, step: int, output_dir: Path) -> None:
    """Raises TrainingError for weights or scores that are not finite: such a checkpoint would push out a good one."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TrainingError(
                f"update {step}: {name} is not finite any more: nothing is saved; lower the learning rates, and continue "
                f"from the last checkpoint in {output_dir}"
            )


def check_ranks(model: nn.Module, masks: Masks | None, step: int, world: World) -> None:
    """Raises TrainingError when cut-off, masks, scores or weights are not the same on every rank, bit for bit."""
    tensors = dict(model.named_parameters())
    tensors |= {f"{name}.mask": mask for name, mask in masks.by_layer.items()} if masks else {}
    own = {
        name: hashlib.sha256(tensor.detach().cpu().numpy()).hexdigest()
        for name, tensor in tensors.items()
    }
    ranks = world.gather(own | {"global cut-off": masks and masks.cutoff})
    for name in ranks[0]:
        if other := next(
            (rank for rank, values in enumerate(ranks) if values[name] != ranks[0][name]), None
        ):
            raise TrainingError(
                f"--check_ranks: after update {step}, {name} of rank {other} is not that of rank 0"
            )
