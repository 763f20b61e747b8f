"""Figures from CSV files of this repository: that of the first page, and some of results/."""

import csv
import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from emmental.system.errors import UserError

from .plots import (
    COLOURS,
    LINES,
    MARKERS,
    PALETTE,
    WIDTH,
    is_int8,
    name_ends,
    panel,
    remaining_axis,
)
from .points import GLOBAL, METHODS, ROOT, load_points, paper_line
from .runs import TITLES

SHOWN = (*METHODS, "PLATON")
METRICS = {"squad": "f1", "sst-2": "acc"}
LOWEST = 60  # percent of the dense model, at the foot of the axis
BESIDE = 1.1  # ratio of neighbouring places, where our methods stand beside each other


def figures(results: Path = ROOT / "results") -> dict[str, Figure]:
    """The figures, by their file in this repository. Raises UserError for unfit CSV files."""
    return {
        "docs/figure.png": front_figure(results),
        "results/from-dense-cpu/figures/sst-2-speed.png": speeds_figure(
            results / "from-dense-cpu" / "speed.csv"
        ),
        "results/long/figures/accuracy.png": accuracy_figure(results / "long" / "curves.csv"),
    }


def front_figure(results: Path) -> Figure:
    """Metric against remaining weights, the paper's and ours; and our metric against speed.

    results: folder of `*/runs.csv` and of `speed.csv`.
    """
    figure = Figure(figsize=(1.25 * WIDTH, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    _draw_remaining(left, best_of_ours(results))
    _draw_speed(right, results / "speed.csv")
    right.set_title("Ours: smaller models", loc="left")
    return figure


def speeds_figure(file: Path) -> Figure:
    figure, axes = panel("", "", "")
    _draw_speed(axes, file)
    return figure


def best_of_ours(results: Path) -> dict[tuple[str, str, int], tuple[float, float]]:
    """Our best runs by task, method and whole percentage: what remains, and the metric.

    The metric is in percent of our best dense model. The models have single weights pruned.
    """
    best = {}
    for file in sorted(results.glob("*/runs.csv")):
        for row in read_rows(file, "task", "method", "teacher", "metrics", "remaining %"):
            name = METRICS.get(row["task"])
            smaller = row["method"] == "dense" and row["teacher"]  # fewer layers
            whole = row.get("granularity") not in (None, "", "weight")
            if name is None or smaller or whole or row["metrics"] == "failed":
                continue
            remaining = _number(file, row["remaining %"])
            metric = _number(file, row["metrics"].partition(f"{name} ")[2].partition(",")[0])
            key = row["task"], row["method"].removesuffix(GLOBAL), round(remaining)
            best[key] = max(best.get(key, (0, 0)), (metric, remaining))
    dense = {task: best[task, "dense", 100][0] for task in METRICS if (task, "dense", 100) in best}
    return {
        key: (remaining, 100 * metric / dense[key[0]])
        for key, (metric, remaining) in best.items()
        if key[0] in dense
    }


def _draw_remaining(axes: Axes, best: dict[tuple[str, str, int], tuple[float, float]]) -> None:
    dense = load_points("squad")[0].metrics["f1"]
    for place, (method, marker) in enumerate(zip(SHOWN, MARKERS)):
        style = {"color": COLOURS[method], "marker": marker}
        line = [(x, 100 * y / dense) for x, y in paper_line("squad", "f1", method, True)]
        if line:
            axes.plot(*zip(*line), markersize=3, label=method.replace("l0", "L0"), **style)
        beside = BESIDE ** (place - len(SHOWN) // 2)
        for task, filled in ("squad", "full"), ("sst-2", "none"):
            points = [xy for (*what, _), xy in best.items() if what == [task, method]]
            points = sorted((beside * x, y) for x, y in points)
            label = "_" if line or task == "squad" else method
            axes.plot(*_columns(points), ls="none", fillstyle=filled, label=label, **style)
            for x, y in points:
                if y < LOWEST:
                    text = {"textcoords": "offset points", "ha": "right", "color": COLOURS[method]}
                    text["arrowprops"] = {"arrowstyle": "->", "color": COLOURS[method]}
                    axes.annotate(f"{method}: {y:.0f}", (x, LOWEST), (-5, 12), **text)
    title = (
        "Lines: the paper (SQuAD F1, BERT-base)\nOurs (MiniLM): open SST-2, filled a part of SQuAD"
    )
    axes.set_title(title, loc="left")
    axes.set(xlabel="remaining weights, %", ylabel="metric, % of the dense model's")
    axes.set(xlim=(2, 60), ylim=(LOWEST, 103))
    remaining_axis(axes)
    name_ends(axes)


def _draw_speed(axes: Axes, file: Path) -> None:
    series = {}
    for row in read_rows(file, "name", "metric", "runtime", "times"):
        points = series.setdefault((row["name"], row["runtime"]), [])
        points.append((_number(file, row["times"]), _number(file, row["metric"])))
    runtimes = list(dict.fromkeys(runtime for _, runtime in series))
    names = list(dict.fromkeys(name for name, _ in series))
    colours = dict(zip(names, itertools.cycle(("black", *PALETTE[::-1]))))
    markers = dict(zip(names, itertools.cycle(MARKERS)))
    styles = dict(zip(runtimes, itertools.cycle(LINES)))
    for (name, runtime), points in series.items():
        style = {"color": colours[name], "marker": markers[name], "linestyle": styles[runtime]}
        style["fillstyle"] = "none" if is_int8(runtime) else "full"
        label = name if len(runtimes) == 1 else f"{name}, {runtime}"
        axes.plot(*_columns(sorted(points)), label=label, **style)
    alone = f", {runtimes[0]}" if len(runtimes) == 1 else ""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=f"times as fast as dense{alone}", ylabel="SST-2 accuracy, %")
    name_ends(axes, width=20)


def accuracy_figure(file: Path) -> Figure:
    """The accuracy along the longest runs of `curves.csv`, with the names of the runs."""
    curves = {}
    for row in read_rows(file, "run", "updates", "accuracy"):
        point = _number(file, row["updates"]), 100 * _number(file, row["accuracy"])
        curves.setdefault(row["run"], []).append(point)
    figure, axes = panel("updates", "accuracy, %", "")
    longest = max(points[-1][0] for points in curves.values())
    drawn = []
    for run, points in sorted(curves.items()):
        if points[-1][0] == longest:
            method = next((x for x in TITLES if run.startswith(x.lower().split()[0])), None)
            linestyle = LINES[drawn.count(method) % len(LINES)]
            style = {"color": COLOURS.get(method, "black"), "linestyle": linestyle}
            axes.plot(*_columns(points), label=run, **style)
            drawn.append(method)
    name_ends(axes)
    return figure


def read_rows(file: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises UserError without rows, or if it lacks a column."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    lacking = [name for name in columns if not rows or rows[0].get(name) is None]
    if lacking:
        raise UserError(f"{file} has no column {', '.join(lacking)}, or no row")
    return rows


def _number(file: Path, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{file}: {text!r} is not a number") from error


def _columns(points: list[tuple[float, float]]) -> list[list[float]]:
    return [[x for x, _ in points], [y for _, y in points]]
