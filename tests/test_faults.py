"""What goes wrong while a run is written or stopped: checkpoints stay whole, resuming is exact."""

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from stress import kill_resume
from tiny import read, same, weights

import bertarize
import counts_parameters
import masked_run_squad
import saving_prunebert
from emmental.data import squad_features, squad_read
from emmental.training import checkpoint, evaluate, guards, loop, passes
from emmental.training import run as narrative
from emmental.training.distributed import World

TRAIN = "--do_train --max_steps 12 --warmup_steps 2 --save_steps 4 --logging_steps 4"
TRAIN += " --initial_threshold 1 --final_threshold 0.2 --per_gpu_train_batch_size 4"
TRAIN += " --learning_rate 5e-5"
LATEST = "--resume_from_checkpoint latest"


@pytest.fixture
def run(run):
    """Trains, in the folder `output`."""
    return lambda *flags, output="out": run(output, TRAIN, *flags)


def final_state(folder):
    return torch.load(folder / "checkpoint-12" / "training_state.pt", weights_only=True)


def steps_of(folder):
    return [path.name for path in checkpoint.find_checkpoints(folder)]


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
def test_a_signal_ends_the_update_and_writes_a_checkpoint(run, refused, monkeypatch, number):
    whole = run(output="whole")
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        break_after(patch, loop, "set_learning_rates", 6, lambda: signal.raise_signal(number))
        error = refused(run, status=128 + number)
    assert f"stopped by {number.name} after update 6 of 12" in error and LATEST in error
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    out = run(LATEST)
    assert same(whole, out)
    assert kill_resume.alike(*(final_state(folder)["optimizer"] for folder in (whole, out)))


