"""The data points of the paper's tables and figures, and the commands that reproduce them.

`paper/<task>.csv` holds the points (`paper/README.md` lists our corrections). A command has every
setting of the paper's run, which used BERT-base.
"""

import argparse
import csv
import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path

from emmental.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "paper"
TASKS = ("squad", "mnli", "qqp")
METHODS = ("magnitude", "l0", "movement", "soft movement")
GLOBAL = ", global"  # added to the method's name when all matrices are ranked together
METRICS = ("exact", "acc", "acc_matched", "acc_mismatched", "f1", "mcc", "pearson", "spearmanr")
EXAMPLES = {"squad": 88_524, "mnli": 392_702, "qqp": 363_846}  # SQuAD: features of 384 tokens
SEEDS = {"squad": 92, "mnli": 42, "qqp": 42}
TEACHER = "teacher"
# fmt: off
SETTINGS = (
    "pruning_method", "initial_threshold", "final_threshold", "initial_warmup", "final_warmup",
    "mask_init", "mask_scale", "regularization", "final_lambda", "alpha_ce", "alpha_distil",
    "learning_rate", "mask_scores_learning_rate", "per_gpu_train_batch_size", "max_seq_length",
    "num_train_epochs", "warmup_steps",
)
# fmt: on


@dataclass(frozen=True)
class Point:
    """One run of the paper. remaining (bias and LayerNorm counted) and metrics are percentages."""

    task: str
    name: str
    method: str  # one of METHODS, perhaps with GLOBAL, or "dense"
    distil: bool
    remaining: float
    metrics: dict[str, float]
    settings: dict[str, str] = field(repr=False)

    @property
    def batch(self) -> int:
        """Examples per update."""
        return int(self.settings["per_gpu_train_batch_size"])

    @property
    def updates(self) -> int:
        """Updates of the paper's run."""
        examples = float(self.settings["num_train_epochs"]) * EXAMPLES[self.task]
        return round(examples / self.batch)


def load_points(task: str) -> list[Point]:
    """All points of a task, the dense teacher first."""
    points = []
    scale = 1 if task == "squad" else 100
    with (PAPER / f"{task}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            row["exact"] = row.get("exact_match")
            point = Point(
                task=task,
                name=row["point"],
                method=row["method"] + (GLOBAL if row["global_topk"] else ""),
                distil=bool(row["distil"]),
                remaining=float(row["remaining_weights_pct"] or 100),
                metrics={name: scale * float(row[name]) for name in METRICS if row.get(name)},
                settings={name: row[name] for name in SETTINGS if row[name]},
            )
            points.append(point)
    return points


def find_point(task: str, name: str) -> Point:
    """The point of this name. Raises UserError for an unknown one, with the nearest names."""
    points = {point.name: point for point in load_points(task)}
    if name not in points:
        near = difflib.get_close_matches(name.upper(), points, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"{task} has no point {name!r}: {hint}`paper_tables.py list --task {task}` shows all"
        )
    return points[name]


def paper_line(task: str, metric: str, method: str, distil: bool) -> list[tuple[float, float]]:
    """Remaining weights and metric (both in percent) of a method's points, in increasing order."""
    return sorted(
        (point.remaining, point.metrics[metric])
        for point in (load_points(task) if task in TASKS else [])
        if (point.method, point.distil) == (method, distil) and metric in point.metrics
    )


def paper_value(
    task: str, metric: str, method: str, distil: bool, remaining: float
) -> float | None:
    """The paper's metric at `remaining` percent, interpolated; None beyond the paper's points."""
    line = paper_line(task, metric, method, distil)
    for (low, start), (high, end) in zip(line, line[1:], strict=False):
        if low <= remaining <= high:
            return start + (end - start) * (remaining - low) / (high - low)
    return None


def commands(point: Point, args: argparse.Namespace) -> dict[Path, list[str]]:
    """The arguments of `python` that reproduce a point, by output folder, the teacher's first.

    args: of `paper_tables.py command`. Raises UserError for options that do not fit the point.
    """
    squad = point.task == "squad"
    dense = point.name == TEACHER
    if args.task_name and squad:
        raise UserError("--task_name works with points of mnli and qqp only")
    if not args.scale > 0:
        raise UserError(f"--scale must be positive, got {args.scale:g}")
    if args.nproc < 1 or point.batch % args.nproc:
        raise UserError(f"--nproc {args.nproc} does not divide the batch size {point.batch}")

    task = args.task_name or point.task
    name = point.name
    seed = SEEDS[point.task]
    if args.seed not in (None, seed) and not dense:  # one teacher serves all seeds
        name = f"{name}-seed{args.seed}"
        seed = args.seed
    folder = Path(args.runs_dir) / task.lower()
    flags = {
        "model_type": "bert" if dense else "masked_bert",
        "model_name_or_path": args.model,
        "task_name": None if squad else task,
        "data_dir": args.data_dir,
        **point.settings,
        "per_gpu_train_batch_size": point.batch // args.nproc,
        "seed": seed,
        "output_dir": folder / name,
    }
    if args.scale != 1:
        flags["num_train_epochs"] = None
        flags["max_steps"] = max(1, round(args.scale * point.updates))
        flags["warmup_steps"] = round(args.scale * int(point.settings["warmup_steps"]))
    planned = {}
    if point.distil:
        flags["teacher_type"] = "bert"
        flags["teacher_name_or_path"] = args.teacher or folder / TEACHER
        if not args.teacher:
            planned = commands(find_point(point.task, TEACHER), args)

    words = [os.path.relpath(ROOT / f"masked_run_{'squad' if squad else 'glue'}.py")]
    if args.nproc > 1:
        words = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.nproc), *words]
    words += ["--do_train", "--do_eval", "--do_lower_case"]
    if point.method.endswith(GLOBAL):
        words.append("--global_topk")
    for flag, value in flags.items():
        if value is not None:
            words += [f"--{flag}", str(value)]
    return planned | {folder / name: [*words, *args.extra]}
