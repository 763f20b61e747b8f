"""What a script defines: its task. `run` calls the methods in this order."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..losses import distillation_loss

Batch = dict[str, Tensor]
Logits = tuple[Tensor, ...]


class Task:
    """A task: its flags, data, loss and metrics.

    head: the head of the models, one of `families.HEADS`. result_files: patterns of the files that
    an evaluation writes to output_dir; a new run removes old ones. data, dataset: the name of the
    data, and their name on the hub, for the model card. labels, set by `load_examples`: the number
    or the names of the head's outputs; no names for a regression. train_set, evaluation_sets,
    test_sets: the features that `make_features` hands to `set_features`.
    """

    head: str
    max_seq_length: int
    logging_steps: int
    save_steps: int
    result_files: tuple[str, ...] = ("eval_results.*",)

    data: str = "your own data"
    dataset: str | None = None
    labels: int | tuple[str, ...]
    train_set: Dataset | None = None
    evaluation_sets: dict[str, Dataset] = {}
    test_sets: dict[str, Dataset] = {}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the task's own flags."""

    def check(self, args: argparse.Namespace) -> list[str]:
        """The task's problems with the arguments, one line each. `args.given`: the flags given."""
        return []

    def load_examples(self, args: argparse.Namespace, source: str) -> None:
        """Read the examples that the arguments ask for: see `splits`.

        source: the model, which has labels.
        """
        raise NotImplementedError

    @staticmethod
    def splits(
        args: argparse.Namespace,
        evaluation: Iterable[str] = ("dev",),
        tests: Iterable[str] = ("test",),
    ) -> dict[str, int | None]:
        """The splits that the arguments ask for, each with its greatest number of examples.

        None: all. evaluation, tests: the splits for --do_eval and for a task's --do_predict.
        """
        splits = {"train": args.max_train_samples} if args.do_train else {}
        if args.do_eval or args.evaluate_during_training:
            splits |= dict.fromkeys(evaluation, args.max_eval_samples)
        if getattr(args, "do_predict", False):
            splits |= dict.fromkeys(tests)
        return splits

    def make_features(
        self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> None:
        """Turn the examples into features for the model, and hand them to `set_features`."""
        raise NotImplementedError

    def set_features(self, features: dict[str, Dataset]) -> None:
        """Set the features of each split: train, test (or test_...), and those to evaluate.

        Features have a column `length` (tokens).
        """
        self.train_set = features.get("train")
        self.test_sets = {split: x for split, x in features.items() if split.startswith("test")}
        others = {"train", *self.test_sets}
        self.evaluation_sets = {split: x for split, x in features.items() if split not in others}

    def collate(self, features: list[dict]) -> Batch:
        """A batch as tensors (batch, ...): the inputs of the model and of the loss."""
        raise NotImplementedError

    def logits(self, outputs, batch: Batch) -> Logits:
        """The logits (batch, ...) of a model's outputs, in float32."""
        return (outputs.logits.float(),)

    def loss(self, logits: Logits, batch: Batch) -> Tensor:
        """The loss: a mean over the examples of the batch, or over what `weight` counts."""
        raise NotImplementedError

    # A method weight(batch) -> float, if the loss is a mean over something else than examples, such
    # as tokens: the batch's weight in the mean of an update. The ranks exchange it at each update.
    weight = None

    def distillation_loss(
        self, student: Logits, teacher: Logits, batch: Batch, temperature: float
    ) -> Tensor:
        """The loss between student and teacher, a mean as in `loss`."""
        return distillation_loss(student, teacher, temperature)

    def score(
        self, split: str, logits: list[tuple[np.ndarray, ...]], step: int | None, output_dir: Path
    ) -> dict[str, float]:
        """Write the predictions, return the metrics. step: a checkpoint's; None for the end."""
        raise NotImplementedError

    def submit(self, split: str, logits: list[tuple[np.ndarray, ...]], output_dir: Path) -> None:
        """Write the predictions of a test split."""
        raise NotImplementedError
