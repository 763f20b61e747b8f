"""The data points of the paper's tables and figures, and the command that each stands for.

They are in `paper/<task>.csv` (see the README there for what was corrected). A point's command is complete: all that
the paper's run had, for BERT-base, batches and warm-up included.
"""

import csv
import difflib
import itertools
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "paper"
TASKS = ("squad", "mnli", "qqp")
METHODS = ("magnitude", "l0", "movement", "soft movement")
METRICS = {
    "squad": ("exact", "f1"),
    "mnli": ("acc_matched", "acc_mismatched"),
    "qqp": ("acc", "f1"),
}  # as the scripts name them
COLUMNS = {
    "squad": ("exact_match", "f1"),
    "mnli": ("acc_matched", "acc_mismatched"),
    "qqp": ("acc", "f1"),
}  # and the paper
EXAMPLES = {
    "squad": 88_524,
    "mnli": 392_702,
    "qqp": 363_846,
}  # of training; for SQuAD, features of 384 tokens
SEEDS = {"squad": 92}  # that the paper's sheets name; else the scripts' default
TEACHER = "teacher"
FLAGS = (
    "pruning_method", "initial_threshold", "final_threshold", "initial_warmup", "final_warmup", "mask_init", "mask_scale",
    "regularization", "final_lambda", "alpha_ce", "alpha_distil", "learning_rate", "mask_scores_learning_rate",
    "per_gpu_train_batch_size", "max_seq_length", "num_train_epochs", "warmup_steps",
)  # fmt: skip


