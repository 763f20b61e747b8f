"""The paper's figures with our runs in them, and our metrics against measured speed-ups."""

import itertools
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emmental.checkpoints.counts import remaining_weights
from emmental.checkpoints.loading import load_masked, load_model, read_config
from emmental.models.families import COMPACT
from emmental.modules.granularity import GRANULARITIES
from emmental.modules.masks import find_masks, masked_layers
from emmental.system.errors import UserError

from .points import GLOBAL, paper_line
from .runs import TITLES, Run, methods_of

PALETTE = "blue green orange red purple brown pink olive cyan".split()
COLOURS = {title: f"tab:{name}" for title, name in zip(TITLES, itertools.cycle(PALETTE))}
MARKERS = "os^Dv"
SMALLER = ("fewer layers", "compact, fine-tuned")  # dense models
KIND_MARKERS = dict(zip([*SMALLER, *GRANULARITIES], itertools.cycle("x*" + MARKERS)))
SAMPLE = 4000  # remaining weights in a scatter, and as many pruned ones


def draw(runs: list[Run], folder: Path, speeds: "Speeds | None" = None) -> list[str]:
    """Save all figures as PNG files. Returns a line for each: its path, or why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []

    def save(figure: Figure, name: str) -> None:
        figure.savefig(folder / name, dpi=120)
        lines.append(str(folder / name))

    for task in sorted({run.task for run in runs}):
        of_task = [run for run in runs if run.task == task and run.metrics]
        if not of_task:
            lines.append(f"not drawn: {task}-metric.png: its runs have no metric")
            continue
        save(metric_figure(task, of_task), f"{task}-metric.png")
        if not speeds:
            continue
        if figure := speed_figure(task, of_task, speeds):
            save(figure, f"{task}-speed.png")
        else:
            lines.append(f"not drawn: {task}-speed.png: no speed of its runs was measured")
    depth = 2  # of the folders in a file's name: enough to tell the runs apart
    while len({run.folder.parts[-depth:] for run in runs}) < len(runs):
        depth += 1
    for run in runs:
        if run.method == "dense":
            continue
        name = "-".join(run.folder.parts[-depth:])
        save(layer_figure(run), f"{name}-layers.png")
        try:
            save(scatter_figure(run), f"{name}-weights.png")
        except UserError as error:
            lines.append(f"not drawn: {name}-weights.png: {error}")
    return lines


def metric_figure(task: str, runs: list[Run]) -> Figure:
    """Metric against remaining weights, by method: the paper as lines, ours as points."""
    metric = _metric(task, runs)
    figure, axes = _panel("remaining weights, % of the encoder", f"{metric}, %", task)
    extras = sorted({_extras(run) for run in runs} | {""})
    for method, distil in itertools.product(methods_of(runs), (False, True)):
        name = method + ", distilled" * distil
        line = paper_line(task, metric, method, distil)
        _plot(axes, method, line, label=f"{name} (paper)", linestyle="-" if distil else ":")
        for extra, marker in zip(extras, itertools.cycle(MARKERS)):
            ours = [
                (run.remaining, run.metrics[metric])
                for run in runs
                if (run.method, run.distil, _extras(run)) == (method, distil, extra)
            ]
            style = {"marker": marker, "fillstyle": "full" if distil else "none"}
            _plot(axes, method, ours, label=f"{name}{extra} (ours)", linestyle="none", **style)
    for run in runs:
        if run.method == "dense" and not run.distil:  # not a model with fewer layers
            axes.axhline(run.metrics[metric], color="black", ls="--", label="dense (ours)")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=7)
    return figure


@dataclass
class Speeds:
    """Measured speed-ups over the dense model, at one batch and length.

    gains: by runtime, those of the models by their folders. dense: the folder of the dense model.
    """

    gains: dict[str, dict[Path, float]]
    dense: Path
    setting: str


def read_speeds(file: Path) -> Speeds:
    """The results of benchmarks/compact.py for models in folders. Raises UserError."""
    gains = {}
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        dense = Path(results["dense"]).resolve()
        for row in results["rows"]:
            model = Path(row["model"]).resolve()
            gains.setdefault(row["runtime"], {})[model] = float(row["gain"])
        setting, *others = {f"{row['batch']} x {row['length']}" for row in results["rows"]}
    except (KeyError, TypeError, ValueError) as error:
        problem = "does not hold speeds of models in folders, measured by benchmarks/compact.py"
        raise UserError(f"{file} {problem}") from error
    if others:
        raise UserError(f"{file} holds several batches or lengths: measure at one of each")
    return Speeds(gains, dense, setting)


def speed_figure(task: str, runs: list[Run], speeds: Speeds) -> Figure | None:
    """Metric against speed-up, by method and granularity; None if no run's speed was measured."""
    metric = _metric(task, runs)
    series = {}
    for run, runtime in itertools.product(runs, speeds.gains):
        folder = run.folder.resolve()
        if folder != speeds.dense and folder in speeds.gains[runtime]:
            points = series.setdefault((run.method, _kind(run), runtime), [])
            points.append((speeds.gains[runtime][folder], run.metrics[metric]))
    if not series:
        return None
    xlabel = f"times as fast as the dense model (batch x length {speeds.setting})"
    figure, axes = _panel(xlabel, f"{metric}, %", task)
    runtimes = list(speeds.gains)
    for (method, kind, runtime), points in sorted(series.items()):
        label = kind if method == "dense" else f"{method}, {kind}"
        label += f", {runtime}" if len(runtimes) > 1 else ""
        linestyle = ("-", "--", ":", "-.")[runtimes.index(runtime)]
        style = {"marker": KIND_MARKERS[kind], "linestyle": linestyle}
        _plot(axes, method, sorted(points), label=label, **style)
    for run in runs:
        if run.folder.resolve() == speeds.dense:
            axes.axhline(run.metrics[metric], color="black", ls="--", lw=0.8, label="dense")
    axes.legend(fontsize=7)
    return figure


