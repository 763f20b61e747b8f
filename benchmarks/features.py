"""The gain from real lengths: fast features, and batches padded to their longest example.

    python benchmarks/features.py squad --data_dir SQUAD --model bert-base-uncased
    python benchmarks/features.py sst-2 --data_dir GLUE/SST-2 --model bert-base-uncased

Features: our features and those of the Python tokenizer of transformers are made in turn, from the
same examples, in one process. Their ids are compared.

Epoch: two copies of the model are fine-tuned on the same examples, with alternating updates. One
trains on batches of similar lengths, as the scripts do, the other on random batches padded to
--max_seq_length, as the 2020 scripts did. The report has the time of an epoch and the metric after
that.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import report
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import masked_run_glue
import masked_run_squad
from emmental.checkpoints.loading import load_model
from emmental.checkpoints.tokenizer import load_tokenizer
from emmental.data import glue, glue_tasks, squad_answers, squad_features, squad_read
from emmental.data.metrics import glue_metrics, squad_metrics
from emmental.data.padding import padding_of
from emmental.models.inputs import MODEL_INPUTS
from emmental.schedule import learning_rate_factor
from emmental.system.errors import UserError
from emmental.training.batches import BatchPlan
from emmental.training.distributed import World, keep_freed_memory
from emmental.training.evaluate import Predictor
from emmental.training.optim import build_optimizer, set_learning_rates
from emmental.training.passes import forward


class Squad(masked_run_squad.Squad):
    """SQuAD v1.1: questions about contexts, in windows of 384 tokens that advance by 128."""

    length, stride, query, key_metric = 384, 128, 64, "f1"

    def __init__(self, args: argparse.Namespace):
        train, dev = find(args.data_dir, "train*.json"), find(args.data_dir, "dev*.json")
        self.train = squad_read.read_examples(train, False, unique_ids=False)
        self.dev = squad_read.read_examples(dev, False)

    def features(self, examples: Dataset, tokenizer, training: bool = True) -> Dataset:
        return squad_features.build_features(
            examples,
            tokenizer,
            max_seq_length=self.length,
            doc_stride=self.stride,
            max_query_length=self.query,
            training=training,
            overwrite_cache=True,
        )

    def python_features(self, examples: Dataset, tokenizer) -> list[list[int]]:
        """The ids of every window. A context is tokenized again for each of its questions."""
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        ids = tokenizer.convert_tokens_to_ids
        windows = []
        for example in examples:
            question = ids(tokenizer.tokenize(example["question"]))[: self.query]
            words = example["context"].split()
            context = ids([token for word in words for token in tokenizer.tokenize(word)])
            room = self.length - len(question) - 3
            last = max(0, len(context) - room)
            for begin in range(0, last + self.stride, self.stride):
                windows.append([cls, *question, sep, *context[begin : begin + room], sep])
        return windows

    def metric(self, features: Dataset, logits: list) -> float:
        starts, ends = zip(*logits, strict=True)
        predictions, _, _ = squad_answers.postprocess(
            self.dev,
            features,
            list(starts),
            list(ends),
            n_best_size=20,
            max_answer_length=30,
            version_2_with_negative=False,
            null_score_diff_threshold=0.0,
        )
        return squad_metrics(self.dev, predictions, version_2_with_negative=False)["f1"]


class Glue(masked_run_glue.Glue):
    """A classification task of GLUE, with at most 128 tokens."""

    length = 128

    def __init__(self, args: argparse.Namespace):
        self.task = glue_tasks.TASKS[glue_tasks.task_name(args.task)]
        if self.task.is_regression or not self.task.evaluation_splits:
            raise UserError(
                f"{args.task} is not a classification task with a development set: choose another"
            )
        self.key_metric = self.task.key_metric
        self.train = glue.read_examples(self.task, args.data_dir, "train")
        self.dev = glue.read_examples(self.task, args.data_dir, self.task.evaluation_splits[0])
        self.labels = self.task.labels

    def features(self, examples: Dataset, tokenizer, training: bool = True) -> Dataset:
        return glue.build_features(
            examples, tokenizer, max_seq_length=self.length, overwrite_cache=True
        )

    def python_features(self, examples: Dataset, tokenizer) -> list[list[int]]:
        ids = []
        for example in examples:
            texts = [text for text in (example["text_a"], example["text_b"]) if text is not None]
            encoded = tokenizer(*texts, truncation=True, max_length=self.length)
            ids.append(encoded["input_ids"])
        return ids

    def metric(self, features: Dataset, logits: list) -> float:
        stacked = np.stack([part for (part,) in logits])
        return glue_metrics(self.task, stacked, np.asarray(features["label"]))[self.key_metric]


def find(folder: str, pattern: str) -> Path:
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise UserError(f"--data_dir {folder} has no {pattern}")
    return files[0]


# ------------------------------------------------------------------------------------ features


def compare_features(
    task: Squad | Glue, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> dict:
    """Features per second with both tokenizers: medians over slices of the examples."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = tokenizer.get_vocab()
        file = Path(folder) / "vocab.txt"
        file.write_text("\n".join(sorted(vocabulary, key=vocabulary.get)), encoding="utf-8")
        # with the vocabulary and the case of the other
        slow = BertTokenizerLegacy(str(file), do_lower_case=tokenizer.do_lower_case)
    rates = {"ours": [], "python": []}
    same = total = 0
    for start in range(0, min(args.slices * args.slice, len(task.train)), args.slice):
        examples = task.train.select(range(start, min(start + args.slice, len(task.train))))
        begun = time.perf_counter()
        ours = task.features(examples, tokenizer)
        between = time.perf_counter()
        theirs = task.python_features(examples, slow)
        ended = time.perf_counter()
        rates["ours"].append(len(ours) / (between - begun))
        rates["python"].append(len(theirs) / (ended - between))
        same += sum(a == b for a, b in zip(ours["input_ids"], theirs, strict=True))
        total += len(theirs)
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["python"], strict=True))
    rates = {name: statistics.median(values) for name, values in rates.items()}
    return {"features": total, "same_ids": same, "ratio": ratio, "per_second": rates}


