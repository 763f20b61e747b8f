"""Checkpoints: all that an exact resume needs, written whole or not at all.

A `checkpoint-<step>` folder is a normal model folder with `training_args.json` and
`training_state.pt`: optimiser, gradient scaler, random states of every rank, global cut-off,
projection to the teacher's width, completed updates. It is read with `weights_only=True`; nothing
in it is ever executed. `files.json` lists the files with their sizes and SHA-256: a checkpoint is
whole if they match.
"""

import functools
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..errors import TrainingError, UserError
from ..families import layers_of
from ..files import file_digest, write_folder, write_into, write_json
from ..modules.masks import count, find_masks, masked_layers
from .distributed import World, describe_hardware
from .hidden import projection_of
from .optim import build_optimizer
from .settings import Settings, make_steering

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
ARGS_FILE = "training_args.json"
SUMMARY_FILE = "training_summary.json"
MANIFEST_FILE = "files.json"
WEIGHTS_FILE = "model.safetensors"

# Arguments that may differ in a resumed run, because its weights do not depend on them.
FREE_ARGUMENTS = {
    "output_dir", "model_name_or_path", "config_name", "tokenizer_name", "cache_dir", "data_dir",
    "train_file", "predict_file", "do_eval", "do_predict", "evaluate_during_training",
    "eval_all_checkpoints", "overwrite_output_dir", "overwrite_cache", "resume_from_checkpoint",
    "per_gpu_eval_batch_size", "logging_steps", "save_steps", "save_total_limit", "num_workers",
    "threads", "local_rank", "check_ranks", "sparse_inference", "verbose_logging", "n_best_size",
    "max_answer_length", "null_score_diff_threshold", "max_eval_samples", "fp16_opt_level",
    "server_ip", "server_port", "lang_id",
}  # fmt: skip


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
        self.projection = projection_of(model)
        model.to(world.device).train()
        self.optimizer = build_optimizer(model, **settings.rates)
        is_scaled = settings.precision == torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=is_scaled)
        self.mask_generator = torch.Generator(world.device)
        self.mask_generator.manual_seed(settings.seed)  # the same masks on all ranks
        self.steering = make_steering(model, settings)
        self.step, self.cutoff, self.seconds = 0, None, 0.0
        torch.manual_seed(settings.seed + world.rank)  # other dropout on each rank
        for layer in layers_of(model) if settings.compile else ():
            layer.compile()  # one by one, as equal layers share compiled code

    def save(self, seconds: float) -> None:
        """Write a checkpoint after `seconds` of training, on every rank, and remove old ones."""
        self._check_weights()
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
            "projection": self.projection and self.projection.state_dict(),
            "mask_generator": self.mask_generator.get_state(),
            "random_states": self.world.gather(random_state),
        } | self._data

        def fill(place: Path) -> None:
            self._save_model(place)
            with (place / STATE_FILE).open("wb") as file:  # given a path, torch hides OS errors
                torch.save(state, file)
            write_json(place / MANIFEST_FILE, describe_files(place))

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
            if self.projection:
                self.projection.load_state_dict(saved["projection"])
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
            if name not in FREE_ARGUMENTS
            and (arguments.get(name) or None) != (value or None)  # older runs lack newer flags
        ]
        if {name: saved[name] for name in self._data} != self._data:
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
        self._check_weights()
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
            made_by = {
                "processes": self.world.size,
                "hardware": describe_hardware(self.world),
                "torch": torch.__version__,
            }
            digest = {"weights": file_digest(place / WEIGHTS_FILE)}
            write_json(place / SUMMARY_FILE, figures | made_by | digest)

        if self.world.is_main:
            write_into(output_dir, fill)
        return figures

    def _check_weights(self) -> None:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        norms = torch._foreach_norm([parameter.detach() for parameter in parameters])
        for name, value in zip(names, torch.stack([x.float() for x in norms]).tolist()):
            if not math.isfinite(value):
                raise TrainingError(
                    f"update {self.step}: {name} is not finite: nothing is saved; lower the "
                    "learning rates, and continue from the last checkpoint"
                )

    def _save_model(self, place: Path) -> None:
        self.model.save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        write_json(place / ARGS_FILE, self.settings.arguments)

    @functools.cached_property
    def _data(self) -> dict:
        """A hash of the inputs and labels of all training examples, and the names of the labels."""
        digest = hashlib.sha256()
        for batch in self.train_set.with_format("arrow").iter(batch_size=10_000):
            for name, column in zip(batch.column_names, batch.columns):
                values = column.combine_chunks()
                digest.update(name.encode())
                if pa.types.is_list(values.type):
                    digest.update(values.value_lengths().to_numpy())
                    values = values.flatten()
                digest.update(values.to_numpy(zero_copy_only=False))
        labels = list(self.model.config.id2label.values())
        return {"data": digest.hexdigest(), "labels": labels}


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    folders = [path.parent for path in output_dir.glob(f"checkpoint-*/{STATE_FILE}")]
    folders = [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The completed updates of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def damage_of(folder: Path) -> str | None:
    """What differs from a checkpoint's list of files, or None. Old checkpoints have no list."""
    if not (folder / MANIFEST_FILE).exists():
        return None
    try:
        listed = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        found = describe_files(folder)
        damaged = [name for name, entry in listed.items() if found.get(name) != entry]
    except (OSError, ValueError, AttributeError):
        return f"{MANIFEST_FILE} or another file cannot be read"
    if not damaged:
        return None
    return f"{damaged[0]} is {'damaged' if damaged[0] in found else 'missing'}"


def describe_files(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of each file in a folder."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {f.name: {"bytes": f.stat().st_size, "sha256": file_digest(f)} for f in files}


def find_resume_folder(asked: str | None, output_dir: Path, overwrite: bool) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means; None to start from the beginning.

    Raises UserError if there is no whole checkpoint.
    """
    if not asked:
        return None
    if asked != "latest" and not (Path(asked) / STATE_FILE).is_file():
        raise UserError(
            f"--resume_from_checkpoint {asked} is no checkpoint (it has no {STATE_FILE}): "
            "give a checkpoint-<step> folder, or 'latest'"
        )
    problem = None
    for folder in find_checkpoints(output_dir)[::-1] if asked == "latest" else [Path(asked)]:
        problem = damage_of(folder)
        if not problem:
            return folder
        logger.warning("%s is broken and skipped: %s", folder, problem)
    if problem:
        raise UserError(
            f"--resume_from_checkpoint {asked}: no checkpoint is whole ({problem}); give another "
            "one, or remove them to start from the beginning"
        )
    if (output_dir / "config.json").exists() and not overwrite:
        raise UserError(
            f"--output_dir {output_dir} holds a finished model and no checkpoint to resume from"
        )
    logger.warning("%s holds no checkpoint yet: training starts from the beginning", output_dir)
    return None


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Keep the newest `limit` checkpoints; None keeps all."""
    for folder in find_checkpoints(output_dir)[:-limit] if limit else ():
        gone = folder.rename(folder.with_name(f".{folder.name}-old"))  # whole or a leftover
        shutil.rmtree(gone)


def clean_output(output_dir: Path, result_files: Iterable[str], resumes_in_place: bool) -> None:
    """Remove half-written files and, unless the run is resumed, the results of an older run."""
    old = [*output_dir.glob(".checkpoint-*"), *output_dir.glob(".writing-*")]
    if not resumes_in_place:
        old += find_checkpoints(output_dir)
        for pattern in ("events.out.tfevents.*", *result_files):
            old += output_dir.glob(pattern)
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