def layer_figure(run: Run) -> Figure:
    """Remaining weights by layer and kind of matrix; kinds that are equal share a line."""
    by_kind = {}
    for matrix in remaining_weights(load_masked(str(run.folder))).matrices:
        kind = re.split(r"\.\d+\.", matrix.name)[-1]
        kind = kind.replace("attention.self.", "").removesuffix(".dense")
        by_kind.setdefault(kind, []).append(matrix.percent)
    lines = {}
    for kind, percents in by_kind.items():
        lines.setdefault(tuple(percents), []).append(kind)
    figure, axes = _panel("layer", "remaining weights, %", _title(run))
    for (percents, kinds), marker in zip(lines.items(), itertools.cycle(MARKERS)):
        axes.plot(percents, marker=marker, fillstyle="none", label=", ".join(kinds))
    axes.set_xticks(range(max(map(len, lines))))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@torch.no_grad()
def scatter_figure(run: Run) -> Figure:
    """Final against first weight, and the move from zero, of remaining and of pruned weights.

    Raises UserError when the model that the run started from cannot be loaded.
    """
    model = load_masked(str(run.folder))
    head = type(model).__name__.partition("For")[2]
    start = run.args["model_name_or_path"]
    first = load_model(start, head, masked=False, cache_dir=run.args["cache_dir"])
    layers = masked_layers(model)
    masks = find_masks(model).by_layer
    generator = torch.Generator().manual_seed(0)
    figure = Figure(figsize=(9, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for remain, title, colour, (above, below) in (
        (True, "kept", "tab:orange", panels[:, 0]),
        (False, "pruned (its weight before the mask)", "tab:gray", panels[:, 1]),
    ):
        sample = []
        for name, layer in layers.items():
            mask = layer.expand(masks[name])
            places = ((mask != 0) == remain).expand(layer.weight.shape).nonzero()
            order = torch.randperm(len(places), generator=generator)
            rows, columns = places[order[: SAMPLE // len(layers)]].T
            before = first.get_parameter(f"{name}.weight")
            sample.append(torch.stack([before[rows, columns], layer.weight[rows, columns]]))
        before, after = torch.cat(sample, 1).numpy()
        for axes, values in ((above, after), (below, abs(after) - abs(before))):
            axes.scatter(before, values, s=2, alpha=0.4, color=colour, linewidths=0)
            axes.axhline(0, color="black", linewidth=0.4)
        above.axline((0, 0), slope=1, color="black", linewidth=0.6, linestyle=":")
        above.set(title=title)
        below.set(xlabel=f"{run.start} weight")
    panels[0, 0].set(ylabel="final weight")
    panels[1, 0].set(ylabel="moved away from zero (negative: towards zero)")
    figure.suptitle(_title(run))
    return figure


def _panel(xlabel: str, ylabel: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _plot(axes: Axes, method: str, points: list[tuple[float, float]], **style) -> None:
    """Plot in the method's colour, paler if it ranks all matrices together."""
    if points:
        colour = COLOURS.get(method.removesuffix(GLOBAL), "black")
        alpha = 0.5 if GLOBAL in method else 1
        axes.plot(*zip(*points, strict=True), color=colour, alpha=alpha, **style)


def _metric(task: str, runs: list[Run]) -> str:
    return "f1" if task.startswith("squad") else next(iter(runs[0].metrics))


def _kind(run: Run) -> str:
    """The granularity of a pruned model, or what makes a dense model smaller."""
    compact = read_config(str(run.folder))["model_type"].startswith(COMPACT)
    return run.granularity or SMALLER[compact]


def _extras(run: Run) -> str:
    """What the paper's runs did not have: ", structure, fine-tuned start, alpha_hidden 1"."""
    hidden = run.args.get("alpha_hidden")
    extras = f", {run.granularity}" if run.granularity not in ("", "weight") else ""
    extras += ", fine-tuned start" * (run.start == "fine-tuned")
    return extras + (f", alpha_hidden {hidden:g}" if hidden else "")


def _title(run: Run) -> str:
    """What the run was, in lines that fit a figure."""
    method = run.method + ", distilled" * run.distil + _extras(run)
    title = f"{run.task}: {method}, {run.remaining:.1f}% remaining, seed {run.args['seed']}"
    return textwrap.fill(title, 60)
