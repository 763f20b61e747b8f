"""Prediction and evaluation, of the final model and of checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..modules.masks import masked
from ..system.errors import UserError
from .batches import evaluation_batches, load_batches
from .distributed import World
from .passes import forward
from .runlog import progress_bar
from .task import Task


@dataclass(frozen=True)
class Predictor:
    """Predicts data sets with a model of the task.

    batch_size: examples of a batch on each rank. prepare: makes a faster model with the same
    outputs, or raises ValueError; None to use the model itself.
    """

    task: Task
    world: World
    precision: torch.dtype | None
    batch_size: int
    num_workers: int
    output_dir: Path
    prepare: Callable[[nn.Module], nn.Module] | None = None

    @torch.no_grad()
    def predict(self, model: nn.Module, dataset: Dataset) -> list[tuple[np.ndarray, ...]] | None:
        """Logits of every example, in order, as tuples of float32 arrays; None except on rank 0.

        The ranks share the examples. Raises UserError for logits that are not finite.
        """
        model.to(self.world.device).eval()
        if self.prepare:
            try:
                model = self.prepare(model)
            except ValueError as error:
                raise UserError(f"--sparse_inference: {error}") from error
        lengths = np.asarray(dataset["length"])
        batches = evaluation_batches(lengths, self.batch_size, self.world.rank, self.world.size)
        loader = load_batches(self.task, dataset, batches, self.num_workers, self.world.device)
        steps = {"iterable": loader, "total": len(batches)}
        bar = progress_bar(self.world, **steps, desc="evaluating", unit="batch")
        results = {}
        with bar, masked(model):
            for examples, batch in zip(batches, bar, strict=True):
                logits = forward(self.task, model, batch, self.precision)
                rows = zip(*(tensor.float().cpu().numpy() for tensor in logits), strict=True)
                results |= dict(zip(examples, rows, strict=True))
        parts = self.world.gather(results)
        if not self.world.is_main:
            return None
        results = {index: logits for part in parts for index, logits in part.items()}
        if not all(np.isfinite(part).all() for logits in results.values() for part in logits):
            raise UserError("the outputs of the model are not finite: train it again")
        return [results[index] for index in range(len(dataset))]

    def evaluate(self, model: nn.Module, step: int | None = None) -> dict[str, float]:
        """Metrics of every evaluation split; {} except on rank 0. step: None for the final one."""
        results = {}
        for split, features in self.task.evaluation_sets.items():
            logits = self.predict(model, features)
            if self.world.is_main:
                results |= self.task.score(split, logits, step, self.output_dir)
        return results

    def submit(self, model: nn.Module) -> None:
        """Write the predictions of every test split."""
        for split, features in self.task.test_sets.items():
            logits = self.predict(model, features)
            if self.world.is_main:
                self.task.submit(split, logits, self.output_dir)
