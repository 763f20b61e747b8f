"""What a training needs to know, as values: no function below `run` sees the command line."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..schedule import Schedule


@dataclass(frozen=True)
class Precision:
    """Mixed precision: the dtype of autocast, None for float32. Parameters stay float32."""

    dtype: torch.dtype | None = None

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)

    @property
    def scales_gradients(self) -> bool:
        return self.dtype == torch.float16


@dataclass(frozen=True)
class Settings:
    """A training run. Fields without a comment are the flags of the same name."""

    arguments: dict  # the command line, saved with every checkpoint, compared when one is resumed
    output_dir: Path
    schedule: Schedule
    precision: Precision
    first_cut: float  # the initial scores, for the steering
    keep: int | None  # checkpoints to keep, None for all
    seed: int
    learning_rate: float
    mask_scores_learning_rate: float
    weight_decay: float
    adam_epsilon: float
    max_grad_norm: float  # infinite for no clipping
    alpha_ce: float
    alpha_distil: float
    temperature: float
    regularization: str | None  # l0, l1 or None
    target_remaining: float | None
    final_lambda: float
    global_topk_frequency_compute: int
    logging_steps: int
    save_steps: int
    evaluate_during_training: bool
    compile: bool
    num_workers: int
    check_ranks: bool
