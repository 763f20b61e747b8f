"""The paper's two kinds of figure with our runs in them, and where kept and pruned weights lie."""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from ..errors import UserError
from ..export import remaining_weights
from ..loading import load_masked, load_model
from ..modules.masks import find_masks, masked_layers
from .points import METHODS, TASKS, load_points
from .runs import Run

COLOURS = dict(zip(METHODS, ("tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))
KINDS = (
    "query",
    "key",
    "value",
    "attention.output",
    "intermediate",
    "output",
)  # of a layer's matrices, in its order
POINTS = 4000  # weights in a scatter, kept and pruned each


def metric_figure(task: str, runs: list[Run]) -> Figure:
    """Metric against remaining weights (percent, logarithmic), by method: the paper as lines, ours as points."""
    own = [run for run in runs if run.task == task]
    metric = list(own[0].metrics)[-1 if task == "squad" else 0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    points = load_points(task) if task in TASKS else []
    for method in METHODS:
        for distil in (False, True):
            line = sorted(
                (point.remaining, point.metrics[metric])
                for point in points
                if (point.method, point.distil, point.global_topk) == (method, distil, False)
            )
            if line:
                axes.plot(*zip(*line, strict=True), color=COLOURS[method], linestyle="-" if distil else ":",
                          label=f"{method}{', distilled' if distil else ''} (paper)")  # fmt: skip
            ours = [
                (run.remaining, run.metrics[metric])
                for run in own
                if (run.method, run.distil, run.global_topk) == (method, distil, False)
                and metric in run.metrics
            ]
            if ours:
                axes.scatter(*zip(*ours, strict=True), color=COLOURS[method], marker="o" if distil else "x", zorder=3,
                             label=f"{method}{', distilled' if distil else ''} (ours)")  # fmt: skip
    for run in own:
        if run.is_dense and metric in run.metrics:
            axes.axhline(run.metrics[metric], color="black", linewidth=0.8, linestyle="--")
            axes.annotate(
                "dense (ours)",
                (0.01, run.metrics[metric]),
                xycoords=("axes fraction", "data"),
                va="bottom",
                fontsize=8,
            )
    axes.set(
        xscale="log",
        xlabel="remaining weights, % of the encoder",
        ylabel=f"{metric}, %",
        title=task,
    )
    for axis_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis_formatter(FormatStrFormatter("%g"))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def layer_figure(run: Run) -> Figure:
    """Remaining weights of one run, by layer and kind of matrix."""
    matrices = remaining_weights(load_masked(str(run.folder))).matrices
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    per_layer = len(KINDS)
    for place, kind in enumerate(KINDS):
        axes.plot(
            [matrix.percent for matrix in matrices[place::per_layer]],
            marker="o",
            markersize=3,
            label=kind,
        )
    axes.set(
        xlabel="layer",
        ylabel="remaining weights, %",
        title=_title(run),
        xticks=range(len(matrices) // per_layer),
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


@torch.no_grad()
def scatter_figure(run: Run) -> Figure:
    """Final weight against pre-trained weight of a sample of weights of all matrices, kept and pruned, and how far
    each moved away from zero.

    Raises UserError when the pre-trained model is not to be had.
    """
    model = load_masked(str(run.folder))
    head = type(model).__name__.partition("For")[2]
    first = load_model(run.model, head, masked=False, cache_dir=run.args.get("cache_dir"))
    generator = torch.Generator().manual_seed(0)
    layers, masks = masked_layers(model), find_masks(model)
    share = math.ceil(POINTS / len(layers))
    parts = {True: [], False: []}
    for name, layer in layers.items():
        before = first.get_parameter(f"{name}.weight")
        if before.shape != layer.weight.shape:
            raise UserError(
                f"{run.model} is not what {run.folder} was fine-pruned from: {name} has another shape"
            )
        for kept in parts:
            places = ((masks.by_layer[name] != 0) == kept).flatten().nonzero().flatten()
            chosen = places[torch.randperm(len(places), generator=generator)[:share]]
            parts[kept].append(
                torch.stack([before.flatten()[chosen], layer.weight.flatten()[chosen]])
            )
    figure = Figure(figsize=(9, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, (kept, colour) in enumerate(((True, "tab:orange"), (False, "tab:gray"))):
        before, after = torch.cat(parts[kept], 1)
        style = {"s": 2, "alpha": 0.4, "color": colour, "linewidths": 0}
        above, below = panels[:, column]
        above.scatter(before.numpy(), after.numpy(), **style)
        above.axline((0, 0), slope=1, color="black", linewidth=0.6, linestyle=":")
        above.set(title="kept" if kept else "pruned (its weight before the mask)")
        below.scatter(before.numpy(), (after.abs() - before.abs()).numpy(), **style)
        below.set(xlabel="pre-trained weight")
        for axes in (above, below):
            axes.axhline(0, color="black", linewidth=0.4)
    panels[0, 0].set_ylabel("final weight")
    panels[1, 0].set_ylabel("moved away from zero (below 0: towards it)")
    figure.suptitle(_title(run))
    return figure


def _title(run: Run) -> str:
    return f"{run.task}: {run.method}{', distilled' if run.distil else ''}, {run.remaining:.1f}% remaining, seed {run.seed}"


def draw(runs: list[Run], folder: Path) -> list[tuple[Path, str | None]]:
    """Write all figures as PNG; returns each file, and why it could not be drawn if it could not."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for task in sorted({run.task for run in runs}):
        outcomes.append(
            _save(
                folder / f"{task.replace(chr(47), chr(45))}-metric.png", metric_figure, task, runs
            )
        )
    for run in runs:
        if not run.is_dense:
            name = "-".join(run.folder.parts[-2:])
            outcomes.append(_save(folder / f"{name}-layers.png", layer_figure, run))
            outcomes.append(_save(folder / f"{name}-weights.png", scatter_figure, run))
    return outcomes


def _save(path: Path, make, *args) -> tuple[Path, str | None]:
    try:
        figure = make(*args)
    except UserError as error:
        return path, str(error)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=120, format="png")
    aside.replace(path)
    return path, None
