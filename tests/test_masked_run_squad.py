"""masked_run_squad.py as a user runs it: through its main, looking at what it leaves behind."""

import collections
import json
import math
import shutil
from argparse import Namespace

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

import bertarize
import counts_parameters
import masked_run_squad
from emmental import MaskedBertForQuestionAnswering
from emmental.data import squad
from emmental.inference import sparsify
from emmental.modules import masks
from emmental.training import run as narrative
from emmental.training.distributed import World
from emmental.training.passes import Means
from emmental.training.settings import warmup_updates

SHORT = (
    "--max_seq_length 48 --max_query_length 16 --doc_stride 16 --per_gpu_train_batch_size 4"
).split()
METHODS = {
    "topK": "--pruning_method topK --initial_threshold 1 --final_threshold 0.2".split(),
    "magnitude": ("--pruning_method magnitude --initial_threshold 1 --final_threshold 0.2").split(),
    "threshold": (
        "--pruning_method threshold --initial_threshold=-0.1 --final_threshold=0.0"
    ).split(),
    "soft": (
        "--pruning_method sigmoied_threshold --initial_threshold 0 --final_threshold 0.5 "
        "--regularization l1 --final_lambda 20"
    ).split(),
    "soft to a target": (
        "--pruning_method sigmoied_threshold --initial_threshold 0 --final_threshold 0.1 "
        "--regularization l1 --target_remaining 0.3 --mask_scores_learning_rate 0.3"
    ).split(),
    "l0 to a target": (
        "--pruning_method l0 --initial_threshold 1 --final_threshold 1 --mask_scale 2.197 "
        "--regularization l0 --target_remaining 0.3 --mask_scores_learning_rate 0.5"
    ).split(),
    "l0": (
        "--pruning_method l0 --initial_threshold 1 --final_threshold 1 --mask_scale 2.197 "
        "--regularization l0 --final_lambda 20 --mask_scores_learning_rate 0.1"
    ).split(),
    "global topK": (
        "--pruning_method topK --global_topk --global_topk_frequency_compute 3 "
        "--initial_threshold 1 --final_threshold 0.2"
    ).split(),
    "global magnitude": (
        "--pruning_method magnitude --global_topk --global_topk_frequency_compute 3 "
        "--initial_threshold 1 --final_threshold 0.2"
    ).split(),
}


@pytest.fixture
def run(tmp_path, tiny_bert, squad_dir):
    """Run the script on the tiny data; later flags win."""

    def run_squad(*flags, output="out", model_type="masked_bert", model=tiny_bert):
        common = [
            "--model_type",
            model_type,
            "--model_name_or_path",
            str(model),
            "--output_dir",
            str(tmp_path / output),
        ]
        data = [
            "--data_dir",
            str(squad_dir),
            "--cache_dir",
            str(tmp_path / "cache"),
            "--do_lower_case",
        ]
        masked_run_squad.main([*common, *data, *SHORT, *flags])
        return tmp_path / output

    return run_squad


def weights(folder):
    return load_file(folder / "model.safetensors")


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }, events


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


TRAIN = "--do_train --max_steps 12 --warmup_steps 2 --save_steps 0 --logging_steps 4".split()


