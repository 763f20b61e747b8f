"""paper_tables.py: runs of the paper's points, their report, which checks them, and plots."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from test_points import SCRIPTS, tables
from tiny import SHORT, edit, read, rewrite, write_split

import paper_tables
from emmental.modules.methods import METHODS
from paper import plots, points
from paper.points import paper_value
from paper.report import headline, run_rows
from paper.runs import find_runs, read_run


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_bert, squad_dir):
    """Options of `run` for tiny runs of the points of SQuAD: 11 updates, 3 of the teacher."""
    cache = tmp_path_factory.mktemp("cache")
    own = ["--model", tiny_bert, "--data_dir", squad_dir, "--scale", "0.0002"]
    return [*own, "--", *SHORT, "--no_cuda", "--cache_dir", cache, "--save_steps", "5"]


def run_here(command, out):
    """`run_process` in this process, which saves 5 seconds."""
    SCRIPTS[Path(command[1]).name].main(command[2:])
    return 0, 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings):
    """A folder with the runs of a point and of its teacher, made by `run`."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_tables, "run_process", run_here)
        tables("run", "squad", "teacher", "--runs_dir", folder, *settings)
    tables("run", "squad", "10D3", "--runs_dir", folder, *settings)
    return folder


@pytest.fixture
def runs(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_run_is_made_once(finished, settings, capsys, monkeypatch):
    monkeypatch.setattr(paper_tables, "run_process", lambda *_: pytest.fail("run again"))
    names = {path.name for path in (finished / "squad").iterdir()}
    assert names == {"teacher", "10D3", "teacher.log", "10D3.log"}
    again = ["run", "squad", "10D3", "--runs_dir", finished, *settings]
    tables(*again)
    said = capsys.readouterr().out
    assert said.count("finished already") == 2 and "other flags" not in said
    tables(*again, "--learning_rate", "1")
    assert capsys.readouterr().out.count("with other flags (see") == 2


def test_an_interrupted_run_goes_on(runs, settings, monkeypatch):
    monkeypatch.setattr(paper_tables, "run_process", run_here)
    own = runs / "squad" / "10D3"
    teacher = read(own / "training_args.json")["teacher_name_or_path"]
    again = ["run", "squad", "10D3", "--runs_dir", runs, "--teacher", teacher, *settings]
    whole = load_file(own / "model.safetensors")
    for killed in ("in training", "in evaluation"):
        (own / "eval_results.json").unlink()
        if killed == "in training":  # after the checkpoint of update 5
            shutil.rmtree(own / "checkpoint-10")
            for file in own.iterdir():
                file.is_file() and file.unlink()
        trained = own / "training_summary.json"
        before = trained.stat().st_mtime_ns if trained.exists() else None
        tables(*again)
        assert before in (None, trained.stat().st_mtime_ns)  # only evaluated
        resumed = load_file(own / "model.safetensors")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert (own / "eval_results.json").exists()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Replaces masked_run_squad.py by the given lines. Returns the arguments of `run` for it."""

    def write(text):
        (tmp_path / "masked_run_squad.py").write_text(text)
        monkeypatch.setattr(points, "ROOT", tmp_path)
        return ["run", "squad", "3D1", "--runs_dir", tmp_path]

    return write


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_for_the_run(stand_in, tmp_path, refused, number):
    """It can write a checkpoint and end; `run` ends after it."""
    words = stand_in("""if True:
        import signal, sys, time
        def stop(number, frame):
            time.sleep(0.2)
            print("x.py: error: stopped by", signal.Signals(number).name)
            sys.exit(128 + number)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        print("ready", flush=True)
        time.sleep(60)
    """)
    log = tmp_path / "squad" / "3D1.log"

    def send():
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if log.exists() and "ready" in log.read_text():
                os.kill(os.getpid(), number)
                break
            time.sleep(0.01)

    before = signal.getsignal(number)
    sender = threading.Thread(target=send)
    sender.start()
    error = refused(tables, *words, status=128 + number)
    sender.join()
    got = "SIGINT" if number == signal.SIGINT else "SIGTERM"
    assert (
        f"3D1: stopped by {got} (see {log}; run the same paper_tables.py command to go on)" in error
    )
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("text, said", [
    ("print('a.py: error: no data'); exit(2)", "3D1: no data (see "),
    ("print('first'); raise KeyError('what')", "KeyError: 'what' (see "),
    ("import os; os.kill(os.getpid(), 9)", "3D1: it was killed by SIGKILL (see "),
])  # fmt: skip
def test_a_failing_run_says_why(stand_in, refused, text, said):
    words = stand_in(text)
    assert said in refused(tables, *words, status=1)


def test_report(runs, capsys, tmp_path):
    tables("report", runs, "--csv", tmp_path / "runs.csv", "--markdown", tmp_path / "report.md")
    said = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text() == said
    dense, movement = csv.DictReader((tmp_path / "runs.csv").open())
    results = read(runs / "squad" / "10D3" / "eval_results.json")
    assert movement["metrics"] == f"exact {results['exact']:.2f}, f1 {results['f1']:.2f}"
    state = load_file(runs / "squad" / "10D3" / "model.safetensors")
    sizes = [t.numel() for name, t in state.items() if name.endswith("mask_scores")]
    percent = 100 * sum(int(0.1 * n) for n in sizes) / sum(sizes)
    assert float(movement["of the Linears %"]) == pytest.approx(percent, abs=0.01)
    assert float(movement["remaining %"]) == pytest.approx(results["remaining_percent"], abs=0.01)
    assert (movement["seed"], movement["updates"], movement["batch"]) == ("92", "11", "4")
    assert dense["method"] == "dense" and dense["remaining %"] == "100.0"
    assert "threads of" in movement["hardware"]


def test_the_batch_is_that_of_all_processes(runs):
    own = runs / "squad" / "10D3"
    summary = read(own / "training_summary.json")
    assert summary.pop("processes") == 1

    def run(**processes):
        (own / "training_summary.json").write_text(json.dumps(summary | processes))
        return read_run(own)

    older, two = run(), run(processes=2)  # older runs do not record them
    assert [row["batch"] for row in run_rows([older, two])] == [4, 8]
    edit(own / "training_args.json", per_gpu_train_batch_size=2)
    assert run(processes=2).settings == older.settings != two.settings


def test_a_reader_that_leaves_loses_no_table(runs, unread, tmp_path):
    files = [tmp_path / "runs.csv", tmp_path / "report.md"]
    unread(paper_tables.main, "report", runs, "--csv", files[0], "--markdown", files[1])
    unread(paper_tables.main, "plot", runs, "--to", tmp_path / "plots")
    unread(paper_tables.main, "list")
    assert all(file.exists() for file in files)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4


def spoil_weights(folder):
    rewrite(folder, lambda state: state | {"qa_outputs.bias": state["qa_outputs.bias"] + 1})


def spoil_results(folder):
    edit(folder / "eval_results.json", remaining_percent_linear=5.0)


def interrupt(folder):
    for file in folder.iterdir():
        file.is_file() and file.unlink()


@pytest.mark.parametrize("spoil, said", [
    (spoil_results, "eval_results.json records 5.00% remaining weights, but its checkpoint has"),
    (spoil_weights, "its model.safetensors has changed since the end of the training"),
    (interrupt, "it is not finished: it has no eval_results.json"),
    (lambda folder: (folder / "training_summary.json").write_text("{"), "its files are damaged"),
    (lambda folder: (folder / "training_args.json").write_text("{}"), "its files are damaged"),
    (lambda folder: edit(folder / "training_args.json", "doc_stride"), "it is of a script of your"),
])  # fmt: skip
def test_runs_that_do_not_fit_their_files_are_left_out(runs, refused, capsys, spoil, said):
    spoil(runs / "squad" / "10D3")
    tables("report", runs)
    text = capsys.readouterr().out
    assert f"left out: {runs / 'squad' / '10D3'}: {said}" in text
    assert "| dense |" in text and "| movement | yes |" not in text
    shutil.rmtree(runs / "squad" / "teacher")
    assert f"holds no finished run; {runs / 'squad' / '10D3'}: {said}" in refused(
        tables, "report", runs
    )


def test_headline(runs):
    """It averages seeds and keeps other settings apart, below the paper's row."""
    own = runs / "squad" / "10D3"
    found = []
    for name, changes, score in (
        ("first", {}, 10.0),
        ("second", {"seed": 1, "max_steps": 11.0}, 20.0),
        ("longer", {"max_steps": 99}, 50.0),
    ):
        shutil.copytree(own, own.with_name(name))
        edit(own.with_name(name) / "training_args.json", **changes)
        found.append(read_run(own.with_name(name)))
        found[-1].metrics, found[-1].remaining = {"exact": score, "f1": score}, 10.0
    _, paper, ours = headline([*found, read_run(own.with_name("teacher"))])
    assert paper[:5] == ["squad (exact/f1), distilled", "paper", "80.4/88.1", "10%", "70.2/80.1"]
    seeds = "15.0/15.0 (10.0 to 20.0, 2 seeds) at 10.0%"
    assert sorted(ours[6].split("; ")) == [
        f"{seeds}, max_steps 11",
        "50.0/50.0 at 10.0%, max_steps 99",
    ]


def test_runs_without_a_metric_are_failures_of_their_cell(runs, capsys, tmp_path):
    """A mean over the seeds that did not collapse alone would flatter the method."""
    own = runs / "squad" / "10D3"
    good = read_run(own)
    good.remaining = 10.0
    edit(own / "eval_results.json", "exact", "f1")
    first, bad = {"seed": 1}, dataclasses.replace(read_run(own), remaining=10.0)
    seeds = [dataclasses.replace(good, args=good.args | first), bad]
    seeds[0].metrics = {"exact": 20.0, "f1": 30.0}
    for found, cell in (
        (seeds, "20.0/30.0 (2 seeds, 1 failed) at 10.0%"),
        (seeds[1:], "failed at 10.0%"),
        ([bad, bad], "failed (2 seeds) at 10.0%"),
    ):
        assert headline(found)[-1][6] == cell
    assert run_rows([bad])[0]["metrics"] == "failed"
    shutil.rmtree(runs / "squad" / "teacher")
    tables("plot", runs, "--to", tmp_path / "figures")
    assert "not drawn: squad-metric.png: its runs have no metric" in capsys.readouterr().out


def test_no_run_is_left_out_of_the_first_table(runs):
    """Whatever remains of it, and whatever its task."""
    movement, teacher = (read_run(runs / "squad" / name) for name in ("10D3", "teacher"))
    folder, reviews = runs / "squad" / "10D3", {"task_name": "custom", "data_dir": "data/reviews"}
    edit(folder / "training_args.json", "doc_stride", regression=True, **reviews)
    edit(folder / "eval_results.json", acc=0.5)
    own = read_run(folder)
    assert own.task == "custom-reviews" and own.metrics["acc"] == 50
    own.metrics, teacher.metrics = {"acc": 50.0}, {"exact": 60.0, "f1": 70.0}
    movement.metrics = {"exact": 20.0, "f1": 30.0}
    movement.remaining, own.remaining = 40.0, 20.0
    smaller = dataclasses.replace(teacher, distil=True, metrics={"exact": 40.0, "f1": 50.0})
    rows = [row[:7] for row in headline([movement, smaller, own])[1:]]
    assert len(rows) == 2
    assert rows[0][:4] == ["custom-reviews (acc), distilled", "ours", "", "other"]
    assert rows[0][6] == "50.0 at 20.0%"
    assert rows[1][:4] == ["squad (exact/f1), distilled", "ours", "40.0/50.0", "other"]
    assert rows[1][6] == "20.0/30.0 at 40.0%"
    assert [row[:4] for row in headline([teacher])[1:]] == [
        ["squad (exact/f1)", "ours", "60.0/70.0", ""]
    ]


def test_a_flag_that_an_older_run_lacks_is_unset(runs):
    run = read_run(runs / "squad" / "10D3")
    before = run.settings
    run.args |= {"alpha_hidden": 0.0, "new_switch": False, "new_option": None}
    assert run.settings == before
    run.args["alpha_hidden"] = 0.5
    assert run.settings == before | {"alpha_hidden": "0.5"}


def test_headline_of_seeds_with_an_undefined_metric(runs):
    own = runs / "squad" / "10D3"
    shutil.copytree(own, own.with_name("second"))
    edit(own.with_name("second") / "training_args.json", seed=1)
    found = [read_run(own), read_run(own.with_name("second"))]
    for run, metrics in zip(found, ({"acc": 10.0}, {"acc": 20.0, "f1": 30.0}), strict=True):
        run.task, run.metrics, run.remaining = "mrpc", metrics, 10.0
    for order in (found, found[::-1]):
        _, ours = headline(order)
        assert ours[0] == "mrpc (acc/f1), distilled"
        assert ours[6] == "15.0 (10.0 to 20.0, 2 seeds) at 10.0%"


def test_plot(runs, capsys, tmp_path):
    tables("plot", runs, "--to", tmp_path / "figures")
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    of_run = {f"squad-10D3-{kind}.png" for kind in ("layers", "weights", "curves")}
    assert set(drawn) == {"squad-metric.png"} | of_run
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in drawn.values())
    edit(runs / "squad" / "10D3" / "training_args.json", model_name_or_path="gone")
    next((runs / "squad" / "10D3").glob("events.out.tfevents.*")).unlink()
    capsys.readouterr()
    tables("plot", runs, "--to", tmp_path / "again")
    said = capsys.readouterr().out
    assert "not drawn: squad-10D3-weights.png: no usable checkpoint at 'gone'" in said
    assert f"not drawn: squad-10D3-curves.png: {runs / 'squad' / '10D3'} has no Tensor" in said
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        "squad-metric.png",
        "squad-10D3-layers.png",
    }


