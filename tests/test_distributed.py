"""Several processes under torchrun do what one process does, and stop together."""

import importlib
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import launch
from tiny import read, same, weights

import masked_run_squad
from emmental.system.errors import UserError, one_line_errors
from emmental.system.launcher import Launch, read_launch
from emmental.training import checkpoint, distributed

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--model_type masked_bert --do_lower_case --do_train --do_eval --max_seq_length 48 "
    "--max_steps 8 --warmup_steps 1 --save_steps 0 --logging_steps 2 --adam_epsilon 1e-4"
).split()
SQUAD = ["--max_query_length", "16", "--doc_stride", "16"]
METHODS = {
    "topK": "--pruning_method topK --final_threshold 0.3 --gradient_accumulation_steps 2",
    "l0": "--pruning_method l0 --initial_threshold 1 --final_threshold 1 --mask_scale 2.197 "
    "--regularization l0 --final_lambda 10",
    "threshold": "--pruning_method threshold --final_threshold 0.3 --global_topk "
    "--global_topk_frequency_compute 3",
}
METHODS = {name: flags.split() for name, flags in METHODS.items()}


def run(launcher, output, cache, model, data, *flags, script="masked_run_squad.py"):
    """launcher: the words of one; None for this process."""
    places = {"output_dir": output, "cache_dir": cache}
    places |= {"model_name_or_path": model, "data_dir": data}
    places = [word for name, place in places.items() for word in (f"--{name}", str(place))]
    if launcher is None:
        words = [*FLAGS, *flags, *places]
        importlib.import_module(script.removesuffix(".py")).main(list(map(str, words)))
        return None
    done = launch(*launcher, ROOT / script, *FLAGS, *flags, *places)
    assert done.returncode == 0, done.stderr
    return done


def torchrun(processes):
    return f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()


TORCHRUN = torchrun(2)
LAUNCH = [word.replace("distributed.run", "distributed.launch") for word in TORCHRUN]


@pytest.mark.parametrize("method, processes", [("l0", 2), ("threshold", 2), ("topK", 4)])
def test_several_processes_reach_the_weights_of_one(
    method, processes, tmp_path, tiny_bert, squad_dir
):
    # 24 questions in batches of 10 or 20: in the last of an epoch, some rank has no example.
    common = (tmp_path / "cache", tiny_bert, squad_dir, *SQUAD, *METHODS[method])
    run(None, tmp_path / "one", *common, "--per_gpu_train_batch_size", str(5 * processes))
    own = ("--per_gpu_train_batch_size", "5", "--check_ranks")
    done = run(torchrun(processes), tmp_path / "many", *common, *own)
    assert done.stdout.count("results saved to") == 1  # rank 0 alone speaks
    assert "Warning" not in done.stderr
    one, many = tmp_path / "one", tmp_path / "many"
    torch.testing.assert_close(weights(many), weights(one), rtol=1e-3, atol=1e-5)
    assert read(many / "eval_results.json") == pytest.approx(read(one / "eval_results.json"))
    # Of every question, though ten are no multiple of the processes.
    assert read(many / "predictions_.json") == read(one / "predictions_.json")


def test_two_processes_on_a_glue_task(tmp_path, tiny_bert):
    places = enumerate(["oslo", "rome", "lima"] * 7)
    rows = "".join(f"ada lives in {place} .\t{number % 2}\n" for number, place in places)
    for split in "train", "dev":
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    rows = "".join(f"{n}\tben lives in rome .\n" for n in range(7))
    (tmp_path / "test.tsv").write_text("index\tsentence\n" + rows)
    task = "--task_name", "sst-2", "--do_predict", *METHODS["topK"], "--per_gpu_train_batch_size"
    common, script = (tmp_path / "cache", tiny_bert, tmp_path, *task), "masked_run_glue.py"
    run(None, tmp_path / "one", *common, "10", script=script)
    run(LAUNCH, tmp_path / "two", *common, "5", script=script)  # it adds --local-rank=0
    one, two = tmp_path / "one", tmp_path / "two"
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=1e-5)
    ours, theirs = (read(folder / "eval_results.json") for folder in (one, two))
    assert ours.pop("entropy") == pytest.approx(theirs.pop("entropy"), rel=1e-4)
    assert ours == theirs
    assert (one / "SST-2.tsv").read_text() == (two / "SST-2.tsv").read_text()
    assert read(two / "training_summary.json")["processes"] == 2


WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variables, flag, launch",
    [
        ({}, -1, (0, 1, 0, 1)),
        (WHOLE, -1, (1, 4, 0, 1)),
        (WHOLE, 1, (1, 4, 1, 2)),
        (WHOLE | {"LOCAL_RANK": "0"}, 1, (1, 4, 0, 1)),
        (WHOLE | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, -1, (1, 4, 1, 2)),
    ],
)
def test_the_variables_of_a_launcher(monkeypatch, variables, flag, launch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_launch(flag) == Launch(*launch)


@pytest.mark.parametrize(
    "variables, flags, said",
    [
        ({"RANK": "1"}, [], "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "2"}, [], "RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"LOCAL_RANK": "1"}, [], "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        ({}, ["--local_rank", "1"], "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        (WHOLE | {"WORLD_SIZE": ""}, [], "WORLD_SIZE not set"),
        (WHOLE | {"MASTER_ADDR": " "}, [], "MASTER_ADDR not set"),
        (WHOLE | {"RANK": "one"}, [], "RANK is 'one'"),
        (WHOLE | {"RANK": "-1"}, [], "RANK is '-1'"),
        (WHOLE | {"LOCAL_RANK": "x"}, [], "LOCAL_RANK is 'x'"),
        (WHOLE | {"RANK": "4"}, [], "RANK 4 is not below WORLD_SIZE 4"),
        (WHOLE | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, [], "LOCAL_RANK 2 and LOCAL_WORLD"),
        (WHOLE | {"LOCAL_WORLD_SIZE": "8"}, [], "LOCAL_WORLD_SIZE 8 do not fit WORLD_SIZE 4"),
    ],
)
def test_an_incomplete_set_of_variables_is_ignored(
    tmp_path, tiny_bert, squad_dir, monkeypatch, capsys, caplog, variables, flags, said
):
    """The run is an ordinary one, and its errors are said."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    places = f"--output_dir {tmp_path}/out --cache_dir {tmp_path}/cache "
    places += f"--model_name_or_path {tiny_bert} --data_dir {squad_dir} --max_steps 4"
    command = [*FLAGS, *SQUAD, *places.split(), *flags]
    masked_run_squad.main(command)
    warned = [message for message in caplog.messages if "launcher" in message]
    assert len(warned) == 1 and said in warned[0]
    assert "results saved to" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(SystemExit):
        masked_run_squad.main([*command, "--fp61"])
    assert "unknown argument --fp61" in capsys.readouterr().err


def test_a_place_where_no_process_can_be_joined(monkeypatch):
    for name, value in (WHOLE | {"LOCAL_RANK": "0", "MASTER_PORT": "99999"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cannot join the other processes .* 99999"):
        distributed.join_world(no_cuda=True, local_rank=-1, fp16=False)


def test_sigterm_ends_a_process_that_waits_for_others(monkeypatch):
    """At once: no handler runs in Python while torch waits."""
    found = []
    note = lambda *_, **__: found.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", note)
    monkeypatch.setattr(dist, "barrier", note)
    with one_line_errors():
        with distributed.join_world(no_cuda=True, local_rank=-1, fp16=False).main_first():
            note()
    assert found[:2] == [signal.SIG_DFL] * 2 and callable(found[2])


def test_errors_of_two_processes_are_said_once(tmp_path, tiny_bert, squad_dir):
    places = tmp_path / "out", tmp_path / "cache", tiny_bert, squad_dir
    # What is broken is found by rank 0 alone, while the other waits for its features.
    (tmp_path / "broken.json").write_text("{}")
    for file, said in ("absent.json", "error: --train_file"), (
        tmp_path / "broken.json", '"data" is missing'
    ):  # fmt: skip
        with pytest.raises(AssertionError) as failed:
            run(TORCHRUN, *places, *SQUAD, "--train_file", file)
        assert str(failed.value).count(said) == 1
    assert "gloo" not in str(failed.value)
    assert 'masked_run_squad.py", line' not in str(failed.value)


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import masked_run_squad
from emmental.training import checkpoint, loop
rank, act, update = int(os.environ["RANK"]), {act!r}, iter(range(1, 1000))
original = loop.set_learning_rates

def set_learning_rates(optimizer, factor):
    number = next(update)
    if number == 6 and rank == 1 and act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 6 and rank == 1 and act == "drift":
        optimizer.param_groups[0]["params"][0].data.view(-1)[0] += 1e-3
    if number == 6 and rank == 0 and act == "stop":
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun passes it on to all
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    original(optimizer, factor)

loop.set_learning_rates = set_learning_rates
if act == "die writing" and rank == 0:
    digest = checkpoint.file_digest

    def die(path):
        if "checkpoint-8" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return digest(path)

    checkpoint.file_digest = die
masked_run_squad.main()
"""


@pytest.fixture
def spoiled(tmp_path, tiny_bert, squad_dir):
    """Run two processes, one of which does `act` at update 6; returns how it ended, and seconds."""

    def start(act, *flags):
        (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), act=act))
        places = f"--output_dir {tmp_path}/out --cache_dir {tmp_path}/cache "
        places += f"--model_name_or_path {tiny_bert} --data_dir {squad_dir}"
        own = "--per_gpu_train_batch_size 5 --save_steps 2 --max_steps 8"
        common = [*FLAGS, *SQUAD, *METHODS["topK"], *own.split(), *places.split()]
        started = time.perf_counter()
        done = launch(*TORCHRUN, tmp_path / "script.py", *common, *flags, timeout=120)
        return done, time.perf_counter() - started

    return start


