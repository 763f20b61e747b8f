"""The gain of sparse inference on this CPU, compared with dense forms of the same models.

    python benchmarks/inference.py      # BERT-base with random masks: 20 min on 2 cores
    python benchmarks/inference.py --models OUT --densities --lengths 128     # a fine-pruned model
    python benchmarks/inference.py --family roberta     # the default size of another family

`dense` is the stock model in float32 with SDPA, `compiled` the same under torch.compile, `int8` its
dynamic quantisation by torch, `ours` is `sparsify(model)`. The four take turns with the same inputs
without padding. A time is the median of all turns. The gain is the median over turns of the time of
the faster of dense and compiled, divided by ours. `bound` is the time that ours would take if its
remaining multiply-adds (products and attention) ran at the speed of this machine's dense product.
A difference is the largest one between logits and those of dense.
"""

import argparse
import copy
import functools
import itertools
import statistics
import time
import warnings
from collections.abc import Callable

import report
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from emmental.checkpoints.loading import load_plain
from emmental.compact.algebra import activation_of, density
from emmental.inference import sparsify
from emmental.inference.encoder import SparseEncoder
from emmental.models.families import FAMILIES, encoder_of
from emmental.models.inputs import longest_input
from emmental.system.errors import UserError

HELPS = 1.05  # lower gains are listed at the end
DENSE_SIDES = ("dense", "compiled", "int8")


