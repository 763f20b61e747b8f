"""Fine-prune (or fine-tune) BERT on a GLUE task or on a task of one's own, evaluate it, predict its test set.

Movement pruning towards 15% of the encoder's weights on MNLI:

    python masked_run_glue.py --model_type masked_bert --model_name_or_path bert-base-uncased \\
        --task_name mnli --data_dir GLUE/MNLI --output_dir OUT \\
        --do_train --do_eval --do_lower_case --per_gpu_train_batch_size 32 --num_train_epochs 6 \\
        --learning_rate 3e-5 --mask_scores_learning_rate 1e-2 --warmup_steps 12000 \\
        --initial_threshold 1 --final_threshold 0.15 --initial_warmup 1 --final_warmup 2 --pruning_method topK

The dense teacher: --model_type bert. Several GPUs: torchrun --nproc_per_node 8 masked_run_glue.py ...
Without --data_dir the task comes from the hub. --task_name custom takes train and dev files of any task
(.tsv, .csv, .jsonl) whose columns --text_column, --text_pair_column and --label_column name.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from torch.nn import functional as F

from emmental.data import glue, glue_tasks
from emmental.data.features import padding_of
from emmental.data.metrics import glue_metrics, mean_entropy
from emmental.errors import UserError
from emmental.files import write_text
from emmental.inference import sparsify
from emmental.loading import checkpoint_labels
from emmental.losses import distillation_loss, regression_distillation_loss
from emmental.training import run
from emmental.training.args import make_parser
from emmental.training.parser import Parser
from emmental.training.task import Task

logger = logging.getLogger(__name__)

CUSTOM_ARGUMENTS = ("text_column", "text_pair_column", "label_column", "regression")


class Glue(Task):
    """The nine GLUE tasks, and tasks of one's own: a class, or a number, for a text or a pair of texts."""

    head = "SequenceClassification"
    max_seq_length, logging_steps, save_steps = 128, 50, 50
    result_files = ("eval_results.*", *glue_tasks.SUBMISSION_FILES)

    def add_arguments(self, parser):
        # fmt: off
        add = parser.add_argument_group("GLUE").add_argument
        add("--task_name", type=task_name, required=True,
            help=f"{', '.join(glue_tasks.TASKS)} (in any case), or {glue_tasks.CUSTOM}; mnli-mm evaluates the mismatched set alone")
        add("--data_dir", help="folder of the task's files (default: the task comes from the hub)")
        add("--do_predict", action="store_true", help="write the predictions for the test set, as GLUE takes them")
        add("--text_column", default="text", help=f"{glue_tasks.CUSTOM}: column of the text, or of the first of a pair")
        add("--text_pair_column", help=f"{glue_tasks.CUSTOM}: column of the second text, where there are pairs")
        add("--label_column", default="label", help=f"{glue_tasks.CUSTOM}: column of the label")
        add("--regression", action="store_true", help=f"{glue_tasks.CUSTOM}: the labels are numbers to be approximated")

        # fmt: on

    def check(self, args, given):
        problems = []
        if args.task_name == glue_tasks.CUSTOM:
            if not args.data_dir:
                problems.append(
                    f"--task_name {glue_tasks.CUSTOM} needs --data_dir: the folder of its train and dev files"
                )
            problems += [
                f"--{name} is empty: is its variable set?"
                for name in CUSTOM_ARGUMENTS
                if getattr(args, name) == ""
            ]
        else:
            task = glue_tasks.TASKS[args.task_name]
            for name in sorted(given & set(CUSTOM_ARGUMENTS)):
                problems.append(
                    f"--{name} is for --task_name {glue_tasks.CUSTOM}; the columns of {task.name} are known"
                )
            if not task.evaluation_splits and (args.do_train or args.do_eval):
                problems.append(
                    f"{task.name} has a test set only: give --do_predict, with a model fine-tuned on mnli"
                )
            if task.is_regression and "temperature" in given:
                logger.warning(
                    "--temperature: no effect in a regression, whose teacher is followed in the squared error"
                )
        if args.data_dir and not Path(args.data_dir).is_dir():
            problems.append(f"--data_dir {args.data_dir} is no folder")
        return problems

    def load_examples(self, args, source):
        own = args.task_name == glue_tasks.CUSTOM
        self.task, self.examples = read_custom_task(args, source) if own else read_task(args)
        self.labels = self.task.labels

    def make_features(self, args, tokenizer, model):
        self.padding = padding_of(tokenizer, model)
        options = {name: getattr(args, name) for name in ("max_seq_length", "overwrite_cache")}
        features = {
            split: glue.build_features(rows, tokenizer, num_proc=args.threads, **options)
            for split, rows in self.examples.items()
        }
        self.train_set = features.get("train")
        self.evaluation_sets = {
            split: features[split] for split in self.task.evaluation_splits if split in features
        }
        self.test_sets = {
            split: features[split] for split in self.task.submissions if split in features
        }

    def collate(self, features):
        return glue.collate(features, **self.padding)

    def loss(self, logits, batch):
        if self.task.is_regression:
            return F.mse_loss(logits[0].squeeze(-1), batch["labels"])
        return F.cross_entropy(logits[0], batch["labels"])

    def distillation_loss(self, student, teacher, batch, temperature):
        if self.task.is_regression:
            return regression_distillation_loss(student, teacher)
        return distillation_loss(student, teacher, temperature)

    def score(self, split, logits, step, output_dir):
        logits = np.stack([row for (row,) in logits])
        metrics = glue_metrics(self.task, logits, np.asarray(self.examples[split]["label"]))
        if not self.task.is_regression:
            metrics["entropy"] = mean_entropy(logits)
        kind = split.removeprefix("dev") if len(self.task.evaluation_splits) > 1 else ""
        return {name + kind: value for name, value in metrics.items()}

    def submit(self, split, logits, output_dir):
        logits = np.stack([row for (row,) in logits])
        write_text(
            output_dir / self.task.submissions[split],
            glue.submission(self.task, self.examples[split], logits),
        )


