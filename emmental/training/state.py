"""What training changes: model, optimiser and all else that an exact resume needs."""

import functools
import logging
import math
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..models.families import layers_of
from ..modules.masks import count, find_masks, masked_layers
from ..system.errors import TrainingError
from ..system.files import write_json
from .checkpoint import (
    ARGS_FILE,
    check_same_run,
    describe_data,
    read_checkpoint,
    refuse_damage,
    write_checkpoint,
    write_trained,
)
from .distributed import World, describe_hardware
from .hidden import projection_of
from .optim import build_optimizer
from .settings import Settings, make_steering

logger = logging.getLogger(__name__)


class TrainingState:
    """Model, optimiser and all else that training changes.

    step: completed updates. cutoff: the global cut-off in force, see
    --global_topk_frequency_compute. seconds: of training, before this process.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        train_set: Dataset,
        settings: Settings,
        world: World,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.train_set = train_set
        self.settings = settings
        self.world = world
        self.projection = projection_of(model)
        model.to(world.device).train()
        self.optimizer = build_optimizer(model, **settings.rates)
        is_scaled = settings.precision == torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=is_scaled)
        self.mask_generator = torch.Generator(world.device)
        self.mask_generator.manual_seed(settings.seed)  # the same masks on all ranks
        self.steering = make_steering(model, settings)
        self.step = 0
        self.cutoff = None
        self.seconds = 0.0
        torch.manual_seed(settings.seed + world.rank)  # other dropout on each rank
        if settings.compile:
            for layer in layers_of(model):
                layer.compile()  # one by one, as equal layers share compiled code

    def save(self, seconds: float) -> None:
        """Write a checkpoint after `seconds` of training, on every rank, and remove old ones."""
        self._check_weights()
        random_state = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.world.device)
        values = {
            "step": self.step,
            "cutoff": self.cutoff,
            "steering": self.steering and self.steering.integral,
            "seconds": seconds,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "projection": self.projection and self.projection.state_dict(),
            "mask_generator": self.mask_generator.get_state(),
            "random_states": self.world.gather(random_state),
        } | self._data
        if self.world.is_main:
            output_dir, keep = self.settings.output_dir, self.settings.keep
            write_checkpoint(output_dir, values, self._save_model, keep)
        self.world.barrier()

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint `folder`, from which the model's weights are loaded already.

        Raises UserError if it is damaged, or has other arguments, data or number of processes.
        """
        with refuse_damage(folder):
            arguments, values = read_checkpoint(folder)
            now = self.settings.arguments
            check_same_run(folder, arguments, values, now, self._data, self.world.size)
            self.step = int(values["step"])
            self.cutoff = values["cutoff"]
            self.seconds = values["seconds"]
            if self.steering:
                self.steering.integral = values["steering"]
            self._load_moments(**values["optimizer"])
            if self.projection:
                self.projection.load_state_dict(values["projection"])
            self.scaler.load_state_dict(values["scaler"])
            self.mask_generator.set_state(values["mask_generator"])
            random_state = values["random_states"][self.world.rank]
            torch.set_rng_state(random_state["cpu"])
            if self.world.device.type == "cuda" and "cuda" in random_state:
                torch.cuda.set_rng_state(random_state["cuda"], self.world.device)

    def finish(self, seconds: float) -> dict[str, float]:
        """Save the trained model, after `seconds` of training. Returns the figures of the run."""
        self._check_weights()
        self.model.eval()
        if masked_layers(self.model):
            self.model.config.threshold = self.settings.schedule.final_threshold
            if self.steering:
                target, remaining = self.steering.target, count(find_masks(self.model)).overall
                logger.info(f"--target_remaining {target:g}: {remaining:.2%} of the weights remain")
        figures = {"updates": self.step, "seconds": seconds}
        figures["seconds_per_update"] = seconds / self.step
        if self.world.is_main:
            made_by = {
                "processes": self.world.size,
                "hardware": describe_hardware(self.world),
                "torch": torch.__version__,
            }
            write_trained(self.settings.output_dir, figures | made_by, self._save_model)
        return figures

    def _load_moments(self, state: dict, param_groups: list[dict]) -> None:
        groups = self.optimizer.state_dict()["param_groups"]  # their settings come from the flags
        for group, saved in zip(groups, param_groups, strict=True):
            group["updates"] = saved["updates"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, moments in self.optimizer.state.items():
            if any(moment.shape not in (parameter.shape, ()) for moment in moments.values()):
                raise ValueError("moments of other weights")  # would corrupt the memory

    def _check_weights(self) -> None:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        norms = torch._foreach_norm([parameter.detach() for parameter in parameters])
        for name, value in zip(names, torch.stack([x.float() for x in norms]).tolist()):
            if not math.isfinite(value):
                raise TrainingError(
                    f"update {self.step}: {name} is not finite: nothing is saved; lower the "
                    "learning rates, and continue from the last checkpoint"
                )

    def _save_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / ARGS_FILE, self.settings.arguments)

    @functools.cached_property
    def _data(self) -> dict:
        return describe_data(self.train_set, list(self.model.config.id2label.values()))
