"""Fine-prune (or fine-tune) an encoder, such as BERT, on a GLUE task or your own.

Movement pruning towards 15% of the encoder's weights on MNLI:

    python masked_run_glue.py --model_type masked_bert --model_name_or_path bert-base-uncased \\
        --task_name mnli --data_dir GLUE/MNLI --output_dir OUT --do_train --do_eval \\
        --do_lower_case --per_gpu_train_batch_size 32 --num_train_epochs 6 --learning_rate 3e-5 \\
        --mask_scores_learning_rate 1e-2 --warmup_steps 12000 --initial_threshold 1 \\
        --final_threshold 0.15 --initial_warmup 1 --final_warmup 2 --pruning_method topK

The dense teacher: --model_type bert. Several GPUs: torchrun --nproc_per_node 8 masked_run_glue.py
Without --data_dir the task comes from the hub. --task_name custom reads your own train and dev
files (.tsv, .csv, .jsonl); --text_column, --text_pair_column and --label_column name the columns.
"""

import argparse
import functools

import numpy as np
from torch.nn import functional as F

from emmental.checkpoints.labels import checkpoint_labels
from emmental.data import glue
from emmental.data.glue_tasks import (
    CUSTOM,
    CUSTOM_ARGUMENTS,
    SUBMISSION_FILES,
    TASKS,
    custom_task,
    task_name,
)
from emmental.data.metrics import glue_metrics, mean_entropy
from emmental.data.padding import padding_of
from emmental.data.reading import name_outputs, take_first
from emmental.losses import distillation_loss, regression_distillation_loss
from emmental.system.errors import UserError
from emmental.system.files import write_text
from emmental.training import run
from emmental.training.flags import make_parser
from emmental.training.parser import Parser, choice
from emmental.training.task import Task


class Glue(Task):
    """The GLUE tasks and your own: a class, or a number, for a text or a pair of texts."""

    head = "SequenceClassification"
    max_seq_length, logging_steps, save_steps = 128, 50, 50
    result_files = ("eval_results.*", *SUBMISSION_FILES)

    # fmt: off
    def add_arguments(self, parser):
        add = parser.add_argument_group("GLUE").add_argument
        add("--task_name", type=lambda text: choice(*TASKS, CUSTOM)(task_name(text)), required=True,
            help=f"{', '.join(TASKS)} (any case), or {CUSTOM}; mnli-mm evaluates the mismatched "
                 "set only")
        add("--data_dir", help="folder of the task's files (default: the task comes from the hub)")
        add("--do_predict", action="store_true",
            help="write the predictions for the test set in GLUE's format")
        add("--text_column", default="text", help=f"{CUSTOM}: column of the (first) text")
        add("--text_pair_column", help=f"{CUSTOM}: column of the second text, for pairs")
        add("--label_column", default="label", help=f"{CUSTOM}: column of the label")
        add("--regression", action="store_true", help=f"{CUSTOM}: labels are numbers to predict")
    # fmt: on

    def check(self, args):
        custom_flags = sorted(args.given & set(CUSTOM_ARGUMENTS))
        if args.task_name == CUSTOM:
            problems = [f"--{name} is empty" for name in custom_flags if getattr(args, name) == ""]
            if not args.data_dir:
                problems.append("--task_name custom needs --data_dir")
            return problems
        problems = [f"--{name} is for --task_name {CUSTOM} only" for name in custom_flags]
        task = TASKS[args.task_name]
        if not task.evaluation_splits and (args.do_train or args.do_eval):
            problems.append(f"{task.name} has no labels: give --do_predict and a model of mnli")
        return problems

    def load_examples(self, args, checkpoint):
        if args.task_name == CUSTOM:
            self.task = read_custom_task(args, checkpoint)
        else:
            self.task = TASKS[args.task_name]
            self.data = f"GLUE {args.task_name}"
            self.dataset = glue.HUB_NAME
        self.labels = self.task.labels
        if args.data_dir:
            read = functools.partial(glue.read_examples, self.task, args.data_dir)
        else:
            read = functools.partial(glue.load_hub_examples, self.task)
        splits = self.splits(args, self.task.evaluation_splits, self.task.submissions)
        self.examples = {
            split: take_first(read(split, cache_dir=args.cache_dir), limit)
            for split, limit in splits.items()
        }

    def make_features(self, args, tokenizer, model):
        self.padding = padding_of(tokenizer, model)
        options = {name: getattr(args, name) for name in ("max_seq_length", "overwrite_cache")}
        features = {
            split: glue.build_features(examples, tokenizer, **options)
            for split, examples in self.examples.items()
        }
        self.set_features(features)

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
        suffix = split.removeprefix("dev") if len(self.task.evaluation_splits) > 1 else ""
        return {f"{name}{suffix}": value for name, value in metrics.items()}

    def submit(self, split, logits, output_dir):
        logits = np.stack([row for (row,) in logits])
        text = glue.submission(self.task, self.examples[split], logits)
        write_text(output_dir / self.task.submissions[split], text)


def read_custom_task(args: argparse.Namespace, checkpoint: str) -> glue.Task:
    """Your own task, with the labels of the training file, or else of the checkpoint's model.

    A model without names of labels takes those of the evaluation file.
    """
    text_columns = tuple(filter(None, (args.text_column, args.text_pair_column)))
    task = custom_task((), text_columns, args.label_column)
    if not args.do_train:
        labels = checkpoint_labels(checkpoint, args.cache_dir)
        if (len(labels) == 1) != args.regression:
            change = "drop" if args.regression else "add"
            raise UserError(f"{checkpoint} has {len(labels)} outputs: {change} --regression")
        if args.do_eval and not args.regression:
            path = glue.split_file(task, args.data_dir, "dev")
            labels = name_outputs(labels, tuple(glue.count_labels(path, task)), path)
    elif not args.regression:
        labels = glue.find_labels(glue.split_file(task, args.data_dir, "train"), task)
    return task if args.regression else custom_task(labels, text_columns, args.label_column)


def get_parser() -> Parser:
    return make_parser(Glue(), __doc__)


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    return run.main(Glue(), __doc__, argv)


if __name__ == "__main__":
    main()
