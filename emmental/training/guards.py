"""What stops a training before it does harm: signals, non-finite values, ranks that differ."""

import hashlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..modules.masks import Masks
from ..system.errors import SAME_SIGNAL, Interrupted, TrainingError, handled_signals
from .distributed import World
from .state import TrainingState

logger = logging.getLogger(__name__)

PATIENCE_FP16 = 50  # updates in a row that the gradient scaler may skip
EXCHANGE = 4  # updates after which the ranks tell each other of signals


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT inside the block; one that follows later interrupts at once."""
    numbers, first = [], 0.0

    def note(number: int, frame) -> None:
        nonlocal first
        if not numbers:
            first = time.monotonic()
            logger.warning("stopping after this update, with a checkpoint")
        elif time.monotonic() - first >= SAME_SIGNAL:
            raise KeyboardInterrupt
        numbers.append(number)

    with handled_signals(note, signal.SIGTERM, signal.SIGINT):
        yield numbers


def agreed_signal(signals: list[int], step: int, world: World) -> int:
    """The signal that stops all ranks after `step` updates, of any of them; or 0."""
    return 0 if world.size > 1 and step % EXCHANGE else world.largest(signals[0] if signals else 0)


def interruption(number: int, step: int, total: int) -> Interrupted:
    """The error that ends a run after a signal."""
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after update {step} of {total}: "
        "give the same command again with --resume_from_checkpoint latest to continue",
        number,
    )


class GradientGuard:
    """Stops a run with a non-finite gradient; with a gradient scaler, after many in a row.

    loss: that of the last update, on this rank.
    """

    def __init__(self, scaled: bool, world: World):
        self.patience, self.world = PATIENCE_FP16 if scaled else 0, world
        self.skipped, self.loss = 0, math.nan  # skipped: updates in a row

    def skips(self, step: int, norms: list[Tensor], losses: dict[str, Tensor]) -> bool:
        """Whether the gradient scaler skips this update. Raises TrainingError to stop.

        norms: of the gradients. Here the host waits for the device, once in an update.
        """
        self.loss, *values = torch.stack([losses["loss"].float(), *norms]).tolist()
        self.skipped = 0 if all(map(math.isfinite, values)) else self.skipped + 1
        if self.skipped <= self.patience:
            return self.skipped > 0
        values = {name: value.item() for name, value in losses.items() if name != "loss"}
        found = [
            f"{name} = {value} on rank {rank}"
            for rank, own in enumerate(self.world.gather(values))
            for name, value in own.items()
            if not math.isfinite(value)
        ] or ["the gradient is not finite, though every part of the loss is"]
        series = f" for {self.skipped} updates in a row" if self.patience else ""
        raise TrainingError(
            f"update {step + 1}{series}: {', '.join(found)}: training stops; lower the learning "
            "rates or drop --fp16, and continue from the last checkpoint"
        )


def check_ranks(state: TrainingState, masks: Masks | None) -> None:
    """Raises TrainingError if cut-off, masks or parameters differ between ranks in any bit."""
    own = {"global cut-off": state.cutoff}
    tensors = state.model.state_dict()
    tensors |= {f"{name}.mask": mask for name, mask in masks.by_layer.items()} if masks else {}
    for name, tensor in tensors.items():
        own[name] = hashlib.sha256(tensor.detach().cpu().numpy()).hexdigest()
    first, *others = state.world.gather(own)
    for rank, values in enumerate(others, 1):
        for name in own:
            if values[name] != first[name]:
                raise TrainingError(
                    f"--check_ranks: after update {state.step}, {name} of rank {rank} is not that "
                    "of rank 0"
                )
