"""Reproduce the paper's tables: its 269 data points as commands, and a report on the runs that checks itself.

    python paper_tables.py list --task squad --distil --remaining 3..10     # the points as a table
    python paper_tables.py command squad 10D3 --data_dir data/squad         # a point's commands, to paste
    python paper_tables.py run squad 10D3 3E2 --data_dir data/squad         # the same, executed; restartable
    python paper_tables.py report runs                                      # the paper's table with ours beside it
    python paper_tables.py plot runs                                        # the paper's figures with ours in them

`--scale 0.1` gives a run a tenth of the paper's updates and warm-up, for smaller data. What stands after `--` goes to
the scripts as it is, and wins over the point's own settings: `... --scale 0.04 -- --no_cuda --learning_rate 1e-4`.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from emmental.errors import Interrupted, TrainingError, UserError, one_line_errors
from emmental.files import write_text
from emmental.tables.points import (
    METHODS,
    TASKS,
    TEACHER,
    Options,
    Point,
    Step,
    find_point,
    load_points,
    steps,
)
from emmental.tables.report import headline, run_rows, to_csv, to_markdown
from emmental.tables.runs import FINISHED, TRAINED, find_runs, run_state
from emmental.training.args import Parser
from emmental.training.runlog import set_up_logging

ROOT = Path(__file__).resolve().parent
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TAIL = 5  # lines of a failed run's log that are shown


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(
        dest="verb",
        required=True,
        metavar="list | command | run | report | plot",
        help="what to do",
    )

    def verb(name: str, summary: str):
        sub = verbs.add_parser(name, help=summary, description=summary)
        return sub.add_argument

    add = verb("list", "the paper's data points as a table")
    add("--task", choices=TASKS, help="those of one task")
    add("--method", choices=METHODS, help="those of one method")
    add("--distil", action="store_true", help="those with a teacher")
    add(
        "--remaining",
        type=interval,
        metavar="LOW..HIGH",
        help="percent of the weights that remain, such as 3..10",
    )
    for name, summary in (
        ("command", "print the commands of a point"),
        ("run", "run the commands of points, skipping what is finished"),
    ):
        add = verb(name, summary)
        add("task", choices=TASKS, help="task of the points")
        add(
            "points",
            metavar="POINT",
            nargs="+" if name == "run" else 1,
            help="names that `list` shows, such as 10D3, or teacher",
        )
        add(
            "--model",
            default="bert-base-uncased",
            help="pre-trained model: a name on the hub, or a folder",
        )
        add("--data_dir", help="folder of the data; without it they come from the hub")
        add(
            "--runs_dir",
            "--output_dir",
            default="runs",
            help="where the runs go, each in a folder <task>/<point>",
        )
        add(
            "--teacher",
            help="fine-tuned teacher, when there is one: a folder, or a name on the hub",
        )
        add("--seed", type=int, help="seed of the runs, when not the paper's")
        add(
            "--scale",
            type=float,
            default=1.0,
            help="updates and warm-up, as a fraction of the paper's",
        )
        add(
            "--nproc",
            type=int,
            default=1,
            help="processes, one for each GPU, that share a batch (torchrun)",
        )
        add(
            "--task_name",
            help="another GLUE task, to be run with the settings of a point of mnli or qqp",
        )
    add = verb("report", "gather the finished runs below a folder, beside the paper's")
    add("runs_dir", help="folder of the runs")
    add("--csv", help="file to write a row for each run to")
    add("--markdown", help="file to write the tables to")
    add = verb("plot", "draw the paper's figures with the runs below a folder in them")
    add("runs_dir", help="folder of the runs")
    add("--to", help="folder for the PNG files (default: that of the runs)")
    return parser


def interval(text: str) -> tuple[float, float]:
    low, dots, high = text.partition("..")
    try:
        bounds = float(low), float(high if dots else low)
    except ValueError:
        bounds = (1.0, 0.0)
    if not 0 <= bounds[0] <= bounds[1] <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no interval such as 3..10, in percent")
    return bounds


def list_points(args) -> None:
    print("| task | point | method | remaining % | metrics | updates |\n|---|---|---|---|---|---|")
    for point in (point for task in TASKS for point in load_points(task)):
        low, high = args.remaining or (0, 100)  # whole percents: the paper's 10% are 10.1
        if (
            args.task in (None, point.task)
            and args.method in (None, point.method)
            and (point.distil or not args.distil)
            and (
                point.remaining is None
                and not args.remaining
                or point.remaining is not None
                and low - 0.5 <= point.remaining <= high + 0.5
            )
        ):
            print(f"| {point.task} | {point.name} | {describe(point)} | "
                  f"{'' if point.remaining is None else f'{point.remaining:.1f}'} | "
                  f"{', '.join(f'{name} {value:.1f}' for name, value in point.metrics.items())} | {point.updates:,} |")  # fmt: skip


def describe(point: Point) -> str:
    return point.method + ", global" * point.global_topk + ", distilled" * point.distil


def options_of(args, extra: list[str]) -> Options:
    if args.nproc < 1:
        raise UserError(f"--nproc must be at least 1, got {args.nproc}")
    return Options(
        args.model,
        args.data_dir,
        args.runs_dir,
        args.teacher,
        args.seed,
        args.scale,
        args.nproc,
        args.task_name,
        tuple(extra),
    )


def plan(args, extra: list[str]) -> list[Step]:
    """The steps of all points asked for, each once, in an order in which teachers come first."""
    options = options_of(args, extra)
    return list(
        {
            step.output_dir: step
            for name in args.points
            for step in steps(find_point(args.task, name), options)
        }.values()
    )


def run(args, extra: list[str]) -> None:
    """Raises TrainingError when a run fails."""
    planned = plan(args, extra)
    # Runs with other settings end this before it begins. A teacher that is there serves, unless it was asked for itself.
    served = [step.output_dir.name == TEACHER and TEACHER not in args.points for step in planned]
    states = [
        run_state(step.output_dir, step.settings, tolerant)
        for step, tolerant in zip(planned, served, strict=True)
    ]
    for number, (step, (state, differing)) in enumerate(zip(planned, states, strict=True), 1):
        label = f"[{number}/{len(planned)}] {step.output_dir}"
        if state == FINISHED:
            others = f", with other settings: {'; '.join(differing)}" if differing else ""
            print(f"{label}: finished already{others}", flush=True)
            continue
        flags = [*step.flags, "--resume_from_checkpoint", "latest"]
        if state == TRAINED:  # and not evaluated
            flags = [
                *(flag for flag in step.flags if flag != "--do_train"),
                "--model_name_or_path",
                str(step.output_dir),
            ]
        print(f"{label}: {shlex.join([*step.words[: -len(step.flags)], *flags])}", flush=True)
        log = step.output_dir.with_name(step.output_dir.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        launcher = (
            ["-m", "torch.distributed.run", "--nproc_per_node", str(step.processes)]
            if step.processes > 1
            else []
        )
        with log.open("ab") as out:
            begin = out.tell()
            command = [sys.executable, *launcher, str(ROOT / step.script), *flags]
            status, received = run_process(command, out)
        if status and received:
            raise Interrupted(f"{step.output_dir}: {reason(log, begin, status)}", received)
        if status:
            raise TrainingError(
                f"{step.output_dir} failed: {reason(log, begin, status)} (see {log}; the same command goes on where it stopped)"
            )
        print(f"{label}: done, see {log}", flush=True)


def run_process(command: list[str], out: BinaryIO) -> tuple[int, int]:
    """Its exit status, and the signal that came meanwhile, or 0.

    SIGTERM, Ctrl-C and a closed terminal are for the process, which writes a checkpoint and ends.
    """
    process = subprocess.Popen(
        command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
    )
    received = 0

    def pass_on(number: int, _) -> None:
        nonlocal received
        received = number
        process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    handlers = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        return process.wait(), received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def reason(log: Path, begin: int, status: int) -> str:
    """Why a run failed, from what it wrote into its log from the byte `begin` on."""
    if status < 0:
        return f"it was killed by {signal.Signals(-status).name}"
    text = log.read_bytes()[begin:].decode(errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    said = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return said[-1] if said else "; ".join(lines[-TAIL:])


def report(args) -> None:
    runs, left_out = find_runs(args.runs_dir)
    text = "no finished run\n"
    if runs:
        rows = run_rows(runs)
        text = f"{to_markdown(headline(runs))}\n{to_markdown([list(rows[0]), *(row.values() for row in rows)])}"
        if args.csv:
            write_text(Path(args.csv), to_csv(rows))
    text += "".join(f"\nleft out: {folder}: {reason}\n" for folder, reason in left_out.items())
    print(text)
    if args.markdown:
        write_text(Path(args.markdown), text)


def plot(args) -> None:
    """Raises UserError when nothing can be drawn."""
    runs, left_out = find_runs(args.runs_dir)
    for folder, reason in left_out.items():
        print(f"left out: {folder}: {reason}")
    if not runs:
        raise UserError(f"{args.runs_dir} holds no finished run to draw")
    from emmental.tables.plots import draw  # matplotlib is slow to import

    for path, problem in draw(runs, Path(args.to or args.runs_dir)):
        print(f"not drawn: {path}: {problem}" if problem else path)


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    extra = words[words.index("--") + 1 :] if "--" in words else []
    args = get_parser().parse_args(words[: words.index("--")] if "--" in words else words)
    set_up_logging()
    with one_line_errors():
        if extra and args.verb not in ("command", "run"):
            raise UserError(f"{args.verb} takes nothing after --")
        if args.verb == "list":
            list_points(args)
        elif args.verb == "command":
            for step in plan(args, extra):
                print(shlex.join(step.words))
        elif args.verb == "run":
            run(args, extra)
        elif args.verb == "report":
            report(args)
        else:
            plot(args)


if __name__ == "__main__":
    main()