@pytest.fixture
def measured(runs, monkeypatch):
    """Runs with another granularity and of a dense model with fewer layers, and their speeds."""
    monkeypatch.chdir(runs)
    for name, source in ("heads", "10D3"), ("fewer", "teacher"):
        shutil.copytree(f"squad/{source}", f"squad/{name}")
    edit(runs / "squad" / "heads" / "training_args.json", granularity="structure")
    edit(runs / "squad" / "fewer" / "training_args.json", teacher_name_or_path="squad/teacher")
    gains = {"teacher": 1.0, "10D3": 1.5, "heads": 2.0, "fewer": 3.0}
    where = {"runtime": "eager", "batch": 32, "length": 128}
    rows = [{"model": f"squad/{name}", **where, "gain": gain} for name, gain in gains.items()]
    file = runs / "speed.json"
    file.write_text(json.dumps({"dense": "squad/teacher", "rows": rows}))
    return file


def test_the_metric_against_measured_speed(measured, tmp_path, monkeypatch):
    for other in ("layer_figure", "scatter_figure", "curves_figure"):
        monkeypatch.setattr(plots, other, lambda *_: Figure(figsize=(1, 1)))
    tables("plot", ".", "--speed", measured, "--to", tmp_path / "figures")
    assert (tmp_path / "figures" / "squad-speed.png").read_bytes().startswith(b"\x89PNG")
    found = find_runs(str(measured.parent))[0]  # another spelling of the folders
    for run, score in zip(sorted(found, key=lambda run: run.folder.name), (10, 20, 30, 40)):
        run.metrics = {"exact": 0, "f1": score}  # 10D3, fewer, heads, teacher

    def lines(figure):
        return {x.get_label(): (*x.get_xdata(), *x.get_ydata()) for x in figure.axes[0].lines}

    speeds = plots.read_speeds(measured)
    assert lines(plots.speed_figure("squad", found, speeds)) == {
        "movement, weight": (1.5, 10),
        "movement, structure": (2.0, 30),
        "fewer layers": (3.0, 20),
        "dense": (0, 1, 40, 40),  # the whole width
    }
    speeds.gains["sparse"] = {found[0].folder.resolve(): 9.0}
    labels = set(lines(plots.speed_figure("squad", found, speeds)))
    assert labels >= {"movement, weight, eager", "movement, weight, sparse"}

    where = {"runtime": "onnx-int8", "batch": 32, "length": 128}
    int8 = [{"model": model, **where, "gain": 4} for model in ("dense", "squad/heads")]
    edit(measured, rows=read(measured)["rows"] + int8)
    figure = plots.speed_figure("squad", found, plots.read_speeds(measured))
    assert lines(figure)["movement, structure, onnx-int8"] == (4, 30)
    assert lines(figure)["dense, onnx-int8"] == (4, 40)
    open_markers = {x.get_label() for x in figure.axes[0].lines if x.get_fillstyle() == "none"}
    assert open_markers == {"movement, structure, onnx-int8", "dense, onnx-int8"}
    figure = plots.metric_figure("squad", found)
    metrics = lines(figure)
    assert {"movement (ours)", "movement, structure (ours)"} < set(metrics)
    assert figure.axes[0].get_title() == "squad (ours: distilled)"
    assert [row["granularity"] for row in run_rows(found)] == ["", "", "weight", "structure"]
    assert metrics["dense (ours)"] == (0, 1, 40, 40)  # not the one with fewer layers


