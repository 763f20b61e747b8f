"""Several processes do what one process does, and stop together."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import launch
from tiny import L0, TOGETHER, TOPK, read, same, weights, write_split

import masked_run_glue
import masked_run_squad
from emmental.system.errors import UserError, one_line_errors
from emmental.system.launcher import Launch, read_launch
from emmental.training import checkpoint, distributed

ROOT = Path(__file__).parent.parent
TRAIN = "--do_train --do_eval --save_steps 0 --logging_steps 2 --adam_epsilon 1e-4"
TRAIN += " --learning_rate 5e-5"
METHODS = {
    "topK": f"{TOPK} --final_threshold 0.3 --gradient_accumulation_steps 2",
    "l0": f"{L0} --final_lambda 10",
    "threshold": f"--pruning_method threshold --final_threshold 0.3 {TOGETHER}",
}


def torchrun(script, *words, processes=2, module="torch.distributed.run"):
    launcher = f"-m {module} --standalone --nproc_per_node {processes}".split()
    return launch(*launcher, script, *words, timeout=120)


def assert_same_run(one, many):
    torch.testing.assert_close(weights(many), weights(one), rtol=1e-3, atol=1e-5)
    assert read(many / "eval_results.json") == pytest.approx(read(one / "eval_results.json"))
    # Of every question, though ten are no multiple of the processes.
    assert read(many / "predictions_.json") == read(one / "predictions_.json")


# 24 questions in batches of 10 or 20: in the last of an epoch, some rank has no example.


def test_four_processes_reach_the_weights_of_one(run, flags, tmp_path):
    one = run("one", TRAIN, METHODS["topK"], "--per_gpu_train_batch_size 20")
    words = flags("many", TRAIN, METHODS["topK"], "--check_ranks")
    done = torchrun(ROOT / "masked_run_squad.py", *words, processes=4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results saved to") == 1  # rank 0 alone speaks
    assert "Warning" not in done.stderr
    assert_same_run(one, tmp_path / "many")


def test_two_processes_reach_the_weights_of_one(run, flags, tmp_path, on_two_ranks):
    methods = "l0", "threshold"
    on_two_ranks(*(flags(f"two {x}", TRAIN, METHODS[x], "--check_ranks") for x in methods))
    for method in methods:
        one = run(f"one {method}", TRAIN, METHODS[method], "--per_gpu_train_batch_size 10")
        assert_same_run(one, tmp_path / f"two {method}")


def test_two_processes_on_a_glue_task(tmp_path, tiny_bert):
    for split, rows in {"train": 21, "dev": 21, "test": 7}.items():
        write_split(tmp_path / f"{split}.tsv", "sst-2", rows, 0, test=split == "test")
    places = f"--model_name_or_path {tiny_bert} --data_dir {tmp_path} --cache_dir {tmp_path}/cache"
    flags = f"--task_name sst-2 --model_type masked_bert --do_predict --max_seq_length 48 {places}"
    flags += f" {TRAIN} {METHODS['topK']} --max_steps 8 --warmup_steps 1 --no_cuda"
    flags += " --per_gpu_train_batch_size"
    one, two = tmp_path / "one", tmp_path / "two"
    masked_run_glue.main(f"{flags} 10 --output_dir {one}".split())
    words = f"{flags} 5 --output_dir {two}".split()
    script, old = ROOT / "masked_run_glue.py", "torch.distributed.launch"
    done = torchrun(script, *words, module=old)  # which adds --local-rank=0
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=1e-5)
    ours, theirs = (read(folder / "eval_results.json") for folder in (one, two))
    assert ours.pop("entropy") == pytest.approx(theirs.pop("entropy"), rel=1e-4)
    assert ours == theirs
    assert (one / "SST-2.tsv").read_text() == (two / "SST-2.tsv").read_text()
    assert read(two / "training_summary.json")["processes"] == 2


WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """Sets those of a launcher."""
    return lambda values: [monkeypatch.setenv(*item) for item in values.items()]


@pytest.mark.parametrize("values, flag, launch", [
    ({}, -1, (0, 1, 0, 1)),
    (WHOLE, -1, (1, 4, 0, 1)),
    (WHOLE, 1, (1, 4, 1, 2)),
    (WHOLE | {"LOCAL_RANK": "0"}, 1, (1, 4, 0, 1)),
    (WHOLE | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, -1, (1, 4, 1, 2)),
])  # fmt: skip
def test_the_variables_of_a_launcher(variables, values, flag, launch):
    variables(values)
    assert read_launch(flag) == Launch(*launch)


INCOMPLETE = [  # variables, --local_rank, what is said
    ({"RANK": "1"}, -1, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
    ({"WORLD_SIZE": "2"}, -1, "RANK, MASTER_ADDR, MASTER_PORT not set"),
    ({"LOCAL_RANK": "1"}, -1, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
    ({}, 1, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
    (WHOLE | {"WORLD_SIZE": ""}, -1, "WORLD_SIZE not set"),
    (WHOLE | {"MASTER_ADDR": " "}, -1, "MASTER_ADDR not set"),
    (WHOLE | {"RANK": "one"}, -1, "RANK is 'one'"),
    (WHOLE | {"RANK": "-1"}, -1, "RANK is '-1'"),
    (WHOLE | {"LOCAL_RANK": "x"}, -1, "LOCAL_RANK is 'x'"),
    (WHOLE | {"RANK": "4"}, -1, "RANK 4 is not below WORLD_SIZE 4"),
    (WHOLE | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, -1, "LOCAL_RANK 2 and LOCAL_WORLD"),
    (WHOLE | {"LOCAL_WORLD_SIZE": "8"}, -1, "LOCAL_WORLD_SIZE 8 do not fit WORLD_SIZE 4"),
]


@pytest.mark.parametrize("values, flag, said", INCOMPLETE)
def test_an_incomplete_set_of_variables_is_ignored(
    variables, flags, refused, caplog, values, flag, said
):
    """The process is one alone, and its errors are said."""
    variables(values)
    world = distributed.join_world(no_cuda=True, local_rank=flag, fp16=False)
    assert (world.rank, world.size) == (0, 1)
    (warned,) = [message for message in caplog.messages if "launcher" in message]
    assert said in warned
    words = flags("out", f"{TRAIN} --local_rank {flag} --fp61")
    assert "unknown argument --fp61" in refused(masked_run_squad.main, words)


@pytest.mark.parametrize("values, flag", [INCOMPLETE[0][:2], INCOMPLETE[3][:2]])
def test_a_run_without_a_whole_launcher(variables, run, capsys, caplog, values, flag):
    variables(values)
    out = run("out", TRAIN, f"--max_steps 4 --local_rank {flag}")
    assert sum("launcher" in message for message in caplog.messages) == 1
    assert "results saved to" in capsys.readouterr().out
    assert (out / "model.safetensors").exists()


def test_a_place_where_no_process_can_be_joined(variables):
    variables(WHOLE | {"LOCAL_RANK": "0", "MASTER_PORT": "99999"})
    with pytest.raises(UserError, match="cannot join the other processes .* 99999"):
        distributed.join_world(no_cuda=True, local_rank=-1, fp16=False)


def test_sigterm_ends_a_process_that_waits_for_others(variables, monkeypatch):
    """At once: no handler runs in Python while torch waits."""
    handlers = []
    note = lambda *_, **__: handlers.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
    variables(WHOLE)
    monkeypatch.setattr(dist, "init_process_group", note)
    monkeypatch.setattr(dist, "barrier", note)
    with one_line_errors():
        with distributed.join_world(no_cuda=True, local_rank=-1, fp16=False).main_first():
            note()
    assert handlers[:2] == [signal.SIG_DFL] * 2 and callable(handlers[2])


TWO_FILES = """
import sys
sys.path.insert(0, {root!r})
import masked_run_squad
*words, first, second = sys.argv[1:]
for file in first, second:
    try:
        masked_run_squad.main([*words, "--train_file", file])
    except SystemExit as stop:
        print("status", stop.code)
