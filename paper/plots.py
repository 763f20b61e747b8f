"""The paper's figures with our runs in them, our metrics against measured speed-ups, and pictures
of one run.

All figures share a style. A page shows them 600 pixels wide; colours differ in grey; a name beside
the end of a line takes the place of a legend.
"""

import itertools
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from transformers import PreTrainedModel

from emmental.checkpoints.counts import (
    LayerCount,
    RemainingWeights,
    count_layers,
    remaining_weights,
)
from emmental.checkpoints.loading import load_masked, load_model
from emmental.modules.granularity import GRANULARITIES
from emmental.modules.masks import find_masks, masked_layers
from emmental.system.errors import UserError
from emmental.system.files import write_file

from .curves import read_curves
from .points import GLOBAL, TASKS, paper_line
from .runs import PLAIN, TITLES, Run, methods_of

WIDTH = 6  # inches, of 100 pixels on a page
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.color": "0.9",
    "savefig.dpi": 150,
}
matplotlib.rcParams.update(STYLE)
PALETTE = ("#757575", "#f2ae3d", "#52a5dd", "#08306b", "#5d7f3b", "#b5123f")
COLOURS = dict(zip(TITLES, itertools.cycle(PALETTE)))
LINES = ("-", "--", ":", "-.")
MARKERS = "os^DvP"
SMALLER = {"dense": "fewer layers", "compact": "compact, fine-tuned"}
KINDS = ("dense", *SMALLER.values(), *GRANULARITIES)
KIND_MARKERS = dict(zip(KINDS, itertools.cycle("Px*" + MARKERS)))
TICKS = (1, 2, 3, 5, 10, 20, 30, 50, 100)
OVERALL = "remaining/overall"
SAMPLE = 4000  # remaining weights in a scatter, and as many pruned ones


def draw(runs: list[Run], folder: Path, speeds: "Speeds | None" = None) -> list[str]:
    """Save all figures as PNG files. Returns a line for each: its path, or why there is none."""
    lines = []

    def save(name: str, make: Callable[..., Figure], *of_what) -> None:
        try:
            figure = make(*of_what)
        except UserError as error:
            lines.append(f"not drawn: {name}: {error}")
        else:
            save_figure(figure, folder / name)
            lines.append(str(folder / name))

    for task in sorted({run.task for run in runs}):
        of_task = [run for run in runs if run.task == task and run.metrics]
        save(f"{task}-metric.png", metric_figure, task, of_task)
        if of_task and speeds:
            save(f"{task}-speed.png", speed_figure, task, of_task, speeds)
    depth = 2  # folders in a file's name: enough to tell the runs apart
    while len({run.folder.parts[-depth:] for run in runs}) < len(runs):
        depth += 1
    for run in runs:
        if run.method in PLAIN:
            continue
        name = "-".join(run.folder.parts[-depth:])
        model = load_masked(str(run.folder))
        masks = find_masks(model)
        counts, layers = remaining_weights(model, masks), count_layers(model, masks)
        save(f"{name}-layers.png", layer_figure, counts, layers, _title(run))
        save(f"{name}-weights.png", scatter_figure, run, model)
        save(f"{name}-curves.png", curves_figure, run)
    return lines


