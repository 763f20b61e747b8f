"""Checkpoints: one state that holds all that an exact resume needs, written whole or not at all.

A `checkpoint-<step>` folder is a normal model folder (config.json, model.safetensors, tokenizer) with
`training_args.json` and `training_state.pt` beside: optimiser, gradient scaler, random states of every
rank, global cut-off, completed updates. It is read with `weights_only=True`; nothing in it is ever
executed. `files.json` lists all of these with their sizes and SHA-256: a checkpoint is whole when they match.
"""

import argparse
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn

from ..archive import what_is_odd
from ..schedule import LambdaSteering
from .args import TrainingError, UsageError
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

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    mask_generator: torch.Generator
    world: World
    train_set: Dataset = field(repr=False)
    step: int = 0
    cutoff: float | None = None  # global cut-off in force, see --global_topk_frequency_compute
    steering: LambdaSteering | None = None  # of --target_remaining
    seconds: float = 0.0  # of training, up to the checkpoint that the run continues from

    def save(
        self, folder: Path, args: argparse.Namespace, save_model: Callable[[Path], None], seconds: float = 0.0
    ) -> None:
        """Write the checkpoint `folder`, after so many seconds of training; every rank must call this."""
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
                save_model(place)
                write_json(place / ARGS_FILE, vars(args))
                with (place / STATE_FILE).open("wb") as file:  # given a path, torch hides what the system says of it
                    torch.save(state, file)
                write_json(place / MANIFEST_FILE, _manifest(place))

            write_folder(folder, fill)
        self.world.barrier()

    def load(self, folder: Path, args: argparse.Namespace) -> None:
        """Continue from the checkpoint `folder`; the model's weights must have been loaded from there.

        Raises UsageError when the folder is no such checkpoint, or of a run with other arguments, other
        data or another number of processes.
        """
        saved_args = _read_json(folder, ARGS_FILE)
        differing = [
            f"--{name} {saved_args.get(name)} there, {value} now"
            for name, value in sorted(json.loads(json.dumps(vars(args))).items())
            if name not in FREE_ARGUMENTS and saved_args.get(name) != value
        ]
        if differing:
            raise UsageError(f"cannot continue {folder} exactly, the arguments differ: {'; '.join(differing)}")
        try:
            if problem := what_is_odd(folder / STATE_FILE):
                raise ValueError(problem)
            saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
            data, labels, processes = saved["data"], saved["labels"], len(saved["random_states"])
            self.step, self.cutoff = int(saved["step"]), saved["cutoff"]
            if not 0 <= self.step < 2**40 or not (self.cutoff is None or math.isfinite(float(self.cutoff))):
                raise ValueError("an impossible update or cut-off")
            self.seconds = float(saved.get("seconds", 0.0))
            if self.steering:
                self.steering.integral = float(saved["steering"])
            settings = [dict(group) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(saved["optimizer"])
            for group, own in zip(self.optimizer.param_groups, settings, strict=True):  # they come from the arguments
                if not 0 <= group["updates"] <= self.step:
                    raise ValueError("an impossible number of updates")
                group |= {name: value for name, value in own.items() if name not in ("params", "updates")}
            for parameter, moments in self.optimizer.state.items():
                for tensor in moments.values():
                    if tensor.shape not in (parameter.shape, ()) or tensor.dtype != torch.float32 or not tensor.isfinite().all():
                        raise ValueError("moments of other weights")
            self.scaler.load_state_dict(saved["scaler"])
            self.mask_generator.set_state(saved["mask_generator"])
            _set_random_state(saved["random_states"][self.world.rank % processes], self.world.device)
        except Exception as error:  # a broken archive, or one that holds something else, raises whatever it likes
            raise UsageError(
                f"{folder / STATE_FILE} is damaged, or was not written by these scripts: continue from another checkpoint"
            ) from error
        if data != self._data_digest or labels != self._labels:
            raise UsageError(f"cannot continue {folder} exactly: the training data has changed")
        if processes != self.world.size:
            raise UsageError(
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
        raise UsageError(f"{folder} is no checkpoint to resume from: {name} is missing or broken")
    return value


def _manifest(folder: Path) -> dict[str, dict]:
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST_FILE)
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in files}