"""


def test_errors_of_two_processes_are_said_once(flags, tmp_path):
    """What is broken is found by rank 0 alone, while the other waits for its features."""
    script, broken = tmp_path / "script.py", tmp_path / "broken.json"
    script.write_text(TWO_FILES.format(root=str(ROOT)))
    broken.write_text("{}")
    done = torchrun(script, *flags("out", TRAIN), "absent.json", broken)
    for said in "error: --train_file", '"data" is missing':
        assert done.stderr.count(said) == 1, done.stderr
    assert done.stdout.count("status 2") >= 3
    assert "gloo" not in done.stderr and 'masked_run_squad.py", line' not in done.stderr


SPOILED = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import masked_run_squad, two_ranks
from emmental.training import checkpoint, loop
act, forked, update = {act!r}, {forked!r}, iter(range(1, 1000))
set_learning_rates, file_digest = loop.set_learning_rates, checkpoint.file_digest

def spoiled_update(optimizer, factor):
    at = act, os.environ["RANK"], next(update)
    if at == ("die", "1", 6):
        os.kill(os.getpid(), signal.SIGKILL)
    if at == ("drift", "1", 6):
        optimizer.param_groups[0]["params"][0].data.view(-1)[0] += 1e-3
    if at == ("stop", "0", 6):
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun passes it on to all
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    set_learning_rates(optimizer, factor)

def spoiled_digest(path):
    if act == "die writing" and os.environ["RANK"] == "0" and "checkpoint-8" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return file_digest(path)

loop.set_learning_rates, checkpoint.file_digest = spoiled_update, spoiled_digest
if forked:
    sys.exit(two_ranks.main())
masked_run_squad.main()
"""