def check_picture(flag: str, file: Path) -> None:
    """Raises UserError for a picture that cannot be written: its ending, or no folder."""
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.lower().removeprefix(".") not in endings:
        raise UserError(f"{flag} {file}: the name must end in one of .{' .'.join(endings)}")
    if not file.parent.is_dir():
        raise UserError(f"{flag} {file}: there is no folder {file.parent}: make it first")


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure. A PNG has 128 colours, and a third of the bytes."""

    def fill(aside: Path) -> None:
        figure.savefig(aside)
        if aside.suffix.lower() == ".png":
            Image.open(aside).convert("RGB").quantize(128).save(aside, optimize=True)

    write_file(file, fill)


# ------------------------------------------------------------------------------------ many runs


def metric_figure(task: str, runs: list[Run]) -> Figure:
    """Metric against remaining weights, by method: the paper as lines, ours as points.

    The title has what our pruned models have in common. Raises UserError without runs.
    """
    if not runs:
        raise UserError("its runs have no metric")
    metric = _metric(task, runs)
    pruned = [run for run in runs if run.method not in PLAIN]
    common = set.intersection(*(set(_extras(run)) for run in pruned)) if pruned else set()
    shared = [extra for extra in _extras(pruned[0]) if extra in common] if common else []
    title = f"{task} (ours: {', '.join(shared)})" if shared else task
    figure, axes = panel("remaining weights, % of the encoder", f"{metric}, %", title)
    for method, distil in itertools.product(methods_of(runs), (False, True)):
        line = paper_line(task, metric, method, distil)
        label = method + ", distilled" * distil + " (paper)"
        linestyle = LINES[2 * (not distil) + (GLOBAL in method)]
        _plot(axes, method, line, label=label, linestyle=linestyle)
    series, whose = {}, " (ours)" * (task in TASKS)
    for run in pruned:
        extras = ", ".join(extra for extra in _extras(run) if extra not in common)
        points = series.setdefault((run.method, extras, run.distil), [])
        points.append((run.remaining, run.metrics[metric]))
    kinds = sorted({(GLOBAL in method, extras) for method, extras, _ in series})
    markers = dict(zip(kinds, itertools.cycle(MARKERS)))
    for (method, extras, distil), points in series.items():
        style = {"marker": markers[GLOBAL in method, extras], "linestyle": "none"}
        style["fillstyle"] = "full" if distil else "none"
        label = ", ".join(filter(None, (method, extras))) + whose
        _plot(axes, method, points, label=label, **style)
    for run in runs:
        if run.method == "dense" and not run.distil:  # not a model with fewer layers
            axes.axhline(run.metrics[metric], color="black", lw=0.8, label=f"dense{whose}")
    remaining_axis(axes)
    name_ends(axes)
    return figure


@dataclass
class Speeds:
    """Measured speed-ups over the dense model, at one batch and length.

    gains: for each runtime, the speed-ups of models, by folder. dense: the dense model's folder.
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
            by_folder = gains.setdefault(row["runtime"], {})
            is_dense = row["model"] == "dense" and is_int8(row["runtime"])  # measured unasked
            by_folder[dense if is_dense else Path(row["model"]).resolve()] = float(row["gain"])
        setting, *others = {f"{row['batch']} x {row['length']}" for row in results["rows"]}
    except (KeyError, TypeError, ValueError) as error:
        problem = "does not hold speeds of models in folders, measured by benchmarks/compact.py"
        raise UserError(f"{file} {problem}") from error
    if others:
        raise UserError(f"{file} holds several batches or lengths: measure at one of each")
    return Speeds(gains, dense, setting)


def speed_figure(task: str, runs: list[Run], speeds: Speeds) -> Figure:
    """Metric against speed-up, a line for each method, granularity and runtime.

    The metric is that of the float32 model, at speeds of int8, too. Raises UserError if the speed
    of no run was measured.
    """
    metric = _metric(task, runs)
    series = {}
    for run, (runtime, gains) in itertools.product(runs, speeds.gains.items()):
        folder = run.folder.resolve()
        kind = "dense" if folder == speeds.dense else _kind(run)
        if folder in gains and (kind != "dense" or is_int8(runtime)):  # else 1 by definition
            points = series.setdefault((run.method, kind, runtime), [])
            points.append((gains[folder], run.metrics[metric]))
    if not series:
        raise UserError("no speed of its runs was measured")
    xlabel = f"times as fast as dense in float32 (batch x length {speeds.setting})"
    figure, axes = panel(xlabel, f"{metric}, %", task)
    styles = dict(zip(speeds.gains, itertools.cycle(LINES)))
    for (method, kind, runtime), points in sorted(series.items()):
        label = kind if method in PLAIN else f"{method}, {kind}"
        label += f", {runtime}" if len(speeds.gains) > 1 else ""
        style = {"marker": KIND_MARKERS[kind], "linestyle": styles[runtime]}
        style["fillstyle"] = "none" if is_int8(runtime) else "full"
        _plot(axes, method, sorted(points), label=label, **style)
    for run in runs:
        if run.folder.resolve() == speeds.dense:
            axes.axhline(run.metrics[metric], color="black", lw=0.8, label="dense")
    name_ends(axes)
    return figure


