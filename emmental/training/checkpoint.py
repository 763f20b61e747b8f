"""Checkpoints: one state that holds all that an exact resume needs, written whole or not at all.

A `checkpoint-<step>` folder is a normal model folder (config.json, model.safetensors, tokenizer) with
`training_args.json` and `training_state.pt` beside: optimiser, gradient scaler, random states of every
rank, global cut-off, completed updates. It is read with `weights_only=True`; nothing in it is ever
executed. `files.json` lists all of these with their sizes and SHA-256: a checkpoint is whole when they match.
"""

import functools
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..errors import UserError
from ..files import file_digest, write_folder, write_into, write_json
from ..steering import LambdaSteering
from .distributed import World

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
ARGS_FILE = "training_args.json"
SUMMARY_FILE = "training_summary.json"
MANIFEST_FILE = "files.json"
WEIGHTS_FILE = "model.safetensors"

# Arguments that may change when a run is continued, because its weights do not depend on them.
FREE_ARGUMENTS = {
    "output_dir", "model_name_or_path", "do_eval", "do_predict", "evaluate_during_training", "eval_all_checkpoints",
    "overwrite_output_dir", "overwrite_cache", "resume_from_checkpoint", "cache_dir", "config_name", "tokenizer_name",
    "per_gpu_eval_batch_size", "logging_steps", "save_steps", "save_total_limit", "num_workers", "local_rank", "check_ranks",
    "data_dir", "train_file", "predict_file", "threads", "verbose_logging", "n_best_size",
    "max_answer_length", "null_score_diff_threshold", "sparse_inference", "fp16_opt_level", "server_ip", "server_port", "lang_id",
}  # fmt: skip


@dataclass
class TrainingState:
    """What training changes, whole: saved and loaded together."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    mask_generator: torch.Generator
    world: World
    train_set: Dataset = field(repr=False)
    step: int = 0
    cutoff: float | None = None  # global cut-off in force, see --global_topk_frequency_compute
    steering: LambdaSteering | None = None  # of --target_remaining
    seconds: float = 0.0  # of training, up to the checkpoint that the run continues from

    def save(self, folder: Path, arguments: dict, seconds: float = 0.0) -> None:
        """Write the checkpoint `folder`, after so many seconds of training; every rank must call this.

        arguments: those of the run, compared when it is resumed.
        """
        random_states = self.world.gather(_random_state(self.world.device))
        if self.world.is_main:
            state = {
                "step": self.step,
                "cutoff": self.cutoff,
                "steering": self.steering and self.steering.integral,
                "seconds": seconds,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "mask_generator": self.mask_generator.get_state(),
                "random_states": random_states,
                "data": self._data_digest,
                "labels": self._labels,
            }

            def fill(place: Path) -> None:
                self.save_model(place, arguments)
                with (place / STATE_FILE).open(
                    "wb"
                ) as file:  # given a path, torch hides what the system says of it
                    torch.save(state, file)
                write_json(place / MANIFEST_FILE, _manifest(place))

            write_folder(folder, fill)
        self.world.barrier()

    def save_model(self, place: Path, arguments: dict) -> None:
        """Write model, tokenizer and arguments into the folder `place`."""
        self.model.save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        write_json(place / ARGS_FILE, arguments)

    def load(self, folder: Path, arguments: dict) -> None:
        """Continue from the checkpoint `folder`; the model's weights must have been loaded from there.

        Raises UserError when the folder is no such checkpoint, or of a run with other arguments, other
        data or another number of processes.
        """
        saved_args = _read_json(folder, ARGS_FILE)
        differing = [
            f"--{name} {saved_args.get(name)} there, {value} now"
            for name, value in sorted(json.loads(json.dumps(arguments)).items())
            if name not in FREE_ARGUMENTS and saved_args.get(name) != value
        ]
        if differing:
            raise UserError(
                f"cannot continue {folder} exactly, the arguments differ: {'; '.join(differing)}"
            )
        try:
            saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
            data, labels, processes = saved["data"], saved["labels"], len(saved["random_states"])
            self.step, self.cutoff = int(saved["step"]), saved["cutoff"]
            self.seconds = float(saved.get("seconds", 0.0))
            if self.steering:
                self.steering.integral = float(saved["steering"])
            settings = [dict(group) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(saved["optimizer"])
            for group, own in zip(
                self.optimizer.param_groups, settings, strict=True
            ):  # they come from the arguments
                group |= {
                    name: value for name, value in own.items() if name not in ("params", "updates")
                }
            for parameter, moments in self.optimizer.state.items():
                for tensor in moments.values():
                    if tensor.shape not in (parameter.shape, ()):
                        raise ValueError("moments of other weights")
            self.scaler.load_state_dict(saved["scaler"])
            self.mask_generator.set_state(saved["mask_generator"])
            _set_random_state(
                saved["random_states"][self.world.rank % processes], self.world.device
            )
        except (
            Exception
        ) as error:  # a broken archive, or one that holds something else, raises whatever it likes
            raise UserError(
                f"{folder / STATE_FILE} is damaged, or was not written by these scripts: continue from another checkpoint"
            ) from error
        if data != self._data_digest or labels != self._labels:
            raise UserError(f"cannot continue {folder} exactly: the training data has changed")
        if processes != self.world.size:
            raise UserError(
                f"cannot continue {folder} exactly: it was written by {processes} processes, "
                f"and this run has {self.world.size}"
            )

    @property
    def _labels(self) -> list[str]:
        return list(self.model.config.id2label.values())

    @functools.cached_property
    def _data_digest(self) -> str:
        """Hash of all that the training examples hold: inputs and labels."""
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


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _read_json(folder: Path, name: str) -> dict:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if type(value) is not dict:
        raise UserError(f"{folder} is no checkpoint to resume from: {name} is missing or broken")
    return value


def _manifest(folder: Path) -> dict[str, dict]:
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST_FILE)
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in files
    }


def damage_of(folder: Path) -> str | None:
    """What a checkpoint lacks of what was written, by its list of files; None for nothing, or when there is no list.

    (There is none in the checkpoints of older versions.)
    """
    if not (folder / MANIFEST_FILE).exists():
        return None
    try:
        listed = _read_json(folder, MANIFEST_FILE)
        for name, entry in listed.items():
            path = folder / name
            if path.parent != folder or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
            if file_digest(path) != entry["sha256"]:
                return f"the checksum of {name} does not match"
    except (UserError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is damaged"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; `damage_of` tells whether they are whole."""
    found = {}
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and (folder / STATE_FILE).is_file():
            found[int(match[1])] = folder
    return [found[step] for step in sorted(found)]


