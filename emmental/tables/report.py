"""The paper's headline table with our runs in it, and a row for each run: Markdown and CSV."""

import csv
import io
import itertools
import statistics
from collections.abc import Iterable

from .points import METHODS, TASKS, load_points, paper_value
from .runs import Run

LEVELS = (10, 3)  # percent remaining, of the headline table
NEAR = 0.25  # a run within this of a level, relative, counts to it
TITLES = {"l0": "L0"}
HEADLINE = {  # as printed in the paper; some cells are the authors' interpolations
    ("squad", 10): ("70.2/80.1", "72.4/81.9", "75.6/84.3", "76.6/84.9"),
    ("squad", 3): ("45.5/59.6", "64.3/75.8", "67.5/78.0", "72.7/82.3"),
    ("mnli", 10): ("78.3/79.3", "78.7/79.7", "80.1/80.4", "81.2/81.8"),
    ("mnli", 3): ("69.4/70.6", "76.0/76.2", "76.5/77.4", "79.5/80.1"),
    ("qqp", 10): ("79.8/65.0", "88.1/82.8", "89.7/86.2", "90.2/86.8"),
    ("qqp", 3): ("72.4/57.8", "87.0/81.9", "86.1/81.5", "89.1/85.5"),
}


def headline(runs: list[Run]) -> list[list[str]]:
    """The rows of the headline table: for each task, with and without a teacher, the paper's row and ours below."""
    rows = [
        [
            "task (metrics)",
            "whose",
            "dense",
            "remaining",
            *(TITLES.get(method, method) for method in METHODS),
        ]
    ]
    tasks = sorted({run.task for run in runs}, key=lambda task: (task not in TASKS, task))
    for task in tasks:
        own = [run for run in runs if run.task == task]
        title = f"{task} ({'/'.join(own[0].metrics)})"
        dense = [run for run in own if run.is_dense and not run.distil]
        for distil in (True, False):
            for level in LEVELS:
                cells = [
                    _cell([run for run in own if _belongs(run, method, distil, level)])
                    for method in METHODS
                ]
                if not any(cells):
                    continue
                name = f"{title}, {'distilled' if distil else 'without teacher'}"
                if task in TASKS:
                    rows.append(
                        [
                            name,
                            "paper",
                            _paper_dense(task),
                            f"{level}%",
                            *_paper_cells(task, distil, level),
                        ]
                    )
                rows.append(
                    [name, "ours", _cell(dense, remaining=False), f"about {level}%", *cells]
                )
    return rows


def _belongs(run: Run, method: str, distil: bool, level: int) -> bool:
    return (run.method, run.distil, run.global_topk) == (method, distil, False) and abs(
        run.remaining / level - 1
    ) <= NEAR


def _cell(runs: list[Run], remaining: bool = True) -> str:
    """Means over seeds, with the range of the first metric where there are several; other settings stand apart."""
    groups = itertools.groupby(
        sorted(runs, key=lambda run: run.settings), key=lambda run: run.settings
    )
    return "; ".join(_seeds(list(group), remaining) for _, group in groups)


def _seeds(runs: list[Run], remaining: bool) -> str:
    text = "/".join(
        f"{statistics.mean(run.metrics[name] for run in runs):.1f}" for name in runs[0].metrics
    )
    if len(runs) > 1:
        first = [next(iter(run.metrics.values())) for run in runs]
        text += f" ({min(first):.1f} to {max(first):.1f}, {len(runs)} seeds)"
    return text + (
        f" at {statistics.mean(run.remaining for run in runs):.1f}%" if remaining else ""
    )


def _paper_dense(task: str) -> str:
    return "/".join(f"{value:.1f}" for value in load_points(task)[0].metrics.values())


def _paper_cells(task: str, distil: bool, level: int) -> Iterable[str]:
    if distil:
        return HEADLINE[task, level]
    metrics = load_points(task)[0].metrics
    values = (
        [paper_value(task, name, method, False, level) for name in metrics] for method in METHODS
    )
    return [
        "/".join("" if value is None else f"{value:.1f}" for value in pair).strip("/")
        for pair in values
    ]


def run_rows(runs: list[Run]) -> list[dict]:
    """One row for each run, for CSV; the paper's metrics stand on the line between its two nearest runs."""
    rows = []
    for run in sorted(
        runs, key=lambda run: (run.task, run.method, run.distil, -run.remaining, run.seed)
    ):
        row = {
            "task": run.task, "method": run.method + ", global" * run.global_topk, "teacher": "yes" if run.distil else "",
            "seed": run.seed, "remaining %": round(run.remaining, 2), "of the Linears %": round(run.remaining_linear, 2),
        }  # fmt: skip
        row["metrics"] = ", ".join(f"{name} {value:.2f}" for name, value in run.metrics.items())
        paper = {}
        if run.task in TASKS and not run.is_dense and not run.global_topk:
            paper = {
                name: paper_value(run.task, name, run.method, run.distil, run.remaining)
                for name in run.metrics
            }
        row["paper there"] = ", ".join(
            f"{name} {value:.2f}" for name, value in paper.items() if value is not None
        )
        row |= {
            "updates": run.updates, "batch": run.batch, "hours": round(run.seconds / 3600, 2), "hardware": run.hardware,
            "model": run.model, "folder": str(run.folder),
        }  # fmt: skip
        rows.append(row)
    return rows


def to_markdown(rows: list[list]) -> str:
    first, *others = [[str(cell) for cell in row] for row in rows]
    lines = [first, ["---"] * len(first), *others]
    return "".join("| " + " | ".join(row) + " |\n" for row in lines)


def to_csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
