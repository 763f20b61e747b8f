"""What a script says of its task. `run` calls the methods in the order in which they stand here."""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..losses import distillation_loss


class Task:
    """A task: its flags, data, loss and metrics.

    head: the head of its models, one of `families.HEADS`. result_files: patterns of what its evaluation leaves in
    output_dir; a new run removes what an old one left. labels, set by `load_examples`: outputs of the head, how many or
    their names, none for a regression. train_set, evaluation_sets, test_sets, set by `make_features`: the features, with
    a column `length` (tokens), by split; what the flags do not ask for is None or empty.
    """

    head: str
    max_seq_length: int
    logging_steps: int
    save_steps: int
    result_files: tuple[str, ...] = ("eval_results.*",)

    labels: int | tuple[str, ...]
    train_set: Dataset | None = None
    evaluation_sets: dict[str, Dataset] = {}
    test_sets: dict[str, Dataset] = {}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the task's own flags."""

    def check(self, args: argparse.Namespace, given: set[str]) -> list[str]:
        """Every problem that the task has with the arguments, one line each. `given`: those on the command line."""
        return []

    def load_examples(self, args: argparse.Namespace, source: str) -> None:
        """Read the examples of the splits that the arguments ask for. source: the model, for what its labels say."""
        raise NotImplementedError

    def make_features(
        self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> None:
        """Turn the examples into features for the model."""
        raise NotImplementedError

    def collate(self, features: list[dict]) -> dict[str, Tensor]:
        """A batch of features as tensors (batch, ...): the model's inputs, and what the loss needs besides."""
        raise NotImplementedError

    def logits(self, outputs, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The logits (batch, ...) of a model's outputs, in float32."""
        return (outputs.logits.float(),)

    def loss(self, logits: tuple[Tensor, ...], batch: dict[str, Tensor]) -> Tensor:
        """The loss, a mean over the examples of the batch, or over what `weight` counts."""
        raise NotImplementedError

    # weight(batch) -> float: what a batch weighs in the mean of an update. None: as much as it has examples. A task whose
    # loss is a mean over something else (tokens) defines the method, and pays an exchange between the ranks per update.
    weight = None

    def distillation_loss(
        self,
        student: tuple[Tensor, ...],
        teacher: tuple[Tensor, ...],
        batch: dict[str, Tensor],
        temperature: float,
    ) -> Tensor:
        """The loss that follows the teacher's logits, a mean over what `loss` is a mean over."""
        return distillation_loss(student, teacher, temperature)

    def score(
        self, split: str, logits: list[tuple[np.ndarray, ...]], step: int | None, output_dir: Path
    ) -> dict[str, float]:
        """Metrics of an evaluation split, whose predictions are written. step: of a checkpoint, None for the final model."""
        raise NotImplementedError

    def submit(self, split: str, logits: list[tuple[np.ndarray, ...]], output_dir: Path) -> None:
        """Write the predictions of a test split."""
        raise NotImplementedError
