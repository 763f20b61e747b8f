"""What goes wrong while a run is written or stopped: checkpoints stay whole, resuming is exact."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from stress import kill_resume

import bertarize
import counts_parameters
import masked_run_squad
import saving_prunebert
from emmental.data import cache, squad_features, squad_read
from emmental.training import checkpoint, evaluate, guards, loop, passes
from emmental.training import run as narrative
from emmental.training.distributed import World

FLAGS = (
    "--model_type masked_bert --do_lower_case --do_train --max_steps 12 --warmup_steps 2 "
    "--save_steps 4 --logging_steps 4 --initial_threshold 1 --final_threshold 0.2 "
    "--max_seq_length 48 --max_query_length 16 --doc_stride 16 --per_gpu_train_batch_size 4"
)


@pytest.fixture
def run(tmp_path, tiny_bert, squad_dir):
    def run_squad(*flags, output="out"):
        out = tmp_path / output
        places = f"--model_name_or_path {tiny_bert} --data_dir {squad_dir} --output_dir {out}"
        command = f"{FLAGS} {places} --cache_dir {tmp_path / 'cache'}"
        masked_run_squad.main([*command.split(), *flags])
        return out

    run_squad.folder = tmp_path
    return run_squad


def stopped(capsys, run, *flags, status, **kwargs):
    with pytest.raises(SystemExit) as stop:
        run(*flags, **kwargs)
    error = capsys.readouterr().err
    assert stop.value.code == status and "Traceback" not in error and error.count("error: ") == 1, (
        error
    )
    return error


def same_files(a, b, *names):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def break_after(monkeypatch, module, name, calls, action):
    """Have a function do `action` before its `calls`-th call."""
    function, count = getattr(module, name), iter(range(1, 10**6))

    def wrapper(*args, **kwargs):
        if next(count) == calls:
            action()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_update_and_writes_a_checkpoint(run, capsys, monkeypatch, number):
    whole = run(output="whole")
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        break_after(patch, loop, "set_learning_rates", 6, lambda: signal.raise_signal(number))
        error = stopped(capsys, run, status=128 + number)
    assert (
        f"stopped by {number.name} after update 6 of 12" in error
        and "--resume_from_checkpoint latest" in error
    )
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    out = run("--resume_from_checkpoint", "latest")
    assert same_files(whole, out, "model.safetensors")
    final = [
        torch.load(folder / "checkpoint-12" / "training_state.pt", weights_only=True)
        for folder in (whole, out)
    ]
    for a, b in zip(*(state["optimizer"]["state"].values() for state in final), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_signal_does_not_wait(run, capsys, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        break_after(patch, loop, "set_learning_rates", 6, twice)
        assert "stopped by SIGINT after update 6" in stopped(
            capsys, run, status=130
        )  # torchrun says it twice
    break_after(monkeypatch, loop, "set_learning_rates", 6, twice)
    monkeypatch.setattr(guards, "SAME_SIGNAL", 0.0)
    assert "interrupted" in stopped(capsys, run, output="other", status=130)


@pytest.mark.parametrize(
    "module, name",
    [
        (squad_read, "read_examples"),
        (squad_features, "build_features"),
        (narrative, "load_student"),
        (evaluate, "masked"),
        (checkpoint, "file_digest"),  # in the middle of writing the trained model
        (narrative, "print_summary"),
    ],
)
def test_sigterm_outside_the_loop_ends_the_script(run, capsys, monkeypatch, module, name):
    before = signal.getsignal(signal.SIGTERM)
    break_after(monkeypatch, module, name, 1, lambda: signal.raise_signal(signal.SIGTERM))
    error = stopped(capsys, run, "--do_eval", "--save_steps", "0", output="o/out", status=143)
    assert "error: stopped by SIGTERM" in error
    assert not list(run.folder.glob("**/.writing-*"))
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_during_a_cleanup_waits_for_it(run, capsys, monkeypatch):
    cleaned = []

    def twice():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # of torchrun, after that of the process group
            cleaned.append(True)

    break_after(monkeypatch, narrative, "load_student", 1, twice)
    stopped(capsys, run, status=143)
    assert cleaned


def test_the_other_scripts_end_on_sigterm_and_name_no_flag_of_training(run, capsys, monkeypatch):
    out = run("--save_steps", "0")
    for number in signal.SIGTERM, signal.SIGINT:
        with monkeypatch.context() as patch:
            stop = lambda number=number: signal.raise_signal(number)  # noqa: E731
            break_after(patch, counts_parameters, "remaining_weights", 1, stop)
            count = lambda: counts_parameters.main(["--serialization_dir", str(out)])  # noqa: E731
            error = stopped(capsys, count, status=128 + number)
        assert "--" not in error
    thread = threading.Thread(target=count)  # only the main thread may set handlers
    thread.start()
    thread.join()
    assert "Linear weights only" in capsys.readouterr().out


SLOW_FEATURES = """
import sys, time
sys.path.insert(0, {root!r})
import masked_run_squad
from emmental.data import squad_answers, squad_features, squad_read
squad_features._featurize = lambda *columns, **options: time.sleep(100)
masked_run_squad.main()
"""


def test_a_signal_while_several_processes_make_features(tmp_path, tiny_bert, squad_dir):
    root = str(Path(masked_run_squad.__file__).parent)
    (tmp_path / "script.py").write_text(SLOW_FEATURES.format(root=root))
    places = f"--model_name_or_path {tiny_bert} --data_dir {squad_dir} --output_dir {tmp_path}/out"
    flags = f"{FLAGS} {places} --cache_dir {tmp_path / 'cache'} --threads 2".split()
    command = [sys.executable, str(tmp_path / "script.py"), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    said = b""
    while b"features (num_proc=2)" not in said:
        said += process.stderr.read1()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    assert b"error: stopped by SIGTERM" in process.stderr.read()


def test_signals_end_workers_without_a_handler(tmp_path):
    """A pool that had an error waits for ever if a worker's handler does not run."""

    def featurize(column):
        defaults = [signal.getsignal(n) is signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGINT)]
        return {"default": [defaults] * len(column)}

    datasets.Dataset.from_dict({"x": [1, 2, 3, 4]}).save_to_disk(tmp_path / "data")
    before = signal.getsignal(signal.SIGTERM)
    made = cache.cached_map(
        datasets.load_from_disk(tmp_path / "data"), featurize, ["x"], key="k", num_proc=2
    )
    assert made["default"] == [[True, True]] * 4
    assert signal.getsignal(signal.SIGTERM) is before