def test_a_run_leaves_exactly_what_the_readme_says(run):
    out = run(*METHODS["topK"], *TRAIN, "--do_eval", "--save_steps", "5")
    names = {file.name for file in out.iterdir() if not file.name.startswith("events.out.tfevents")}
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_args.json",
        "training_summary.json",
        "eval_results.txt",
        "eval_results.json",
        "predictions_.json",
        "nbest_predictions_.json",
        "checkpoint-5",
        "checkpoint-10",
    }
    summary = json.loads((out / "training_summary.json").read_text())
    assert (
        summary["updates"] == 12 and summary["seconds"] > 0 and "threads of" in summary["hardware"]
    )
    assert {file.name for file in (out / "checkpoint-5").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_args.json",
        "training_state.pt",
        "files.json",
    }
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["pruning_method"], config["threshold"]) == (
        "masked_bert",
        "topK",
        0.2,
    )
    results = json.loads((out / "eval_results.json").read_text())
    assert results["total"] == 10 and 0 <= results["exact"] <= results["f1"] <= 100
    assert f"f1 = {results['f1']}\n" in (out / "eval_results.txt").read_text()
    predictions = json.loads((out / "predictions_.json").read_text())
    assert set(predictions) == {f"q{i}" for i in range(10)}
    nbest = json.loads((out / "nbest_predictions_.json").read_text())
    assert all(nbest[key][0]["text"] == text for key, text in predictions.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_counts_and_bertarizes(run, method, capsys):
    out = run(*METHODS[method], *TRAIN, "--do_eval")
    before = MaskedBertForQuestionAnswering.from_pretrained(out)
    counts = counts_parameters.main(
        ["--serialization_dir", str(out), "--json", str(out / "counts.json")]
    )
    if "topK" in method or "magnitude" in method:
        kept = sum(m.remaining for m in counts.matrices)
        total = sum(m.total for m in counts.matrices)
        exact = (
            int(0.2 * total)
            if "global" in method
            else sum(int(0.2 * m.total) for m in counts.matrices)
        )
        assert kept == exact
    written = json.loads((out / "counts.json").read_text())
    assert written["remaining_percent_linear"] == pytest.approx(counts.linear_percent)
    assert f"{counts.published_percent:.3f}" in capsys.readouterr().out
    results = json.loads((out / "eval_results.json").read_text())
    assert results["remaining_percent"] == pytest.approx(counts.published_percent)

    target = bertarize.main(["--model_name_or_path", str(out)])
    assert target == out.parent / "bertarized_out"
    after, info = BertForQuestionAnswering.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    inputs = AutoTokenizer.from_pretrained(target)(
        "where does ada live ?", "ada lives in oslo .", return_tensors="pt"
    )
    masked, plain = before.eval()(**inputs), after.eval()(**inputs)
    torch.testing.assert_close(masked.start_logits, plain.start_logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked.end_logits, plain.end_logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["soft to a target", "l0 to a target"])
def test_a_target_is_reached_and_lambda_steered(run, method, caplog):
    flags = [
        *METHODS[method],
        *TRAIN,
        *"--max_steps 150 --warmup_steps 15 --logging_steps 10".split(),
    ]
    out = run(*flags, "--do_eval", "--final_warmup", "4")
    remaining = json.loads((out / "eval_results.json").read_text())["remaining_percent_linear"]
    assert remaining == pytest.approx(
        30, rel=0.1
    )  # some ten updates an e-fold: 2% takes a longer run
    values, _ = scalars(out)
    weights_of_penalty = list(values["lambda"].values())
    assert len(set(weights_of_penalty)) > 5 and min(weights_of_penalty) >= 0
    assert "--target_remaining 0.3: " in caplog.text


def test_embeddings_stay_frozen_and_the_encoder_moves(run, tiny_bert):
    before, after = weights(tiny_bert), weights(run(*METHODS["topK"], *TRAIN))
    for key, value in before.items():
        moved = not torch.equal(value, after[key])
        assert moved != key.startswith("bert.embeddings."), key


@pytest.mark.parametrize("method", ["topK", "soft", "l0", "global topK"])
def test_resume_is_bit_identical(run, method, tiny_bert, tmp_path):
    # Dropout makes the resumed run depend on the random state.
    BertConfig.from_pretrained(tiny_bert, hidden_dropout_prob=0.3).save_pretrained(
        tmp_path / "dropout"
    )
    flags = [
        *METHODS[method],
        *TRAIN,
        *"--gradient_accumulation_steps 2 --save_steps 4".split(),
        "--config_name",
        str(tmp_path / "dropout"),
    ]
    whole = run(*flags, "--save_total_limit", "3", output="whole")
    assert {f.name for f in whole.glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-8",
        "checkpoint-12",
    }
    resumed = run(*flags, "--resume_from_checkpoint", str(whole / "checkpoint-4"), output="resumed")
    assert same(weights(whole), weights(resumed))
    first = torch.load(whole / "checkpoint-12" / "training_state.pt", weights_only=True)[
        "optimizer"
    ]["state"]
    second = torch.load(resumed / "checkpoint-12" / "training_state.pt", weights_only=True)[
        "optimizer"
    ]["state"]
    assert all(torch.equal(first[i]["exp_avg_sq"], second[i]["exp_avg_sq"]) for i in first)


def test_latest_takes_the_newest_checkpoint_and_starts_anew_without_one(run):
    flags = [*METHODS["topK"], *TRAIN, "--save_steps", "5", "--resume_from_checkpoint", "latest"]
    out = run(*flags)
    first = weights(out)
    run(*flags)  # from checkpoint-10
    assert same(first, weights(out))


def test_resume_refuses_another_run(run, capsys):
    out = run(*METHODS["topK"], *TRAIN, "--save_steps", "5")
    with pytest.raises(SystemExit) as stop:
        run(
            *METHODS["topK"],
            *TRAIN,
            "--learning_rate",
            "1e-3",
            "--resume_from_checkpoint",
            str(out / "checkpoint-5"),
        )
    assert stop.value.code == 2
    assert "--learning_rate" in capsys.readouterr().err


def refused(capsys, run, *flags):
    with pytest.raises(SystemExit) as stop:
        run(*METHODS["topK"], *TRAIN, *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_resume_refuses_changed_answers(run, squad_dir, tmp_path, capsys):
    out = run(*METHODS["topK"], *TRAIN, "--save_steps", "5")
    document = json.loads((squad_dir / "train-v1.1.json").read_text())
    answer = document["data"][0]["paragraphs"][3]["qas"][0]["answers"][0]
    answer |= {"text": "lives", "answer_start": 4}  # same inputs, same lengths, another label
    assert document["data"][0]["paragraphs"][3]["context"].startswith("lives", 4)
    (tmp_path / "changed.json").write_text(json.dumps(document))
    resume = [
        "--train_file",
        str(tmp_path / "changed.json"),
        "--resume_from_checkpoint",
        str(out / "checkpoint-5"),
    ]
    assert "the training data has changed" in refused(capsys, run, *resume)


def test_resume_leaves_another_run_alone(run, capsys):
    mine = run(*METHODS["topK"], *TRAIN, "--save_steps", "5")
    other = run(*METHODS["topK"], *TRAIN, "--save_steps", "4", "--do_eval", output="other")
    before = {file: file.stat().st_mtime_ns for file in other.rglob("*")}
    flags = ["--resume_from_checkpoint", str(mine / "checkpoint-10")]
    with pytest.raises(SystemExit):
        run(*METHODS["topK"], *TRAIN, *flags, output="other")
    assert "other is not empty" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in other.rglob("*")} == before
    run(*METHODS["topK"], *TRAIN, *flags, "--overwrite_output_dir", output="other")
    assert same(weights(mine), weights(other))
    assert not list(other.glob("checkpoint-*")) and not list(other.glob("*predictions*"))
    assert (mine / "checkpoint-10").is_dir()


@pytest.mark.parametrize(
    "content", [[1, 2], {"step": 5}, {"step": 5, "data": "", "random_states": []}]
)
def test_resume_refuses_a_damaged_state(run, capsys, content):
    out = run(*METHODS["topK"], *TRAIN, "--save_steps", "5")
    torch.save(content, out / "checkpoint-10" / "training_state.pt")
    for folder in out.glob("checkpoint-*"):
        (folder / "files.json").unlink()  # as an older version leaves them
    error = refused(capsys, run, "--resume_from_checkpoint", str(out / "checkpoint-10"))
    assert "checkpoint-10 is damaged" in error and "weights_only" not in error
    (out / "checkpoint-5" / "training_args.json").write_text("[]")
    error = refused(capsys, run, "--resume_from_checkpoint", str(out / "checkpoint-5"))
    assert "checkpoint-5 is damaged" in error


def test_overwriting_removes_the_results_of_the_old_run(run):
    out = run(*METHODS["topK"], *TRAIN, "--do_eval", "--save_steps", "5", "--eval_all_checkpoints")
    results = json.loads((out / "eval_results.json").read_text())
    assert (results["pruning_method"], results["threshold"], results["global_topk"]) == (
        "topK",
        0.2,
        False,
    )
    (out / "notes.md").write_text("mine")
    run(*METHODS["magnitude"], *TRAIN, "--overwrite_output_dir")
    names = {file.name for file in out.iterdir() if not file.name.startswith("events.out")}
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_args.json",
        "training_summary.json",
        "notes.md",
    }


