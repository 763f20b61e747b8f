"""What a training needs to know, as values: no function below `run` sees the command line."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..schedule import Schedule


@dataclass(frozen=True)
class Precision:
    """Mixed precision: the dtype of autocast, None for float32. Parameters and scores stay float32."""

    dtype: torch.dtype | None = None

    def autocast(self, device: torch.device):
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)

    @property
    def scales_gradients(self) -> bool:
        return self.dtype == torch.float16


@dataclass(frozen=True)
class Distillation:
    """Weights of the task's own loss and of the teacher's, and the temperature of both distributions."""

    alpha_ce: float
    alpha_distil: float
    temperature: float


@dataclass(frozen=True)
class Settings:
    """A training run.

    arguments: the command line, recorded with every checkpoint and compared when one is resumed. penalty: l0, l1 or
    None. target_remaining: the fraction of the weights that lambda is steered to, or None. rates: learning rates,
    decay and epsilon, as `build_optimizer` takes them. logging_steps, save_steps: updates between two lines in
    TensorBoard, two checkpoints (0: none). keep: how many checkpoints are kept, None for all.
    """

    arguments: dict
    output_dir: Path
    schedule: Schedule
    rates: dict[str, float]
    max_grad_norm: float  # infinite for none
    seed: int
    precision: Precision
    distillation: Distillation
    penalty: str | None
    target_remaining: float | None
    final_lambda: float  # that the steering starts at, 0 for a usual one
    first_cut: float  # where the scores start, for the steering
    global_topk_frequency_compute: int
    logging_steps: int
    save_steps: int
    keep: int | None
    evaluate: bool  # at every logging_steps
    compile: bool
    num_workers: int
    check_ranks: bool
