"""The paper's headline table with our runs in it, and a table with a row per run."""

import itertools
import statistics
from collections.abc import Iterable

from .points import METHODS, TASKS, load_points, paper_value
from .runs import Run

LEVELS = (10, 3)  # percent remaining, of the headline table
NEAR = 0.25  # a run counts for a level up to this relative distance
HEADLINE = {  # as printed in the paper, with a teacher; the authors interpolated some cells
    ("squad", 10): ("70.2/80.1", "72.4/81.9", "75.6/84.3", "76.6/84.9"),
    ("squad", 3): ("45.5/59.6", "64.3/75.8", "67.5/78.0", "72.7/82.3"),
    ("mnli", 10): ("78.3/79.3", "78.7/79.7", "80.1/80.4", "81.2/81.8"),
    ("mnli", 3): ("69.4/70.6", "76.0/76.2", "76.5/77.4", "79.5/80.1"),
    ("qqp", 10): ("79.8/65.0", "88.1/82.8", "89.7/86.2", "90.2/86.8"),
    ("qqp", 3): ("72.4/57.8", "87.0/81.9", "86.1/81.5", "89.1/85.5"),
}


def headline(runs: list[Run]) -> list[list[str]]:
    """Rows of the headline table: by task, teacher and level, the paper's results and ours."""
    titles = [method.replace("l0", "L0") for method in METHODS]
    rows = [["task (metrics)", "whose", "dense", "remaining", *titles]]
    for task in sorted({run.task for run in runs}):
        own = [run for run in runs if run.task == task]
        dense = _cell(run for run in own if run.method == "dense" and not run.distil)
        for distil, level in itertools.product((True, False), LEVELS):
            near = [r for r in own if r.distil == distil and abs(r.remaining / level - 1) <= NEAR]
            cells = [_cell(run for run in near if run.method == method) for method in METHODS]
            if not any(cells):
                continue
            teacher = "distilled" if distil else "without teacher"
            metrics = max((run.metrics for run in own), key=len)
            title = f"{task} ({'/'.join(metrics)}), {teacher}"
            if task in TASKS:
                paper_dense = _joined(load_points(task)[0].metrics.values())
                paper = _paper_cells(task, distil, level)
                rows.append([title, "paper", paper_dense, f"{level}%", *paper])
            rows.append([title, "ours", dense, f"about {level}%", *cells])
    return rows


def _cell(runs: Iterable[Run]) -> str:
    """Means over seeds, with the range of the first metric; one entry per group of settings."""
    parts = []
    by_settings = sorted(runs, key=lambda run: run.settings)
    for _, group in itertools.groupby(by_settings, key=lambda run: run.settings):
        seeds = list(group)
        names = [n for n in seeds[0].metrics if all(n in run.metrics for run in seeds)]
        part = _joined(statistics.mean(run.metrics[name] for run in seeds) for name in names)
        if len(seeds) > 1:
            first = [next(iter(run.metrics.values())) for run in seeds]
            part += f" ({min(first):.1f} to {max(first):.1f}, {len(seeds)} seeds)"
        if seeds[0].method != "dense":
            part += f" at {statistics.mean(run.remaining for run in seeds):.1f}%"
        parts.append(part)
    return "; ".join(parts)


def _paper_cells(task: str, distil: bool, level: int) -> tuple[str, ...]:
    if distil:
        return HEADLINE[task, level]
    metrics = load_points(task)[0].metrics
    return tuple(
        _joined(paper_value(task, metric, method, distil, level) for metric in metrics)
        for method in METHODS
    )


def _joined(metrics: Iterable[float | None]) -> str:
    return "/".join(f"{value:.1f}" for value in metrics if value is not None)


def run_rows(runs: list[Run]) -> list[dict]:
    """A row per run. "paper there" interpolates between the paper's two nearest points."""
    rows = []
    for run in sorted(runs, key=lambda run: (run.task, run.method, run.distil, -run.remaining)):
        args, summary, kind = run.args, run.summary, (run.method, run.distil)
        paper = {name: paper_value(run.task, name, *kind, run.remaining) for name in run.metrics}
        row = {
            "task": run.task,
            "method": run.method,
            "teacher": "yes" if run.distil else "",
            "seed": args["seed"],
            "remaining %": round(run.remaining, 2),
            "of the Linears %": round(run.remaining_linear, 2),
            "metrics": _listed(run.metrics),
            "paper there": _listed(paper),
            "updates": summary["updates"],
            "batch": run.batch,
            "hours": round(summary["seconds"] / 3600, 2),
            "hardware": summary["hardware"],
            "model": args["model_name_or_path"],
            "folder": str(run.folder),
        }
        rows.append(row)
    return rows


def _listed(metrics: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if value is not None)


def to_markdown(rows: list[list]) -> str:
    """A Markdown table; the first row is its header."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)
