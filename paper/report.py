"""The paper's headline table with our runs in it, and a table with a row per run."""

import itertools
import statistics
from collections.abc import Iterable
from pathlib import Path

from emmental.system.errors import UserError

from .floor import bag_of_words
from .points import METHODS, METRICS, TASKS, load_points, paper_value
from .runs import Run, methods_of

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
    """Rows of the headline table: by task, teacher and level, the paper's results and ours.

    Runs that are near no level have rows of their own. In the last row of a task, the column of the
    dense model has what a bag of words reaches.
    """
    methods = methods_of(runs)
    titles = [method.replace("l0", "L0") for method in methods]
    rows = [["task (metrics)", "whose", "dense", "remaining", *titles]]
    for task in sorted({run.task for run in runs}):
        of_task = [run for run in runs if run.task == task]
        metrics = max((run.metrics for run in of_task), key=len)
        name = f"{task} ({'/'.join(metrics)})"
        dense = [run for run in of_task if run.method == "dense" and not run.distil]
        alone = len(rows)
        for distil, level in itertools.product((True, False), (*LEVELS, None)):
            near = [run for run in of_task if run.distil == distil and _level(run) == level]
            cells = [_cell(run for run in near if run.method == method) for method in methods]
            taught = [run for run in near if run.method == "dense" and distil]
            if not (any(cells) or taught):
                continue
            title = f"{name}, {'distilled' if distil else 'without teacher'}"
            if task in TASKS and level:
                paper_dense = _joined(load_points(task)[0].metrics.values())
                paper = [_paper_cell(task, distil, level, method) for method in methods]
                rows.append([title, "paper", paper_dense, f"{level}%", *paper])
            where = f"about {level}%" if level else "other"
            rows.append([title, "ours", _cell(dense + taught), where, *cells])
        if len(rows) == alone:
            rows.append([name, "ours", _cell(dense), "", *[""] * len(methods)])
        if floor := _floor(of_task):
            rows.append([name, "bag of words", floor, "", *[""] * len(methods)])
    return rows


def _level(run: Run) -> int | None:
    """The level that a run counts for, if it is near one."""
    return next((level for level in LEVELS if abs(run.remaining / level - 1) <= NEAR), None)


def _floor(runs: list[Run]) -> str | None:
    """Metrics of a bag of words on the task of the runs, or why there are none."""
    reasons = {}
    for args in {run.args["data_dir"]: run.args for run in runs}.values():
        try:
            metrics = bag_of_words(args)
            return metrics and _joined(metrics.values())
        except (UserError, OSError) as error:
            reasons[str(error).removeprefix("--data_dir ")] = None
    return f"not computed: {'; '.join(reasons)}"


def _cell(runs: Iterable[Run]) -> str:
    """Means over seeds, with the range of the first metric; one entry per group of settings.

    Runs without a metric have failed, and are counted. Entries name the settings in which they
    differ, and what the paper's runs did not have: a fine-tuned start, hidden-state distillation.
    """
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run.settings.items()), []).append(run)
    shared = set.intersection(*map(set, groups)) if groups else set()
    parts = []
    for settings, seeds in groups.items():
        scored = [run.metrics for run in seeds if run.metrics]
        names = [name for name in METRICS if scored and all(name in x for x in scored)]
        part = _joined(statistics.mean(x[name] for x in scored) for name in names) or "failed"
        if len(seeds) > 1:
            notes = [f"{len(seeds)} seeds"]
            if 0 < len(scored) < len(seeds):
                notes.append(f"{len(seeds) - len(scored)} failed")
            if len(scored) > 1:
                first = [next(iter(metrics.values())) for metrics in scored]
                notes.insert(0, f"{min(first):.1f} to {max(first):.1f}")
            part += f" ({', '.join(notes)})"
        if seeds[0].method != "dense":
            part += f" at {statistics.mean(run.remaining for run in seeds):.1f}%"
        start = seeds[0].start
        for name, value in settings:
            is_model = name == "model_name_or_path"
            beyond = name == "alpha_hidden" or (is_model and start == "fine-tuned")
            if beyond or (name, value) not in shared:
                part += f", {start} {Path(value).name}" if is_model else f", {name} {value}"
        parts.append(part)
    return "; ".join(parts)


def _paper_cell(task: str, distil: bool, level: int, method: str) -> str:
    if distil and method in METHODS:
        return HEADLINE[task, level][METHODS.index(method)]
    metrics = load_points(task)[0].metrics
    return _joined(paper_value(task, metric, method, distil, level) for metric in metrics)


def _joined(metrics: Iterable[float | None]) -> str:
    return "/".join(f"{value:.1f}" for value in metrics if value is not None)


def run_rows(runs: list[Run]) -> list[dict]:
    """A row per run. The column "paper there" interpolates between the paper's nearest points."""
    rows = []
    methods = ["dense", *methods_of(runs)]
    runs = sorted(
        runs, key=lambda run: (run.task, methods.index(run.method), run.distil, -run.remaining)
    )
    for run in runs:
        kind = run.method, run.distil
        compared = run.metrics if run.granularity in ("", "weight") else ()
        paper = {name: paper_value(run.task, name, *kind, run.remaining) for name in compared}
        row = {
            "task": run.task,
            "method": run.method,
            "granularity": run.granularity,
            "start": run.start,
            "teacher": "yes" if run.distil else "",
            "loss weights": _loss_weights(run),
            "seed": run.args["seed"],
            "remaining %": round(run.remaining, 2),
            "of the Linears %": round(run.remaining_linear, 2),
            "metrics": _listed(run.metrics) or "failed",
            "paper there": _listed(paper),
            "updates": run.summary["updates"],
            "batch": run.batch,
            "hours": round(run.summary["seconds"] / 3600, 2),
            "hardware": run.summary["hardware"],
            "model": run.args["model_name_or_path"],
            "folder": str(run.folder),
        }
        rows.append(row)
    return rows


def _loss_weights(run: Run) -> str:
    """The loss weights of a run with a teacher: "ce 0.1, distil 0.9"."""
    weights = {flag: value for flag, value in run.args.items() if flag.startswith("alpha_")}
    parts = [f"{flag.removeprefix('alpha_')} {value:g}" for flag, value in weights.items() if value]
    return ", ".join(parts) if run.distil else ""


def _listed(metrics: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if value is not None)


def to_markdown(rows: list[list]) -> str:
    """A Markdown table; the first row is its header."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)
