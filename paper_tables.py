"""Reproduce the paper's tables: its 269 data points as commands, and a report on the finished runs.

    python paper_tables.py list --task squad --distil --remaining 3..10    # the points as a table
    python paper_tables.py command squad 10D3 --data_dir data/squad        # commands to paste
    python paper_tables.py run squad 10D3 3E2 --data_dir data/squad        # run them; restartable
    python paper_tables.py report runs                                     # tables: paper and ours
    python paper_tables.py plot runs                                       # figures: paper and ours
    python paper_tables.py figure                                          # the README's figure

`--scale 0.1` gives a run a tenth of the paper's updates and warm-up, for smaller data. Flags after
`--` go to the scripts and override the point's settings: `... -- --no_cuda --learning_rate 1e-4`,
or `--runs_dir runs/platon ... -- --pruning_method platon` for a method that is not the paper's.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pandas

from emmental.system.errors import Interrupted, TrainingError, handled_signals, one_line_errors
from emmental.system.files import followed, write_text
from emmental.training.checkpoint import SUMMARY_FILE
from emmental.training.parser import Parser
from emmental.training.runlog import set_up_logging
from paper.points import GLOBAL, METHODS, ROOT, TASKS, commands, find_point, load_points
from paper.report import headline, run_rows, to_markdown
from paper.runs import RESULTS, find_runs


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    # fmt: off
    metavar = "list | command | run | report | plot | figure"
    verbs = parser.add_subparsers(required=True, metavar=metavar, help="what to do")

    def verb(name: str, function: Callable[[argparse.Namespace], None], summary: str):
        sub = verbs.add_parser(name, help=summary, description=summary)
        sub.set_defaults(function=function)
        return sub.add_argument

    add = verb("list", list_points, "print the paper's data points as a table")
    add("--task", choices=TASKS, help="points of this task only")
    add("--method", choices=METHODS, help="points of this method only")
    add("--distil", action="store_true", help="points with a teacher only")
    add("--remaining", type=interval, metavar="LOW..HIGH", help="percentages such as 3..10")
    for name, function, number, summary in (
        ("command", print_commands, 1, "print the commands of a point"),
        ("run", run, "+", "run the commands of points, and skip finished runs"),
    ):
        add = verb(name, function, summary)
        add("task", choices=TASKS, help="task of the points")
        add("points", metavar="POINT", nargs=number, help="name from `list`, such as 10D3")
        add("--model", default="bert-base-uncased", help="pre-trained model: hub name or folder")
        add("--data_dir", help="folder of the data; without it, the data comes from the hub")
        add("--runs_dir", "--output_dir", default="runs", help="folder for <task>/<point>")
        add("--teacher", help="fine-tuned teacher, if there is one: hub name or folder")
        add("--seed", type=int, help="seed of the runs, if not the paper's")
        add("--scale", type=float, default=1.0, help="fraction of the paper's updates and warm-up")
        add("--nproc", type=int, default=1, help="GPUs to share each batch (torchrun)")
        add("--task_name", help="another GLUE task, with the settings of a point of mnli or qqp")
    add = verb("report", report, "compare the finished runs below a folder with the paper")
    add("runs_dir", help="folder of the runs")
    add("--csv", help="write a row per run to this file")
    add("--markdown", help="write the tables to this file")
    add = verb("plot", plot, "draw the paper's figures with the runs below a folder")
    add("runs_dir", help="folder of the runs")
    add("--to", help="folder for the PNG files (default: that of the runs)")
    speeds = "draw the metric against the speed-ups in this file of benchmarks/compact.py"
    add("--speed", metavar="FILE", help=speeds)
    add = verb("figure", figure, "draw the figures that CSV files of this repository make")
    add("--to", default=ROOT, help="folder to write them to (default: this repository)")
    # fmt: on
    return parser


def interval(text: str) -> tuple[float, float]:
    """An argparse type: LOW..HIGH, or one number for both."""
    low, _, high = text.partition("..")
    return float(low), float(high or low)


def list_points(args: argparse.Namespace) -> None:
    rows = [["task", "point", "method", "remaining %", "metrics", "updates"]]
    low, high = args.remaining or (0, 100)
    for task in [args.task] if args.task else TASKS:
        for point in load_points(task):
            if args.method not in (None, point.method.removesuffix(GLOBAL)):
                continue
            if point.distil < args.distil or not low - 0.5 <= point.remaining <= high + 0.5:
                continue  # the paper's 10% are 10.1
            method = point.method + ", distilled" * point.distil
            metrics = ", ".join(f"{name} {value:.1f}" for name, value in point.metrics.items())
            remaining = f"{point.remaining:.1f}"
            rows.append([task, point.name, method, remaining, metrics, f"{point.updates:,}"])
    print(to_markdown(rows), end="")


def plan(args: argparse.Namespace) -> dict[Path, list[str]]:
    """The commands of all points, by output folder. A teacher comes once, before its students."""
    planned = {}
    for name in args.points:
        planned |= commands(find_point(args.task, name), args)
    return planned


def print_commands(args: argparse.Namespace) -> None:
    for words in plan(args).values():
        print(shlex.join(["python", *words]))


def run(args: argparse.Namespace) -> None:
    """Raises TrainingError when a run fails, Interrupted when a signal ends it."""
    planned = plan(args)
    for number, (folder, words) in enumerate(planned.items(), 1):
        label = f"[{number}/{len(planned)}] {folder}"
        log = folder.with_name(f"{folder.name}.log")
        words = [*words, "--resume_from_checkpoint", "latest"]
        command = shlex.join(["python", *words])
        if (folder / RESULTS).exists():
            print(f"{label}: finished already", flush=True)
            if log.exists() and command not in read_log(log).splitlines():
                print(f"    with other flags (see {log}); to run it again, give another --runs_dir")
            continue
        if (folder / SUMMARY_FILE).exists():  # trained, but not evaluated
            words = [word for word in words[:-2] if word != "--do_train"]
            words += ["--model_name_or_path", str(folder)]
            command = shlex.join(["python", *words])
        print(f"{label}: {command}", flush=True)
        followed(folder.parent).mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8", errors="backslashreplace") as out:
            print(command, file=out, flush=True)
            status, received = run_process([sys.executable, *words], out)
        if status:
            why = failure(log, command, status)
            message = f"{folder}: {why} (see {log}; run the same paper_tables.py command to go on)"
            raise Interrupted(message, received) if received else TrainingError(message)
        print(f"{label}: done, see {log}", flush=True)


def run_process(command: list[str], out: TextIO) -> tuple[int, int]:
    """Run a command to its end. Returns its exit status and the last signal received, or 0.

    SIGTERM, Ctrl-C and a closed terminal go to the command, which writes a checkpoint and ends.
    """
    process, received = None, 0

    def pass_on(number: int, _) -> None:
        nonlocal received
        received = number
        if process:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    output = {"stdout": out, "stderr": subprocess.STDOUT}
    with handled_signals(pass_on, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = subprocess.Popen(command, start_new_session=True, **output)
        if received:  # while it started
            pass_on(received, None)
        return process.wait(), received


def read_log(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def failure(log: Path, command: str, status: int) -> str:
    """Why a command failed: its error message, or else the last line that it wrote to the log."""
    if status < 0:
        return f"it was killed by {signal.Signals(-status).name}"
    output = read_log(log).rpartition(command)[2]
    lines = [command, *output.rstrip().splitlines()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return (errors or lines)[-1]


def report(args: argparse.Namespace) -> None:
    runs, left_out = find_runs(args.runs_dir)
    rows = run_rows(runs)
    table = to_markdown([list(rows[0]), *(row.values() for row in rows)])
    text = f"{to_markdown(headline(runs))}\n{table}"
    text += "".join(f"\nleft out: {folder}: {reason}\n" for folder, reason in left_out.items())
    if args.markdown:
        write_text(Path(args.markdown), text)
    if args.csv:
        write_text(Path(args.csv), pandas.DataFrame(rows).to_csv(index=False))
    print(text, end="")


def plot(args: argparse.Namespace) -> None:
    from paper.plots import draw, read_speeds  # matplotlib is slow to import

    speeds = read_speeds(Path(args.speed)) if args.speed else None
    runs, left_out = find_runs(args.runs_dir)
    figures = draw(runs, Path(args.to or args.runs_dir), speeds)
    lines = [f"left out: {folder}: {reason}" for folder, reason in left_out.items()]
    print(*lines, *figures, sep="\n")


def figure(args: argparse.Namespace) -> None:
    from paper.front import figures
    from paper.plots import save_figure

    for name, drawn in figures().items():
        save_figure(drawn, Path(args.to) / name)
        print(Path(args.to) / name)


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    extra = argparse.Namespace(extra=words[end + 1 :])
    args = get_parser().parse_args(words[:end], extra)
    set_up_logging()
    with one_line_errors():
        args.function(args)


if __name__ == "__main__":
    main()
