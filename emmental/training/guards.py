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
from ..system.errors import Interrupted, TrainingError, handled_signals
from .distributed import World
from .state import TrainingState

logger = logging.getLogger(__name__)

SAME_SIGNAL = 3.0  # seconds: torchrun passes on a signal that the process group also got
PATIENCE_FP16 = 50  # updates in a row that the gradient scaler may skip
EXCHANGE = 4  # updates after which the ranks tell each other of signals


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT inside the block. A second, later signal interrupts at once."""
    signals = []
    first = 0.0

    def note(number: int, frame) -> None:
        nonlocal first
        if not signals:
            first = time.monotonic()
            logger.warning("stopping after this update, with a checkpoint")
        elif time.monotonic() - first >= SAME_SIGNAL:
            raise KeyboardInterrupt
        signals.append(number)

    with handled_signals(note, signal.SIGTERM, signal.SIGINT):
        yield signals


def agreed_signal(signals: list[int], step: int, world: World) -> int:
    """The signal to any rank that stops all ranks after `step` updates; or 0."""
    if world.size > 1 and step % EXCHANGE:
        return 0
    return world.largest(signals[0] if signals else 0)


def interruption(number: int, step: int, total: int) -> Interrupted:
    """The error that ends a run after a signal."""
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after update {step} of {total}: "
        "give the same command again with --resume_from_checkpoint latest to continue",
        number,
    )


class GradientGuard:
    """Stops a run with a non-finite gradient; with a gradient scaler, after many in a row.

    skipped: skipped updates in a row. loss: that of the last update, on this rank.
    """

    def __init__(self, scaled: bool, world: World):
        self.patience = PATIENCE_FP16 if scaled else 0
        self.world = world
        self.skipped = 0
        self.loss = math.nan

    def skips(self, step: int, norms: list[Tensor], losses: dict[str, Tensor]) -> bool:
        """Whether the gradient scaler skips this update. Raises TrainingError to stop.

        norms: of the gradients. The host waits for the device here, once in each update.
        """
        self.loss, *values = torch.stack([losses["loss"].float(), *norms]).tolist()
        if all(map(math.isfinite, values)):
            self.skipped = 0
            return False
        self.skipped += 1
        if self.skipped <= self.patience:
            return True
        parts = {name: value.item() for name, value in losses.items() if name != "loss"}
        causes = [
            f"{name} = {value} on rank {rank}"
            for rank, parts in enumerate(self.world.gather(parts))
            for name, value in parts.items()
            if not math.isfinite(value)
        ]
        cause = ", ".join(causes) or "the gradient is not finite, though every part of the loss is"
        series = f" for {self.skipped} updates in a row" if self.patience else ""
        advice = "lower the learning rates" + " or drop --fp16" * bool(self.patience)
        raise TrainingError(
            f"update {step + 1}{series}: {cause}: training stops; {advice}, and continue from the "
            "last checkpoint"
        )


def check_ranks(state: TrainingState, masks: Masks | None) -> None:
    """Raises TrainingError if cut-off, masks or parameters differ between ranks in any bit."""
    tensors = state.model.state_dict()
    if masks:
        tensors |= {f"{name}.mask": mask for name, mask in masks.by_layer.items()}
    digests = {"global cut-off": state.cutoff}
    for name, tensor in tensors.items():
        digests[name] = hashlib.sha256(tensor.detach().cpu().numpy()).hexdigest()
    first, *others = state.world.gather(digests)
    for rank, digests in enumerate(others, 1):
        for name, digest in digests.items():
            if digest != first[name]:
                raise TrainingError(
                    f"--check_ranks: after update {state.step}, {name} of rank {rank} is not that "
                    "of rank 0"
                )
