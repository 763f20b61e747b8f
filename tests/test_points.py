"""The paper's points: what they hold, and commands of paper_tables.py that run them."""

import argparse
from pathlib import Path

import pytest

import masked_run_glue
import masked_run_squad
import paper_tables
from emmental.modules.methods import METHODS
from emmental.training.checks import check_common_arguments
from paper import points
from paper.points import find_point, load_points, paper_value

POINTS = [point for task in points.TASKS for point in load_points(task)]
SCRIPTS = {f"{script.__name__}.py": script for script in (masked_run_squad, masked_run_glue)}


def tables(verb, *words):
    paper_tables.main([verb, *map(str, words)])


def test_all_points_are_there_and_corrected():
    assert len(POINTS) == 269
    assert len({(point.task, point.name) for point in POINTS}) == 269
    for point in POINTS:
        if point.name == "teacher":
            assert point.method == "dense" and "pruning_method" not in point.settings
            assert point.remaining == 100
            continue
        method = point.method.removesuffix(", global")
        assert METHODS[point.settings["pruning_method"]].title == method
        if method in ("magnitude", "movement"):  # the threshold says what remains
            percent = 100 * float(point.settings["final_threshold"])
            assert percent == pytest.approx(point.remaining, abs=0.2)
        assert (method != point.method) == (point.name[-2:] in ("B2", "B4", "D2", "D4"))
        assert point.distil == (point.name[-1] in "34") == ("alpha_distil" in point.settings)
    assert find_point("squad", "10D3").metrics == {"exact": 75.572375, "f1": 84.290569}
    assert find_point("mnli", "teacher").metrics["acc_matched"] == pytest.approx(84.4931)


def plan(*words, extra=()):
    """Output folder and parsed arguments of each command that `run` would run."""
    given = argparse.Namespace(extra=list(extra))
    planned = paper_tables.plan(paper_tables.get_parser().parse_args(["run", *words], given))
    for folder, command in planned.items():
        place = next(i for i, word in enumerate(command) if word.endswith(".py"))
        parser, flags = SCRIPTS[Path(command[place]).name].get_parser(), command[place + 1 :]
        yield folder, parser.parse_args(flags)


@pytest.mark.parametrize(
    "words, extra",
    [((), ()), (("--scale", "0.01", "--nproc", "4", "--seed", "7"), ("--bf16", "--no_cuda"))],
    ids=["whole", "scaled"],
)
def test_every_command_parses_and_passes_the_checks(words, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task in points.TASKS:
        by_name = {point.name: point for point in load_points(task)}
        planned = list(plan(task, *by_name, *words, extra=extra))
        assert len(planned) == len(by_name)
        for folder, args in planned:
            assert check_common_arguments(args) == []
            if task != "squad":
                assert masked_run_glue.Glue().check(args) == []
            if not words:
                for name, value in by_name[folder.name].settings.items():
                    assert getattr(args, name) == type(getattr(args, name))(value)


def test_scaled_and_shared_commands():
    options = ["--scale", "0.1", "--nproc", "4", "--seed", "3", "--task_name", "sst-2"]
    (teacher, dense), (folder, args) = plan("mnli", "3D3", *options, extra=["--bf16"])
    assert args.max_steps == round(0.1 * 6 * 392_702 / 32) and args.warmup_steps == 1200
    assert (args.per_gpu_train_batch_size, args.task_name) == (8, "sst-2")
    assert (args.seed, args.bf16) == (3, True)
    assert args.teacher_name_or_path == str(teacher) == "runs/sst-2/teacher"
    assert str(folder) == "runs/sst-2/3D3-seed3"
    assert (dense.seed, dense.model_type) == (42, "bert")
    ((_, args),) = plan("squad", "3D3", "--teacher", "mine", "--data_dir", "data")
    assert (args.teacher_name_or_path, args.data_dir) == ("mine", "data")
    assert (args.num_train_epochs, args.seed) == (10, 92)
    ((_, args),) = plan("squad", "3D1", extra=["--learning_rate=1e-4"])
    assert args.learning_rate == 1e-4  # not the point's


def test_the_paper_between_its_points():
    low, high = find_point("squad", "8E4"), find_point("squad", "13E4")
    middle = (low.remaining + high.remaining) / 2
    mean = (low.metrics["f1"] + high.metrics["f1"]) / 2
    soft = ("squad", "f1", "soft movement", True)
    assert paper_value(*soft, middle) == pytest.approx(mean)
    assert paper_value(*soft, 10) == pytest.approx(84.9, abs=0.05)  # as in the headline table
    assert paper_value(*soft, 1) is None


def test_list(capsys):
    tables(
        "list", "--task", "squad", "--method", "soft movement", "--distil", "--remaining", "3..10"
    )
    lines = capsys.readouterr().out.splitlines()[2:]
    names = [line.split(" | ")[1] for line in lines]
    assert names == ["8E4", "6E4", "5E4", "4E4", "3.1E4", "2.6E4"]
    tables("list")
    assert len(capsys.readouterr().out.splitlines()) == 2 + 269


def test_command(capsys, monkeypatch):
    monkeypatch.chdir(points.ROOT)
    tables("command", "qqp", "14C4", "--model", "my bert", "--output_dir", "o", "--nproc", "2")
    teacher, student = capsys.readouterr().out.splitlines()
    torchrun = "python -m torch.distributed.run --nproc_per_node 2 masked_run_glue.py --do_train"
    assert teacher.startswith(torchrun) and "--model_name_or_path 'my bert'" in teacher
    assert "--output_dir o/qqp/teacher" in teacher
    assert "--teacher_name_or_path o/qqp/teacher" in student


@pytest.mark.parametrize("words, said", [
    (["command", "squad", "10D9"], "squad has no point '10D9': did you mean"),
    (["command", "sst-2", "10D3"], "squad"),
    (["command", "squad", "10D3", "--scale", "0"], "--scale must be positive"),
    (["command", "squad", "10D3", "--scale", "nan"], "--scale must be positive"),
    (["command", "squad", "10D3", "--nproc", "3"], "--nproc 3 does not divide the batch size 16"),
    (["command", "squad", "10D3", "--nproc", "0"], "--nproc 0 does not divide the batch size 16"),
    (["command", "squad", "10D3", "--task_name", "rte"], "--task_name works with"),
    (["list", "--remaining", "x"], "invalid interval value: 'x'"),
    (["report", "nowhere"], "nowhere holds no finished run"),
    (["plot", "nowhere"], "nowhere holds no finished run"),
])  # fmt: skip
def test_refusals(refused, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(tables, *words)
