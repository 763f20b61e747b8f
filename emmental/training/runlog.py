"""What a person sees of a run: TensorBoard, progress bars, a summary at the end."""

import logging
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import transformers
from torch import nn
from tqdm import tqdm

from ..modules.masks import masked_layers
from .args import TrainingError
from .checkpoint import write_json, write_text
from .distributed import World


def set_up_logging() -> None:
    """Log to the screen, from rank 0 only; keep the libraries quiet (our own loading checks speak instead)."""
    is_main = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(logging.INFO if is_main else logging.ERROR)
    for name in ("datasets", "httpx", "fsspec", "filelock", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING if is_main else logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every retry
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class RunLog:
    """TensorBoard events of a run, written by rank 0; silent on the others."""

    def __init__(self, output_dir: Path, world: World):
        self.output_dir, self.world, self.writer, self.step = output_dir, world, None, 0

    def start(self, step: int) -> None:
        """Begin after `step` updates; what an interrupted run logged later than that is dropped."""
        self.step = step
        if self.world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # slow to import; the other ranks need none

            threading.excepthook = _quiet_about_curves
            with self._writing():
                self.writer = SummaryWriter(log_dir=str(self.output_dir), purge_step=step + 1 if step else None)

    def scalars(self, values: dict[str, float], step: int | None = None) -> None:
        """Log values after `step` updates, by default after as many as were logged last."""
        self.step = self.step if step is None else step
        if self.writer:
            with self._writing():
                for name, value in values.items():
                    self.writer.add_scalar(name, value, self.step)

    def score_histograms(self, model: nn.Module, step: int) -> None:
        """Distribution of the scores of every masked matrix."""
        if self.writer:
            with self._writing():
                for name, layer in masked_layers(model).items():
                    if layer.mask_scores is not None:
                        self.writer.add_histogram(f"scores/{name}", layer.mask_scores.detach().float().cpu(), step)

    def close(self) -> None:
        if self.writer:
            with self._writing():
                self.writer.close()

    @contextmanager
    def _writing(self):
        """Raises TrainingError for what TensorBoard's thread could not write, which it says at a later call."""
        try:
            yield
        except OSError as error:
            raise TrainingError(f"cannot write TensorBoard's curves into {self.output_dir}: {error.strerror or error}") from error


def _quiet_about_curves(args) -> None:
    """`threading.excepthook` without the traceback of TensorBoard's thread: `RunLog` tells of its errors."""
    if not (isinstance(args.exc_value, OSError) and "event_file_writer" in type(args.thread).__module__):
        threading.__excepthook__(args)


def progress_bar(world: World, **kwargs) -> tqdm:
    return tqdm(dynamic_ncols=True, disable=not world.is_main, file=sys.stderr, **kwargs)


def write_results(output_dir: Path, results: dict[str, float | str]) -> None:
    """Write `eval_results.txt` (`key = value` lines) and `eval_results.json`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{name} = {value}\n" for name, value in results.items())
    write_text(output_dir / "eval_results.txt", lines)
    write_json(output_dir / "eval_results.json", results)


def print_summary(world: World, figures: dict[str, float | str], output_dir: Path) -> None:
    """The last lines of a run: its figures, and where everything lies."""
    if not world.is_main:
        return
    width = max(map(len, figures))
    print()
    for name, value in figures.items():
        print(f"  {name:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
    print(f"\n  everything lies in {output_dir}")
