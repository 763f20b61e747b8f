"""What training changes: the model, the optimizer and all else that an exact resume needs."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..steering import LambdaSteering
from ..system.errors import TrainingError
from .distributed import World
from .hidden import projection_of
from .optim import AdamW
from .settings import Settings


@dataclass
class TrainingState:
    """What training changes, and what a checkpoint needs beside it.

    data: describes the training data, see `describe_data`. mask_generator: draws the same masks on
    all ranks. step: completed updates. cutoff: the global cut-off in force, see
    --global_topk_frequency_compute. seconds: of training, before this process.
    """

    settings: Settings
    world: World
    data: dict
    tokenizer: PreTrainedTokenizerFast
    model: PreTrainedModel
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    mask_generator: torch.Generator
    steering: LambdaSteering | None
    step: int = 0
    cutoff: float | None = None
    seconds: float = 0.0

    def state_dict(self) -> dict:
        """All but the model and `seconds`. The ranks exchange their random states."""
        projection = projection_of(self.model)
        random_state = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return self.data | {
            "step": self.step,
            "cutoff": self.cutoff,
            "steering": self.steering and self.steering.integral,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "projection": projection and projection.state_dict(),
            "mask_generator": self.mask_generator.get_state(),
            "random_states": self.world.gather(random_state),
        }

    def load_state_dict(self, values: dict) -> None:
        """Continue from a `state_dict` with `seconds`. A damaged one may raise any exception."""
        self.step = int(values["step"])
        self.cutoff = values["cutoff"]
        self.seconds = values["seconds"]
        if self.steering:
            self.steering.integral = values["steering"]
        self._load_moments(**values["optimizer"])
        if projection := projection_of(self.model):
            projection.load_state_dict(values["projection"])
        self.scaler.load_state_dict(values["scaler"])
        self.mask_generator.set_state(values["mask_generator"])
        random_state = values["random_states"][self.world.rank]
        torch.set_rng_state(random_state["cpu"])
        if self.world.device.type == "cuda" and "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"], self.world.device)

    def _load_moments(self, state: dict, param_groups: list[dict]) -> None:
        groups = self.optimizer.state_dict()["param_groups"]  # their settings come from the flags
        for group, saved in zip(groups, param_groups, strict=True):
            group["updates"] = saved["updates"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, moments in self.optimizer.state.items():
            if any(moment.shape not in (parameter.shape, ()) for moment in moments.values()):
                raise ValueError("moments of other weights")  # would corrupt the memory

    def check_weights(self) -> None:
        """Raises TrainingError for a weight that is not finite."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        norms = torch._foreach_norm([parameter.detach() for parameter in parameters])
        for name, norm in zip(names, torch.stack([x.float() for x in norms]).tolist()):
            if not math.isfinite(norm):
                raise TrainingError(
                    f"update {self.step}: {name} is not finite: nothing is saved; lower the "
                    "learning rates, and continue from the last checkpoint"
                )
