"""What a person sees of a run: TensorBoard, progress, results, a summary at the end.

Progress is a bar on a terminal, and lines in a log.
"""

import logging
import sys
import threading
import time
from pathlib import Path

import datasets
import transformers
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..modules.masks import MaskedLayers, Masks, count, masked_layers
from ..system.errors import first_line
from ..system.files import write_json, write_text
from ..system.launcher import read_launch
from .distributed import World

logger = logging.getLogger(__name__)

HISTOGRAM_SAMPLE = 10_000  # scores of a matrix, at most


def set_up_logging() -> None:
    """Log to the screen from rank 0 only, and keep the libraries quiet.

    A character that the screen cannot show is printed as an escape, and is no error.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks have other streams
            stream.reconfigure(errors="backslashreplace")
    is_main = read_launch().rank == 0
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(logging.INFO if is_main else logging.ERROR)
    for name in ("datasets", "httpx", "httpx2", "fsspec", "filelock", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING if is_main else logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no warning for every retry
    transformers.utils.logging.set_verbosity_error()  # loading.py reports what matters
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


class RunLog:
    """TensorBoard events of a training and lines of a log, from rank 0 only."""

    def __init__(self, output_dir: Path, world: World):
        self.output_dir = output_dir
        self.world = world
        self.writer = None

    def start(self, step: int, total: int) -> None:
        """Begin after `step` of `total` updates; later events of an interrupted run are dropped."""
        self.first, self.total, self.begun = step, total, time.perf_counter()
        if not self.world.is_main:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import
        except Exception as error:  # a broken installation may raise anything
            reason = first_line(error)
            logger.warning("no curves are written: TensorBoard cannot be imported: %s", reason)
            return
        threading.excepthook = _hide_write_errors
        self.writer = SummaryWriter(str(self.output_dir), purge_step=step + 1 if step else None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log values after `step` updates."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def update(
        self, step: int, values: dict[str, float], optimizer: Optimizer, masks: Masks | None
    ) -> None:
        """Log values, learning rates and remaining weights; most of them in a line, too."""
        values = dict(values)
        for group in optimizer.param_groups:
            values[f"learning_rate/{group['name']}"] = group["lr"]
        if masks:
            counts = count(masks)
            values["remaining/overall"] = counts.overall
            for name, total in counts.total.items():
                values[f"remaining/{name}"] = counts.remaining[name] / total
        self.scalars(values, step)
        if not sys.stderr.isatty():
            logger.info(self._line(step, values, masks))

    def _line(self, step: int, values: dict[str, float], masks: Masks | None) -> str:
        """Progress, loss, threshold, remaining weights, speed and the time left, in a line."""
        parts = [f"loss {values['loss']:.3f}"] if "loss" in values else ["all updates skipped"]
        if masks:
            parts.append(" ".join(_threshold(masks)))
            parts.append(f"remaining {values['remaining/overall']:.1%}")
        rate = (step - self.first) / (time.perf_counter() - self.begun)
        left = tqdm.format_interval((self.total - step) / rate)
        return f"update {step}/{self.total}: {', '.join(parts)}, {rate:.3g} updates/s, {left} left"

    def evaluation(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of an evaluation after `step` updates."""
        if step and metrics:
            figures = ", ".join(f"{name} {_brief(value)}" for name, value in metrics.items())
            logger.info(f"update {step}: {figures}")
        self.scalars({f"eval/{name}": value for name, value in metrics.items()}, step)

    def score_histograms(self, model: nn.Module | MaskedLayers, step: int) -> None:
        """Log the distribution of the scores of every masked matrix, from a sample of each."""
        layers = masked_layers(model)
        if not self.writer or not layers or not layers.layers[0].method.scores:
            return
        holders = {id(layer) for layer in layers.holders}
        for name, layer in layers.items():
            if id(layer) in holders:
                scores = layer.source.detach().flatten()
                sample = scores[:: -(-len(scores) // HISTOGRAM_SAMPLE)].float().cpu()
                self.writer.add_histogram(f"scores/{name}", sample, step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def _hide_write_errors(args) -> None:
    """A `threading.excepthook`: TensorBoard's thread fails, and then `RunLog.scalars` raises."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def progress_bar(world: World, **kwargs) -> tqdm:
    """A progress bar on stderr if that is a terminal, on rank 0 only."""
    disable = None if world.is_main else True
    return tqdm(dynamic_ncols=True, disable=disable, file=sys.stderr, **kwargs)


def show_progress(bar: tqdm, step: int, loss: float, masks: Masks | None) -> None:
    """Show loss, threshold and remaining weights beside the bar, at every tenth update.

    Remaining weights that must be counted, which waits for a GPU, are shown at every hundredth.
    """
    if bar.disable or step % 10:
        return
    figures = {"loss": f"{loss:.3f}"}
    if masks:
        if masks.ones or step % 100 == 0:
            bar.remaining = f"{count(masks).overall:.1%}"
        name, value = _threshold(masks)
        figures[name] = value
        figures["remaining"] = getattr(bar, "remaining", "?")
    bar.set_postfix(figures, refresh=False)


def _threshold(masks: Masks) -> tuple[str, str]:
    """The threshold under its name: with --target_speedup, it is a fraction of the time."""
    if masks.by_time:
        return "time", f"{masks.threshold:.1%}"
    return "threshold", f"{masks.threshold:.3f}"


def write_results(output_dir: Path, results: dict[str, float | str]) -> None:
    """Write `eval_results.txt` (`key = value` lines) and `eval_results.json`."""
    lines = "".join(f"{name} = {value}\n" for name, value in results.items())
    write_text(output_dir / "eval_results.txt", lines)
    write_json(output_dir / "eval_results.json", results)


def print_summary(figures: dict[str, float | str], output_dir: Path) -> None:
    """Print the figures of a run and its output folder."""
    width = max(map(len, figures))
    print()
    for name, value in figures.items():
        print(f"  {name:<{width}}  {_brief(value)}")
    print(f"\n  results saved to {output_dir}")


def _brief(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
