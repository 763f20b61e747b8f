"""What real lengths save: features from the Rust tokenizer, and batches padded to their longest example.

    python benchmarks/features.py squad --data_dir SQUAD --model bert-base-uncased --epoch_examples 4000
    python benchmarks/features.py sst-2 --data_dir GLUE/SST-2 --model bert-base-uncased

First the features: ours against the Python tokenizer of transformers, one process each, in turn, on the same
examples; their ids are compared. Then an epoch: two copies of the model are fine-tuned on the same examples, one
update of each in turn, the one on batches of similar lengths (as the scripts do), the other on random batches
padded to --max_seq_length (as in 2020); what an epoch takes, and the metric that each reaches.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import report
import torch
import transformers
from torch.nn import functional as F
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import masked_run_squad
from emmental.data import glue, glue_tasks, squad
from emmental.data.metrics import glue_metrics, squad_metrics
from emmental.errors import UserError, one_line_errors
from emmental.loading import load_model, load_tokenizer
from emmental.schedule import learning_rate_factor
from emmental.training.batches import BatchPlan
from emmental.training.distributed import World, keep_freed_memory
from emmental.training.evaluate import Predictor
from emmental.training.optim import build_optimizer, set_learning_rates
from emmental.training.passes import MODEL_INPUTS, forward


class Squad:
    """SQuAD v1.1: questions about contexts, in windows of 384 tokens that advance by 128."""

    length, stride, query, key_metric = 384, 128, 64, "f1"

    def __init__(self, args):
        self.train = squad.read_examples(
            find(args.data_dir, "train*.json"), False, unique_ids=False
        )
        self.dev = squad.read_examples(find(args.data_dir, "dev*.json"), False)
        self.collate = squad.collate

    def features(self, examples, tokenizer, folder, training=True):
        return squad.build_features(
            examples, tokenizer, max_seq_length=self.length, doc_stride=self.stride, max_query_length=self.query,
            training=training, overwrite_cache=True,
        )  # fmt: skip

    def python_features(self, examples, tokenizer) -> list[list[int]]:
        """Ids of every window; each question tokenizes its context anew, as nothing remembers it."""
        special = tokenizer.cls_token_id, tokenizer.sep_token_id
        found = []
        for example in examples:
            question = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(example["question"]))[
                : self.query
            ]
            words = [
                token for word in example["context"].split() for token in tokenizer.tokenize(word)
            ]
            context = tokenizer.convert_tokens_to_ids(words)
            room, begin = self.length - len(question) - 3, 0
            while True:
                window = context[begin : begin + room]
                found.append([special[0], *question, special[1], *window, special[1]])
                if begin + room >= len(context):
                    break
                begin += self.stride
        return found

    def model(self, name):
        return load_model(name, masked_run_squad.Squad.head, masked=False)

    def logits(self, outputs, batch):
        return masked_run_squad.span_logits(outputs, batch)

    def loss(self, logits, batch):
        return masked_run_squad.span_loss(logits, batch)

    def metric(self, features, logits):
        starts, ends = zip(*logits, strict=True)
        predictions, _, _ = squad.postprocess(
            self.dev, features, list(starts), list(ends), n_best_size=20, max_answer_length=30,
            version_2_with_negative=False, null_score_diff_threshold=0.0,
        )  # fmt: skip
        return squad_metrics(self.dev, predictions, version_2_with_negative=False)["f1"]


class Glue:
    """A classification task of GLUE, in 128 tokens."""

    length = 128

    def __init__(self, args):
        self.task = glue_tasks.find_task(args.task)
        if self.task.is_regression or not self.task.evaluation_splits:
            raise UserError(f"{args.task} is no classification with a dev set: choose another task")
        self.key_metric = self.task.key_metric
        self.train = glue.read_examples(self.task, args.data_dir, "train")
        self.dev = glue.read_examples(self.task, args.data_dir, self.task.evaluation_splits[0])
        self.collate = glue.collate

    def features(self, examples, tokenizer, folder, training=True):
        return glue.build_features(
            examples, tokenizer, max_seq_length=self.length, overwrite_cache=True
        )

    def python_features(self, examples, tokenizer) -> list[list[int]]:
        texts = ((example["text_a"], example["text_b"]) for example in examples)
        return [
            tokenizer(
                *(text for text in pair if text is not None),
                truncation=True,
                max_length=self.length,
            )["input_ids"]
            for pair in texts
        ]

    def model(self, name):
        return load_model(name, "SequenceClassification", masked=False, labels=self.task.labels)

    def logits(self, outputs, batch):
        return (outputs.logits.float(),)

    def loss(self, logits, batch):
        return F.cross_entropy(logits[0], batch["labels"])

    def metric(self, features, logits):
        stacked = np.stack([part for (part,) in logits])
        return glue_metrics(self.task, stacked, np.asarray(features["label"]))[self.key_metric]


def find(folder: str, pattern: str) -> Path:
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise UserError(f"--data_dir {folder} holds no {pattern}")
    return files[0]


# ---------------------------------------------------------------------------------------- features


def compare_features(task, tokenizer, args) -> dict:
    """Features per second of both sides, medians over slices of the examples."""
    # The same vocabulary and case for the Python tokenizer, whatever files the model folder has.
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        (Path(folder) / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
        slow = BertTokenizerLegacy(
            str(Path(folder) / "vocab.txt"), do_lower_case=tokenizer.do_lower_case
        )
        rates, same, total = {"ours": [], "python": []}, 0, 0
        for start in range(0, min(args.slices * args.slice, len(task.train)), args.slice):
            examples = task.train.select(range(start, min(start + args.slice, len(task.train))))
            begun = time.perf_counter()
            ours = task.features(examples, tokenizer, folder)
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


# ------------------------------------------------------------------------------------------- epoch


class Learner:
    """A model in training on its own plan of batches; `fixed`: the length to pad to, or None."""

    def __init__(self, task, features, tokenizer, fixed: int | None, args):
        self.task, self.features, self.fixed, self.args = task, features, fixed, args
        self.pad = tokenizer.pad_token_id or 0
        self.precision = torch.bfloat16 if args.bf16 else None
        lengths = np.asarray(features["length"])
        self.plan = BatchPlan(
            lengths if fixed is None else np.zeros_like(lengths), args.batch, 1, args.seed
        )
        torch.manual_seed(args.seed)
        self.model = task.model(args.model).train()
        self.model.base_model.embeddings.requires_grad_(False)
        self.optimizer = build_optimizer(self.model, args.learning_rate, 0.0, 0.0, 1e-8)
        self.updates, self.seconds, self.tokens = self.plan.updates_per_epoch, [], 0

    def update(self, step: int) -> None:
        begun = time.perf_counter()
        set_learning_rates(
            self.optimizer, learning_rate_factor(step, self.updates, self.updates // 10)
        )
        (indices,) = self.plan.update(step)
        batch = self.task.collate([self.features[int(i)] for i in indices], self.pad)
        if self.fixed is not None:
            room = self.fixed - batch["input_ids"].shape[1]
            for name in MODEL_INPUTS:
                batch[name] = F.pad(
                    batch[name], (0, room), value=self.pad if name == "input_ids" else 0
                )
        logits = forward(self.task, self.model, batch, self.precision)
        self.task.loss(logits, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.perf_counter() - begun)
        self.tokens += batch["input_ids"].numel()

    def score(self, dev_features) -> float:
        task = SimpleNamespace(
            collate=lambda rows: self.task.collate(rows, self.pad), logits=self.task.logits
        )
        predictor = Predictor(
            task, WORLD, self.precision, batch_size=32, num_workers=0, output_dir=None
        )
        return self.task.metric(dev_features, predictor.predict(self.model, dev_features))


WORLD = World(torch.device("cpu"))


def compare_epochs(task, tokenizer, args) -> dict:
    """Time, tokens and metric of an epoch, both ways."""
    with tempfile.TemporaryDirectory() as folder:
        examples = task.train.shuffle(seed=args.seed).select(
            range(min(args.epoch_examples, len(task.train)))
        )
        features = task.features(examples, tokenizer, folder)
        dev_features = task.features(task.dev, tokenizer, folder, training=False)
        learners = {"ours": Learner(task, features, tokenizer, None, args)}
        learners["fixed length"] = Learner(task, features, tokenizer, task.length, args)
        for step in range(learners["ours"].updates):
            for learner in learners.values() if step % 2 else reversed(learners.values()):
                learner.update(step)
            if step % 50 == 49:
                print(f"  update {step + 1} of {learners['ours'].updates}", flush=True)
        return {
            name: {
                "updates": learner.updates,
                "tokens": learner.tokens,
                "seconds": sum(learner.seconds),
                task.key_metric: learner.score(dev_features),
            }
            for name, learner in learners.items()
        }


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", help="squad, or a classification task of GLUE")
    add("--data_dir", required=True, help="folder of the task's files")
    add("--model", required=True, help="BERT to take the tokenizer from, and to fine-tune")
    add(
        "--slice",
        type=int,
        default=4000,
        help="examples of a measurement of the features (default: 4000)",
    )
    add("--slices", type=int, default=3, help="such measurements (default: 3)")
    add(
        "--epoch_examples",
        type=int,
        default=4000,
        help="examples of the epoch; 0 leaves it out (default: 4000)",
    )
    add("--batch", type=int, default=16, help="examples of an update (default: 16)")
    add("--learning_rate", type=float, default=5e-5, help="default: 5e-5")
    add("--bf16", action="store_true", help="train in bfloat16, as the scripts' --bf16")
    add("--seed", type=int, default=42, help="default: 42")
    add("--json", help="file to write the results to")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    with one_line_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    keep_freed_memory()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()  # that the heads are fresh is no news
    transformers.utils.logging.disable_progress_bar()
    task = Squad(args) if args.task == "squad" else Glue(args)
    tokenizer = load_tokenizer(args.model)
    results = {
        "machine": report.machine(),
        "task": args.task,
        "features": compare_features(task, tokenizer, args),
    }
    print(results["machine"])
    found = results["features"]
    rows = [
        [name, value, found["ratio"] if name == "ours" else None]
        for name, value in found["per_second"].items()
    ]
    report.print_table(
        f"{args.task}: features per second, one process",
        ["tokenizer", "features/s", "ours/python"],
        rows,
    )
    print(f"the same ids in {found['same_ids']} of {found['features']} features")
    if args.epoch_examples:
        results["epoch"] = epoch = compare_epochs(task, tokenizer, args)
        slowest = epoch["fixed length"]["seconds"]
        rows = [
            [name, *values.values(), values["seconds"] / slowest] for name, values in epoch.items()
        ]
        title = f"{args.task}: an epoch of {args.epoch_examples} examples, batches of {args.batch}"
        report.print_table(title, ["batches", *epoch["ours"], "ours/fixed"], rows)
    report.write_json(args.json, results)


if __name__ == "__main__":
    main()