def whole_checkpoints(folder):
    found = checkpoint.find_checkpoints(folder)
    return [path.name for path in found if checkpoint.damage_of(path) is None]


@pytest.mark.parametrize(
    "act, kept",
    [("die", ["checkpoint-2", "checkpoint-4"]), ("die writing", ["checkpoint-4", "checkpoint-6"])],
)
def test_a_rank_that_is_killed_stops_the_others(
    spoiled, tmp_path, tiny_bert, squad_dir, act, kept, capsys
):
    done, seconds = spoiled(act)
    assert done.returncode != 0 and seconds < 60
    assert "another process died; see its error above" in done.stderr, done.stderr
    assert 'loop.py", line' not in done.stderr  # of the one that was killed torchrun tells
    assert whole_checkpoints(tmp_path / "out") == kept
    if act == "die":
        return
    rest = [*METHODS["topK"], "--per_gpu_train_batch_size", "5", "--save_steps", "2"]
    common = (tmp_path / "cache", tiny_bert, squad_dir, *SQUAD, *rest)
    run(TORCHRUN, tmp_path / "out", *common, "--resume_from_checkpoint", "latest")
    run(TORCHRUN, tmp_path / "whole", *common)
    assert same(tmp_path / "out", tmp_path / "whole")
    # Another number of processes is refused in words.
    with pytest.raises(SystemExit):
        run(None, tmp_path / "out", *common, "--resume_from_checkpoint", "latest")
    assert "it was written by 2 processes, and this run has 1" in capsys.readouterr().err


def test_a_rank_that_drifts_is_found(spoiled):
    done, _ = spoiled("drift", "--check_ranks")
    assert done.returncode != 0
    scores = "bert.encoder.layer.0.attention.self.query.mask_scores"
    assert f"--check_ranks: after update 6, {scores} of rank 1 is not that" in done.stderr


def test_a_signal_to_all_ranks(spoiled, tmp_path):
    done, seconds = spoiled("stop")
    assert done.returncode != 0 and seconds < 60
    assert done.stderr.count("stopped by SIGTERM after update") == 1
    last = whole_checkpoints(tmp_path / "out")[-1]
    assert last in ("checkpoint-6", "checkpoint-7", "checkpoint-8")
