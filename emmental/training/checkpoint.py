"""Checkpoint folders of a run: which are whole, which one to resume from, which ones to remove.

A `checkpoint-<step>` folder is a normal model folder with `training_args.json` and
`training_state.pt`, which `state.TrainingState` writes and reads. `files.json` lists the files with
their sizes and SHA-256: a checkpoint is whole if they match.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from ..files import file_digest, write_json

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
    "max_answer_length", "null_score_diff_threshold", "fp16_opt_level", "server_ip", "server_port",
    "lang_id",
}  # fmt: skip


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    folders = [path.parent for path in output_dir.glob(f"checkpoint-*/{STATE_FILE}")]
    folders = [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The completed updates of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def write_manifest(folder: Path) -> None:
    """List the files of a checkpoint, in itself."""
    write_json(folder / MANIFEST_FILE, _describe_files(folder))


def damage_of(folder: Path) -> str | None:
    """What differs from a checkpoint's list of files, or None. Old checkpoints have no list."""
    if not (folder / MANIFEST_FILE).exists():
        return None
    try:
        listed = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        found = _describe_files(folder)
        damaged = [name for name, entry in listed.items() if found.get(name) != entry]
    except (OSError, ValueError, AttributeError):
        return f"{MANIFEST_FILE} or another file cannot be read"
    if not damaged:
        return None
    return f"{damaged[0]} is {'damaged' if damaged[0] in found else 'missing'}"


def _describe_files(folder: Path) -> dict[str, dict]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in files
        if path.name != MANIFEST_FILE
    }


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
    """Remove what a killed run has half written and, unless it is resumed, what it has finished."""
    old = [*output_dir.glob(".checkpoint-*"), *output_dir.glob(".writing-*")]
    if not resumes_in_place:
        old += find_checkpoints(output_dir)
        for pattern in ("events.out.tfevents.*", *result_files):
            old += output_dir.glob(pattern)
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