# ------------------------------------------------------------------------------------ epoch


class Learner:
    """A model in training with its own batches. fixed: pad all to this length (None: do not)."""

    def __init__(self, task: Squad | Glue, features: Dataset, tokenizer, fixed: int | None, args):
        self.task, self.features, self.fixed = task, features, fixed
        self.precision = torch.bfloat16 if args.bf16 else None
        lengths = np.asarray(features["length"])
        if fixed is not None:
            lengths = np.zeros_like(lengths)  # all alike: random batches
        self.plan = BatchPlan(lengths, args.batch, 1, args.seed)
        torch.manual_seed(args.seed)
        self.model = load_model(args.model, task.head, masked=False, labels=task.labels).train()
        task.padding = padding_of(tokenizer, self.model)
        self.model.base_model.embeddings.requires_grad_(False)
        self.optimizer = build_optimizer(self.model, args.learning_rate, 0.0, 0.0, 1e-8)
        self.updates = self.plan.updates_per_epoch
        self.seconds = 0.0
        self.tokens = 0

    def update(self, step: int) -> None:
        begun = time.perf_counter()
        factor = learning_rate_factor(step, self.updates, self.updates // 10)
        set_learning_rates(self.optimizer, factor)
        (indices,) = self.plan.update(step)
        batch = self.task.collate([self.features[int(i)] for i in indices])
        if self.fixed is not None:
            room = self.fixed - batch["input_ids"].shape[1]
            for name in MODEL_INPUTS:
                value = self.task.padding["pad_token_id"] if name == "input_ids" else 0
                batch[name] = F.pad(batch[name], (0, room), value=value)
        logits = forward(self.task, self.model, batch, self.precision)
        self.task.loss(logits, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - begun
        self.tokens += batch["input_ids"].numel()

    def score(self, dev_features: Dataset) -> float:
        predictor = Predictor(
            self.task, WORLD, self.precision, batch_size=32, num_workers=0, output_dir=None
        )
        return self.task.metric(dev_features, predictor.predict(self.model, dev_features))


WORLD = World(torch.device("cpu"))


def compare_epochs(
    task: Squad | Glue, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> dict:
    """Time, tokens and metric of an epoch with both kinds of batches."""
    count = min(args.epoch_examples, len(task.train))
    examples = task.train.shuffle(seed=args.seed).select(range(count))
    features = task.features(examples, tokenizer)
    dev_features = task.features(task.dev, tokenizer, training=False)
    learners = {
        "ours": Learner(task, features, tokenizer, None, args),
        "fixed length": Learner(task, features, tokenizer, task.length, args),
    }
    updates = learners["ours"].updates
    for step in range(updates):
        for learner in learners.values() if step % 2 else reversed(learners.values()):
            learner.update(step)
        if step % 50 == 49:
            print(f"  update {step + 1} of {updates}", flush=True)
    return {
        name: {
            "updates": learner.updates,
            "tokens": learner.tokens,
            "seconds": learner.seconds,
            task.key_metric: learner.score(dev_features),
        }
        for name, learner in learners.items()
    }


def get_parser() -> argparse.ArgumentParser:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("task", help="squad, or a classification task of GLUE")
    add("--data_dir", required=True, help="folder of the task's files")
    add("--model", required=True, help="BERT to fine-tune, with its tokenizer")
    add("--slice", type=int, default=4000,
        help="examples per measurement of the features (default: 4000)")
    add("--slices", type=int, default=3, help="measurements of the features (default: 3)")
    add("--epoch_examples", type=int, default=4000,
        help="examples of the epoch; 0 skips it (default: 4000)")
    add("--batch", type=int, default=16, help="examples per update (default: 16)")
    add("--learning_rate", type=float, default=5e-5, help="default: 5e-5")
    add("--bf16", action="store_true", help="train in bfloat16, like --bf16 of the scripts")
    add("--seed", type=int, default=42, help="default: 42")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> None:
    report.main(get_parser().parse_args(argv), run)


def run(args: argparse.Namespace) -> dict:
    keep_freed_memory()
    datasets.disable_progress_bars()
    task = Squad(args) if args.task == "squad" else Glue(args)
    tokenizer = load_tokenizer(args.model)
    results = {"task": args.task}
    results["features"] = features = compare_features(task, tokenizer, args)
    ratios = {"ours": features["ratio"]}
    report.print_table(
        f"{args.task}: features per second, one process",
        ["tokenizer", "features/s", "ours/python"],
        [[name, rate, ratios.get(name)] for name, rate in features["per_second"].items()],
    )
    print(f"{features['same_ids']} of {features['features']} features have the same ids")
    if args.epoch_examples:
        results["epoch"] = epoch = compare_epochs(task, tokenizer, args)
        fixed = epoch["fixed length"]["seconds"]
        report.print_table(
            f"{args.task}: an epoch of {args.epoch_examples} examples, batches of {args.batch}",
            ["batches", *epoch["ours"], "ours/fixed"],
            [[name, *row.values(), row["seconds"] / fixed] for name, row in epoch.items()],
        )
    return results


if __name__ == "__main__":
    main()