def what_is_broken(folder: Path) -> str | None:
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
    except (UsageError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is damaged"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; whether they are whole `what_is_broken` tells."""
    found = {}
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and (folder / STATE_FILE).is_file():
            found[int(match[1])] = folder
    return [found[step] for step in sorted(found)]


def find_resume_folder(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means; None to start from the beginning.

    Raises UsageError when the given folder is no checkpoint.
    """
    if not args.resume_from_checkpoint:
        return None
    if args.resume_from_checkpoint == "latest":
        checkpoints = find_checkpoints(Path(args.output_dir))
        if not checkpoints:
            if (Path(args.output_dir) / "config.json").exists() and not args.overwrite_output_dir:
                raise UsageError(f"--output_dir {args.output_dir} holds a finished model and no checkpoint to resume from")
            logger.warning("%s holds no checkpoint yet: training starts from the beginning", args.output_dir)
            return None
        for folder in reversed(checkpoints):
            problem = what_is_broken(folder)
            if not problem:
                return folder
            logger.warning("%s is broken and skipped: %s", folder, problem)
        raise UsageError(f"no checkpoint in {args.output_dir} is whole (see above): remove them to start from the beginning")
    folder = Path(args.resume_from_checkpoint)
    if not (folder / STATE_FILE).is_file():
        raise UsageError(
            f"--resume_from_checkpoint {folder} is no checkpoint (it holds no {STATE_FILE}): "
            "give a checkpoint-<step> folder, or 'latest'"
        )
    if problem := what_is_broken(folder):
        raise UsageError(f"--resume_from_checkpoint {folder} is broken: {problem}; 'latest' takes the newest whole one")
    return folder


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Keep the newest `limit` checkpoints of a run, and more where none of these is whole."""
    if limit is None:
        return
    checkpoints = find_checkpoints(output_dir)
    if len(checkpoints) <= limit or all(what_is_broken(folder) for folder in reversed(checkpoints[-limit:])):
        return
    for folder in checkpoints[:-limit]:
        gone = folder.with_name(f".{folder.name}-old")  # a name that `remove_leftovers` knows, should this be killed
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


def save_final(output_dir: Path, args: argparse.Namespace, save_model: Callable[[Path], None], summary: dict) -> None:
    """Put the trained model, the arguments of its run and its figures into output_dir."""

    def fill(place: Path) -> None:
        save_model(place)
        write_json(place / ARGS_FILE, vars(args))
        write_json(place / SUMMARY_FILE, summary | {"weights": file_digest(place / WEIGHTS_FILE)})

    write_into(output_dir, fill)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` through `fill(place)`: written aside, then renamed, replacing an old one.

    Raises TrainingError when it cannot be written; nothing of it is left then.
    """
    with _aside(target, target.parent, f".{target.name}-") as place:
        fill(place / "new")
        _open_to_others(place / "new")
        _sync(place / "new")
        if target.exists():
            target.rename(place / "old")
        (place / "new").rename(target)
        _sync_folder(target.parent)


def write_into(target: Path, fill: Callable[[Path], None]) -> None:
    """Put the files that `fill(place)` makes into the folder `target`, each whole. Raises TrainingError."""
    with _aside(target, target, ".writing-") as place:
        fill(place / "new")
        _open_to_others(place / "new")
        _sync(place / "new")
        for file in sorted((place / "new").iterdir()):
            os.replace(file, target / file.name)
        _sync_folder(target)


@contextmanager
def _aside(target: Path, parent: Path, prefix: str):
    """A temporary folder below `parent` with an empty folder `new` in it, gone afterwards."""
    place = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        (place / "new").mkdir()
        yield place
    except Exception as error:  # a full disk is an OSError here, a RuntimeError of torch or an error of safetensors there
        raise TrainingError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        if place:
            shutil.rmtree(place, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have all files of a folder, and their names, on the disk before the folder gets its own name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises TrainingError when it cannot be written."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error in a line, without the names of files that are written aside."""
    if isinstance(error, TrainingError) and error.__cause__:
        error = error.__cause__
    chain = [error]
    while chain[-1].__context__:  # torch raises an error of its own over what the system said
        chain.append(chain[-1].__context__)
    error = next((link for link in chain if isinstance(link, OSError)), error)
    return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)


def _open_to_others(place: Path) -> None:
    """Give a folder made in private the permissions that the user's umask allows."""
    mask = os.umask(0)
    os.umask(mask)
    place.chmod(0o777 & ~mask)
    for file in place.iterdir():
        file.chmod(0o666 & ~mask)