@pytest.fixture
def spoiled(tmp_path, flags):
    """Runs two processes, one of which does `act` at update 6; returns how they ended.

    Forked, they start sooner than under torchrun.
    """

    def start(act, *more, forked=False):
        script, commands = tmp_path / "script.py", tmp_path / "commands.json"
        places = {"root": str(ROOT), "tests": str(ROOT / "tests")}
        script.write_text(SPOILED.format(act=act, forked=forked, **places))
        words = flags("out", TRAIN, METHODS["topK"], "--save_steps 2", *more)
        commands.write_text(json.dumps([words]))
        started = time.perf_counter()
        done = launch(script, commands, timeout=120) if forked else torchrun(script, *words)
        assert done.returncode != 0 and time.perf_counter() - started < 60
        return done

    return start


def whole_checkpoints(folder):
    checkpoints = checkpoint.find_checkpoints(folder)
    return [path.name for path in checkpoints if checkpoint.damage_of(path) is None]


def test_a_rank_that_is_killed_stops_the_others(spoiled, tmp_path):
    error = spoiled("die").stderr
    assert "another process died; see its error above" in error, error
    assert 'loop.py", line' not in error  # of the one that was killed torchrun tells
    assert whole_checkpoints(tmp_path / "out") == ["checkpoint-2", "checkpoint-4"]


def test_a_rank_that_is_killed_while_it_writes(
    spoiled, run, refused, flags, tmp_path, on_two_ranks
):
    error = spoiled("die writing", forked=True).stderr
    assert "another process died; see its error above" in error, error
    assert 'loop.py", line' not in error
    assert whole_checkpoints(tmp_path / "out") == ["checkpoint-4", "checkpoint-6"]
    words, resume = (TRAIN, METHODS["topK"], "--save_steps 2"), "--resume_from_checkpoint latest"
    on_two_ranks(flags("out", *words, resume), flags("whole", *words))
    assert same(tmp_path / "out", tmp_path / "whole")
    said = refused(run, "out", *words, resume)
    assert "it was written by 2 processes, and this run has 1" in said


def test_a_rank_that_drifts_is_found(spoiled):
    scores = "bert.encoder.layer.0.attention.self.query.mask_scores"
    said = f"--check_ranks: after update 6, {scores} of rank 1 is not that"
    assert said in spoiled("drift", "--check_ranks", forked=True).stderr


def test_a_signal_to_all_ranks(spoiled, tmp_path):
    assert spoiled("stop").stderr.count("stopped by SIGTERM after update") == 1
    last = whole_checkpoints(tmp_path / "out")[-1]
    assert last in ("checkpoint-6", "checkpoint-7", "checkpoint-8")
