"""Finished runs: what they were asked, what they left, and whether the two agree.

Nothing is taken from a flag that can be measured: the remaining weights are counted in the checkpoint, and a run whose
recorded figures do not match its files is refused.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..export import remaining_weights
from ..families import is_masked
from ..files import file_digest
from ..loading import load_masked, read_config
from ..modules.methods import METHODS
from ..training.checkpoint import ARGS_FILE, FREE_ARGUMENTS, SUMMARY_FILE, WEIGHTS_FILE
from .points import METRICS

FINISHED, TRAINED, BEGUN = "finished", "trained", "begun"
RESULTS = "eval_results.json"
ESSENTIAL = {"data_dir", "model_name_or_path", "task_name"}
BARE = {"target_remaining", "regularization", "teacher_name_or_path", "teacher_type"}
COUNT_TOLERANCE = 0.01  # percent points between the recorded and the recounted remaining weights


@dataclass
class Run:
    """A finished run. remaining: percent of the encoder in the paper's convention; remaining_linear: of the Linears alone."""

    folder: Path
    task: str
    method: str
    global_topk: bool
    distil: bool
    seed: int
    metrics: dict[str, float]
    remaining: float
    remaining_linear: float
    updates: int
    seconds: float
    hardware: str
    args: dict
    batch: int = 0  # examples of an update, on one process
    model: str = ""  # that it began from

    @property
    def settings(self) -> tuple:
        """All that its seed does not decide: runs with the same ones differ by their seeds."""
        free = FREE_ARGUMENTS - {"model_name_or_path"} | {"seed"}
        return tuple(
            sorted((name, str(value)) for name, value in self.args.items() if name not in free)
        )

    @property
    def is_dense(self) -> bool:
        return self.method == "dense"


def find_runs(runs_dir: str) -> tuple[list[Run], dict[Path, str]]:
    """All finished runs below a folder, and why each other folder with a run in it is left out.

    Raises UserError when there is no such folder, or nothing in it.
    """
    root = Path(runs_dir)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    folders = sorted(
        {path.parent for name in (ARGS_FILE, RESULTS) for path in root.rglob(name)}
        | {path.parent for path in root.rglob("checkpoint-*") if path.is_dir()}
    )
    runs, left_out = [], {}
    for folder in folders:
        parts = folder.relative_to(root).parts
        if any(part.startswith((".", "checkpoint-")) for part in parts):
            continue
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out[folder] = str(error)
    if not runs and not left_out:
        raise UserError(f"{root} holds no run: `paper_tables.py run` makes them")
    return runs, left_out


def read_run(folder: Path) -> Run:
    """Raises UserError for a run that is unfinished, foreign, or whose figures do not match its files."""
    args, results, summary = (_read(folder, name) for name in (ARGS_FILE, RESULTS, SUMMARY_FILE))
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"it has no {WEIGHTS_FILE}")
    if file_digest(folder / WEIGHTS_FILE) != summary.get("weights"):
        raise UserError(f"its {WEIGHTS_FILE} is not the one that the run ended with")
    text = {}
    try:
        lines = (folder / "eval_results.txt").read_text(encoding="utf-8").splitlines()
        text = dict(line.split(" = ", 1) for line in lines if " = " in line)
        config = read_config(str(folder))
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"it is incomplete: {error}") from error
    if text != {name: str(value) for name, value in results.items()}:
        raise UserError("eval_results.txt and eval_results.json differ")
    try:
        squad = "squad_v2" if args.get("version_2_with_negative") else "squad"
        task = squad if "doc_stride" in args else str(args["task_name"]).lower()
        masked = is_masked(args["model_type"])
        names = METRICS.get(task) or tuple(
            name for name in results if _is_metric(name, results[name])
        )
        scale = 1 if "doc_stride" in args else 100
        metrics = {name: scale * float(results[name]) for name in names}
        method = METHODS[args["pruning_method"]].title if masked else "dense"
        run = Run(
            folder, task, method, masked and bool(args["global_topk"]), bool(args["teacher_name_or_path"]), int(args["seed"]),
            metrics, 100.0, 100.0, int(summary["updates"]), float(summary["seconds"]), str(summary["hardware"]), args,
        )  # fmt: skip
        run.batch = int(args["per_gpu_train_batch_size"]) * int(args["gradient_accumulation_steps"])
        run.model = str(args["model_name_or_path"])
    except KeyError as error:
        raise UserError(
            f"its files lack {error}: it is of another version of these scripts, or of another task"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"its files hold what these scripts do not write ({error})") from error
    if not all(math.isfinite(value) for value in metrics.values()) or not metrics:
        raise UserError("its metrics are missing or not finite")
    if is_masked(config["model_type"]) != masked:
        raise UserError(
            f"{ARGS_FILE} says {args['model_type']}, and config.json {config.get('model_type')}"
        )
    if masked:
        _recount(run, config, results)
    return run


