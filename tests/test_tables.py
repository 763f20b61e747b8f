"""paper_tables.py: the paper's points as commands that run, and a report that believes nothing it can measure."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_masked_run_squad import SHORT

import masked_run_glue
import masked_run_squad
import paper_tables
from emmental.modules.methods import METHODS
from emmental.tables.points import Options, find_point, load_points, paper_value, steps
from emmental.tables.report import headline
from emmental.tables.runs import read_run
from emmental.training.args import check_common_arguments

POINTS = [point for task in ("squad", "mnli", "qqp") for point in load_points(task)]
PARSERS = {
    "masked_run_squad.py": masked_run_squad.get_parser,
    "masked_run_glue.py": masked_run_glue.get_parser,
}


def refused(capsys, *words, status=2):
    with pytest.raises(SystemExit) as stop:
        paper_tables.main([str(word) for word in words])
    assert stop.value.code == status
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    return error


# ---------------------------------------------------------------------------------------- the points


def test_all_points_are_there_with_their_slips_corrected():
    assert len(POINTS) == 269
    assert len({(point.task, point.name) for point in POINTS}) == 269
    for point in POINTS:
        if point.name == "teacher":
            assert point.method == "dense" and "pruning_method" not in point.settings
            continue
        method = point.settings["pruning_method"]
        assert METHODS[method].title == point.method
        if point.method in (
            "magnitude",
            "movement",
        ):  # what they leave is what their threshold says
            assert 100 * float(point.settings["final_threshold"]) == pytest.approx(
                point.remaining, abs=0.2
            )
        assert point.global_topk == (point.name[-2:] in ("B2", "B4", "D2", "D4"))
        assert point.distil == (point.name[-1] in "34") == ("alpha_distil" in point.settings)
    assert find_point("squad", "10D3").metrics == {"exact": 75.572375, "f1": 84.290569}
    assert find_point("mnli", "teacher").metrics["acc_matched"] == pytest.approx(84.4931)


def commands(options):
    for point in POINTS:
        for step in steps(point, options):
            yield point, step


@pytest.mark.parametrize(
    "options",
    [Options(), Options(scale=0.01, processes=4, seed=7, extra=("--bf16", "--no_cuda"))],
    ids=["whole", "scaled"],
)
def test_every_command_parses_and_passes_the_checks(options, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    number = 0
    for point, step in commands(options):
        parser = PARSERS[step.script]()
        args, given = parser.parse_args(step.flags), parser.given(step.flags)
        assert check_common_arguments(args, given) == []
        if step.script == "masked_run_glue.py":
            assert masked_run_glue.Glue().check(args, given) == []
        for name, value in point.settings.items() if step.output_dir.name != "teacher" else ():
            if options == Options():
                assert getattr(args, name) == type(getattr(args, name))(value), (point, name)
        number += 1
    assert number == 269 + sum(point.distil for point in POINTS)


def test_scaled_and_shared_commands():
    (teacher, step) = steps(
        find_point("mnli", "3D3"),
        Options(scale=0.1, processes=4, seed=3, task_name="sst-2", extra=("--bf16",)),
    )
    args = masked_run_glue.get_parser().parse_args(step.flags)
    assert args.max_steps == round(0.1 * 6 * 392_702 / 32) and args.warmup_steps == 1200
    assert (args.per_gpu_train_batch_size, args.task_name, args.seed, args.bf16) == (
        8,
        "sst-2",
        3,
        True,
    )
    assert args.teacher_name_or_path == str(teacher.output_dir) == "runs/sst-2/teacher"
    assert str(step.output_dir) == "runs/sst-2/3D3-seed3" and step.words[:3] == [
        "torchrun",
        "--nproc_per_node",
        "4",
    ]
    args = masked_run_glue.get_parser().parse_args(teacher.flags)
    assert (args.seed, args.model_type) == (42, "bert")
    (step,) = steps(find_point("squad", "3D3"), Options(teacher="mine", data_dir="data"))
    args = masked_run_squad.get_parser().parse_args(step.flags)
    assert (args.teacher_name_or_path, args.data_dir, args.num_train_epochs, args.seed) == (
        "mine",
        "data",
        10,
        92,
    )
    assert step.words[0] == "python"


def test_settings_of_a_step_are_those_that_the_script_takes():
    (step,) = steps(
        find_point("squad", "3D1"),
        Options(
            extra=("--learning_rate=1e-4", "--no_cuda", "--save_steps", "5", "--save_steps", "6")
        ),
    )
    args = vars(masked_run_squad.get_parser().parse_args(step.flags))
    assert step.flags.count("--learning_rate") == 0  # ours takes the place of the point's
    for name, text in step.settings.items():
        assert args[name] == (True if text == "True" else type(args[name])(text)), name
    assert (args["save_steps"], args["learning_rate"], args["no_cuda"]) == (6, 1e-4, True)


def test_the_paper_between_its_points():
    low, high = find_point("squad", "8E4"), find_point("squad", "13E4")
    middle = (low.remaining + high.remaining) / 2
    assert paper_value("squad", "f1", "soft movement", True, middle) == pytest.approx(
        (low.metrics["f1"] + high.metrics["f1"]) / 2
    )
    assert paper_value("squad", "f1", "soft movement", True, 10) == pytest.approx(
        84.9, abs=0.05
    )  # the headline table's
    assert paper_value("squad", "f1", "soft movement", True, 1) is None


def test_list(capsys):
    paper_tables.main(
        ["list", "--task", "squad", "--method", "soft movement", "--distil", "--remaining", "3..10"]
    )
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == [
        "8E4",
        "6E4",
        "5E4",
        "4E4",
        "3.1E4",
        "2.6E4",
    ]
    paper_tables.main(["list"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 269


def test_command(capsys):
    paper_tables.main(
        ["command", "qqp", "14C4", "--model", "my bert", "--data_dir", "d", "--output_dir", "o"]
    )
    teacher, student = capsys.readouterr().out.splitlines()
    assert teacher.startswith(
        "python masked_run_glue.py --model_type bert --model_name_or_path 'my bert' --task_name qqp"
    )
    assert (
        "--output_dir o/qqp/teacher" in teacher
        and "--teacher_name_or_path o/qqp/teacher" in student
    )


@pytest.mark.parametrize("words, said", [
    (["command", "squad", "10D9"], "squad has no point '10D9': did you mean"),
    (["command", "sst-2", "10D3"], "squad"),
    (["command", "squad", "10D3", "--scale", "0"], "--scale must be positive"),
    (["command", "squad", "10D3", "--nproc", "3"], "choose a divisor"),
    (["command", "squad", "10D3", "--task_name", "rte"], "--task_name is for"),
    (["list", "--remaining", "x"], "no interval"),
    (["list", "--remaining", "10..3"], "no interval"),
    (["command", "squad", "10D3", "--scale", "nan"], "--scale must be positive"),
    (["command", "squad", "10D3", "--seed", "-1"], "--seed must lie in"),
    (["command", "squad", "10D3", "--", "--output_dir", "x"], "--output_dir is not for the scripts alone"),
    (["report", "nowhere"], "there is no folder nowhere"),
    (["report", ".", "--", "--bf16"], "takes nothing after --"),
    (["plot", "nowhere"], "there is no folder nowhere"),
])  # fmt: skip
def test_refusals(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *words)


# ------------------------------------------------------------------------------------- runs and report


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_bert, squad_dir):
    """Arguments of `run` that make tiny runs of the points of SQuAD: 11 updates."""
    cache = tmp_path_factory.mktemp("cache")
    own = ["--model", tiny_bert, "--data_dir", squad_dir, "--scale", "0.0002"]
    return [*own, "--", *SHORT, "--no_cuda", "--cache_dir", cache, "--save_steps", "5"]


def tables(verb, *words):
    paper_tables.main([verb, *map(str, words)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings):
    """A folder with the runs of a point with its teacher, made by `run`."""
    folder = tmp_path_factory.mktemp("runs")
    tables("run", "squad", "10D3", "--runs_dir", folder, *settings)
    return folder


@pytest.fixture
def runs(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_run_is_made_once(runs, settings, capsys, monkeypatch):
    assert {path.name for path in (runs / "squad").iterdir()} == {
        "teacher",
        "10D3",
        "teacher.log",
        "10D3.log",
    }
    monkeypatch.setattr(paper_tables, "run_process", lambda *_: pytest.fail("run again"))
    for name in ("teacher", "10D3"):  # a copy knows its old place: output_dir may differ
        assert json.loads((runs / "squad" / name / "training_summary.json").read_text())[
            "updates"
        ] in (11, 3)
    tables("run", "squad", "10D3", "--runs_dir", runs, "--teacher", teacher_of(runs), *settings)
    assert "finished already" in capsys.readouterr().out
    error = refused(
        capsys,
        "run",
        "squad",
        "10D3",
        "--runs_dir",
        runs,
        "--teacher",
        teacher_of(runs),
        *settings,
        "--learning_rate",
        "1",
    )
    assert "holds a run with other settings (--learning_rate 3e-05 there, 1 now)" in error


def test_a_teacher_serves_as_it_is_unless_asked_for(runs, settings, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(
        paper_tables, "run_process", lambda command, _: started.append(command) or (0, 0)
    )
    tables("run", "squad", "3D3", "--runs_dir", runs, *settings, "--learning_rate", "1")
    said = capsys.readouterr().out
    assert (
        f"{runs}/squad/teacher: finished already, with other settings: --learning_rate 3e-05 there, 1 now"
        in said
    )
    error = refused(
        capsys, "run", "squad", "3D3", "--runs_dir", runs, *settings[:1], runs, *settings[2:]
    )
    assert "teacher holds a run with other settings (--model_name_or_path" in error
    assert [command[-1] for command in started] == ["latest"] and f"{runs}/squad/3D3" in started[0]
    error = refused(
        capsys, "run", "squad", "teacher", "--runs_dir", runs, *settings, "--learning_rate", "1"
    )
    assert "teacher holds a run with other settings" in error


def teacher_of(runs):
    return json.loads((runs / "squad" / "10D3" / "training_args.json").read_text())[
        "teacher_name_or_path"
    ]


def test_an_interrupted_run_goes_on(runs, settings, capsys):
    own, teacher = runs / "squad" / "10D3", teacher_of(runs)
    whole = load_file(own / "model.safetensors")
    for file in own.iterdir():  # as if killed after the checkpoint of update 5
        if file.is_file():
            file.unlink()
    shutil.rmtree(own / "checkpoint-10")
    tables("run", "squad", "10D3", "--runs_dir", runs, "--teacher", teacher, *settings)
    again = load_file(own / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    (own / "eval_results.json").unlink()  # as if killed before the evaluation
    for folder in own.glob("checkpoint-*"):
        shutil.rmtree(folder)
    capsys.readouterr()
    tables("run", "squad", "10D3", "--runs_dir", runs, "--teacher", teacher, *settings)
    assert "--do_train" not in capsys.readouterr().out
    assert (own / "eval_results.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_for_the_run(runs, settings, number):
    """It writes a checkpoint and ends; the command ends after it, and goes on from there."""
    place = settings.index("--scale") + 1
    words = [
        "run",
        "squad",
        "3D3",
        "--runs_dir",
        runs,
        "--teacher",
        teacher_of(runs),
        *settings[:place],
        "0.001",
        *settings[place + 1 :],
    ]
    command = [sys.executable, paper_tables.__file__, *map(str, words)]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    own, end = runs / "squad" / "3D3", time.monotonic() + 60
    while not (own / "checkpoint-5").exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "stopped by SIGTERM after update" in error and "Traceback" not in error
    last = max(int(path.name.partition("-")[2]) for path in own.glob("checkpoint-*"))
    assert last > 5 and not (own / "model.safetensors").exists()
    tables(*words)
    assert (own / "eval_results.json").exists()


def test_a_failing_run_says_why(runs, settings, capsys, tmp_path):
    error = refused(
        capsys,
        "run",
        "squad",
        "3D1",
        "--runs_dir",
        runs,
        *settings,
        "--learning_rat",
        "1",
        status=1,
    )
    assert (
        "3D1 failed: unknown argument --learning_rat; did you mean --learning_rate?" in error
        and "3D1.log" in error
    )


def test_report(runs, capsys, tmp_path):
    tables("report", runs, "--csv", tmp_path / "runs.csv", "--markdown", tmp_path / "report.md")
    said = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text() == said.rstrip("\n") + "\n"
    dense, movement = csv.DictReader((tmp_path / "runs.csv").open())
    results = json.loads((runs / "squad" / "10D3" / "eval_results.json").read_text())
    assert movement["metrics"] == f"exact {results['exact']:.2f}, f1 {results['f1']:.2f}"
    state = load_file(runs / "squad" / "10D3" / "model.safetensors")
    sizes = [t.numel() for name, t in state.items() if name.endswith("mask_scores")]
    assert float(movement["of the Linears %"]) == pytest.approx(
        100 * sum(int(0.1 * n) for n in sizes) / sum(sizes), abs=0.01
    )
    assert float(movement["remaining %"]) == pytest.approx(results["remaining_percent"], abs=0.01)
    assert (movement["seed"], movement["updates"], movement["batch"]) == ("92", "11", "4")
    assert dense["method"] == "dense" and dense["remaining %"] == "100.0"
    assert "threads of" in movement["hardware"]
    assert (
        "| squad (exact/f1), distilled | paper | 80.4/88.1 | 10% | 70.2/80.1 |" in said
        or float(movement["remaining %"]) > 12.5
    )


def spoil_results(folder):
    results = json.loads((folder / "eval_results.json").read_text())
    results["remaining_percent_linear"] = 5.0
    (folder / "eval_results.json").write_text(json.dumps(results))
    (folder / "eval_results.txt").write_text(
        "".join(f"{name} = {value}\n" for name, value in results.items())
    )


def spoil_metric(folder):
    results = json.loads((folder / "eval_results.json").read_text()) | {"f1": 99.0}
    (folder / "eval_results.json").write_text(json.dumps(results))


def spoil_weights(folder):
    state = load_file(folder / "model.safetensors")
    state["qa_outputs.bias"] += 1
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def drop(folder, name):
    args = json.loads((folder / "training_args.json").read_text())
    del args[name]
    (folder / "training_args.json").write_text(json.dumps(args))


def spoil_arguments(folder):
    args = json.loads((folder / "training_args.json").read_text()) | {"pruning_method": "magnitude"}
    (folder / "training_args.json").write_text(json.dumps(args))


@pytest.mark.parametrize("spoil, said", [
    (spoil_results, "eval_results.json says that 5.0% remain, and its checkpoint holds"),
    (spoil_metric, "eval_results.txt and eval_results.json differ"),
    (spoil_weights, "is not the one that the run ended with"),
    (lambda folder: drop(folder, "gradient_accumulation_steps"), "its files lack 'gradient_accumulation_steps'"),
    (lambda folder: drop(folder, "model_name_or_path"), "its files lack 'model_name_or_path'"),
    (spoil_arguments, "training_args.json says magnitude, and config.json topK"),
    (lambda folder: (folder / "eval_results.json").unlink(), "it has no eval_results.json: it is not finished"),
    (lambda folder: (folder / "training_summary.json").write_text("{"), "training_summary.json cannot be read"),
    (lambda folder: (folder / "training_summary.json").write_text("[]"), "does not hold what these scripts write"),
    (lambda folder: (folder / "config.json").unlink(), "it is incomplete"),
])  # fmt: skip
def test_runs_that_do_not_match_their_files_are_left_out(runs, capsys, spoil, said):
    spoil(runs / "squad" / "10D3")
    tables("report", runs)
    text = capsys.readouterr().out
    assert f"left out: {runs / 'squad' / '10D3'}: " in text and said in text
    assert "dense" in text and "movement |" not in text.split("left out")[0].split("\n\n")[1]


def test_seeds_are_averaged_and_other_settings_stand_apart(runs, capsys):
    own = runs / "squad" / "10D3"
    for name, changes in (("seed", {"seed": 1}), ("longer", {"max_steps": 99})):
        shutil.copytree(own, own.with_name(name))
        args = json.loads((own / "training_args.json").read_text()) | changes
        (own.with_name(name) / "training_args.json").write_text(json.dumps(args))
    found = [read_run(own.with_name(name)) for name in ("10D3", "seed", "longer")]
    for run, score in zip(found, (10.0, 20.0, 50.0), strict=True):
        run.metrics, run.remaining = {"exact": score, "f1": score}, 10.0
    (row,) = [row for row in headline(found) if row[1] == "ours"]
    assert sorted(row[6].split("; ")) == [
        "15.0/15.0 (10.0 to 20.0, 2 seeds) at 10.0%",
        "50.0/50.0 at 10.0%",
    ]


def test_a_folder_without_runs(capsys, tmp_path):
    assert "holds no run" in refused(capsys, "report", tmp_path)


def test_plot(runs, capsys, tmp_path):
    tables("plot", runs, "--to", tmp_path / "figures")
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(drawn) == {"squad-metric.png", "squad-10D3-layers.png", "squad-10D3-weights.png"}
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in drawn.values())
    args = json.loads((runs / "squad" / "10D3" / "training_args.json").read_text()) | {
        "model_name_or_path": "gone"
    }
    (runs / "squad" / "10D3" / "training_args.json").write_text(json.dumps(args))
    capsys.readouterr()
    tables("plot", runs, "--to", tmp_path / "again")
    assert (
        "not drawn: " in capsys.readouterr().out
        and not (tmp_path / "again" / "squad-10D3-weights.png").exists()
    )