def test_speeds_that_cannot_be_drawn(measured, refused, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save_figure", lambda *_: None)
    whole = json.loads(measured.read_text())
    flags = ["plot", ".", "--to", tmp_path / "figures", "--speed", measured]
    edit(measured, rows=[row | {"model": "gone"} for row in whole["rows"]])
    tables(*flags)
    assert "not drawn: squad-speed.png: no speed of its runs" in capsys.readouterr().out
    for change, said in (
        ({"rows": [*whole["rows"], whole["rows"][0] | {"batch": 1}]}, "holds several batches"),
        ({"dense": None}, "does not hold speeds of models in folders"),
        ({"rows": []}, "does not hold speeds of models in folders"),
    ):
        measured.write_text(json.dumps(whole | change))
        assert said in refused(tables, *flags)
    assert "gone.json" in refused(tables, *flags[:-1], "gone.json", status=1)


# ------------------------------------------------------------------- what the paper does not have


@pytest.fixture(scope="module")
def beyond(tmp_path_factory, tiny_bert):
    """Runs on SST-2 of methods and starts that the paper does not have, and their teacher."""
    folder, data = tmp_path_factory.mktemp("beyond"), tmp_path_factory.mktemp("sst-2")
    for split, rows in ("train", 16), ("dev", 8):
        write_split(data / f"{split}.tsv", "sst-2", rows, 0)
    short = ["--scale", "0.00003", "--task_name", "sst-2", "--data_dir", data]
    own = ["--no_cuda", "--cache_dir", folder / "cache", "--max_seq_length", "32"]

    def run(name, point, model, *flags):
        words = ["run", "mnli", point, "--runs_dir", folder / name, "--model", model, *short]
        words += ["--teacher", teacher] if teacher else []
        tables(*words, "--", *own, *flags)
        return folder / name / "sst-2" / point

    teacher = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_tables, "run_process", run_here)
        teacher = run("dense", "teacher", tiny_bert)
        for method in ("platon", "sensitivity"):
            run(method, "10D3", tiny_bert, "--pruning_method", method)
        run("global", "10D3", tiny_bert, "--pruning_method=platon", "--global_topk")
        run("start", "10D3", teacher, "--pruning_method=platon")
        run("alone", "10D1", teacher, "--pruning_method=platon")
    return folder


