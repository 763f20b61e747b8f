"""Checkpoints: all that an exact resume needs, written whole or not at all.

A `checkpoint-<step>` folder is a normal model folder with `training_args.json` and
`training_state.pt`: optimiser, gradient scaler, random states of every rank, global cut-off,
projection to the teacher's width, completed updates. The state is read with `weights_only=True`;
nothing in it is ever executed. `files.json` lists the files with their sizes and SHA-256: a
checkpoint is whole if they match.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedConfig

from ..modules.masks import masked_layers
from ..system.errors import UserError
from ..system.files import file_digest, remove, write_folder, write_into, write_json
from .distributed import describe_hardware
from .state import TrainingState

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
ARGS_FILE = "training_args.json"
SUMMARY_FILE = "training_summary.json"
MANIFEST_FILE = "files.json"
WEIGHTS_FILE = "model.safetensors"

# Arguments that may differ in a resumed run, because the weights do not depend on them.
FREE_ARGUMENTS = {
    "output_dir", "model_name_or_path", "config_name", "tokenizer_name", "cache_dir", "data_dir",
    "train_file", "predict_file", "do_eval", "do_predict", "evaluate_during_training",
    "eval_all_checkpoints", "overwrite_output_dir", "overwrite_cache", "resume_from_checkpoint",
    "per_gpu_eval_batch_size", "logging_steps", "save_steps", "save_total_limit", "num_workers",
    "threads", "local_rank", "check_ranks", "sparse_inference", "onnx_file", "verbose_logging",
    "n_best_size", "max_answer_length", "null_score_diff_threshold", "max_eval_samples",
    "fp16_opt_level", "server_ip", "server_port", "lang_id",
}  # fmt: skip


def save_checkpoint(state: TrainingState, seconds: float) -> None:
    """Write a checkpoint after `seconds` of training, and remove old ones. All ranks take part."""
    state.check_weights()
    values = state.state_dict() | {"seconds": seconds}

    def fill(folder: Path) -> None:
        _save_model(state, folder)
        with (folder / STATE_FILE).open("wb") as file:  # given a path, torch hides OS errors
            torch.save(values, file)
        write_json(folder / MANIFEST_FILE, describe_files(folder))

    if state.world.is_main:
        output_dir = state.settings.output_dir
        write_folder(output_dir / f"checkpoint-{state.step}", fill)
        remove_old_checkpoints(output_dir, state.settings.keep)
    state.world.barrier()


def save_trained(state: TrainingState, seconds: float) -> dict[str, float]:
    """Write the trained model, after `seconds` of training. Returns the figures of the run.

    `training_summary.json` has the figures, the hardware of the run, and the hash of the weights.
    """
    state.check_weights()
    state.model.eval()
    if masked_layers(state.model):
        state.model.config.threshold = state.settings.schedule.final_threshold
    figures = {"updates": state.step, "seconds": seconds}
    figures["seconds_per_update"] = seconds / state.step

    def fill(folder: Path) -> None:
        _save_model(state, folder)
        made_by = {
            "processes": state.world.size,
            "hardware": describe_hardware(state.world),
            "torch": torch.__version__,
            "weights": file_digest(folder / WEIGHTS_FILE),
        }
        write_json(folder / SUMMARY_FILE, figures | made_by)

    if state.world.is_main:
        write_into(state.settings.output_dir, fill)
    return figures


def _save_model(state: TrainingState, folder: Path) -> None:
    state.model.save_pretrained(folder)
    state.tokenizer.save_pretrained(folder)
    write_json(folder / ARGS_FILE, state.settings.arguments)


def load_checkpoint(state: TrainingState, folder: Path) -> None:
    """Continue from the checkpoint `folder`, from which the model's weights are loaded already.

    Raises UserError for a checkpoint that is damaged, or of other arguments, data or processes.
    """
    try:
        arguments = json.loads((folder / ARGS_FILE).read_text(encoding="utf-8"))
        values = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        problems = _differences(arguments, values, state)
        if not problems:
            state.load_state_dict(values)
    except Exception as error:  # a broken file may raise anything
        raise UserError(
            f"{folder} is damaged, or of another program: continue from another checkpoint"
        ) from error
    if problems:
        raise UserError(f"cannot continue {folder} exactly: {'; '.join(problems)}")


def _differences(arguments: dict, values: dict, state: TrainingState) -> list[str]:
    """How the run that wrote a checkpoint differs from this one in what the weights depend on."""
    problems = []
    for name, value in sorted(state.settings.arguments.items()):
        old = arguments.get(name)  # older runs lack newer flags
        if name not in FREE_ARGUMENTS and (old or None) != (value or None):
            problems.append(f"--{name} was {old} and is {value}")
    if {name: values[name] for name in state.data} != state.data:
        problems.append("the training data has changed")
    if (processes := len(values["random_states"])) != state.world.size:
        problems.append(
            f"it was written by {processes} processes, and this run has {state.world.size}"
        )
    return problems


def describe_data(train_set: Dataset, config: PreTrainedConfig) -> dict:
    """A hash of the inputs and labels of all training examples, and the names of the labels."""
    digest = hashlib.sha256()
    for batch in train_set.with_format("arrow").iter(batch_size=10_000):
        for name, column in zip(batch.column_names, batch.columns):
            values = column.combine_chunks()
            digest.update(name.encode())
            if pa.types.is_list(values.type):
                digest.update(values.value_lengths().to_numpy())
                values = values.flatten()
            digest.update(values.to_numpy(zero_copy_only=False))
    return {"data": digest.hexdigest(), "labels": list(config.id2label.values())}


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
        files = describe_files(folder)
        for name, entry in listed.items():
            if files.get(name) != entry:
                return f"{name} is {'damaged' if name in files else 'missing'}"
    except (OSError, ValueError, AttributeError):
        return f"{MANIFEST_FILE} or another file cannot be read"
    return None


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
    if asked == "latest":
        checkpoints = find_checkpoints(output_dir)
    elif (Path(asked) / STATE_FILE).is_file():
        checkpoints = [Path(asked)]
    else:
        raise UserError(
            f"--resume_from_checkpoint {asked} is no checkpoint (it has no {STATE_FILE}): "
            "give a checkpoint-<step> folder, or 'latest'"
        )
    for checkpoint in reversed(checkpoints):
        damage = damage_of(checkpoint)
        if not damage:
            return checkpoint
        logger.warning("%s is broken and skipped: %s", checkpoint, damage)
    if checkpoints:
        raise UserError(
            f"--resume_from_checkpoint {asked}: no checkpoint is whole ({damage}); give another "
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
    if limit is None:
        return
    for folder in find_checkpoints(output_dir)[:-limit]:
        remove(folder.rename(folder.with_name(f".{folder.name}-old")))  # whole or absent


def clean_output(output_dir: Path, result_files: Iterable[str], resumes_in_place: bool) -> None:
    """Remove half-written files and, unless the run is resumed, the results of an older run."""
    old = [*output_dir.glob(".checkpoint-*"), *output_dir.glob(".writing-*")]
    if not resumes_in_place:
        old += find_checkpoints(output_dir)
        for pattern in ("events.out.tfevents.*", *result_files):
            old += output_dir.glob(pattern)
    for path in old:
        remove(path)
