"""Fine-prune (or fine-tune) an encoder, such as BERT, on SQuAD v1.1 or v2.0, and evaluate it.

Movement pruning towards 15% of the encoder's weights, as in the paper:

    python masked_run_squad.py --model_type masked_bert --model_name_or_path bert-base-uncased \\
        --data_dir SQUAD --train_file train-v1.1.json --predict_file dev-v1.1.json \\
        --output_dir OUT --do_train --do_eval --do_lower_case --per_gpu_train_batch_size 16 \\
        --num_train_epochs 10 --learning_rate 3e-5 --mask_scores_learning_rate 1e-2 \\
        --warmup_steps 5400 --initial_threshold 1 --final_threshold 0.15 --initial_warmup 1 \\
        --final_warmup 2 --pruning_method topK

The dense teacher: --model_type bert. Several GPUs: torchrun --nproc_per_node 8 masked_run_squad.py
Without --data_dir and files, SQuAD comes from the hub.
"""

import argparse
import logging
from pathlib import Path

import torch
from torch.nn import functional as F

from emmental.data import squad_answers, squad_features, squad_read
from emmental.data.metrics import squad_metrics
from emmental.data.padding import padding_of
from emmental.data.reading import take_first
from emmental.system.errors import UserError
from emmental.system.files import write_json
from emmental.training import run
from emmental.training.flags import make_parser
from emmental.training.parser import Parser, number
from emmental.training.task import Task

logger = logging.getLogger(__name__)

PADDING_LOGIT = -1e9


class Squad(Task):
    """SQuAD v1.1 and v2.0: an answer is a span of a context."""

    head, labels = "QuestionAnswering", 2
    max_seq_length, logging_steps, save_steps = 384, 500, 500
    result_files = (
        "eval_results.*",
        "predictions_*.json",
        "nbest_predictions_*.json",
        "null_odds_*.json",
    )

    # fmt: off
    def add_arguments(self, parser):
        add = parser.add_argument_group("SQuAD").add_argument
        count = number(int, at_least=1)
        add("--data_dir", help="folder of the SQuAD JSON files")
        add("--train_file", help="training file (default: train-v1.1.json or train-v2.0.json)")
        add("--predict_file", help="evaluation file (default: dev-v1.1.json or dev-v2.0.json)")
        add("--version_2_with_negative", action="store_true",
            help="SQuAD v2.0: some questions have no answer")
        add("--null_score_diff_threshold", type=number(float), default=0.0,
            help="v2.0: predict no answer if its score exceeds the best answer's by more than this")
        add("--doc_stride", type=count, default=128,
            help="tokens between the starts of the windows over a long context")
        add("--max_query_length", type=count, default=64,
            help="longest question in tokens; longer ones are cut")
        add("--n_best_size", type=count, default=20,
            help="predictions per question in nbest_predictions_.json")
        add("--max_answer_length", type=count, default=30, help="longest answer in tokens")
        add("--verbose_logging", action="store_true",
            help="log one feature, and every skipped question")
        add("--lang_id", default=None, help=argparse.SUPPRESS)
    # fmt: on

    @property
    def data(self):
        return f"SQuAD v{'2.0' if self.v2 else '1.1'}"

    @property
    def dataset(self):
        return squad_read.HUB_NAMES[self.v2]

    def check(self, args):
        problems = []
        for split, file in data_files(args).items():
            if file and not file.is_file():
                problems.append(f"--{split}_file: there is no file {file}")
            elif not file and (args.train_file or args.predict_file):
                problems.append(
                    f"--{split}_file is missing: give it, or --data_dir (SQuAD comes from the hub "
                    "if no file is given)"
                )
        return problems

    def load_examples(self, args, checkpoint):
        self.v2 = args.version_2_with_negative
        files, self.examples = data_files(args), {}
        for split, limit in self.splits(args, ["predict"]).items():
            file, training = files[split], split == "train"
            if file:
                rows = squad_read.read_examples(file, self.v2, not training, args.cache_dir)
            else:
                hub_split = "train" if training else "validation"
                rows = squad_read.load_hub_examples(hub_split, self.v2, args.cache_dir)
            self.examples[split] = take_first(rows, limit)
        if args.do_train:
            self.examples["train"], skipped = squad_features.drop_misaligned(self.examples["train"])
            for reason, ids in skipped.items():
                shown = ", ".join(ids if args.verbose_logging else ids[:5])
                logger.warning(
                    f"skipped {len(ids)} training questions, {reason}: {shown} "
                    "(--verbose_logging lists all)"
                )
            if not len(self.examples["train"]):
                raise UserError("no training question is usable: see the warning above")

    def make_features(self, args, tokenizer, model):
        self.padding = padding_of(tokenizer, model)
        search = ("n_best_size", "max_answer_length", "null_score_diff_threshold")
        self.search = {name: getattr(args, name) for name in search}
        sizes = ("max_seq_length", "doc_stride", "max_query_length", "overwrite_cache")
        options = {name: getattr(args, name) for name in sizes}
        features = {
            split: squad_features.build_features(
                examples, tokenizer, training=split == "train", **options
            )
            for split, examples in self.examples.items()
        }
        self.set_features(features)
        if args.verbose_logging and self.train_set:
            logger.info("first feature: %s", tokenizer.decode(self.train_set[0]["input_ids"]))

    def collate(self, features):
        return squad_features.collate(features, **self.padding)

    def logits(self, outputs, batch):
        return span_logits(outputs, batch)

    def loss(self, logits, batch):
        return span_loss(logits, batch)

    def score(self, split, logits, step, output_dir):
        examples = self.examples[split]
        suffix = "" if step is None else step
        options = {"version_2_with_negative": self.v2}
        predictions, nbest, null_odds = squad_answers.postprocess(
            examples, self.evaluation_sets[split], *zip(*logits), **self.search, **options
        )
        write_json(output_dir / f"predictions_{suffix}.json", predictions)
        write_json(output_dir / f"nbest_predictions_{suffix}.json", nbest)
        if self.v2:
            write_json(output_dir / f"null_odds_{suffix}.json", null_odds)
        if all(map(squad_read.is_unanswerable, examples["answers"])):
            logger.warning("no question has an answer: nothing to score")
            return {}
        return squad_metrics(examples, predictions, null_odds, **options)


def data_files(args: argparse.Namespace) -> dict[str, Path | None]:
    """The file of each split that the arguments ask for; None if it comes from the hub."""
    version = "v2.0" if args.version_2_with_negative else "v1.1"
    usual = {"train": f"train-{version}.json", "predict": f"dev-{version}.json"}
    files = {}
    for split in Task.splits(args, ["predict"]):
        file = getattr(args, f"{split}_file") or (args.data_dir and usual[split])
        files[split] = Path(args.data_dir or "") / file if file else None
    return files


def span_logits(outputs, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end logits in float32, with padding masked: the loss does not depend on it."""
    padding = batch["attention_mask"] == 0
    start = outputs.start_logits.float().masked_fill(padding, PADDING_LOGIT)
    return start, outputs.end_logits.float().masked_fill(padding, PADDING_LOGIT)


def span_loss(logits: tuple[torch.Tensor, torch.Tensor], batch: dict) -> torch.Tensor:
    """Mean of the cross-entropies of start and end."""
    start, end = logits
    start_loss = F.cross_entropy(start, batch["start_positions"])
    return (start_loss + F.cross_entropy(end, batch["end_positions"])) / 2


def get_parser() -> Parser:
    return make_parser(Squad(), __doc__)


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    return run.main(Squad(), __doc__, argv)


if __name__ == "__main__":
    main()