def test_methods_and_starts_that_the_paper_does_not_have(beyond):
    found = find_runs(beyond)[0]
    for run in found:
        run.metrics = {"acc": 80.0}
        run.remaining = 10.0 if run.method != "dense" else run.remaining
    header, distilled, alone, floor = headline(found)
    ours = ["sensitivity", "PLATON", "PLATON, global"]
    assert header[4:] == ["magnitude", "L0", "movement", "soft movement", *ours]
    platon = "80.0 at 10.0%, pre-trained {}; 80.0 at 10.0%, fine-tuned teacher"
    model = next(Path(r.args["model_name_or_path"]).name for r in found if r.method == "dense")
    assert distilled[4:] == [*[""] * 4, "80.0 at 10.0%", platon.format(model), "80.0 at 10.0%"]
    assert alone[4:] == [*[""] * 5, "80.0 at 10.0%, fine-tuned teacher", ""]
    assert floor == ["sst-2 (acc)", "bag of words", "100.0", "", *[""] * 7]

    rows = {Path(row["folder"]).parts[-3]: row for row in run_rows(found)}
    methods = [row["method"] for row in rows.values()]
    assert methods == ["dense", "sensitivity", *["PLATON"] * 3, ours[2]]
    tuned = {name for name, row in rows.items() if row["start"] == "fine-tuned"}
    assert tuned == {"start", "alone"}
    weights = {name: row["loss weights"] for name, row in rows.items()}
    assert weights["platon"] == "ce 0.1, distil 0.9" and not weights["alone"]

    next(run for run in found if run.method == "sensitivity").args["alpha_hidden"] = 2.0
    assert headline(found)[1][8] == "80.0 at 10.0%, alpha_hidden 2"
    hidden = {row["loss weights"] for row in run_rows(found)}
    assert "ce 0.1, distil 0.9, hidden 2" in hidden
    (axes,) = plots.metric_figure("sst-2", found).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {
        "dense",
        "sensitivity, distilled, alpha_hidden 2",
        "PLATON, fine-tuned start",
        "PLATON, distilled",
        "PLATON, distilled, fine-tuned start",
        "PLATON, global, distilled",
    }
    assert len({line.get_color() for line in lines.values()}) == 3
    assert len({method.title for method in METHODS.values()}) == len(set(plots.COLOURS.values()))