def test_old_checkpoints_are_removed_unless_all_are_evaluated(run):
    flags = [*METHODS["topK"], *TRAIN, "--save_steps", "3"]
    assert len(list(run(*flags).glob("checkpoint-*"))) == 2
    assert len(list(run(*flags, "--save_total_limit", "1", output="b").glob("checkpoint-*"))) == 1
    out = run(*flags, "--do_eval", "--eval_all_checkpoints", output="c")
    assert len(list(out.glob("checkpoint-*"))) == 4
    results = json.loads((out / "eval_results.json").read_text())
    assert {"exact", "exact_3", "exact_6", "exact_9", "exact_12"} <= results.keys()
    assert (out / "predictions_3.json").is_file()


def test_distillation_and_what_tensorboard_shows(run, tiny_bert):
    flags = [
        "--teacher_type",
        "bert",
        "--teacher_name_or_path",
        str(tiny_bert),
        *("--alpha_distil 0.9 --alpha_ce 0.1 --save_steps 12 --evaluate_during_training").split(),
    ]
    out = run(*METHODS["soft"], *TRAIN, *flags)
    values, events = scalars(out)
    wanted = {
        "loss",
        "loss/task",
        "loss/distil",
        "loss/penalty",
        "gradient_norm",
        "threshold",
        "lambda",
        "remaining/overall",
        "learning_rate/scores",
        "learning_rate/weights",
        "eval/f1",
        "eval/exact",
    }
    assert wanted <= values.keys()
    assert sum(tag.startswith("remaining/bert.encoder.layer.0.") for tag in values) == 6
    assert list(values["loss"]) == [4, 8, 12]
    assert len(events.Tags()["histograms"]) == 12
    last = {name: series[12] for name, series in values.items()}
    assert last["threshold"] == pytest.approx(0.5) and last["lambda"] == pytest.approx(20)
    # The last four updates rest at the final lambda, so the means add up.
    expected = 0.9 * last["loss/distil"] + 0.1 * last["loss/task"] + 20 * last["loss/penalty"]
    assert last["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_dense_teacher_trains_without_masks(run):
    out = run(*TRAIN, "--do_eval", model_type="bert")
    assert not any(key.endswith("mask_scores") for key in weights(out))
    assert json.loads((out / "config.json").read_text())["model_type"] == "bert"
    assert "remaining_percent" not in json.loads((out / "eval_results.json").read_text())
    BertForQuestionAnswering.from_pretrained(out)


def test_evaluating_alone_gives_the_results_of_training(run):
    out = run(*METHODS["topK"], *TRAIN, "--do_eval")
    alone = run("--do_eval", output="alone", model=out)
    assert json.loads((out / "predictions_.json").read_text()) == json.loads(
        (alone / "predictions_.json").read_text()
    )
    assert {file.name for file in alone.iterdir()} == {
        "predictions_.json",
        "nbest_predictions_.json",
        "eval_results.txt",
        "eval_results.json",
    }


@pytest.mark.parametrize("method", METHODS)
def test_sparse_inference_predicts_the_same(run, method, monkeypatch):
    made = []
    monkeypatch.setattr(
        masked_run_squad, "sparsify", lambda model: made.append(sparsify(model)) or made[0]
    )
    model = run(*METHODS[method], *TRAIN)
    dense = run("--do_eval", model=model, output="dense")
    sparse = run("--do_eval", "--sparse_inference", model=model, output="sparse")
    for name in ("predictions_.json", "eval_results.txt"):
        assert (dense / name).read_text() == (sparse / name).read_text()
    assert len(made) == 1


def test_sparse_inference_while_training(run, capsys):
    flags = (*METHODS["topK"], *TRAIN, "--do_eval", "--evaluate_during_training")
    dense, sparse = run(*flags, output="dense"), run(*flags, "--sparse_inference", output="sparse")
    assert same(weights(dense), weights(sparse))
    assert (dense / "predictions_8.json").read_text() == (sparse / "predictions_8.json").read_text()
    assert "--sparse_inference computes in float32" in refused(
        capsys, run, "--sparse_inference", "--bf16"
    )


def test_a_released_pruned_bert_evaluates_and_fine_prunes(run):
    """The released PruneBERT checkpoints are plain BERTs with zeros, as of bertarize.py."""
    out = run(*METHODS["topK"], *TRAIN, "--do_eval")
    plain = bertarize.main(["--model_name_or_path", str(out)])
    alone = run("--do_eval", model=plain, model_type="bert", output="alone")
    assert json.loads((out / "predictions_.json").read_text()) == json.loads(
        (alone / "predictions_.json").read_text()
    )

    flags = (
        "--pruning_method magnitude --global_topk --initial_threshold .25 --final_threshold .25"
    ).split()
    further = weights(
        bertarize.main(
            ["--model_name_or_path", str(run(*flags, *TRAIN, model=plain, output="further"))]
        )
    )
    zeros = kept = 0
    for key, value in weights(plain).items():
        if "encoder" in key and value.dim() == 2:
            zeros += ((further[key] == 0) & (value == 0)).sum() / (value == 0).sum() / 12
            kept += ((further[key] != 0) & (value != 0)).sum() / (value != 0).sum() / 12
    assert zeros > 0.9 and kept > 0.99  # the slack of 5% lets some zeros learn


def test_version_2(run):
    out = run(*METHODS["topK"], *TRAIN, "--do_eval", "--version_2_with_negative")
    results = json.loads((out / "eval_results.json").read_text())
    assert results["HasAns_total"] == 6 and results["NoAns_total"] == 4
    assert {"best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"} <= results.keys()
    odds = json.loads((out / "null_odds_.json").read_text())
    assert set(odds) == {f"q{i}" for i in range(10)} and all(
        math.isfinite(value) for value in odds.values()
    )


def test_accumulation_equals_a_larger_batch(run):
    large = run(
        *METHODS["topK"],
        *TRAIN,
        *"--max_steps 6 --warmup_steps 1 --per_gpu_train_batch_size 24".split(),
        output="a",
    )
    small = run(
        *METHODS["topK"],
        *TRAIN,
        *(
            "--max_steps 6 --warmup_steps 1 --per_gpu_train_batch_size 6 "
            "--gradient_accumulation_steps 4"
        ).split(),
        output="b",
    )
    for key, value in weights(large).items():
        if not key.endswith(
            "mask_scores"
        ):  # Adam's first steps turn rounding into sign flips of tiny gradients
            torch.testing.assert_close(value, weights(small)[key], rtol=0, atol=2e-4)


def test_a_fractional_epoch_trains_what_it_schedules(run):
    out = run(
        *METHODS["topK"],
        *(
            "--do_train --num_train_epochs 1.5 --logging_steps 1 --save_steps 0 "
            "--gradient_accumulation_steps 4"
        ).split(),
    )
    values, _ = scalars(out)
    assert max(values["loss"]) == 3  # 24 questions, 6 batches, 2 updates an epoch


@pytest.mark.parametrize("ratio, total", [("0.17", ["--max_steps", "12"]), ("0.29", [])])
def test_the_warmup_as_a_fraction_of_the_updates(run, ratio, total):
    """It fits any number of them: of the 18 updates of three epochs, 5.22."""
    steps, flags = "2" if total else "5", [*METHODS["topK"], "--do_train", "--save_steps", "0"]
    expected = weights(run(*flags, *total, "--warmup_steps", steps))
    found = weights(run(*flags, *total, "--warmup_ratio", ratio, output="ratio"))
    assert same(expected, found)


def test_the_warmup_is_rounded_down():
    for ratio, total, updates in ((0.29, 100, 29), (0.1, 30, 3), (0.3, 3, 0), (0, 9, 0)):
        assert warmup_updates(Namespace(warmup_ratio=ratio), total) == updates


def test_bf16_keeps_scores_and_moments_in_float32(run):
    out = run(*METHODS["topK"], *TRAIN, "--bf16", "--save_steps", "12")
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}
    state = torch.load(out / "checkpoint-12" / "training_state.pt", weights_only=True)["optimizer"][
        "state"
    ]
    assert {entry["exp_avg"].dtype for entry in state.values()} == {torch.float32}


