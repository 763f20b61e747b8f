"""Prediction and evaluation, of the final model and of checkpoints."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from ..errors import UserError
from ..modules.masks import masked
from .batches import evaluation_batches
from .distributed import World
from .passes import forward
from .runlog import progress_bar
from .settings import Precision
from .task import Task


@dataclass(frozen=True)
class Predictor:
    """Predicts data sets with a model of the task.

    batch_size: examples of a batch on each rank. prepare: what makes of a model a faster one with the same outputs
    (`--sparse_inference`), None for nothing; ValueError says why it cannot.
    """

    task: Task
    world: World
    precision: Precision
    batch_size: int
    num_workers: int
    output_dir: Path
    prepare: Callable[[nn.Module], nn.Module] | None = None

    @torch.no_grad()
    def predict(self, model: nn.Module, dataset: Dataset) -> list[tuple[np.ndarray, ...]] | None:
        """Logits of every example, in the order of `dataset`, as tuples of float32 arrays; None but on rank 0.

        The ranks share the examples out. Masks are found once, before the first batch; so is what `prepare` makes.
        Raises UserError when logits are not finite.
        """
        model.to(self.world.device).eval()
        if self.prepare:
            try:
                model = self.prepare(model)
            except ValueError as error:
                raise UserError(f"--sparse_inference: {error}") from error
        lengths = np.asarray(dataset["length"])
        batches = evaluation_batches(lengths, self.batch_size, self.world.rank, self.world.size)
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=self.task.collate, num_workers=self.num_workers,
                            generator=torch.Generator())  # fmt: skip
        results = []
        numbered = zip(batches, loader, strict=True)
        bar = progress_bar(
            self.world, iterable=numbered, total=len(batches), desc="evaluating", unit="batch"
        )
        with bar, masked(model):
            for indices, batch in bar:
                batch = {name: tensor.to(self.world.device) for name, tensor in batch.items()}
                outputs = forward(self.task, model, batch, self.precision, self.world.device)
                logits = [tensor.float().cpu().numpy() for tensor in outputs]
                results += [
                    (index, tuple(part[row] for part in logits))
                    for row, index in enumerate(indices)
                ]
        gathered = self.world.gather(results)
        if not self.world.is_main:
            return None
        ordered = [
            logits for _, logits in sorted(itertools.chain(*gathered), key=lambda item: item[0])
        ]
        if not all(np.isfinite(part).all() for logits in ordered for part in logits):
            raise UserError("the outputs of the model are not finite: its training had diverged")
        return ordered

    def evaluate(self, model: nn.Module, step: int | None = None) -> dict[str, float]:
        """Metrics of every evaluation split; {} but on rank 0. step: of a checkpoint, None for the final model."""
        results = {}
        for split, features in self.task.evaluation_sets.items():
            logits = self.predict(model, features)
            if self.world.is_main:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                results |= self.task.score(split, logits, step, self.output_dir)
        return results

    def submit(self, model: nn.Module) -> None:
        """Write the predictions of every test split."""
        for split, features in self.task.test_sets.items():
            logits = self.predict(model, features)
            if self.world.is_main:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                self.task.submit(split, logits, self.output_dir)