def is_int8(runtime: str) -> bool:
    return "int8" in runtime


# ------------------------------------------------------------------------------------- one model


def layer_figure(counts: RemainingWeights, layers: list[LayerCount], title: str) -> Figure:
    """A grid: for each layer, the remaining weights of each matrix, the heads and the neurons."""
    columns = {}  # by title, the percentage and the text of each layer
    for matrix in counts.matrices:
        kind = _place(matrix.name)[0].replace(".", "\n") + "\n%"
        columns.setdefault(kind, []).append((matrix.percent, f"{matrix.percent:.3g}"))
    matrices = len(columns)
    for layer in layers:
        for name, left, total in (
            ("heads", layer.heads, layer.all_heads),
            ("neurons", layer.neurons, layer.all_neurons),
        ):
            columns.setdefault(f"{name}\nof {total}", []).append((100 * left / total, f"{left}"))
    rows = max(map(len, columns.values()))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.28 * rows), layout="constrained")
    axes = figure.subplots()
    percents = torch.full((rows, len(columns)), torch.nan)
    for x, cells in enumerate(columns.values()):
        for y, (percent, text) in enumerate(cells):
            percents[y, x] = percent
            colour = "white" if percent > 35 else "black"
            axes.text(x, y, text, ha="center", va="center", color=colour)
    axes.imshow(percents.sqrt(), cmap="Blues", vmin=0, vmax=10, aspect="auto")  # 1% can be seen
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(rows))
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.axvline(matrices - 0.5, color="white", linewidth=6)
    axes.set(ylabel="layer", title=textwrap.fill(title, 80))
    return figure