def task_name(text: str) -> str:
    """An argparse type: the canonical name of a task."""
    try:
        return (
            glue_tasks.CUSTOM
            if text.lower() == glue_tasks.CUSTOM
            else glue_tasks.find_task(text).name
        )
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_task(args: argparse.Namespace) -> tuple[glue_tasks.Task, dict]:
    """A GLUE task, and the examples of each split that the arguments need."""
    task = glue_tasks.TASKS[args.task_name]
    splits = ["train"] if args.do_train else []
    splits += task.evaluation_splits if args.do_eval or args.evaluate_during_training else ()
    splits += task.submissions if args.do_predict else ()
    if args.data_dir:
        return task, {
            split: glue.read_examples(task, args.data_dir, split, args.cache_dir)
            for split in splits
        }
    return task, {split: glue.load_hub_examples(task, split, args.cache_dir) for split in splits}


def read_custom_task(args: argparse.Namespace, source: str) -> tuple[glue_tasks.Task, dict]:
    """A task of one's own, and its examples. The training file says what the labels are, else the model `source`."""
    labels, examples = None, {}
    if not args.do_train:
        labels = checkpoint_labels(source, args.cache_dir)
        if (len(labels) == 1) != args.regression:
            raise UserError(
                f"{source} has {len(labels)} outputs: {'add' if len(labels) == 1 else 'drop'} --regression"
            )
    wanted = {
        "train": args.do_train,
        "dev": args.do_eval or args.evaluate_during_training,
        "test": args.do_predict,
    }
    for split, file in glue.custom_files(
        args.data_dir, [split for split in wanted if wanted[split]]
    ).items():
        examples[split], labels = glue.read_custom_examples(
            file,
            text_column=args.text_column,
            text_pair_column=args.text_pair_column,
            label_column=None if split == "test" else args.label_column,
            labels=labels,
            regression=args.regression,
            cache_dir=args.cache_dir,
        )
    return glue_tasks.custom_task(labels), examples


def get_parser() -> Parser:
    return make_parser(Glue(), __doc__)


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    return run.main(Glue(), __doc__, argv, sparsify)


if __name__ == "__main__":
    main()
