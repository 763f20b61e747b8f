"""What a person sees of a run: TensorBoard, progress bars, a summary at the end."""

import logging
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ..errors import TrainingError
from ..files import write_json, write_text
from ..modules.masks import Masks, count, masked_layers
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
            from torch.utils.tensorboard import (
                SummaryWriter,
            )  # slow to import; the other ranks need none

            threading.excepthook = _quiet_about_curves
            with self._writing():
                self.writer = SummaryWriter(
                    log_dir=str(self.output_dir), purge_step=step + 1 if step else None
                )

    def scalars(self, values: dict[str, float], step: int | None = None) -> None:
        """Log values after `step` updates, by default after as many as were logged last."""
        self.step = self.step if step is None else step
        if self.writer:
            with self._writing():
                for name, value in values.items():
                    self.writer.add_scalar(name, value, self.step)

    def update(
        self,
        means: dict[str, float],
        optimizer: Optimizer,
        threshold: float,
        penalty_weight: float,
        masks: Masks | None,
        step: int,
    ) -> None:
        """Log what the updates up to `step` found: losses, learning rates, threshold, lambda, remaining weights."""
        values = means | {
            f"learning_rate/{group['name']}": group["lr"] for group in optimizer.param_groups
        }
        if masks:
            counts = count(masks)
            values |= {
                "threshold": threshold,
                "lambda": penalty_weight,
                "remaining/overall": counts.overall,
            }
            values |= {
                f"remaining/{name}": counts.remaining[name] / n for name, n in counts.total.items()
            }
        self.scalars(values, step)

    def evaluation(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log the metrics of an evaluation."""
        self.scalars({f"eval/{name}": value for name, value in metrics.items()}, step)

    def score_histograms(self, model: nn.Module, step: int) -> None:
        """Distribution of the scores of every masked matrix."""
        if self.writer:
            with self._writing():
                for name, layer in masked_layers(model).items():
                    if layer.mask_scores is not None:
                        self.writer.add_histogram(
                            f"scores/{name}", layer.mask_scores.detach().float().cpu(), step
                        )

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
            raise TrainingError(
                f"cannot write TensorBoard's curves into {self.output_dir}: {error.strerror or error}"
            ) from error


def _quiet_about_curves(args) -> None:
    """`threading.excepthook` without the traceback of TensorBoard's thread: `RunLog` tells of its errors."""
    if not (
        isinstance(args.exc_value, OSError) and "event_file_writer" in type(args.thread).__module__
    ):
        threading.__excepthook__(args)


def progress_bar(world: World, **kwargs) -> tqdm:
    """A progress bar on stderr, on rank 0 alone."""
    return tqdm(dynamic_ncols=True, disable=not world.is_main, file=sys.stderr, **kwargs)


class TrainingBar:
    """The progress bar of a training. It ends its line when left, so that an error begins one of its own."""

    def __init__(self, world: World, total: int, step: int):
        self.bar = progress_bar(world, total=total, initial=step, desc="training", unit="update")

    def __enter__(self) -> "TrainingBar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def advance(
        self, losses: dict[str, Tensor], optimizer: Optimizer, threshold: float, masks: Masks | None
    ) -> None:
        """One update more; what it found is shown at every tenth."""
        self.bar.update()
        if not self.bar.disable and (self.bar.n % 10 == 0 or self.bar.n == self.bar.total):
            shown = {
                "loss": f"{losses['loss'].item():.3f}",
                "lr": f"{optimizer.param_groups[-1]['lr']:.1e}",
            }
            if masks:
                shown |= {
                    "threshold": f"{threshold:.3f}",
                    "remaining": f"{count(masks).overall:.1%}",
                }
            self.bar.set_postfix(shown, refresh=False)


def write_results(output_dir: Path, results: dict[str, float | str]) -> None:
    """Write `eval_results.txt` (`key = value` lines) and `eval_results.json`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{name} = {value}\n" for name, value in results.items())
    write_text(output_dir / "eval_results.txt", lines)
    write_json(output_dir / "eval_results.json", results)


def print_summary(world: World, figures: dict[str, float | str], output_dir: Path) -> None:
    """The last lines of a run: its figures, and the output folder."""
    if not world.is_main:
        return
    width = max(map(len, figures))
    print()
    for name, value in figures.items():
        print(
            f"  {name:<{width}}  {value:.4g}"
            if isinstance(value, float)
            else f"  {name:<{width}}  {value}"
        )
    print(f"\n  results saved to {output_dir}")
