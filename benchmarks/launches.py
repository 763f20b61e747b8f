"""The operations that masking adds to an update: what a GPU pays for, counted without one.

    python benchmarks/launches.py                                # all methods: 1 minute on 2 cores
    python benchmarks/launches.py --family roberta --granularity structure

torch's dispatcher counts the operations that an update of a masked model starts (masks, forward,
penalty, backward, clipping, observed scores, optimizer), and those of the stock model. Views and
allocations are left out. The tensors are on the CPU, but take the way of a GPU: lists of tensors in
one operation (see `emmental/modules/lists.py`). An operation on a list counts once, or once for
each tensor where a GPU has no kernel for the list: for tensors of unlike types or shapes, and on
broadcast factors. "waits" counts the values that the host waits for: one in the stock model's own
forward, and one of the guard against gradients that are not finite.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from unittest import mock

import report
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_step import Side, make_batch

from emmental.models.families import FAMILIES
from emmental.modules import lists
from emmental.modules.granularity import GRANULARITIES
from emmental.modules.methods import METHODS

FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "detach_", "lift_fresh"}
WAITS = {"_local_scalar_dense", "nonzero"}
COLUMNS = ["method", "operations", "over the stock model", "waits"]


class Launches(TorchDispatchMode):
    """Counts operations by name, and those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()
        self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        if name in WAITS:
            self.waits += 1
        elif not function.is_view and name not in FREE:
            self.operations[name] += _kernels(name, args)
        return function(*args, **(kwargs or {}))


def _kernels(name: str, args: tuple) -> int:
    """How many kernels a GPU starts for an operation."""
    tensors = [
        x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], torch.Tensor)
    ]
    if not name.startswith("_foreach") or not tensors:
        return 1
    alike = all(len({tensor.dtype for tensor in part}) == 1 for part in tensors)
    alike &= name == "_foreach_copy_" or len({part[0].dtype for part in tensors}) == 1
    shapes = [{tensor.shape for tensor in group} for group in zip(*tensors, strict=True)]
    return 1 if alike and all(len(group) == 1 for group in shapes) else len(tensors[0])


def count(method: str, args: argparse.Namespace) -> Launches:
    """The operations of the second update of a side: "dense", or a pruning method."""
    side = Side(method, args)
    batch = make_batch(args.shape, args.device)
    side.step(batch, lambda phase: None)
    with Launches() as launches, mock.patch.object(torch.Tensor, "tolist", _waiting(launches)):
        side.step(batch, lambda phase: None)
    return launches


def _waiting(launches: Launches) -> Callable[[torch.Tensor], list]:
    """`Tensor.tolist`, which the dispatcher does not see."""
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> list:
        launches.waits += 1
        return tolist(tensor)

    return counted


def get_parser() -> argparse.ArgumentParser:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--granularity", choices=GRANULARITIES, default="weight", help="default: weight")
    add("--family", choices=FAMILIES, default="bert", help="default: bert")
    add("--layers", type=report.positive, default=12, help="layers of the model (default: 12)")
    add("--hidden", type=report.hidden_size, default=64,
        help="hidden size, a multiple of 64; it changes no number (default: 64)")
    add("--float32", action="store_true", help="without autocast to bfloat16")
    add("--by_name", action="store_true", help="print each operation, too")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> dict[str, Counter]:
    args = get_parser().parse_args(argv)
    args.bf16 = not args.float32
    args.compile = False
    args.device = "cpu"
    args.shape = (1, 8)
    lists.ONE_BY_ONE.clear()
    try:
        return report.main(args, run)["operations"]
    finally:
        lists.ONE_BY_ONE.add("cpu")


def run(args: argparse.Namespace) -> dict:
    counts = {method: count(method, args) for method in ("dense", *args.methods)}
    stock = counts["dense"].operations.total()
    rows = []
    for method, launches in counts.items():
        total = launches.operations.total()
        rows.append([method, total, f"{total - stock:+}", launches.waits])
    title = f"{args.family} of {args.layers} layers, granularity {args.granularity}, "
    report.print_table(title + ("bfloat16" if args.bf16 else "float32"), COLUMNS, rows)
    if args.by_name:
        for method, launches in counts.items():
            print(f"\n{method}: {dict(launches.operations.most_common())}")
    operations = {method: launches.operations for method, launches in counts.items()}
    waits = {method: launches.waits for method, launches in counts.items()}
    return {"operations": operations, "waits": waits}


if __name__ == "__main__":
    main()
