"""What a person sees of a run: a bar on a terminal, lines in a log, a summary at the end."""

import io
import re
import sys

import torch

TRAIN = "--do_train --do_eval --evaluate_during_training --final_threshold 0.3 --logging_steps 3"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_lines_and_no_bar(run, caplog, capsys):
    caplog.set_level("INFO")
    run("out", TRAIN)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("update ")]
    progress = [line for line in lines if " left" in line]
    assert [line.partition(":")[0] for line in progress] == [
        "update 3/8",
        "update 6/8",
        "update 8/8",
    ]
    figures = r"loss \d\.\d+, threshold 0\.\d+, remaining \d+\.\d%, [\d.]+ updates/s, 00:\d\d left"
    assert all(re.fullmatch(rf"update ./8: {figures}", line) for line in progress)
    assert progress[-1].endswith(" 00:00 left")
    metrics = [line for line in lines if line not in progress]
    assert [line.partition(",")[0][:15] for line in metrics] == [
        f"update {n}: exact" for n in (3, 6, 8)
    ]
    assert "%|" not in capsys.readouterr().err


def test_a_log_of_a_resumed_dense_run(run, caplog):
    caplog.set_level("INFO")
    dense = "--do_train --model_type bert --logging_steps 1 --save_steps 7"
    run("out", dense)
    caplog.clear()
    run("out", dense, "--resume_from_checkpoint latest")
    (line,) = [r.getMessage() for r in caplog.records if " left" in r.getMessage()]
    assert re.fullmatch(r"update 8/8: loss \d\.\d+, [\d.]+ updates/s, 00:00 left", line)


def test_a_terminal_has_a_bar_and_no_lines(run, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(sys, "stderr", Terminal())
    run("out", TRAIN, "--max_steps 30")
    assert "training: 100%|" in sys.stderr.getvalue() and "remaining=" in sys.stderr.getvalue()
    assert " left" not in caplog.text and "update 30: exact" in caplog.text


def test_the_seconds_of_a_resumed_run_are_part_of_its_total(run, capsys):
    folder = run("out", "--do_train --save_steps 4 --final_threshold 0.3")
    state = folder / "checkpoint-4" / "training_state.pt"
    (folder / "checkpoint-4" / "files.json").unlink()
    torch.save(torch.load(state, weights_only=True) | {"seconds": 1000.0}, state)
    capsys.readouterr()
    run("again", "--do_train --final_threshold 0.3", f"--resume_from_checkpoint {state.parent}")
    said = dict(line.split() for line in capsys.readouterr().out.splitlines() if "seconds " in line)
    assert 1000 <= float(said["seconds"]) <= float(said["total_seconds"]) < 1100