# ---- where the output goes


def test_a_reader_that_leaves_loses_no_file(run, unread, monkeypatch, tmp_path):
    unread(lambda flags: run(*flags), "--save_steps", "0", "--do_eval")
    shutil.copytree(tmp_path / "out", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    monkeypatch.chdir(tmp_path)
    for script, flags, written in (
        (counts_parameters, "--serialization_dir out --json counts.json", "counts.json"),
        (saving_prunebert, "pack out out.packed", "out.packed"),
        (saving_prunebert, "info out.packed --json info.json", "info.json"),
        (bertarize, "--model_name_or_path bare", "bertarized_bare/config.json"),
        (counts_parameters, "--help", "out/eval_results.json"),
    ):
        unread(script.main, *flags.split())
        assert (tmp_path / written).stat().st_size > 0


def test_a_pipe_that_breaks_elsewhere_is_an_error(run, capsys, monkeypatch):
    def lose():
        raise BrokenPipeError(32, "Broken pipe")

    break_after(monkeypatch, squad_features, "build_features", 1, lose)
    assert "Broken pipe" in stopped(capsys, run, status=1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_screen_that_cannot_show_a_name(run, monkeypatch, encoding):
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    out = run("--save_steps", "0", output="вывод")
    screen.flush()
    assert (out / "model.safetensors").exists()
    assert "results saved to" in (said := screen.buffer.getvalue().decode(encoding))
    assert "\\u0432\\u044b\\u0432\\u043e\\u0434" in said


@pytest.mark.parametrize("error", [ImportError("no module"), TypeError("of another protobuf")])
def test_a_run_without_tensorboard(run, monkeypatch, caplog, error):
    class Broken:
        def find_spec(self, name, *_):
            if name.startswith("torch.utils.tensorboard"):
                raise error

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    out = run("--do_eval", "--evaluate_during_training")
    warned = [message for message in caplog.messages if "TensorBoard" in message]
    assert warned == [f"no curves are written: TensorBoard cannot be imported: {error}"]
    assert (out / "eval_results.json").exists() and not list(out.glob("events.*"))


# ---- checkpoints


def test_the_list_of_files(run):
    folder = run() / "checkpoint-12"
    listed = json.loads((folder / "files.json").read_text())
    assert set(listed) == {path.name for path in folder.iterdir()} - {"files.json"}
    assert all((folder / name).stat().st_size == entry["bytes"] for name, entry in listed.items())
    assert checkpoint.damage_of(folder) is None


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": (flip, "model.safetensors is damaged"),
    "truncated": (
        lambda folder: os.truncate(folder / "training_state.pt", 1000),
        "training_state.pt is damaged",
    ),
    "missing": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "list": (lambda folder: (folder / "files.json").write_text('{"a": 1}'), "a is missing"),
    "no json": (lambda folder: (folder / "files.json").write_text("{"), "files.json or another"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_skips_a_broken_checkpoint(run, capsys, caplog, damage):
    whole = run(output="whole")
    spoil, said = DAMAGES[damage]
    out = run("--save_steps", "5")
    spoil(out / "checkpoint-10")
    error = stopped(capsys, run, "--resume_from_checkpoint", str(out / "checkpoint-10"), status=2)
    assert "checkpoint-10: no checkpoint is whole" in error
    caplog.clear()
    run("--resume_from_checkpoint", "latest", "--save_steps", "0")
    (message,) = [message for message in caplog.messages if "is broken and skipped" in message]
    assert "checkpoint-10" in message and said in message
    assert "starting at update 5" in caplog.text
    assert same_files(whole, out, "model.safetensors")
    spoil(out / "checkpoint-5")
    if not (out / "checkpoint-10").exists():
        shutil.copytree(out / "checkpoint-5", out / "checkpoint-10")
    error = stopped(capsys, run, "--resume_from_checkpoint", "latest", status=2)
    assert "no checkpoint is whole" in error


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "training_state.pt").touch()
    (tmp_path / "checkpoint-best").mkdir()
    checkpoint.remove_old_checkpoints(tmp_path, None)
    checkpoint.remove_old_checkpoints(tmp_path, 2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-15", "checkpoint-100", "checkpoint-best"}


def test_a_folder_removed_while_running(run, capsys, monkeypatch, tmp_path):
    def remove():
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").write_text("in the way")

    break_after(monkeypatch, loop, "set_learning_rates", 6, remove)
    error = stopped(capsys, run, status=1)
    assert "error: " in error and "out" in error


def test_a_disk_that_is_full(tmp_path, tiny_bert, squad_dir):
    """A limit on file sizes stands for it: the process gets the same kind of error."""
    small = kill_resume.Job(tmp_path, tiny_bert, squad_dir, "topK")
    done = small.start("out", "--save_steps", "4", limit=200_000)
    _, error = done.communicate(timeout=120)
    assert done.returncode == 1 and "Traceback" not in error
    assert "File too large" in error and "masked_run_squad.py: error: cannot write" in error
    assert not list((tmp_path / "out").glob("*checkpoint*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(run, capsys, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    assert "cannot be written to" in stopped(capsys, run, status=2)


# ---- numbers

TEACH = "--alpha_ce 0.5 --alpha_distil 0.5 --teacher_type bert --teacher_name_or_path".split()


def spoil_loss(monkeypatch, name, calls, value=torch.nan):
    """Multiply a loss of the SQuAD script with `value` at these calls, counted from 1."""
    function, count = getattr(masked_run_squad, name), iter(range(1, 10**6))

    def spoiled(*args):
        loss = function(*args)
        return loss * value if next(count) in calls else loss

    monkeypatch.setattr(masked_run_squad, name, spoiled)


def test_a_loss_that_is_not_finite_stops_and_is_named(run, capsys, monkeypatch):
    whole = run(output="whole")
    with monkeypatch.context() as patch:
        spoil_loss(patch, "span_loss", {7})
        error = stopped(capsys, run, status=1)
    assert "update 7: loss/task = nan on rank 0: training stops" in error
    assert [folder.name for folder in checkpoint.find_checkpoints(whole.parent / "out")] == [
        "checkpoint-4"
    ]
    out = run("--resume_from_checkpoint", "latest")
    assert same_files(whole, out, "model.safetensors")


@pytest.mark.parametrize(
    "part, flags",
    [("loss/distil", TEACH), ("loss/penalty", ["--regularization", "l1", "--final_lambda", "1"])],
)
def test_every_part_of_the_loss_is_named(run, capsys, monkeypatch, tiny_bert, part, flags):
    count = iter(range(1, 100))

    def spoiled(function):
        return lambda *args: function(*args) * (torch.inf if next(count) == 5 else 1.0)

    monkeypatch.setattr(passes, "regularization", spoiled(passes.regularization))
    if part == "loss/distil":
        monkeypatch.setattr(
            masked_run_squad.Squad,
            "distillation_loss",
            spoiled(masked_run_squad.Squad.distillation_loss),
        )
        flags = [*flags, str(tiny_bert)]
    assert f"update 5: {part} = inf on rank 0: training stops" in stopped(
        capsys, run, *flags, status=1
    )


def test_a_gradient_that_is_not_finite_stops_too(run, capsys, monkeypatch):
    function, count = torch.nn.utils.clip_grad_norm_, iter(range(1, 100))
    monkeypatch.setattr(
        loop.nn.utils,
        "clip_grad_norm_",
        lambda *args: function(*args) * (torch.nan if next(count) == 3 else 1.0),
    )
    assert "update 3: the gradient is not finite, though every part" in stopped(
        capsys, run, status=1
    )


def test_weights_that_are_not_finite_are_not_saved(run, capsys, monkeypatch, tmp_path):
    function, count = loop.set_learning_rates, iter(range(1, 100))

    def spoil(optimizer, factor):
        function(optimizer, torch.inf if next(count) == 8 else factor)

    monkeypatch.setattr(loop, "set_learning_rates", spoil)
    error = stopped(capsys, run, "--save_total_limit", "1", status=1)
    assert "update 8: " in error and "is not finite: nothing is saved" in error
    assert [folder.name for folder in checkpoint.find_checkpoints(tmp_path / "out")] == [
        "checkpoint-4"
    ]


@pytest.fixture
def half(monkeypatch):
    """--fp16 on a CPU, which the scripts refuse as too slow to be meant."""
    monkeypatch.setattr(narrative, "join_world", lambda *args: World(torch.device("cpu")))


def test_the_gradient_scaler_skips_and_counts(run, half, monkeypatch):
    scalars = {}
    monkeypatch.setattr(
        loop.RunLog, "scalars", lambda self, values, step=None: scalars.update({step: values})
    )
    spoil_loss(monkeypatch, "span_loss", {5, 6}, torch.inf)
    out = run("--fp16")
    assert (
        scalars[8]["skipped_updates"] == 2
        and "skipped_updates" not in scalars[4]
        and "skipped_updates" not in scalars[12]
    )
    assert all(
        torch.isfinite(torch.tensor(value)).all()
        for values in scalars.values()
        for value in values.values()
    )
    assert all(tensor.isfinite().all() for tensor in load_file(out / "model.safetensors").values())


def test_a_long_series_of_skipped_updates_stops(run, half, capsys, monkeypatch):
    monkeypatch.setattr(guards, "PATIENCE_FP16", 3)
    spoil_loss(monkeypatch, "span_loss", {2, 3, 4, *range(6, 100)}, torch.inf)
    error = stopped(capsys, run, "--fp16", status=1)
    assert (
        "update 9 for 4 updates in a row: loss/task = inf" in error
    )  # three in a row, at first, were none too many


def test_the_same_seed_gives_the_same_bits(run):
    one, two, other = run(output="one"), run(output="two"), run("--seed", "43", output="other")
    assert same_files(one, two, "model.safetensors") and not same_files(
        one, other, "model.safetensors"
    )
    states = [
        torch.load(folder / "checkpoint-12" / "training_state.pt", weights_only=True)
        for folder in (one, two)
    ]
    assert kill_resume.alike(*states)


# ---- kills


@pytest.mark.parametrize("method, kills", [("topK", 1), ("l0", 1)])
def test_killed_runs_resume_exactly(tmp_path, tiny_bert, squad_dir, method, kills):
    """The short form of tests/stress/kill_resume.py."""
    job = kill_resume.Job(tmp_path, tiny_bert, squad_dir, method)
    row = kill_resume.kill_until_done(job, kills=kills, seed=1)
    assert row["kills"] == row["resumes"] == kills and row["equal"], row


def test_the_stress_script_notices_a_difference(tmp_path):
    for name, value in (("a", 0.0), ("b", 1e-9)):
        (tmp_path / name).mkdir()
        torch.save({"x": torch.tensor([value])}, tmp_path / name / "training_state.pt")
    assert kill_resume.differences(tmp_path / "a", tmp_path / "a") == []
    assert kill_resume.differences(tmp_path / "a", tmp_path / "b") == ["training_state.pt"]
    (tmp_path / "a" / "model.safetensors").write_bytes(b"1")
    assert kill_resume.differences(tmp_path / "a", tmp_path / "b") == [
        "model.safetensors",
        "training_state.pt",
    ]