def quantised(model: PreTrainedModel) -> Callable:
    quantise = torch.ao.quantization.quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces its successor, another package
        return quantise(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def dense_rate(hidden: int) -> float:
    """Multiply-adds per second of torch's dense product: the best of ten measurements."""
    rows = torch.randn(1024, hidden)
    weight = torch.randn(4 * hidden, hidden)
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        rows @ weight.t()
        seconds.append(time.perf_counter() - start)
    return rows.shape[0] * weight.numel() / min(seconds[1:])


def difference(model: Callable, expected: PreTrainedModel, ids: Tensor) -> float:
    return report.difference(*(side(input_ids=ids).to_tuple() for side in (model, expected)))


def multiply_adds(encoder: SparseEncoder, length: int) -> int:
    """Multiply-adds per token of a sequence of `length`, which bound the speed."""
    layers = encoder.layers
    attention = sum(int(layer.sizes.sum() + layer.sizes_v.sum()) for layer in layers)
    weights = sum(matrix.values.numel() for layer in layers for matrix in layer.matrices())
    return length * attention + weights


def summarise(times: dict[str, list[float]], ours: str) -> dict:
    """Medians of the sides in seconds, and the gain of the side `ours`."""
    opponents = [times[name] for name in ("dense", "compiled") if name in times]
    turns = zip(*opponents, times[ours], strict=True)
    gains = [min(theirs) / seconds for *theirs, seconds in turns]
    medians = {
        name: statistics.median(times[name]) for name in (*DENSE_SIDES, ours) if name in times
    }
    return {**medians, "ours": medians[ours], "gain": statistics.median(gains)}


def run_group(
    title: str, models: dict[str, PreTrainedModel], args: argparse.Namespace, rate: float
) -> list[dict]:
    """Measure models of one shape and print their table.

    The dense sides are measured with the first model only, as masks do not change their speed.
    """
    forced = {} if args.csr_below is None else {"kernel": "native", "csr_below": args.csr_below}
    try:
        ours = {name: sparsify(model, **forced) for name, model in models.items()}
    except ValueError as error:
        raise UserError(f"{title}: {error}") from error
    dense = next(iter(models.values()))
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length, batch in itertools.product(args.lengths, args.batches):
        torch._dynamo.reset()
        sides = {
            "dense": dense,
            "compiled": torch.compile(dense, dynamic=False),
            "int8": quantised(dense),
            **ours,
        }
        sides = {name: side for name, side in sides.items() if name not in args.without}
        ids = torch.randint(0, dense.config.vocab_size, (batch, length), generator=generator)
        with torch.inference_mode():
            calls = {name: functools.partial(side, input_ids=ids) for name, side in sides.items()}
            times = report.take_turns(calls, args.warmup, args.repeats)
            int8 = difference(sides["int8"], dense, ids) if "int8" in sides else None
            for name, model in models.items():
                encoder = encoder_of(ours[name])
                sparse = isinstance(encoder, SparseEncoder)
                without = "compact" if activation_of(model.config) else "dense"
                rows.append(
                    {
                        "model": name,
                        "batch": batch,
                        "length": length,
                        "left": density(encoder_of(model)),
                        "kernels": encoder.backend.name if sparse else without,
                        **summarise(times, name),
                        "bound": multiply_adds(encoder, length) * ids.numel() / rate
                        if sparse
                        else None,
                        "difference": difference(ours[name], model, ids),
                        "int8 difference": int8,
                    }
                )
        print(f"  {title}: {batch} x {length} done", flush=True)
    report.print_table(title, COLUMNS, [_row(result) for result in rows])
    return rows


# fmt: off
COLUMNS = ["batch x length", "remaining", "dense ms", "compiled ms", "int8 ms", "ours ms", "gain",
           "sequences/s", "bound ms", "ours/bound", "difference", "int8 difference"]
# fmt: on


def _row(result: dict) -> list:
    sides = (*DENSE_SIDES, "ours")
    times = [1000 * result[name] if name in result else None for name in sides]
    bound, int8 = result["bound"], result["int8 difference"]
    return [
        f"{result['batch']} x {result['length']}",
        f"{result['left']:.1%}",
        *times,
        result["gain"],
        result["batch"] / result["ours"],
        bound and 1000 * bound,
        bound and result["ours"] / bound,
        f"{result['difference']:.0e}",
        None if int8 is None else f"{int8:.0e}",
    ]


def get_parser() -> argparse.ArgumentParser:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--densities", type=report.fraction, nargs="*", default=[0.15, 0.1, 0.06, 0.03],
        help="densities of the random models (default: 0.15 0.1 0.06 0.03)")
    add("--family", choices=FAMILIES, default="bert", help="family of the random models")
    add("--models", nargs="*", default=[],
        help="folders of fine-pruned checkpoints, masked or bertarized")
    add("--batches", type=report.positive, nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    add("--lengths", type=report.positive, nargs="+", default=[32, 128, 384],
        help="lengths in tokens (default: 32 128 384)")
    add("--layers", type=report.positive,
        help="layers of the random models (default: the family's, 12 for bert)")
    add("--hidden", type=report.hidden_size,
        help="hidden size of these models, a multiple of 64 (default: the family's, 768 for bert)")
    add("--csr_below", type=float,
        help="density below which a matrix becomes CSR, to check the limit (default: sparsify's)")
    add("--repeats", type=report.positive, default=5, help="measured turns (default: 5)")
    add("--warmup", type=report.positive, default=1, help="unmeasured turns at first (default: 1)")
    add("--without", nargs="*", choices=("compiled", "int8"), default=[], help="sides to leave out")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> None:
    report.main(get_parser().parse_args(argv), run)


def load_models(args: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """The models of --models, by folder. Raises UserError if one does not take the --lengths."""
    models = {folder: load_plain(folder) for folder in args.models}
    checked = dict(models)
    if args.densities:
        with torch.device("meta"):  # without its weights
            checked[args.family] = report.random_model(args.family, 1.0)
    if not checked:
        raise UserError("nothing to measure: give --densities or --models")
    for name, model in checked.items():
        limit = longest_input(model)
        if limit and max(args.lengths) > limit:
            raise UserError(f"--lengths: {name} takes {limit} tokens at most")
    return models


def run(args: argparse.Namespace) -> dict:
    models = load_models(args)
    size = report.size_of(args.family, args.layers, args.hidden)
    shape = CONFIG_MAPPING[args.family](**size)
    rate = dense_rate(shape.hidden_size)
    rows = []
    print(f"dense product: {rate / 1e9:.0f} G multiply-adds/s")
    if args.densities:
        title = f"{args.family} of {shape.num_hidden_layers} layers, hidden {shape.hidden_size}"
        title += ", random masks"
        make = functools.partial(report.random_model, args.family, **size)
        group = {f"random {left:.0%}": make(left) for left in args.densities}
        rows += run_group(title, group, args, rate)
    for folder, model in models.items():
        rows += run_group(folder, {folder: model}, args, rate)
    slow = [row for row in rows if row["gain"] < HELPS]
    for row in slow:
        print(
            f"no gain: {row['model']} at {row['batch']} x {row['length']}, "
            f"gain {row['gain']:.2f} ({row['kernels']})"
        )
    if not slow:
        print(f"\nours is at least {HELPS} times as fast as dense and compiled everywhere")
    return {"dense multiply-adds per second": rate, "rows": rows}


if __name__ == "__main__":
    main()