def test_features_are_cached_and_workers_change_nothing(run):
    out = run(*METHODS["topK"], *TRAIN)
    cached = sorted((out.parent / "cache").rglob("*.arrow"))
    again = run(*METHODS["topK"], *TRAIN, "--num_workers", "1", output="again")
    assert cached and sorted((out.parent / "cache").rglob("*.arrow")) == cached
    two = run(*METHODS["topK"], *TRAIN, "--threads", "2", "--overwrite_cache", output="two")
    assert same(weights(out), weights(two))
    assert same(weights(out), weights(again))


def test_non_finite_loss_stops_and_keeps_the_checkpoint(run, monkeypatch, capsys):
    honest, calls = masked_run_squad.span_loss, []

    def poisoned(logits, batch):
        calls.append(1)
        return honest(logits, batch) * (float("nan") if len(calls) == 8 else 1.0)

    monkeypatch.setattr(masked_run_squad, "span_loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        run(*METHODS["topK"], *TRAIN, "--save_steps", "5")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "update 8" in error and "loss/task = nan" in error
    monkeypatch.undo()
    out = run(*METHODS["topK"], *TRAIN, "--save_steps", "5", "--resume_from_checkpoint", "latest")
    assert same(
        weights(out),
        weights(run(*METHODS["topK"], *TRAIN, "--save_steps", "5", output="undisturbed")),
    )


def test_a_disk_that_fills_up_breaks_no_checkpoint(run, monkeypatch, capsys):
    honest = torch.save

    def full(state, path):
        if state["step"] > 5:
            raise RuntimeError(
                "[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file"
            )
        honest(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        run(*METHODS["topK"], *TRAIN, "--save_steps", "5")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "cannot write" in error and "checkpoint-10" in error and "Traceback" not in error
    monkeypatch.undo()
    out = run(*METHODS["topK"], *TRAIN, "--save_steps", "5", "--resume_from_checkpoint", "latest")
    assert not list(out.glob(".*"))
    assert same(
        weights(out),
        weights(run(*METHODS["topK"], *TRAIN, "--save_steps", "5", output="undisturbed")),
    )


def test_misaligned_answers_are_skipped_with_their_ids(run, squad_dir, tmp_path, caplog):
    document = json.loads((squad_dir / "train-v1.1.json").read_text())
    answer = document["data"][0]["paragraphs"][3]["qas"][0]["answers"][0]
    answer["answer_start"] += 1
    (tmp_path / "shifted.json").write_text(json.dumps(document))
    run(*METHODS["topK"], *TRAIN, "--train_file", str(tmp_path / "shifted.json"))
    assert any(
        "skipped 1 training questions" in message and "q3" in message for message in caplog.messages
    )


TEXT = "ada lives in oslo . ben lives in rome ."


@pytest.fixture
def squad_file(tmp_path):
    """Write a SQuAD file with one context; returns its path."""

    def write(*questions, name="file.json"):
        article = {"title": "t", "paragraphs": [{"context": TEXT, "qas": questions}]}
        (tmp_path / name).write_text(json.dumps({"data": [article]}))
        return str(tmp_path / name)

    return write


def asked(id_, *starts, **more):
    """A question; its answers are "oslo" at these places."""
    answers = [{"text": "oslo", "answer_start": start} for start in starts]
    return {"id": id_, "question": "where does ada live ?", "answers": answers, **more}


@pytest.mark.parametrize(
    "questions, v2, trained, skipped",
    [
        ([asked(262780, 13, is_impossible=False), asked(7, 13)], False, 2, ()),
        ([asked("a", 13), *(asked(f"n{n}") for n in range(3))], True, 4, ()),
        ([asked("q1", 13), asked("q2", -1)], False, 1, ["is not at its answer_start: q2"]),
        (
            [asked("q1", 13), asked("q2", None), asked("q3"), asked("q4", 22.0), asked("q5")],
            False,
            1,
            ["skipped 2 training questions, the answer is", "no answer: q3, q5"],
        ),
        ([asked("q1", 13), asked("q2", is_impossible=1)], True, 2, ()),
    ],
)
def test_trains_on_files_of_other_tools(run, squad_file, caplog, questions, v2, trained, skipped):
    flags = ["--train_file", squad_file(*questions), *["--version_2_with_negative"] * v2]
    run(*METHODS["topK"], *TRAIN, *flags)
    assert f"training: {trained} examples" in caplog.text
    assert caplog.text.count("skipped") == len(skipped)
    assert all(reason in caplog.text for reason in skipped)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("answers", [None, [], [{"text": " "}]])
def test_without_answers_there_are_predictions_and_no_metrics(run, squad_file, caplog, v2, answers):
    """In the results, the return value and TensorBoard."""
    file = squad_file(*(asked(n) | {"answers": answers} for n in range(3)), name="dev.json")
    flags = ["--predict_file", file, *["--version_2_with_negative"] * v2]
    out = run(*METHODS["topK"], *TRAIN, "--do_eval", "--evaluate_during_training", *flags)
    assert set(json.loads((out / "predictions_.json").read_text())) == {"0", "1", "2"}
    assert caplog.text.count("no question has an answer: nothing to score") == 4
    assert not {"exact", "f1", "total", "best_f1"} & set(
        json.loads((out / "eval_results.json").read_text())
    )
    assert not any(tag.startswith("eval/") for tag in scalars(out)[0])


def test_a_dense_model_without_metrics_leaves_an_empty_file_of_results(run, squad_file, tiny_bert):
    file = squad_file(asked("a"), name="dev.json")
    out = run("--do_eval", "--predict_file", file, model_type="bert")
    assert json.loads((out / "eval_results.json").read_text()) == {}
    assert (out / "eval_results.txt").read_text() == ""


def test_the_first_samples_only(run, capsys, caplog):
    flags = [*METHODS["topK"], *TRAIN, "--save_steps", "5", "--do_eval"]
    out = run(*flags, "--max_train_samples", "7", "--max_eval_samples", "3")
    assert "training: 7 examples" in caplog.text
    assert set(json.loads((out / "predictions_.json").read_text())) == {"q0", "q1", "q2"}
    assert json.loads((out / "eval_results.json").read_text())["total"] == 3
    resume = ["--resume_from_checkpoint", "latest"]
    again = run(*flags, *resume, "--max_train_samples", "7", "--max_eval_samples", "99")
    assert json.loads((again / "eval_results.json").read_text())["total"] == 10
    error = refused(capsys, run, *flags[4:], *resume, "--max_train_samples", "8")
    assert "--max_train_samples was 7 and is 8" in error
    assert "--max_train_samples: must be at least 1" in refused(
        capsys, run, "--max_train_samples", "0"
    )


def test_the_hub_is_asked_when_no_file_is_given(tmp_path, tiny_bert, squad_dir, monkeypatch):
    asked = []

    def load_dataset(name, split, **kwargs):
        asked.append((name, split))
        local = squad.read_examples(
            squad_dir / ("train-v1.1.json" if split == "train" else "dev-v1.1.json"), False
        )
        return local.remove_columns("is_impossible")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    masked_run_squad.main(
        [
            "--model_type",
            "masked_bert",
            "--model_name_or_path",
            str(tiny_bert),
            "--output_dir",
            str(tmp_path / "out"),
            "--cache_dir",
            str(tmp_path / "cache"),
            "--do_eval",
            *SHORT,
            *METHODS["topK"],
            *TRAIN,
        ]
    )
    assert sorted(asked) == [("rajpurkar/squad", "train"), ("rajpurkar/squad", "validation")]


def test_updates_that_the_gradient_scaler_skips_are_counted_and_not_averaged():
    figures = Means(World(torch.device("cpu")))
    for loss, norm, skipped in ((1.0, 2.0, False), (math.inf, math.nan, True), (3.0, 4.0, False)):
        figures.add({"loss": torch.tensor(loss)}, torch.tensor(norm), skipped)
    assert figures.take() == {"skipped_updates": 1, "loss": 2.0, "gradient_norm": 3.0}
    figures.add({"loss": torch.tensor(math.inf)}, torch.tensor(math.nan), True)
    assert figures.take() == {"skipped_updates": 1}


def test_token_types_are_the_models_whatever_the_tokenizer_lists(run, tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(settings))
    one, two = (
        run(*METHODS["topK"], *TRAIN),
        run(*METHODS["topK"], *TRAIN, model=tmp_path / "other", output="two"),
    )
    assert same(weights(one), weights(two))


def test_the_masks_of_a_masked_teacher_are_found_once(run, monkeypatch):
    teacher = run(*METHODS["topK"], *TRAIN)
    found = []
    find = masks.find_masks
    monkeypatch.setattr(
        masks,
        "find_masks",
        lambda model, *args, **kwargs: found.append(model) or find(model, *args, **kwargs),
    )
    run(
        *METHODS["magnitude"],
        *TRAIN,
        "--teacher_type",
        "masked_bert",
        "--teacher_name_or_path",
        str(teacher),
        output="student",
    )
    counts = collections.Counter(map(id, found))
    assert (
        sorted(counts.values())[0] == 1 and len(counts) == 2
    )  # the teacher's, and the student's at every update


def test_sparse_inference_needs_a_script_that_has_it(capsys, tiny_bert, squad_dir, tmp_path):
    flags = [
        "--model_type",
        "bert",
        "--model_name_or_path",
        str(tiny_bert),
        "--data_dir",
        str(squad_dir),
        "--do_eval",
        "--output_dir",
        str(tmp_path / "out"),
        "--sparse_inference",
    ]
    with pytest.raises(SystemExit):
        narrative.main(masked_run_squad.Squad(), "A script of one's own.", flags)
    assert "--sparse_inference: this script has no sparse form" in capsys.readouterr().err
