"""Ways to find the k largest scores of many matrices: times, and whether the masks are equal.

    python benchmarks/selection.py                  # BERT-base's 72 matrices: 10 minutes on a CPU
    python benchmarks/selection.py --layers 2 --repeats 2

Each matrix is ranked for itself, and then all together, as one vector. On a GPU, matrices of one
size are the rows of a stack. "ours" is what the package does on this device. Seconds are medians of
alternating calls.
"""

import argparse
import statistics
from collections.abc import Callable

import report
import torch
from torch import Tensor

from emmental.modules.lists import by_stack
from emmental.modules.selection import kth_largest, select_largest
from emmental.modules.topk import keep_largest
from emmental.system.errors import UserError

FRACTIONS = (0.9, 0.15, 0.03)
Select = Callable[[list[Tensor], list[int]], list[Tensor]]


def by_rows(kth: Callable[[Tensor, int], Tensor]) -> Select:
    """Masks of stacked matrices, from the k-th largest entry of each row; no ties are broken."""

    def select(values: list[Tensor], counts: list[int]) -> list[Tensor]:
        by_numel = {value.numel(): count for value, count in zip(values, counts, strict=True)}
        return by_stack(lambda rows: rows >= kth(rows, by_numel[rows.shape[1]]), values)

    return select


def by_kthvalue(rows: Tensor, count: int) -> Tensor:
    return rows.kthvalue(rows.shape[1] - count + 1, dim=1, keepdim=True).values


def by_sort(rows: Tensor, count: int) -> Tensor:
    return rows.sort(dim=1, descending=True).values[:, count - 1 : count]


def by_topk(rows: Tensor, count: int) -> Tensor:
    return rows.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)


def in_numpy(values: list[Tensor], counts: list[int]) -> list[Tensor]:
    """The candidate of the package on a CPU, on one thread."""
    return [select_largest(value.cpu(), count) for value, count in zip(values, counts, strict=True)]


CANDIDATES: dict[str, Select] = {
    "ours": keep_largest,
    "sort": by_rows(by_sort),
    "kthvalue": by_rows(by_kthvalue),
    "topk": by_rows(by_topk),
    "topk, the shorter side; a sample for one long row": by_rows(kth_largest),
    "a sample in NumPy": in_numpy,
}


def measure(values: list[Tensor], fraction: float, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each candidate. Raises UserError if its masks differ from ours."""
    counts = [int(fraction * value.numel()) for value in values]
    wanted = keep_largest(values, counts)
    for name, select in CANDIDATES.items():
        for mask, ours in zip(select(values, counts), wanted, strict=True):
            if (mask.to(ours.device) != ours).sum() > 1e-5 * ours.numel():  # ties at the cut-off
                raise UserError(f"{name}: its masks differ from ours at {fraction:g}")
    sides = {n: lambda select=select: select(values, counts) for n, select in CANDIDATES.items()}
    times = report.take_turns(sides, 1, args.repeats, args.device)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def get_parser() -> argparse.ArgumentParser:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    add("--layers", type=report.positive, default=12, help="layers of the BERT (default: 12)")
    add("--hidden", type=report.positive, default=768, help="hidden size (default: 768)")
    add("--repeats", type=report.positive, default=3, help="measured turns (default: 3)")
    device = "cpu or cuda (default: a GPU if there is one)"
    add("--device", type=report.device, default=report.DEVICE, help=device)
    return parser


def main(argv: list[str] | None = None) -> None:
    report.main(get_parser().parse_args(argv), run)


def run(args: argparse.Namespace) -> dict:
    results = {}
    shapes = [(args.hidden, args.hidden)] * 4 * args.layers
    shapes += [(args.hidden, 4 * args.hidden)] * 2 * args.layers
    torch.manual_seed(0)
    values = [torch.randn(shape).to(args.device) for shape in shapes]
    sides = {
        "each matrix for itself": values,
        "all together": [torch.cat([value.reshape(-1) for value in values])],
    }
    for title, tensors in sides.items():
        results[title] = {fraction: measure(tensors, fraction, args) for fraction in FRACTIONS}
        columns = ["way", *(f"{fraction:.0%} kept" for fraction in FRACTIONS)]
        rows = [[name, *(times[name] for times in results[title].values())] for name in CANDIDATES]
        total = sum(value.numel() for value in tensors)
        report.print_table(f"{title}, {total:,} scores: seconds", columns, rows)
    return results


if __name__ == "__main__":
    main()
