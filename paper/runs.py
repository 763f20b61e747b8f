"""Finished runs below a folder, with the remaining weights counted again in their checkpoints."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from emmental.checkpoints.counts import plain_percents, remaining_weights
from emmental.checkpoints.loading import head_of, load_masked, load_model, read_config
from emmental.data.glue_tasks import CUSTOM
from emmental.models.families import COMPACT, is_masked
from emmental.modules.methods import METHODS
from emmental.system.errors import UserError
from emmental.system.files import file_digest
from emmental.training.checkpoint import ARGS_FILE, FREE_ARGUMENTS, SUMMARY_FILE, WEIGHTS_FILE

from . import points
from .points import GLOBAL, METRICS

RESULTS = "eval_results.json"
BATCH = ("per_gpu_train_batch_size", "gradient_accumulation_steps")
PLAIN = ("dense", "compact")  # methods of runs without masks
TITLES = (*dict.fromkeys([*points.METHODS, *(x.title for x in METHODS.values())]), "compact")
UNSET = (None, False, 0, -1)  # values of flags that are as good as absent
TOLERANCE = 0.01  # percentage points between the recorded and the counted remaining weights


@dataclass
class Run:
    """A finished run.

    metrics: percent; empty if none is defined, as for a regression's predictions that are equal.
    remaining: percent of the encoder, bias and LayerNorm counted; remaining_linear: of the Linears
    alone. args, summary: its training_args.json and training_summary.json.
    """

    folder: Path
    task: str
    method: str  # as in `Point`, or "compact": a compact model that was trained further
    distil: bool
    metrics: dict[str, float]
    args: dict
    summary: dict
    remaining: float = 100.0
    remaining_linear: float = 100.0

    @property
    def batch(self) -> int:
        """Examples per update, of all processes. Older summaries do not record their number."""
        processes = self.summary.get("processes", 1)
        return math.prod(self.args[name] for name in BATCH) * processes

    @property
    def granularity(self) -> str:
        """What a score of a masked model stands for."""
        return "" if self.method in PLAIN else self.args.get("granularity") or "weight"

    @property
    def start(self) -> str:
        """fine-tuned, if the run started from its teacher or from another run; or pre-trained."""
        if self.method == "compact":  # its folder is made of a run
            return "fine-tuned"
        model = Path(self.args["model_name_or_path"])
        teacher = self.args["teacher_name_or_path"]
        is_teacher = teacher and model.resolve() == Path(teacher).resolve()
        return "fine-tuned" if is_teacher or (model / ARGS_FILE).exists() else "pre-trained"

    @property
    def settings(self) -> dict[str, str]:
        """What the result depends on, without the seed. Old runs have newer flags unset."""
        ignored = FREE_ARGUMENTS - {"model_name_or_path", "max_eval_samples"} | {"seed", *BATCH}
        values = {k: v for k, v in self.args.items() if k not in ignored and v not in UNSET}
        return {k: _text(v) for k, v in sorted((values | {"batch": self.batch}).items())}


def _text(value: object) -> str:
    """A value of a setting; 1 and 1.0 are the same."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if is_number else str(value)


def methods_of(runs: list[Run]) -> list[str]:
    """The paper's methods, then the others that have a run."""
    others = {run.method for run in runs} - {*points.METHODS}
    names = [title + ranked for title in TITLES for ranked in ("", GLOBAL)]
    return [*points.METHODS, *(name for name in names if name in others)]


def find_runs(runs_dir: str) -> tuple[list[Run], dict[Path, str]]:
    """All finished runs below a folder, and the reason for each run that is left out.

    Raises UserError when there is no finished run.
    """
    runs = []
    left_out = {}
    folders = {path.parent for path in Path(runs_dir).rglob(ARGS_FILE)}
    checkpoints = {folder for folder in folders if folder.name.startswith("checkpoint-")}
    for folder in sorted(folders - checkpoints | {folder.parent for folder in checkpoints}):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out[folder] = str(error)
        except (OSError, KeyError, ValueError) as error:
            left_out[folder] = f"its files are damaged or from another version ({error!r})"
    if not runs:
        reasons = "".join(f"; {folder}: {reason}" for folder, reason in left_out.items())
        raise UserError(f"{runs_dir} holds no finished run{reasons}")
    return runs, left_out


def read_run(folder: Path) -> Run:
    """Raises UserError for a run that is unfinished, or whose results do not fit its checkpoint."""
    if not (folder / RESULTS).exists():
        raise UserError(f"it is not finished: it has no {RESULTS}")
    args, summary, results = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in (ARGS_FILE, SUMMARY_FILE, RESULTS)
    )
    if file_digest(folder / WEIGHTS_FILE) != summary["weights"]:
        raise UserError(f"its {WEIGHTS_FILE} has changed since the end of the training")
    if "doc_stride" in args:
        task = "squad_v2" if args["version_2_with_negative"] else "squad"
        scale = 1
    elif "tag_column" in args:
        data = args["data_dir"] and Path(args["data_dir"]).resolve().name
        task = f"ner-{data or args['dataset_name']}"
        scale = 100
    else:
        task = args.get("task_name")
        if task == CUSTOM:  # your tasks differ by their data
            task += f"-{Path(args['data_dir']).resolve().name}"
        scale = 100
    run = Run(
        folder=folder,
        task=task,
        method="dense",
        distil=bool(args["teacher_name_or_path"]),
        metrics={name: scale * results[name] for name in METRICS if name in results},
        args=args,
        summary=summary,
    )
    if run.task is None:
        raise UserError("it is of a script of your own, whose tasks the report does not know")
    if is_masked(args["model_type"]):
        run.method = METHODS[args["pruning_method"]].title + (GLOBAL if args["global_topk"] else "")
        counts = remaining_weights(load_masked(str(folder)))
        run.remaining = counts.published_percent
        run.remaining_linear = counts.linear_percent
        recorded = results["remaining_percent_linear"]
        if abs(recorded - counts.linear_percent) > TOLERANCE:
            raise UserError(
                f"{RESULTS} records {recorded:.2f}% remaining weights, but its checkpoint has "
                f"{counts.linear_percent:.2f}%"
            )
    elif (config := read_config(str(folder)))["model_type"].startswith(COMPACT):
        model = load_model(str(folder), head_of(str(folder), config), masked=False, trained=True)
        run.method = "compact"
        run.remaining_linear, run.remaining = plain_percents(model)
    return run
