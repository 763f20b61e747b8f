"""Fine-prune (or fine-tune) BERT on SQuAD v1.1 or v2.0, and evaluate it.

Movement pruning towards 15% of the encoder's weights, as in the paper:

    python masked_run_squad.py --model_type masked_bert --model_name_or_path bert-base-uncased \\
        --data_dir SQUAD --train_file train-v1.1.json --predict_file dev-v1.1.json --output_dir OUT \\
        --do_train --do_eval --do_lower_case --per_gpu_train_batch_size 16 --num_train_epochs 10 \\
        --learning_rate 3e-5 --mask_scores_learning_rate 1e-2 --warmup_steps 5400 \\
        --initial_threshold 1 --final_threshold 0.15 --initial_warmup 1 --final_warmup 2 --pruning_method topK

The dense teacher: --model_type bert. Several GPUs: torchrun --nproc_per_node 8 masked_run_squad.py ...
Without --data_dir and files, SQuAD comes from the hub.
"""

import argparse
import logging
from pathlib import Path

import torch
from torch.nn import functional as F

from emmental.data import squad
from emmental.data.features import padding_of
from emmental.data.metrics import squad_metrics
from emmental.errors import UserError
from emmental.files import write_json
from emmental.inference import sparsify
from emmental.training import run
from emmental.training.args import make_parser
from emmental.training.parser import Parser, number
from emmental.training.task import Task

logger = logging.getLogger(__name__)

PADDING_LOGIT = -1e9


class Squad(Task):
    """SQuAD v1.1 and v2.0: spans of a context that answer a question."""

    head, labels = "QuestionAnswering", 2
    max_seq_length, logging_steps, save_steps = 384, 500, 500
    result_files = (
        "eval_results.*",
        "predictions_*.json",
        "nbest_predictions_*.json",
        "null_odds_*.json",
    )

    def add_arguments(self, parser):
        # fmt: off
        add = parser.add_argument_group("SQuAD").add_argument
        add("--data_dir", help="folder of the SQuAD JSON files")
        add("--train_file", help="training file (default in --data_dir: train-v1.1.json or train-v2.0.json)")
        add("--predict_file", help="evaluation file (default in --data_dir: dev-v1.1.json or dev-v2.0.json)")
        add("--version_2_with_negative", action="store_true", help="SQuAD v2.0: some questions have no answer")
        add("--null_score_diff_threshold", type=number(float), default=0.0,
            help="v2.0: predict no answer when its score exceeds the best answer's by more than this")
        count = number(int, at_least=1)
        add("--doc_stride", type=count, default=128, help="tokens by which the windows over a long context advance")
        add("--max_query_length", type=count, default=64, help="longest question in tokens; longer ones are cut")
        add("--n_best_size", type=count, default=20, help="predictions per question in nbest_predictions_.json")
        add("--max_answer_length", type=count, default=30, help="longest answer in tokens")
        add("--verbose_logging", action="store_true", help="log one feature, and every skipped question")
        add("--lang_id", default=None, help=argparse.SUPPRESS)

        # fmt: on

    def check(self, args, given):
        files = {split: data_file(args, split) for split in splits(args)}
        return [
            f"--{split}_file: there is no file {file}"
            for split, file in files.items()
            if file and not file.is_file()
        ]

    def load_examples(self, args, source):
        self.v2 = args.version_2_with_negative
        self.examples = {split: read_examples(args, split) for split in splits(args)}
        if args.do_train:
            self.examples["train"], skipped = squad.drop_misaligned(self.examples["train"])
            if skipped:
                shown = [
                    squad.quoted(id_) for id_ in (skipped if args.verbose_logging else skipped[:5])
                ]
                rest = "" if len(shown) == len(skipped) else ", ... (all with --verbose_logging)"
                logger.warning("%d training questions skipped, their answer_start does not match their text: %s%s",
                               len(skipped), ", ".join(shown), rest)  # fmt: skip
            if not len(self.examples["train"]):
                raise UserError("no training question is usable: see the warning above")

    def make_features(self, args, tokenizer, model):
        self.padding = padding_of(tokenizer, model)
        self.search = {
            name: getattr(args, name)
            for name in ("n_best_size", "max_answer_length", "null_score_diff_threshold")
        }
        sizes = ("max_seq_length", "doc_stride", "max_query_length", "overwrite_cache")
        options = {name: getattr(args, name) for name in sizes} | {"num_proc": args.threads}
        features = {
            split: squad.build_features(rows, tokenizer, training=split == "train", **options)
            for split, rows in self.examples.items()
        }
        self.train_set = features.pop("train", None)
        self.evaluation_sets = features
        if args.verbose_logging and self.train_set:
            logger.info("first feature: %s", tokenizer.decode(self.train_set[0]["input_ids"]))

    def collate(self, features):
        return squad.collate(features, **self.padding)

    def logits(self, outputs, batch):
        return span_logits(outputs, batch)

    def loss(self, logits, batch):
        return span_loss(logits, batch)

    def score(self, split, logits, step, output_dir):
        examples, prefix = self.examples[split], "" if step is None else step
        starts, ends = [start for start, _ in logits], [end for _, end in logits]
        predictions, nbest, null_odds = squad.postprocess(
            examples,
            self.evaluation_sets[split],
            starts,
            ends,
            version_2_with_negative=self.v2,
            **self.search,
        )
        write_json(output_dir / f"predictions_{prefix}.json", predictions)
        write_json(output_dir / f"nbest_predictions_{prefix}.json", nbest)
        if self.v2:
            write_json(output_dir / f"null_odds_{prefix}.json", null_odds)
        return squad_metrics(examples, predictions, null_odds, version_2_with_negative=self.v2)


def splits(args: argparse.Namespace) -> list[str]:
    """The splits that the arguments ask for: "train", "predict"."""
    wanted = {"train": args.do_train, "predict": args.do_eval or args.evaluate_during_training}
    return [split for split, is_wanted in wanted.items() if is_wanted]


def data_file(args: argparse.Namespace, split: str) -> Path | None:
    """The local file of a split; None when SQuAD comes from the hub."""
    name = getattr(args, f"{split}_file")
    if not name and not args.data_dir:
        return None
    version = "v2.0" if args.version_2_with_negative else "v1.1"
    return Path(args.data_dir or "") / (
        name or f"{'train' if split == 'train' else 'dev'}-{version}.json"
    )


def read_examples(args: argparse.Namespace, split: str):
    """The examples of a split, from its file or from the hub."""
    v2, file = args.version_2_with_negative, data_file(args, split)
    if file:
        return squad.read_examples(
            file, v2, unique_ids=split == "predict", cache_dir=args.cache_dir
        )
    return squad.load_hub_examples(
        "train" if split == "train" else "validation", v2, args.cache_dir
    )


def span_logits(outputs, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end logits in float32; padding is no candidate, so that the loss ignores how much there is."""
    padding = batch["attention_mask"] == 0
    return tuple(
        logits.float().masked_fill(padding, PADDING_LOGIT)
        for logits in (outputs.start_logits, outputs.end_logits)
    )


def span_loss(logits, batch) -> torch.Tensor:
    """Mean of the cross-entropies of start and end."""
    start, end = logits
    return (
        F.cross_entropy(start, batch["start_positions"])
        + F.cross_entropy(end, batch["end_positions"])
    ) / 2


def get_parser() -> Parser:
    return make_parser(Squad(), __doc__)


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    return run.main(Squad(), __doc__, argv, sparsify)


if __name__ == "__main__":
    main()
