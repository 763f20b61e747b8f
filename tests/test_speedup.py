"""--target_speedup: heads and neurons are pruned until the compact model is as fast as asked."""

import json
from dataclasses import asdict, replace

import pytest
import tiny
from transformers import AutoModelForQuestionAnswering

import bertarize
import masked_run_squad
from emmental.inference import times
from emmental.inference.times import SpeedTable, measure_table
from emmental.training import speed
from paper.report import headline
from paper.runs import find_runs

TABLE = SpeedTable(
    heads=[[0, 1, 4], [0.0, 40.0, 100.0]],
    neurons=[[0, 64], [0.0, 100.0]],
    rest=50.0,
    dense=450.0,  # of two layers
    runtime="torch",
    batch=1,
    length=16,
)
FLAGS = "--pruning_method platon --granularity structure --global_topk"


@pytest.fixture
def squad(tmp_path, tiny_bert, squad_dir, monkeypatch):
    """A run of 8 updates with --target_speedup, for which TABLE is what is measured."""
    monkeypatch.setattr(speed, "measure_table", lambda *args: TABLE)
    monkeypatch.setattr(speed, "measure_speedup", lambda *args: 2.5)

    def run(asked, *words, output="out"):
        flags = f"--do_train --do_eval {FLAGS} --target_speedup {asked}"
        return masked_run_squad.main(
            tiny.command(tmp_path, tiny_bert, squad_dir, output, flags, *words)
        )

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("asked", [1.5, 3, 6])
def test_the_compact_model_takes_the_time_that_was_asked_for(squad, asked, caplog, capsys):
    caplog.set_level("INFO")
    results = squad(asked)
    assert "bertarize.py --compact will make a smaller bert model" in caplog.text
    config = tiny.read(squad.folder / "out" / "config.json")
    assert config["structure_times"]["dense"] == 450.0
    assert config["threshold"] == pytest.approx((450 / asked - 50) / 400)
    assert results["speedup"] == 2.5
    assert ("measure again on an idle machine" in caplog.text) == (asked > 2.5)
    assert "this machine is busy" not in caplog.text
    assert f", time {config['threshold']:.1%}, remaining " in caplog.text  # no threshold
    # One head costs up to 40 of the 450 microseconds, and neurons come in multiples of 8.
    assert 450 / results["speedup_predicted"] == pytest.approx(450 / asked, abs=40)
    folder = bertarize.main(["--model_name_or_path", str(squad.folder / "out"), "--compact"])
    load = f'AutoModelForQuestionAnswering.from_pretrained("{folder}", trust_remote_code=True)'
    assert f"load it anywhere, with torch and transformers: {load}" in capsys.readouterr().out
    small = AutoModelForQuestionAnswering.from_pretrained(folder).config
    predicted = 450 / TABLE.time_of(small.layer_heads, small.layer_neurons)
    assert predicted == pytest.approx(results["speedup_predicted"])


def test_whole_sublayers_go_and_the_compact_model_trains_on(squad, squad_dir):
    squad(8)
    folder = bertarize.main(["--model_name_or_path", str(squad.folder / "out"), "--compact"])
    small = AutoModelForQuestionAnswering.from_pretrained(folder).config
    assert 0 in small.layer_heads  # the floor keeps one head in each layer

    words = "--do_train --do_eval --model_type dense --max_steps 1 --warmup_steps 0"
    masked_run_squad.main(tiny.command(squad.folder, folder, squad_dir, "second", words))
    first, second = find_runs(str(squad.folder))[0]
    assert (first.method, second.method) == ("PLATON, global", "compact")
    assert second.start == "fine-tuned" and second.granularity == ""
    assert second.remaining_linear == pytest.approx(first.remaining_linear, abs=1)
    rows = headline([first, second])
    assert rows[0][-2:] == ["PLATON, global", "compact"]
    dense, compact = ([row[column] for row in rows[1:]] for column in (2, -1))
    assert not any(dense) and any(" at " in cell for cell in compact)


def test_an_interrupted_run_keeps_its_table(squad, monkeypatch):
    """Times are measured once: those of another hour would end at other masks."""
    whole = squad(2, "--save_steps 3", output="whole")
    monkeypatch.setattr(speed, "measure_table", lambda *args: pytest.fail("measured again"))
    checkpoint = squad.folder / "whole" / "checkpoint-3"
    resumed = squad(2, f"--save_steps 3 --resume_from_checkpoint {checkpoint}")
    assert resumed == whole
    assert tiny.same(*(tiny.weights(squad.folder / name) for name in ("whole", "out")))


def test_a_dense_model_is_not_measured(squad, monkeypatch):
    monkeypatch.setattr(speed, "measure_table", lambda *args: pytest.fail("measured"))
    squad(2, "--model_type bert")
    assert "structure_times" not in tiny.read(squad.folder / "out" / "config.json")


def test_a_table_of_a_busy_machine_is_warned_of(squad, monkeypatch, caplog):
    busy = replace(TABLE, heads=[[0, 1, 4], [0.0, 140.0, 100.0]])
    monkeypatch.setattr(speed, "measure_table", lambda *args: busy)
    squad(2)
    assert "this machine is busy" in caplog.text


def test_what_cannot_be(squad, refused):
    for asked, words, said in (
        (9, "", "without any heads and neurons, the model is 9.0 times as fast"),
        (1, "", "--target_speedup must be above 1"),
        (2, "--final_threshold 0.1", "--target_speedup sets --final_threshold: drop"),
        (2, "--granularity hybrid", "needs --granularity structure --global_topk"),
    ):
        assert said in refused(squad, asked, words)


def test_a_table_is_measured(monkeypatch):
    """Of real models: more heads and neurons never cost less, and the dense model is the sum."""
    monkeypatch.setattr(times, "ROUNDS", 3)
    model = tiny.model_of("mpnet", "SequenceClassification")
    table = measure_table(model, "torch", 2, 16)
    json.dumps(asdict(table))
    layers = model.config.num_hidden_layers
    assert table.heads[0] == [0, 1, 2, 3, 4] and table.neurons[0][-1] == 64
    assert table.rest > 0 and table.dense > 0
    assert SpeedTable(**asdict(table)) == table
    if table.heads[1] == sorted(table.heads[1]) and table.neurons[1] == sorted(table.neurons[1]):
        assert table.time_of([4] * layers, [64] * layers) == pytest.approx(table.dense)