def test_a_second_signal_does_not_wait(run, refused, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        break_after(patch, loop, "set_learning_rates", 6, twice)
        assert "stopped by SIGINT after update 6" in refused(
            run, status=130
        )  # torchrun says it twice
    break_after(monkeypatch, loop, "set_learning_rates", 6, twice)
    monkeypatch.setattr(guards, "SAME_SIGNAL", 0.0)
    assert "interrupted" in refused(run, output="other", status=130)


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
def test_sigterm_outside_the_loop_ends_the_script(
    run, refused, monkeypatch, tmp_path, module, name
):
    before = signal.getsignal(signal.SIGTERM)
    break_after(monkeypatch, module, name, 1, lambda: signal.raise_signal(signal.SIGTERM))
    error = refused(run, "--do_eval", "--save_steps 0", output="o/out", status=143)
    assert "error: stopped by SIGTERM" in error
    assert not list(tmp_path.glob("**/.writing-*"))
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_during_a_cleanup_waits_for_it(run, refused, monkeypatch):
    cleaned = []

    def twice():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # of torchrun, after that of the process group
            cleaned.append(True)

    break_after(monkeypatch, narrative, "load_student", 1, twice)
    refused(run, status=143)
    assert cleaned


def test_the_other_scripts_end_on_sigterm_and_name_no_flag_of_training(
    run, refused, capsys, monkeypatch
):
    out = run("--save_steps 0")
    for number in signal.SIGTERM, signal.SIGINT:
        with monkeypatch.context() as patch:
            stop = lambda number=number: signal.raise_signal(number)  # noqa: E731
            break_after(patch, counts_parameters, "remaining_weights", 1, stop)
            count = lambda: counts_parameters.main(["--serialization_dir", str(out)])  # noqa: E731
            error = refused(count, status=128 + number)
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
def slow(*columns, **options):
    print("features: ", file=sys.stderr, flush=True)
    time.sleep(100)
squad_features._featurize = slow
masked_run_squad.main()
"""


def test_a_signal_while_features_are_made(tmp_path, flags):
    root = str(Path(masked_run_squad.__file__).parent)
    (tmp_path / "script.py").write_text(SLOW_FEATURES.format(root=root))
    command = [sys.executable, str(tmp_path / "script.py"), *flags("out", TRAIN)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    assert any(b"features: " in line for line in process.stderr)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    assert b"stopped by SIGTERM" in process.stderr.read()
    assert not list((tmp_path / "cache").rglob(".writing-*"))


# ---- where the output goes


def test_a_reader_that_leaves_loses_no_file(run, unread, monkeypatch, tmp_path):
    unread(lambda flags: run(*flags), "--save_steps 0", "--do_eval")
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


def test_a_pipe_that_breaks_elsewhere_is_an_error(run, refused, monkeypatch):
    def lose():
        raise BrokenPipeError(32, "Broken pipe")

    break_after(monkeypatch, squad_features, "build_features", 1, lose)
    assert "Broken pipe" in refused(run, status=1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_screen_that_cannot_show_a_name(run, monkeypatch, encoding):
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    out = run("--save_steps 0", output="вывод")
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
    listed = read(folder / "files.json")
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
def test_latest_skips_a_broken_checkpoint(run, refused, caplog, damage):
    whole = run(output="whole")
    spoil, said = DAMAGES[damage]
    out = run("--save_steps 5")
    spoil(out / "checkpoint-10")
    error = refused(run, f"--resume_from_checkpoint {out / 'checkpoint-10'}", status=2)
    assert "checkpoint-10: no checkpoint is whole" in error
    caplog.clear()
    run(LATEST, "--save_steps 0")
    (message,) = [message for message in caplog.messages if "is broken and skipped" in message]
    assert "checkpoint-10" in message and said in message
    assert "starting at update 5" in caplog.text
    assert same(whole, out)
    spoil(out / "checkpoint-5")
    if not (out / "checkpoint-10").exists():
        shutil.copytree(out / "checkpoint-5", out / "checkpoint-10")
    error = refused(run, LATEST, status=2)
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


def test_a_folder_removed_while_running(run, refused, monkeypatch, tmp_path):
    def remove():
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").write_text("in the way")

    break_after(monkeypatch, loop, "set_learning_rates", 6, remove)
    error = refused(run, status=1)
    assert "error: " in error and "out" in error


def test_a_disk_that_is_full(run, refused, tmp_path, monkeypatch):
    """A limit on file sizes stands for it: the process gets the same kind of error."""
    monkeypatch.setattr(sys, "argv", ["folder/masked_run_squad.py"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        error = refused(run, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in error and "masked_run_squad.py: error: cannot write" in error
    assert not list((tmp_path / "out").glob("*checkpoint*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(run, refused, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    assert "cannot be written to" in refused(run, status=2)


class OutOfMemoryError(RuntimeError):
    """As torch's of a GPU."""


@pytest.mark.parametrize("error", [
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
], ids=["gpu", "cpu", "python"])  # fmt: skip
def test_memory_that_runs_out(run, refused, monkeypatch, error):
    def spoiled(*args):
        raise error

    monkeypatch.setattr(masked_run_squad, "span_loss", spoiled)
    assert "out of memory: use smaller batches (and --grad" in refused(run, status=1)


# ---- numbers

TEACH = "--alpha_ce 0.5 --alpha_distil 0.5 --teacher_type bert --teacher_name_or_path"


def spoil_loss(monkeypatch, name, calls, value=torch.nan):
    """Multiply a loss of the SQuAD script with `value` at these calls, counted from 1."""
    function, count = getattr(masked_run_squad, name), iter(range(1, 10**6))

    def spoiled(*args):
        loss = function(*args)
        return loss * value if next(count) in calls else loss

    monkeypatch.setattr(masked_run_squad, name, spoiled)


def test_a_loss_that_is_not_finite_stops_and_is_named(run, refused, monkeypatch):
    whole = run(output="whole")
    with monkeypatch.context() as patch:
        spoil_loss(patch, "span_loss", {7})
        error = refused(run, status=1)
    assert "update 7: loss/task = nan on rank 0: training stops" in error
    assert steps_of(whole.parent / "out") == ["checkpoint-4"]
    out = run(LATEST)
    assert same(whole, out)


@pytest.mark.parametrize(
    "part, words",
    [("loss/distil", TEACH), ("loss/penalty", "--regularization l1 --final_lambda 1")],
)
def test_every_part_of_the_loss_is_named(run, refused, monkeypatch, tiny_bert, part, words):
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
        words = f"{words} {tiny_bert}"
    assert f"update 5: {part} = inf on rank 0: training stops" in refused(run, words, status=1)


def test_a_gradient_that_is_not_finite_stops_too(run, refused, monkeypatch):
    function, count = torch.nn.utils.clip_grad_norm_, iter(range(1, 100))
    monkeypatch.setattr(
        loop.nn.utils,
        "clip_grad_norm_",
        lambda *args: function(*args) * (torch.nan if next(count) == 3 else 1.0),
    )
    assert "update 3: the gradient is not finite, though every part" in refused(run, status=1)


def test_weights_that_are_not_finite_are_not_saved(run, refused, monkeypatch, tmp_path):
    function, count = loop.set_learning_rates, iter(range(1, 100))

    def spoil(optimizer, factor):
        function(optimizer, torch.inf if next(count) == 8 else factor)

    monkeypatch.setattr(loop, "set_learning_rates", spoil)
    error = refused(run, "--save_total_limit 1", status=1)
    assert "update 8: " in error and "is not finite: nothing is saved" in error
    assert steps_of(tmp_path / "out") == ["checkpoint-4"]


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
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


@pytest.mark.parametrize("part", [
    "qa_outputs.bias", "0.output.LayerNorm.weight", "0.attention.self.value.bias",
    "1.attention.self.query.weight",  # which `structure` does not mask: it masks columns alone
])  # fmt: skip
def test_an_overflow_outside_the_scores_is_not_observed(run, half, monkeypatch, part):
    """The scaler skips the whole update: the scores must not observe what is not stepped."""
    backward, observe, updates = passes.Passes.backward, loop.observe_scores, []

    def overflow(self, *args):
        losses = backward(self, *args)
        if len(updates) == 4:
            parameters = dict(self.student.named_parameters())
            name = next(name for name in parameters if name.endswith(part))
            parameters[name].grad.view(-1)[0] = torch.inf
        return losses

    def observed(layers, scaler, skipped):
        before = [layer.source.clone() for layer in layers.holders]
        observe(layers, scaler, skipped)
        pairs = zip(before, layers.holders, strict=True)
        updates.append((skipped, any(not torch.equal(old, layer.source) for old, layer in pairs)))

    monkeypatch.setattr(passes.Passes, "backward", overflow)
    monkeypatch.setattr(loop, "observe_scores", observed)
    run("--fp16 --pruning_method platon --granularity structure --final_threshold 0.6")
    assert updates[4] == (True, False) and all(moved != skipped for skipped, moved in updates)


def test_a_long_series_of_skipped_updates_stops(run, half, refused, monkeypatch):
    monkeypatch.setattr(guards, "PATIENCE_FP16", 3)
    spoil_loss(monkeypatch, "span_loss", {2, 3, 4, *range(6, 100)}, torch.inf)
    error = refused(run, "--fp16", status=1)
    assert (
        "update 9 for 4 updates in a row: loss/task = inf" in error
    )  # three in a row, at first, were none too many


def test_the_same_seed_gives_the_same_bits(run):
    one, two, other = run(output="one"), run(output="two"), run("--seed 43", output="other")
    assert same(one, two) and not same(one, other)
    assert kill_resume.alike(final_state(one), final_state(two))


# ---- kills


class Here(kill_resume.Job):
    """Runs that are not to be killed are of this process, which need not import torch again."""

    def complete(self, name, *flags):
        masked_run_squad.main(self.words(name, *flags))


@pytest.mark.parametrize("method", ["topK", "l0"])
def test_killed_runs_resume_exactly(tmp_path, tiny_bert, squad_dir, method):
    """The short form of tests/stress/kill_resume.py."""
    job = Here(tmp_path, tiny_bert, squad_dir, method)
    row = kill_resume.kill_until_done(job, kills=1, seed=1)
    assert row["kills"] == row["resumes"] == 1 and row["equal"], row


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