def test_a_global_method_of_the_paper_is_beside_its_figures(runs):
    run = read_run(runs / "squad" / "10D3")
    run.method, run.remaining = "movement, global", 10.0
    header, paper, ours = headline([run])
    expected = [paper_value("squad", name, run.method, True, 10) for name in ("exact", "f1")]
    assert header[8] == run.method and ours[8]
    assert paper[8] == "/".join(f"{value:.1f}" for value in expected)


def test_figures_of_other_methods(beyond, tmp_path, monkeypatch):
    """Runs of the same point in several folders have figures of their own."""
    monkeypatch.setattr(plots, "save_figure", lambda figure, file: file.touch())  # saves 5 seconds
    tables("plot", beyond, "--to", tmp_path)
    names = [f"{x}-sst-2-10D3" for x in "platon sensitivity global start".split()]
    names.append("alone-sst-2-10D1")
    kinds = ("layers", "weights", "curves")
    own = {f"{name}-{kind}.png" for name in names for kind in kinds}
    assert {path.name for path in tmp_path.iterdir()} == own | {"sst-2-metric.png"}


def test_a_floor_that_cannot_be_computed_is_said(tmp_path, beyond, capsys):
    shutil.copytree(beyond / "dense", tmp_path / "runs")
    arguments = tmp_path / "runs" / "sst-2" / "teacher" / "training_args.json"
    for folder, said in (
        ("gone", "gone must hold exactly one file train.tsv"),
        (None, "the data came from the hub"),
    ):
        edit(arguments, data_dir=folder)
        tables("report", tmp_path / "runs")
        assert f"| bag of words | not computed: {said}" in capsys.readouterr().out