def find_resume_folder(asked: str | None, output_dir: Path, overwrite: bool) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means; None to start from the beginning.

    Raises UserError when the given folder is no checkpoint.
    """
    if not asked:
        return None
    if asked == "latest":
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints:
            if (output_dir / "config.json").exists() and not overwrite:
                raise UserError(
                    f"--output_dir {output_dir} holds a finished model and no checkpoint to resume from"
                )
            logger.warning(
                "%s holds no checkpoint yet: training starts from the beginning", output_dir
            )
            return None
        for folder in reversed(checkpoints):
            problem = damage_of(folder)
            if not problem:
                return folder
            logger.warning("%s is broken and skipped: %s", folder, problem)
        raise UserError(
            f"no checkpoint in {output_dir} is whole (see above): remove them to start from the beginning"
        )
    folder = Path(asked)
    if not (folder / STATE_FILE).is_file():
        raise UserError(
            f"--resume_from_checkpoint {folder} is no checkpoint (it holds no {STATE_FILE}): "
            "give a checkpoint-<step> folder, or 'latest'"
        )
    if problem := damage_of(folder):
        raise UserError(
            f"--resume_from_checkpoint {folder} is broken: {problem}; 'latest' takes the newest whole one"
        )
    return folder


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Keep the newest `limit` checkpoints of a run, and more where none of these is whole."""
    if limit is None:
        return
    checkpoints = find_checkpoints(output_dir)
    if len(checkpoints) <= limit or all(
        damage_of(folder) for folder in reversed(checkpoints[-limit:])
    ):
        return
    for folder in checkpoints[:-limit]:
        gone = folder.with_name(
            f".{folder.name}-old"
        )  # a name that `remove_leftovers` knows, should this be killed
        folder.rename(gone)
        shutil.rmtree(gone)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run had not finished writing."""
    for pattern in (".checkpoint-*", ".writing-*"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder)


def clear_output(output_dir: Path, result_files: Iterable[str]) -> None:
    """Remove what an earlier run left that a new one could be mixed up with: checkpoints, curves, `result_files`."""
    for folder in find_checkpoints(output_dir):
        shutil.rmtree(folder)
    for pattern in ("events.out.tfevents.*", *result_files):
        for file in output_dir.glob(pattern):
            file.unlink()


def save_final(output_dir: Path, state: TrainingState, arguments: dict, summary: dict) -> None:
    """Put the trained model, the arguments of its run and its figures into output_dir."""

    def fill(place: Path) -> None:
        state.save_model(place, arguments)
        write_json(place / SUMMARY_FILE, summary | {"weights": file_digest(place / WEIGHTS_FILE)})

    write_into(output_dir, fill)