def _recount(run: Run, config: dict, results: dict) -> None:
    if config.get("pruning_method") != run.args["pruning_method"]:
        raise UserError(
            f"{ARGS_FILE} says {run.args['pruning_method']}, and config.json {config.get('pruning_method')}"
        )
    try:
        counts = remaining_weights(load_masked(str(run.folder)))
    except UserError as error:
        raise UserError(str(error)) from error
    run.remaining, run.remaining_linear = counts.published_percent, counts.linear_percent
    recorded = results.get("remaining_percent_linear")
    if (
        not isinstance(recorded, float | int)
        or abs(recorded - run.remaining_linear) > COUNT_TOLERANCE
    ):
        raise UserError(
            f"{RESULTS} says that {recorded}% remain, and its checkpoint holds {run.remaining_linear:.2f}%"
        )


def _read(folder: Path, name: str) -> dict:
    path = folder / name
    if not path.exists():
        raise UserError(f"it has no {name}: it is not finished, or not of these scripts")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} does not hold what these scripts write")
    return content


def _is_metric(name: str, value) -> bool:
    return (
        isinstance(value, float)
        and not name.startswith(("entropy", "remaining", "threshold", "best_", "HasAns", "NoAns"))
        and not name.rpartition("_")[2].isdigit()
    )


def _means(text: str, value) -> bool:
    """Whether the text of a flag stands for the recorded value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return (
        text.removeprefix("./").rstrip("/").lower()
        == str(value).removeprefix("./").rstrip("/").lower()
    )


def run_state(
    output_dir: Path, settings: dict[str, str], tolerant: bool = False
) -> tuple[str, list[str]]:
    """How far the run with these flags (name and text) has come in its folder, and which settings differ there.

    FINISHED, TRAINED (not evaluated) or BEGUN. Raises UserError when a run with other settings has been trained there;
    when `tolerant`, only when it is of another model, other data or another task.
    """
    if not all((output_dir / name).is_file() for name in (ARGS_FILE, SUMMARY_FILE, WEIGHTS_FILE)):
        return BEGUN, []
    try:
        found = _read(output_dir, ARGS_FILE)
    except UserError as error:
        raise UserError(
            f"{output_dir}: {error}; remove it, or choose another --runs_dir"
        ) from error
    free = FREE_ARGUMENTS - ESSENTIAL
    differing = {
        name: f"--{name} {found.get(name)} there, {text} now"
        for name, text in sorted(settings.items())
        if name not in free and not _means(text, found.get(name))
    }
    differing |= {  # flags that have no value of their own when they are not given
        name: f"--{name} {value} there, not given now"
        for name, value in sorted(found.items())
        if name not in settings
        and name not in free
        and (value is True or (name in BARE and value is not None))
    }
    if differing.keys() & ESSENTIAL if tolerant else differing:
        raise UserError(
            f"{output_dir} holds a run with other settings ({'; '.join(differing.values())}): choose another --runs_dir"
        )
    return (FINISHED if (output_dir / RESULTS).is_file() else TRAINED), list(differing.values())