OURS = {  # flags that commands, folders and teachers depend on
    "--output_dir", "--seed", "--teacher_type", "--teacher_name_or_path", "--model_type", "--model_name_or_path",
    "--task_name", "--data_dir", "--do_train", "--do_eval", "--resume_from_checkpoint",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One run of the paper. remaining: percent of the encoder, bias and LayerNorm counted. metrics: percent."""

    task: str
    name: str
    method: str
    global_topk: bool
    distil: bool
    remaining: float | None
    metrics: dict[str, float]
    settings: dict[str, str] = field(repr=False)

    @property
    def updates(self) -> int:
        """Of the paper's run."""
        return round(
            float(self.settings["num_train_epochs"])
            * EXAMPLES[self.task]
            / int(self.settings["per_gpu_train_batch_size"])
        )


def load_points(task: str) -> list[Point]:
    """All points of a task, the dense teacher first. Raises UserError for an unknown task."""
    if task not in TASKS:
        raise UserError(f"the paper has no task {task!r}: choose one of {', '.join(TASKS)}")
    points = []
    with (FOLDER / f"{task}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            scale = 1 if task == "squad" else 100
            metrics = {
                name: scale * float(row[column])
                for name, column in zip(METRICS[task], COLUMNS[task], strict=True)
                if row[column]
            }
            remaining = (
                float(row["remaining_weights_pct"]) if row["remaining_weights_pct"] else None
            )
            settings = {flag: row[flag] for flag in FLAGS if row[flag]}
            points.append(
                Point(
                    task,
                    row["point"],
                    row["method"],
                    bool(row["global_topk"]),
                    bool(row["distil"]),
                    remaining,
                    metrics,
                    settings,
                )
            )
    return points


def find_point(task: str, name: str) -> Point:
    """Raises UserError for an unknown task or point, with the nearest one's name."""
    points = {point.name: point for point in load_points(task)}
    if name not in points:
        near = difflib.get_close_matches(name.upper(), points, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"{task} has no point {name!r}: {hint}`paper_tables.py list --task {task}` shows them"
        )
    return points[name]


def paper_value(
    task: str, metric: str, method: str, distil: bool, remaining: float
) -> float | None:
    """The paper's metric (percent) at `remaining` percent, on a line between its two nearest runs; None outside of them.

    Of the matrix-by-matrix runs, not the global ones.
    """
    line = sorted(
        (point.remaining, point.metrics[metric])
        for point in load_points(task)
        if (point.method, point.distil, point.global_topk) == (method, distil, False)
        and metric in point.metrics
    )
    for (low, start), (high, end) in zip(line, line[1:], strict=False):
        if low <= remaining <= high:
            return start + (end - start) * (remaining - low) / (high - low)
    return None


# ------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Options:
    """How commands are to be made. scale: updates and warm-up, of the paper's. extra: further flags, which win."""

    model: str = "bert-base-uncased"
    data_dir: str | None = None
    runs_dir: str = "runs"
    teacher: str | None = None
    seed: int | None = None
    scale: float = 1.0
    processes: int = 1
    task_name: str | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One process to run: `script` with `flags`; its model goes to `output_dir`."""

    script: str
    flags: list[str]
    output_dir: Path
    processes: int = 1

    @property
    def settings(self) -> dict[str, str]:
        """The flags by name, "True" for a bare one; the last of several wins, as it does for the script."""
        words = [
            part
            for flag in self.flags
            for part in (flag.split("=", 1) if flag.startswith("--") else [flag])
        ]
        pairs = itertools.pairwise([*words, "--"])
        return {
            word[2:]: "True" if after.startswith("--") else after
            for word, after in pairs
            if word.startswith("--")
        }

    @property
    def words(self) -> list[str]:
        """The command, to be typed."""
        launcher = (
            ["torchrun", "--nproc_per_node", str(self.processes)]
            if self.processes > 1
            else ["python"]
        )
        return [*launcher, self.script, *self.flags]


def steps(point: Point, options: Options) -> list[Step]:
    """What reproduces a point: the fine-tuning of its teacher, where it has one, and its own run.

    Raises UserError for options that do not fit.
    """
    if not 0 < options.scale <= 1000:
        raise UserError(f"--scale must be positive and at most 1000, got {options.scale:g}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2^32), got {options.seed}")
    for word in options.extra:
        if word.partition("=")[0] in OURS:
            raise UserError(
                f"{word.partition('=')[0]} is not for the scripts alone: give it, or what decides it, before the --"
            )
    if options.task_name and point.task == "squad":
        raise UserError("--task_name is for points of mnli and qqp")
    task = options.task_name or point.task
    folder = Path(options.runs_dir) / task.lower()
    if point.name == TEACHER:
        return [_step(point, options, folder / TEACHER, [])]
    seed = _seed(point, options)
    own = folder / (point.name + (f"-seed{seed}" if seed != _seed(point, Options()) else ""))
    if not point.distil:
        return [_step(point, options, own, [])]
    teacher = options.teacher or str(folder / TEACHER)
    before = (
        []
        if options.teacher
        else [_step(find_point(point.task, TEACHER), options, folder / TEACHER, [])]
    )
    return [
        *before,
        _step(point, options, own, ["--teacher_type", "bert", "--teacher_name_or_path", teacher]),
    ]


def _seed(point: Point, options: Options) -> int:
    return SEEDS.get(point.task, 42) if options.seed is None else options.seed


def _step(point: Point, options: Options, output_dir: Path, teacher: list[str]) -> Step:
    dense = point.name == TEACHER
    flags = [
        "--model_type",
        "bert" if dense else "masked_bert",
        "--model_name_or_path",
        options.model,
    ]
    if point.task != "squad":
        flags += ["--task_name", options.task_name or point.task]
    if options.data_dir:
        flags += ["--data_dir", options.data_dir]
    flags += ["--do_train", "--do_eval", "--do_lower_case"]
    settings = dict(point.settings)
    if options.scale != 1:
        del settings["num_train_epochs"]
        settings["max_steps"] = str(max(1, round(options.scale * point.updates)))
        settings["warmup_steps"] = str(round(options.scale * int(point.settings["warmup_steps"])))
    batch = int(settings["per_gpu_train_batch_size"])
    if batch % options.processes:
        raise UserError(
            f"batches of {batch} cannot be shared by {options.processes} processes: choose a divisor"
        )
    settings["per_gpu_train_batch_size"] = str(batch // options.processes)
    given = {word.partition("=")[0] for word in options.extra}
    for flag, value in settings.items():
        flags += [f"--{flag}", value] if f"--{flag}" not in given else []
    flags += ["--global_topk"] if point.global_topk else []
    # A teacher is one for all seeds.
    flags += [
        *teacher,
        "--seed",
        str(_seed(point, Options() if dense else options)),
        "--output_dir",
        str(output_dir),
        *options.extra,
    ]
    return Step(
        "masked_run_squad.py" if point.task == "squad" else "masked_run_glue.py",
        flags,
        output_dir,
        options.processes,
    )
