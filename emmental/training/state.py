"""The state of a training: all that an exact resume needs, written whole or not at all."""

import functools
import hashlib
import json
import logging
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..errors import UserError
from ..families import layers_of
from ..files import file_digest, write_folder, write_into, write_json
from ..modules.masks import count, find_masks, masked_layers
from ..modules.methods import METHODS
from ..steering import LambdaSteering, usual_lambda
from .checkpoint import (
    ARGS_FILE,
    FREE_ARGUMENTS,
    STATE_FILE,
    SUMMARY_FILE,
    WEIGHTS_FILE,
    remove_old_checkpoints,
    write_manifest,
)
from .distributed import World, describe_hardware
from .guards import check_weights
from .optim import build_optimizer
from .settings import Settings

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
        self.model, self.tokenizer, self.train_set = model, tokenizer, train_set
        self.settings, self.world = settings, world
        model.to(world.device).train()
        self.optimizer = build_optimizer(
            model,
            settings.learning_rate,
            settings.mask_scores_learning_rate,
            settings.weight_decay,
            settings.adam_epsilon,
        )
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=settings.precision.scales_gradients
        )
        self.mask_generator = torch.Generator(world.device)
        self.mask_generator.manual_seed(settings.seed)  # the same masks on all ranks
        self.steering = make_steering(model, settings)
        self.step, self.cutoff, self.seconds = 0, None, 0.0
        torch.manual_seed(settings.seed + world.rank)  # other dropout on each rank
        for layer in layers_of(model) if settings.compile else ():
            layer.compile()  # one by one, as equal layers share compiled code

    def save(self, seconds: float) -> None:
        """Write a checkpoint after `seconds` of training, on every rank, and remove old ones."""
        check_weights(self.model, self.step)
        output_dir, device = self.settings.output_dir, self.world.device
        random_state = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(device)
        state = {
            "step": self.step,
            "cutoff": self.cutoff,
            "steering": self.steering and self.steering.integral,
            "seconds": seconds,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "mask_generator": self.mask_generator.get_state(),
            "random_states": self.world.gather(random_state),
            "data": self._data_digest,
            "labels": self._labels,
        }

        def fill(place: Path) -> None:
            self._save_model(place)
            with (place / STATE_FILE).open("wb") as file:  # given a path, torch hides OS errors
                torch.save(state, file)
            write_manifest(place)

        if self.world.is_main:
            write_folder(output_dir / f"checkpoint-{self.step}", fill)
            remove_old_checkpoints(output_dir, self.settings.keep)
        self.world.barrier()

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint `folder`, from which the model's weights are loaded already.

        Raises UserError if it is damaged, or has other arguments, data or number of processes.
        """
        try:
            arguments = json.loads((folder / ARGS_FILE).read_text(encoding="utf-8"))
            saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
            self._check_same_run(folder, arguments, saved)
            self.step, self.cutoff = int(saved["step"]), saved["cutoff"]
            self.seconds = saved["seconds"]
            if self.steering:
                self.steering.integral = saved["steering"]
            self._load_moments(**saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.mask_generator.set_state(saved["mask_generator"])
            random_state = saved["random_states"][self.world.rank]
            torch.set_rng_state(random_state["cpu"])
            if self.world.device.type == "cuda" and "cuda" in random_state:
                torch.cuda.set_rng_state(random_state["cuda"], self.world.device)
        except UserError:
            raise
        except Exception as error:  # a broken file may raise anything
            raise UserError(
                f"{folder} is damaged, or not by these scripts: continue from another checkpoint"
            ) from error

    def _load_moments(self, state: dict, param_groups: list[dict]) -> None:
        groups = self.optimizer.state_dict()["param_groups"]  # their settings come from the flags
        for group, saved in zip(groups, param_groups, strict=True):
            group["updates"] = saved["updates"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, moments in self.optimizer.state.items():
            if any(moment.shape not in (parameter.shape, ()) for moment in moments.values()):
                raise ValueError("moments of other weights")  # would corrupt the memory

    def _check_same_run(self, folder: Path, arguments: dict, saved: dict) -> None:
        problems = [
            f"--{name} was {arguments.get(name)} and is {value}"
            for name, value in sorted(self.settings.arguments.items())
            if name not in FREE_ARGUMENTS and arguments.get(name) != value
        ]
        if (saved["data"], saved["labels"]) != (self._data_digest, self._labels):
            problems.append("the training data has changed")
        if (processes := len(saved["random_states"])) != self.world.size:
            problems.append(
                f"it was written by {processes} processes, and this run has {self.world.size}"
            )
        if problems:
            raise UserError(f"cannot continue {folder} exactly: {'; '.join(problems)}")

    def finish(self, seconds: float) -> dict[str, float]:
        """Save the trained model, after `seconds` of training. Returns the figures of the run."""
        model, output_dir = self.model, self.settings.output_dir
        check_weights(model, self.step)
        model.eval()
        if masked_layers(model):
            model.config.threshold = self.settings.schedule.final_threshold
            if self.steering:
                target, found = self.steering.target, count(find_masks(model)).overall
                logger.info(f"--target_remaining {target:g}: {found:.2%} of the weights remain")
        figures = {"updates": self.step, "seconds": seconds}
        figures["seconds_per_update"] = seconds / self.step

        def fill(place: Path) -> None:
            self._save_model(place)
            made_by = {"hardware": describe_hardware(self.world), "torch": torch.__version__}
            digest = {"weights": file_digest(place / WEIGHTS_FILE)}
            write_json(place / SUMMARY_FILE, figures | made_by | digest)

        if self.world.is_main:
            write_into(output_dir, fill)
        return figures

    def _save_model(self, place: Path) -> None:
        self.model.save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        write_json(place / ARGS_FILE, self.settings.arguments)

    @property
    def _labels(self) -> list[str]:
        return list(self.model.config.id2label.values())

    @functools.cached_property
    def _data_digest(self) -> str:
        """Hash of the inputs and labels of all training examples."""
        digest = hashlib.sha256()
        for batch in self.train_set.with_format("arrow").iter(batch_size=10_000):
            for name, column in zip(batch.column_names, batch.columns):
                values = column.combine_chunks()
                digest.update(name.encode())
                if pa.types.is_list(values.type):
                    digest.update(values.value_lengths().to_numpy())
                    values = values.flatten()
                digest.update(values.to_numpy(zero_copy_only=False))
        return digest.hexdigest()


def make_steering(model: PreTrainedModel, settings: Settings) -> LambdaSteering | None:
    """What steers lambda to --target_remaining, if it is given."""
    target, schedule = settings.target_remaining, settings.schedule
    if target is None or not masked_layers(model):
        return None
    method = METHODS[model.config.pruning_method]
    return LambdaSteering(
        target=target,
        first_cut=settings.first_cut,
        last_cut=method.closing_score(schedule.final_threshold),
        start=schedule.initial_warmup * schedule.warmup_steps,
        end=schedule.total_step - schedule.final_warmup * schedule.warmup_steps,
        total_step=schedule.total_step,
        first_lambda=settings.final_lambda or usual_lambda(target, method.penalty),
    )