@torch.no_grad()
def scatter_figure(run: Run, model: PreTrainedModel) -> Figure:
    """Final against first weight, and the move from zero, of remaining and of pruned weights.

    model: the run's. Raises UserError when the model that the run started from cannot be loaded.
    """
    head = type(model).__name__.partition("For")[2]
    start = run.args["model_name_or_path"]
    first = load_model(start, head, masked=False, cache_dir=run.args["cache_dir"])
    layers = masked_layers(model)
    masks = find_masks(model).by_layer
    generator = torch.Generator().manual_seed(0)
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for remain, title, colour, (above, below) in (
        (True, "kept", PALETTE[1], panels[:, 0]),
        (False, "pruned (its weight before the mask)", PALETTE[0], panels[:, 1]),
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
    panels[1, 0].set(ylabel="moved away from zero\n(negative: towards zero)")
    figure.suptitle(_title(run), fontsize=STYLE["axes.titlesize"])
    return figure


def curves_figure(run: Run) -> Figure:
    """Threshold, remaining weights and loss along a run. Raises UserError without its events."""
    curves = read_curves(run.folder)
    if OVERALL not in curves:
        raise UserError("its TensorBoard events hold no remaining weights")
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    threshold, remaining, loss = figure.subplots(3, sharex=True)

    def plot(axes: Axes, tag: str, scale: float = 1, **style) -> None:
        values = curves.get(tag, {})
        axes.plot([*values], [scale * value for value in values.values()], **style)

    plot(threshold, "threshold", color="black", label="_")
    at_end = {tag: [*curves[tag].values()][-1] for tag in curves if tag.startswith("remaining/")}
    lowest, highest = min(at_end, key=at_end.get), max(at_end, key=at_end.get)
    differ = at_end[highest] - at_end[lowest] > 0.01
    for tag in filter(lambda tag: tag != OVERALL, at_end):
        named = differ and tag in (lowest, highest)
        label = "{}, layer {}".format(*_place(tag)) if named else "_"
        plot(remaining, tag, 100, color=PALETTE[2], lw=0.6, label=label)
    plot(remaining, OVERALL, 100, color="black", label="overall")
    parts = sorted(tag for tag in curves if tag.startswith("loss"))
    for tag, colour, linestyle in zip(parts, ("black", *PALETTE), itertools.cycle(LINES)):
        plot(loss, tag, color=colour, linestyle=linestyle, label=tag)
    losses = [value for tag in parts for value in curves[tag].values() if value > 0]
    if losses and max(losses) > 10 * min(losses):
        loss.set_yscale("log")
        loss.yaxis.set_major_formatter("{x:g}")
    threshold.set(ylabel="threshold", title=_title(run))
    remaining.set(ylabel="remaining weights, %")
    loss.set(ylabel="loss", xlabel="updates")
    for axes in figure.axes:
        name_ends(axes)
    return figure


# ----------------------------------------------------------------------------------- the drawing


def panel(xlabel: str, ylabel: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return figure, axes


def remaining_axis(axes: Axes) -> None:
    """Make the x axis one of remaining weights: log, from dense at the left to sparse."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(high, low)
    axes.set_xticks(ticks := [x for x in TICKS if low <= x <= high], ticks)
    axes.set_xticks([], minor=True)


def name_ends(axes: Axes, width: int = 27) -> None:
    """Write the name of each line beside the axes, with a leader from the line's right end.

    A leader is dashed like its line. Names keep apart. width: in characters.
    """
    axes.autoscale_view()
    to_axes = axes.transAxes.inverted()
    row = 1.2 * STYLE["font.size"] / 72 * axes.figure.dpi / axes.get_window_extent().height
    names = []
    for line in axes.lines:
        if not line.get_label().startswith("_"):
            points = to_axes.transform(line.get_transform().transform(line.get_xydata()))
            x, y = max(map(tuple, points))
            text = textwrap.fill(line.get_label(), width, break_on_hyphens=False)
            names.append([y, row * (text.count("\n") + 1), (x, y), text, line])
    names.sort(key=lambda name: name[2][::-1])
    for _ in range(300):
        for below, above in itertools.pairwise(names):
            overlap = max(0, (below[1] + above[1]) / 2 - (above[0] - below[0]))
            below[0] -= overlap / 2
            above[0] += overlap / 2
        for lowest, highest in zip(names[:1], names[-1:]):
            lowest[0], highest[0] = max(lowest[0], 0), min(highest[0], 1)
    for place, _, end, text, line in names:
        colour = [0.7 * part for part in to_rgb(line.get_color())]  # darker, to be read
        leader = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
        leader |= {"relpos": (0, 0.5), "linestyle": line.get_linestyle().replace("None", "-")}
        axes.annotate(
            text,
            end,
            (1.06, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour,
            arrowprops=leader,
        )


def _plot(axes: Axes, method: str, points: list[tuple[float, float]], **style) -> None:
    """Plot in the colour of the method; dense models are black."""
    if points:
        colour = COLOURS.get(method.removesuffix(GLOBAL), "black")
        axes.plot(*zip(*points, strict=True), color=colour, **style)


def _place(name: str) -> tuple[str, str | None]:
    """The kind of a matrix and the number of its layer."""
    number, kind = re.fullmatch(r"(?:.*\.(\d+)\.)?(.*)", name).groups()
    return kind.replace("attention.self.", "").removesuffix(".dense"), number


def _metric(task: str, runs: list[Run]) -> str:
    return "f1" if task.startswith("squad") else next(iter(runs[0].metrics))


def _kind(run: Run) -> str:
    """The granularity of a pruned model, or what makes a dense model smaller."""
    return run.granularity or SMALLER[run.method]


def _extras(run: Run) -> list[str]:
    """What may tell a run from others of its method: distilled, structure, fine-tuned start."""
    hidden = run.args.get("alpha_hidden")
    granularity = run.granularity if run.granularity != "weight" else ""
    start = "fine-tuned start" * (run.start == "fine-tuned")
    hidden = f"alpha_hidden {hidden:g}" if hidden else ""
    return list(filter(None, ("distilled" * run.distil, granularity, start, hidden)))


def _title(run: Run) -> str:
    """What the run was, in lines that fit a figure."""
    method = ", ".join([run.method, *_extras(run)])
    title = f"{run.task}: {method}, {run.remaining:.1f}% remaining, seed {run.args['seed']}"
    return textwrap.fill(title, 80)
