"""Time and memory as the data and the model grow.

    python benchmarks/scale.py      # 10,000 and 100,000 questions, BERT-large: 5 min on 2 cores
    python benchmarks/scale.py --questions 10000 1000000 --layers 0

Data: a separate process reads and checks a generated SQuAD file (paragraphs of 120 words with five
questions each, 50 paragraphs per article), and makes its features. Memory is counted above that of
the process after its imports. "held" is the peak of anonymous memory, sampled every 5 ms. "with
mapped files" is the peak of the resident set, which includes pages of Arrow files that the system
can take back.

Model: for all matrices of a model as large as BERT-large, the time of our masks and of sorting each
matrix, which must give the same masks; and packing that model.
"""

import argparse
import ctypes
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import report
import torch
import transformers
from transformers import BertTokenizerFast

from emmental import MaskedBertConfig, MaskedBertForQuestionAnswering, storage
from emmental.checkpoints.counts import mask_report
from emmental.data import squad_features, squad_read
from emmental.modules import find_masks, masked_layers
from emmental.system.errors import UserError

MIB = 2**20
STATUS = Path("/proc/self/status")
WORDS = [
    f"{first}{second}{third}" for first in "bdfgkl" for second in "aeiou" for third in "mnprst"
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
THRESHOLDS = {"topK": 0.1, "magnitude": 0.1, "sigmoied_threshold": 0.52, "topK --global_topk": 0.1}


# ------------------------------------------------------------------------------------ memory


def status(name: str) -> float:
    """A value of /proc/self/status in MiB."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / MIB


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Measure the peak of anonymous memory in the block, above that before it, in MiB.

    Yields a dictionary, which has the peak under "held" after the block.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # the block could reuse freed memory, which would then not be counted
    memory = {}
    before = peak = status("RssAnon")
    stop = threading.Event()

    def watch():
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, status("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join()
        memory["held"] = max(peak, status("RssAnon")) - before


# ------------------------------------------------------------------------------------ data


def write_squad(path: Path, questions: int) -> None:
    """Write a generated SQuAD file, one article at a time."""
    rng = random.Random(0)
    with path.open("w") as file:
        file.write('{"version": "1.1", "data": [')
        for start in range(0, questions, 250):
            places = range(start, min(start + 250, questions), 5)
            paragraphs = [make_paragraph(rng, place, questions) for place in places]
            article = {"title": f"article {start}", "paragraphs": paragraphs}
            file.write((", " if start else "") + json.dumps(article))
        file.write("]}")


def make_paragraph(rng: random.Random, place: int, questions: int) -> dict:
    """A paragraph with the questions from number `place` on: five, or up to the last."""
    words = rng.choices(WORDS, k=120)
    qas = []
    for number in range(place, min(place + 5, questions)):
        answer = rng.randrange(120)
        begin = len(" ".join(words[:answer])) + (answer > 0)
        question = " ".join(rng.choices(WORDS, k=10)) + "?"
        answers = [{"text": words[answer], "answer_start": begin}]
        qas.append({"id": f"{number:024}", "question": question, "answers": answers})
    return {"context": " ".join(words), "qas": qas}


def make_tokenizer() -> BertTokenizerFast:
    words = [*SPECIAL, *WORDS, "?"]
    return BertTokenizerFast(vocab={word: place for place, word in enumerate(words)})


def make_features(path: str, folder: str) -> dict:
    """Time and memory of reading a SQuAD file and making its features, for a separate process."""
    tokenizer = make_tokenizer()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    resident = status("VmRSS")
    begun = time.perf_counter()
    with peak_memory() as memory:
        examples, _ = squad_features.drop_misaligned(
            squad_read.read_examples(path, False, cache_dir=folder)
        )
        sizes = {"max_seq_length": 384, "doc_stride": 128, "max_query_length": 64}
        features = squad_features.build_features(examples, tokenizer, training=True, **sizes)
    return memory | {
        "seconds": time.perf_counter() - begun,
        "resident": status("VmHWM") - resident,
        "features": len(features),
        "bytes": Path(path).stat().st_size,
    }


def measure_data(counts: list[int]) -> list[dict]:
    rows = []
    for questions in counts:
        with tempfile.TemporaryDirectory() as folder:
            write_squad(Path(folder) / "squad.json", questions)
            command = [sys.executable, __file__, "--make_features", f"{folder}/squad.json", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"no features of {questions} questions: {done.stderr.strip()}")
            rows.append({"questions": questions} | json.loads(done.stdout.splitlines()[-1]))
    return rows


# ------------------------------------------------------------------------------------ model


def large(layers: int, method: str) -> MaskedBertForQuestionAnswering:
    """A BERT as wide as BERT-large, with random weights and scores."""
    torch.manual_seed(0)
    config = MaskedBertConfig(
        **report.size_of("bert", layers, 1024),
        pruning_method=method.split()[0],
        global_topk="global" in method,
        mask_init="uniform",
        mask_scale=1.0,
        threshold=THRESHOLDS[method],
    )
    return MaskedBertForQuestionAnswering(config).eval()


def sorted_masks(model: MaskedBertForQuestionAnswering, method: str) -> list[torch.Tensor]:
    """The masks by sorting each matrix, or all scores together, like the 2020 scripts."""
    threshold = THRESHOLDS[method]
    rankings = []
    for layer in masked_layers(model).values():
        rankings.append(layer.source.abs() if layer.method.absolute else layer.source)
    if method == "sigmoied_threshold":
        return [torch.sigmoid(ranking) > threshold for ranking in rankings]

    def cut_off(scores: torch.Tensor) -> torch.Tensor:
        count = int(threshold * scores.numel())
        return scores.flatten().sort(descending=True).values[count - 1]

    if "global" in method:
        cut = cut_off(torch.cat([ranking.flatten() for ranking in rankings]))
        return [ranking >= cut for ranking in rankings]
    return [ranking >= cut_off(ranking) for ranking in rankings]


def measure_masks(layers: int, repeats: int) -> list[dict]:
    rows = []
    for method in THRESHOLDS:
        model = large(layers, method)
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            find_masks(model, THRESHOLDS[method])
            times.append(time.perf_counter() - begun)
        with peak_memory() as memory:
            masks = find_masks(model, THRESHOLDS[method])
        begun = time.perf_counter()
        wanted = sorted_masks(model, method)
        sorting = time.perf_counter() - begun
        for ours, mask in zip(masks.by_layer.values(), wanted, strict=True):
            if (ours != mask).sum() > mask.sum() * 1e-4:  # ties at the cut-off
                raise UserError(f"{method}: our masks differ from those by sorting")
        row = {"method": method, "ours": statistics.median(times), "sorting": sorting, **memory}
        row["weights"] = sum(layer.weight.numel() for layer in masked_layers(model).values())
        rows.append(row)
        del model, wanted
    return rows


def measure_packing(layers: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model = large(layers, "topK")
        remaining = mask_report(model)
        model.save_pretrained(f"{folder}/model")
        del model
        make_tokenizer().save_pretrained(f"{folder}/model")
        begun = time.perf_counter()
        with peak_memory() as packing:
            packed = storage.pack(f"{folder}/model", f"{folder}/packed")
        between = time.perf_counter()
        with peak_memory() as loading:
            model = storage.load_packed(f"{folder}/packed")
        ended = time.perf_counter()
        totals = storage.summary(packed)["totals"]["encoder and head"]
        return {
            "remaining": remaining["remaining_percent_linear"],
            **{name: totals[name] / 1e6 for name in ("dense", "packed", "entropy")},
            "pack_seconds": between - begun,
            "load_seconds": ended - between,
            "pack_memory": packing["held"],
            "load_memory": loading["held"],
            "model_memory": sum(parameter.numel() for parameter in model.parameters()) * 4 / MIB,
        }


# ------------------------------------------------------------------------------------ main


def get_parser() -> argparse.ArgumentParser:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--questions", type=report.positive, nargs="*", default=[10_000, 100_000],
        help="questions of the files (default: 10000 100000)")
    add("--layers", type=report.at_least(0), default=24,
        help="layers of the model; 0 skips it (default: 24, like BERT-large)")
    add("--repeats", type=report.positive, default=5,
        help="measurements of our masks; sorting is measured once (default: 5)")
    add("--make_features", nargs=2, help=argparse.SUPPRESS)  # for the processes of the data
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.make_features:
        print(json.dumps(make_features(*args.make_features)))
        return
    report.main(args, run)


def run(args: argparse.Namespace) -> dict:
    if not STATUS.exists():
        raise UserError("this benchmark needs Linux: it reads the memory from /proc")
    results = {}
    results["data"] = rows = measure_data(args.questions)
    report.print_table(
        "Reading a SQuAD file and making its features: memory in MiB",
        ["questions", "file MB", "features", "seconds", "held", "with mapped files"],
        [
            [
                r["questions"],
                r["bytes"] / 1e6,
                r["features"],
                r["seconds"],
                r["held"],
                r["resident"],
            ]
            for r in rows
        ],
    )
    if args.layers:
        results["masks"] = rows = measure_masks(args.layers, args.repeats)
        report.print_table(
            f"Masks of {rows[0]['weights']:,} weights, {args.layers} layers as wide as those of "
            "BERT-large: seconds, memory in MiB",
            ["method", "ours", "sorting", "ours/sorting", "memory of ours"],
            [
                [r["method"], r["ours"], r["sorting"], r["ours"] / r["sorting"], r["held"]]
                for r in rows
            ],
        )
        results["packing"] = row = measure_packing(args.layers)
        columns = {
            "dense": "dense MB",
            "packed": "packed MB",
            "entropy": "entropy MB",
            "pack_seconds": "pack s",
            "load_seconds": "load s",
            "pack_memory": "pack MiB",
            "load_memory": "load MiB",
            "model_memory": "model MiB",
        }
        report.print_table(
            f"Packing that model at {row['remaining']:.1f}% remaining, 8 bits: encoder and head",
            list(columns.values()),
            [[row[name] for name in columns]],
        )
    return results


if __name__ == "__main__":
    main()
