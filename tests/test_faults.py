"""What goes wrong while a run is written or stopped: a checkpoint is whole or absent, and resuming is exact."""

import json
import os
import shutil
import signal

import pytest
import torch
from stress import kill_resume
from test_masked_run_squad import SHORT

from emmental.training import checkpoint, loop

TOPK = ["--pruning_method", "topK", "--initial_threshold", "1", "--final_threshold", "0.2"]
TRAIN = ["--do_train", "--max_steps", "12", "--warmup_steps", "2", "--save_steps", "4", "--logging_steps", "4"]


@pytest.fixture
def run(tmp_path, tiny_bert, squad_dir):
    import masked_run_squad

    def run_squad(*flags, output="out"):
        out = tmp_path / output
        masked_run_squad.main([
            "--model_type", "masked_bert", "--model_name_or_path", str(tiny_bert), "--data_dir", str(squad_dir), "--do_lower_case",
            "--output_dir", str(out), "--cache_dir", str(tmp_path / "cache"), *SHORT, *TOPK, *TRAIN, *flags,
        ])  # fmt: skip
        return out

    return run_squad


def stopped(capsys, run, *flags, status, **kwargs):
    with pytest.raises(SystemExit) as stop:
        run(*flags, **kwargs)
    error = capsys.readouterr().err
    assert stop.value.code == status and "Traceback" not in error and error.count("error: ") == 1, error
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


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_update_and_writes_a_checkpoint(run, capsys, monkeypatch, number):
    whole = run(output="whole")
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        break_after(patch, loop, "set_learning_rates", 6, lambda: signal.raise_signal(number))
        error = stopped(capsys, run, status=128 + number)
    assert f"stopped by {number.name} after update 6 of 12" in error and "--resume_from_checkpoint latest" in error
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    out = run("--resume_from_checkpoint", "latest")
    assert same_files(whole, out, "model.safetensors")
    final = [torch.load(folder / "checkpoint-12" / "training_state.pt", weights_only=True) for folder in (whole, out)]
    for a, b in zip(*(state["optimizer"]["state"].values() for state in final), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_signal_does_not_wait(run, capsys, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    break_after(monkeypatch, loop, "set_learning_rates", 6, twice)
    assert "interrupted" in stopped(capsys, run, status=130)


# -------------------------------------------------------------------------------------- checkpoints


def test_the_list_of_files(run):
    folder = run() / "checkpoint-12"
    listed = json.loads((folder / "files.json").read_text())
    assert set(listed) == {path.name for path in folder.iterdir()} - {"files.json"}
    assert all((folder / name).stat().st_size == entry["bytes"] for name, entry in listed.items())
    assert checkpoint.what_is_broken(folder) is None


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": (flip, "the checksum of model.safetensors does not match"),
    "truncated": (lambda folder: os.truncate(folder / "training_state.pt", 1000), "training_state.pt has 1,000 bytes"),
    "missing": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "list": (lambda folder: (folder / "files.json").write_text('{"a": 1}'), "files.json is damaged|a is missing"),
    "no json": (lambda folder: (folder / "files.json").write_text("{"), "files.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_skips_a_broken_checkpoint(run, capsys, caplog, damage):
    whole = run(output="whole")
    spoil, said = DAMAGES[damage]
    out = run("--save_steps", "5")
    spoil(out / "checkpoint-10")
    error = stopped(capsys, run, "--resume_from_checkpoint", str(out / "checkpoint-10"), status=2)
    assert "checkpoint-10 is broken" in error
    caplog.clear()
    run("--resume_from_checkpoint", "latest", "--save_steps", "0")
    (message,) = [message for message in caplog.messages if "is broken and skipped" in message]
    assert "checkpoint-10" in message and any(part in message for part in said.split("|"))
    assert "starting at update 5" in caplog.text
    assert same_files(whole, out, "model.safetensors")
    spoil(out / "checkpoint-5")
    if not (out / "checkpoint-10").exists():
        shutil.copytree(out / "checkpoint-5", out / "checkpoint-10")
    assert "no checkpoint in" in stopped(capsys, run, "--resume_from_checkpoint", "latest", status=2)


def test_the_only_good_checkpoint_is_never_removed(tmp_path):
    for step in (5, 10, 15):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("training_state.pt", "config.json"):
            (folder / name).write_text(f"{step}")
        (folder / "files.json").write_text(json.dumps(checkpoint._manifest(folder)))
    for step in (10, 15):
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("damaged")
    checkpoint.remove_old_checkpoints(tmp_path, 2)
    assert [folder.name for folder in checkpoint.find_checkpoints(tmp_path)] == [
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-15",
    ]
    (tmp_path / "checkpoint-15" / "config.json").write_text("15")
    checkpoint.remove_old_checkpoints(tmp_path, 2)
    assert [folder.name for folder in checkpoint.find_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-15"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-15"}


def test_a_folder_removed_while_running(run, capsys, monkeypatch, tmp_path):
    def remove():
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").write_text("in the way")

    break_after(monkeypatch, loop, "set_learning_rates", 6, remove)
    assert "cannot write" in stopped(capsys, run, status=1)


def test_a_disk_that_is_full(tmp_path, tiny_bert, squad_dir):
    """A limit on file sizes stands for it: the process gets the same kind of error."""
    small = kill_resume.Job(tmp_path, tiny_bert, squad_dir, "topK")
    done = small.start("out", "--save_steps", "4", limit=200_000)
    _, error = done.communicate(timeout=120)
    assert done.returncode == 1 and "Traceback" not in error
    assert "cannot write" in error and "File too large" in error
    assert not list((tmp_path / "out").glob("*checkpoint*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(run, capsys, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    assert "cannot be written to" in stopped(capsys, run, status=2)


# -------------------------------------------------------------------------------------------- murder


@pytest.mark.parametrize("method", ["topK", "l0"])
def test_killed_runs_resume_exactly(tmp_path, tiny_bert, squad_dir, method):
    """The short form of tests/stress/kill_resume.py."""
    job = kill_resume.Job(tmp_path, tiny_bert, squad_dir, method)
    row = kill_resume.kill_until_done(job, kills=2, seed=1)
    assert row["kills"] == 2 and row["resumes"] >= 2 and row["equal"], row


def test_the_stress_script_notices_a_difference(tmp_path):
    for name, value in (("a", 0.0), ("b", 1e-9)):
        (tmp_path / name).mkdir()
        torch.save({"x": torch.tensor([value])}, tmp_path / name / "training_state.pt")
    assert kill_resume.differences(tmp_path / "a", tmp_path / "a") == []
    assert kill_resume.differences(tmp_path / "a", tmp_path / "b") == ["training_state.pt"]
    (tmp_path / "a" / "model.safetensors").write_bytes(b"1")
    assert kill_resume.differences(tmp_path / "a", tmp_path / "b") == ["model.safetensors", "training_state.pt"]
