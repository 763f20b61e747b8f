"""masked_run_squad.py as a user runs it: through its main, looking at what it leaves behind."""

import collections
import json
import math
import shutil
from argparse import Namespace

import pytest
import torch
from tiny import RUNS, TARGETS, TOPK, edit, events, read, same, scalars, weights
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

import bertarize
import counts_parameters
import masked_run_squad
from emmental import MaskedBertForQuestionAnswering
from emmental.data import squad_read
from emmental.inference import sparsify
from emmental.modules import masks
from emmental.training.distributed import World
from emmental.training.passes import Means
from emmental.training.settings import warmup_updates
from paper.runs import UNSET

RATES = "--learning_rate 5e-5 --per_gpu_train_batch_size 4"
LENGTH = "--max_steps 12 --warmup_steps 2"
TRAIN = f"{TOPK} {RATES} --do_train {LENGTH} --save_steps 0 --logging_steps 4"
METHODS = RUNS | TARGETS
DENSE = "--model_type bert"
STATE = "training_state.pt"
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
MODEL |= {"training_args.json"}
TRAINED = MODEL | {"README.md", "training_summary.json"}
RESULTS = {"eval_results.txt", "eval_results.json", "predictions_.json", "nbest_predictions_.json"}


def names(folder):
    """The files and folders of a run but TensorBoard's."""
    return {file.name for file in folder.iterdir() if not file.name.startswith("events.out.")}


def results(folder):
    return read(folder / "eval_results.json")


def moments(checkpoint):
    return torch.load(checkpoint / STATE, weights_only=True)["optimizer"]["state"]


def test_a_run_leaves_exactly_what_the_readme_says(run):
    out = run("out", TRAIN, "--do_eval --save_steps 5")
    assert names(out) == TRAINED | RESULTS | {"checkpoint-5", "checkpoint-10"}
    assert names(out / "checkpoint-5") == MODEL | {STATE, "files.json"}
    summary = read(out / "training_summary.json")
    assert summary["updates"] == 12 and summary["seconds"] > 0
    assert "threads of" in summary["hardware"]
    wanted = {"model_type": "masked_bert", "pruning_method": "topK", "threshold": 0.2}
    assert wanted.items() <= read(out / "config.json").items()
    found = results(out)
    assert found["total"] == 10 and 0 <= found["exact"] <= found["f1"] <= 100
    assert f"f1 = {found['f1']}\n" in (out / "eval_results.txt").read_text()
    predictions = read(out / "predictions_.json")
    assert set(predictions) == {f"q{i}" for i in range(10)}
    nbest = read(out / "nbest_predictions_.json")
    assert all(nbest[key][0]["text"] == text for key, text in predictions.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_counts_and_bertarizes(run, method, capsys):
    out = run("out", TRAIN, METHODS[method], "--do_eval")
    before = MaskedBertForQuestionAnswering.from_pretrained(out)
    file = out / "counts.json"
    counts = counts_parameters.main(["--serialization_dir", str(out), "--json", str(file)])
    if before.bert.encoder.layer[0].output.dense.method.name not in (
        "threshold", "sigmoied_threshold", "l0"
    ):  # fmt: skip
        totals = [m.total for m in counts.matrices]
        totals = [sum(totals)] if "global" in method else totals
        assert sum(m.remaining for m in counts.matrices) == sum(int(0.2 * n) for n in totals)
    assert read(file)["remaining_percent_linear"] == pytest.approx(counts.linear_percent)
    assert f"{counts.published_percent:.3f}" in capsys.readouterr().out
    assert results(out)["remaining_percent"] == pytest.approx(counts.published_percent)

    target = bertarize.main(["--model_name_or_path", str(out)])
    assert target == out.parent / "bertarized_out"
    after, info = BertForQuestionAnswering.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    pair = "where does ada live ?", "ada lives in oslo ."
    inputs = AutoTokenizer.from_pretrained(target)(*pair, return_tensors="pt")
    masked, plain = (model.eval()(**inputs).to_tuple() for model in (before, after))
    torch.testing.assert_close(masked, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", TARGETS)
def test_a_target_is_reached_and_lambda_steered(run, method, caplog):
    longer = "--max_steps 150 --warmup_steps 15 --logging_steps 10 --final_warmup 4 --do_eval"
    out = run("out", TRAIN, TARGETS[method], longer)
    remaining = results(out)["remaining_percent_linear"]
    assert remaining == pytest.approx(30, rel=0.1)  # ten updates an e-fold; 2% takes a longer run
    lambdas = list(scalars(out)["lambda"].values())
    assert len(set(lambdas)) > 5 and min(lambdas) >= 0
    assert "--target_remaining 0.3: " in caplog.text


def test_embeddings_stay_frozen_and_the_encoder_moves(run, tiny_bert):
    before, after = weights(tiny_bert), weights(run("out", TRAIN))
    for key, value in before.items():
        moved = not torch.equal(value, after[key])
        assert moved != key.startswith("bert.embeddings."), key


@pytest.mark.parametrize("method", RUNS)
def test_resume_is_bit_identical(run, method, tiny_bert, tmp_path):
    # Dropout makes the resumed run depend on the random state.
    config = BertConfig.from_pretrained(tiny_bert, hidden_dropout_prob=0.3)
    config.save_pretrained(tmp_path / "dropout")
    flags = TRAIN, RUNS[method], "--gradient_accumulation_steps 2 --save_steps 4"
    flags += (f"--config_name {tmp_path / 'dropout'}",)
    whole = run("whole", *flags, "--save_total_limit 3")
    assert {f.name for f in whole.glob("c*-*")} == {f"checkpoint-{n}" for n in (4, 8, 12)}
    resumed = run("resumed", *flags, f"--resume_from_checkpoint {whole / 'checkpoint-4'}")
    assert same(whole, resumed)
    first, second = (moments(folder / "checkpoint-12") for folder in (whole, resumed))
    assert all(torch.equal(first[i]["exp_avg_sq"], second[i]["exp_avg_sq"]) for i in first)


def test_latest_takes_the_newest_checkpoint_and_starts_anew_without_one(run):
    flags = TRAIN, "--save_steps 5 --resume_from_checkpoint latest"
    first = weights(run("out", *flags))
    assert same(first, weights(run("out", *flags)))  # from checkpoint-10


def test_a_flag_that_is_newer_than_version_2_is_unset_by_default():
    """Checkpoints and runs from before the flag lack it: they go on, and are the same settings."""
    older = """adam_epsilon alpha_ce alpha_distil doc_stride final_threshold final_warmup
        global_topk_frequency_compute gradient_accumulation_steps initial_threshold initial_warmup
        learning_rate logging_steps mask_init mask_scores_learning_rate max_answer_length
        max_grad_norm max_query_length max_seq_length n_best_size num_train_epochs
        per_gpu_eval_batch_size per_gpu_train_batch_size pruning_method save_steps seed
        temperature""".split()
    actions = masked_run_squad.get_parser()._actions
    assert [x.dest for x in actions if x.default not in UNSET and x.dest not in older] == ["help"]


def test_resume_refuses_another_run_and_changed_answers(run, refused, squad_dir, tmp_path):
    out = run("out", TRAIN, "--save_steps 5")
    resume = f"--resume_from_checkpoint {out / 'checkpoint-5'}"
    assert "--learning_rate" in refused(run, "out", TRAIN, "--learning_rate 1e-3", resume)
    document = read(squad_dir / "train-v1.1.json")
    paragraph = document["data"][0]["paragraphs"][3]
    assert paragraph["context"].startswith("lives", 4)
    changed = {"text": "lives", "answer_start": 4}  # same inputs, same lengths, another label
    paragraph["qas"][0]["answers"][0] |= changed
    (tmp_path / "changed.json").write_text(json.dumps(document))
    said = refused(run, "out", TRAIN, f"--train_file {tmp_path / 'changed.json'}", resume)
    assert "the training data has changed" in said


def test_resume_leaves_another_run_alone(run, refused):
    mine = run("out", TRAIN, "--save_steps 5")
    other = run("other", TRAIN, "--save_steps 4 --do_eval")
    before = {file: file.stat().st_mtime_ns for file in other.rglob("*")}
    resume = f"--resume_from_checkpoint {mine / 'checkpoint-10'}"
    assert "other is not empty" in refused(run, "other", TRAIN, resume)
    assert {file: file.stat().st_mtime_ns for file in other.rglob("*")} == before
    run("other", TRAIN, resume, "--overwrite_output_dir")
    assert same(mine, other)
    assert not list(other.glob("checkpoint-*")) and not list(other.glob("*predictions*"))
    assert (mine / "checkpoint-10").is_dir()


@pytest.mark.parametrize(
    "content", [[1, 2], {"step": 5}, {"step": 5, "data": "", "random_states": []}]
)
def test_resume_refuses_a_damaged_state(run, refused, content):
    out = run("out", TRAIN, "--save_steps 5")
    torch.save(content, out / "checkpoint-10" / STATE)
    (out / "checkpoint-5" / "training_args.json").write_text("[]")
    for name in ("checkpoint-10", "checkpoint-5"):
        (out / name / "files.json").unlink()  # as an older version leaves them
        said = refused(run, "out", TRAIN, f"--resume_from_checkpoint {out / name}")
        assert f"{name} is damaged" in said and "weights_only" not in said


def test_overwriting_removes_the_results_of_the_old_run(run):
    out = run("out", TRAIN, "--do_eval --save_steps 5 --eval_all_checkpoints")
    wanted = {"pruning_method": "topK", "threshold": 0.2, "global_topk": False}
    assert wanted.items() <= results(out).items()
    (out / "notes.md").write_text("mine")
    run("out", TRAIN, RUNS["magnitude"], "--overwrite_output_dir")
    assert names(out) == TRAINED | {"notes.md"}


def test_old_checkpoints_are_removed_unless_all_are_evaluated(run):
    flags = TRAIN, "--save_steps 3"
    assert len(list(run("a", *flags).glob("checkpoint-*"))) == 2
    assert len(list(run("b", *flags, "--save_total_limit 1").glob("checkpoint-*"))) == 1
    out = run("c", *flags, "--do_eval --eval_all_checkpoints")
    assert len(list(out.glob("checkpoint-*"))) == 4
    assert {"exact", "exact_3", "exact_6", "exact_9", "exact_12"} <= results(out).keys()
    assert (out / "predictions_3.json").is_file()


def test_distillation_and_what_tensorboard_shows(run, tiny_bert):
    teach = f"--teacher_type bert --teacher_name_or_path {tiny_bert} --alpha_distil 0.9"
    more = "--alpha_ce 0.1 --save_steps 12 --evaluate_during_training"
    out = run("out", TRAIN, RUNS["sigmoied_threshold"], teach, more)
    values = scalars(out)
    wanted = """loss loss/task loss/distil loss/penalty gradient_norm threshold lambda eval/f1
        remaining/overall learning_rate/scores learning_rate/weights eval/exact"""
    assert set(wanted.split()) <= values.keys()
    assert sum(tag.startswith("remaining/bert.encoder.layer.0.") for tag in values) == 6
    assert list(values["loss"]) == [4, 8, 12]
    assert len(events(out).Tags()["histograms"]) == 12
    last = {name: series[12] for name, series in values.items()}
    assert last["threshold"] == pytest.approx(0.5) and last["lambda"] == pytest.approx(20)
    # The last four updates rest at the final lambda, so the means add up.
    expected = 0.9 * last["loss/distil"] + 0.1 * last["loss/task"] + 20 * last["loss/penalty"]
    assert last["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_dense_teacher_trains_without_masks(run):
    out = run("out", TRAIN, DENSE, "--do_eval")
    assert not any(key.endswith("mask_scores") for key in weights(out))
    assert read(out / "config.json")["model_type"] == "bert"
    assert "remaining_percent" not in results(out)
    BertForQuestionAnswering.from_pretrained(out)


def test_evaluating_alone_gives_the_results_of_training(run):
    out = run("out", TRAIN, "--do_eval")
    alone = run("alone", "--do_eval", model=out)
    assert read(out / "predictions_.json") == read(alone / "predictions_.json")
    assert {file.name for file in alone.iterdir()} == RESULTS


@pytest.mark.parametrize("method", METHODS)
def test_sparse_inference_predicts_the_same(run, method, monkeypatch):
    made = []
    note = lambda model: made.append(sparsify(model)) or made[0]  # noqa: E731
    monkeypatch.setattr("emmental.training.run.sparsify", note)
    model = run("out", TRAIN, METHODS[method])
    dense = run("dense", "--do_eval", model=model)
    sparse = run("sparse", "--do_eval --sparse_inference", model=model)
    for name in ("predictions_.json", "eval_results.txt"):
        assert (dense / name).read_text() == (sparse / name).read_text()
    assert len(made) == 1


def test_sparse_inference_while_training(run, refused):
    flags = TRAIN, "--do_eval --evaluate_during_training"
    dense, sparse = run("dense", *flags), run("sparse", *flags, "--sparse_inference")
    assert same(dense, sparse)
    assert (dense / "predictions_8.json").read_text() == (sparse / "predictions_8.json").read_text()
    said = refused(run, "out", TRAIN, "--sparse_inference --bf16")
    assert "--sparse_inference computes in float32" in said


def test_a_released_pruned_bert_evaluates_and_fine_prunes(run):
    """The released PruneBERT checkpoints are plain BERTs with zeros, as of bertarize.py."""
    out = run("out", TRAIN, "--do_eval")
    plain = bertarize.main(["--model_name_or_path", str(out)])
    alone = run("alone", DENSE, "--do_eval", model=plain)
    assert read(out / "predictions_.json") == read(alone / "predictions_.json")

    flags = "--pruning_method magnitude --global_topk --initial_threshold .25 --final_threshold .25"
    further = run("further", TRAIN, flags, model=plain)
    further = weights(bertarize.main(["--model_name_or_path", str(further)]))
    zeros = kept = 0
    for key, value in weights(plain).items():
        if "encoder" in key and value.dim() == 2:
            zeros += ((further[key] == 0) & (value == 0)).sum() / (value == 0).sum() / 12
            kept += ((further[key] != 0) & (value != 0)).sum() / (value != 0).sum() / 12
    assert zeros > 0.9 and kept > 0.99  # the slack of 5% lets some zeros learn


def test_version_2(run):
    out = run("out", TRAIN, "--do_eval --version_2_with_negative")
    found = results(out)
    assert found["HasAns_total"] == 6 and found["NoAns_total"] == 4
    assert {"best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"} <= found.keys()
    odds = read(out / "null_odds_.json")
    assert set(odds) == {f"q{i}" for i in range(10)}
    assert all(math.isfinite(value) for value in odds.values())


def test_accumulation_equals_a_larger_batch(run):
    flags = TRAIN, "--max_steps 6 --warmup_steps 1 --per_gpu_train_batch_size"
    large = weights(run("a", *flags, "24"))
    small = weights(run("b", *flags, "6 --gradient_accumulation_steps 4"))
    for key, value in large.items():
        if not key.endswith("mask_scores"):  # Adam's first steps turn rounding into sign flips
            torch.testing.assert_close(value, small[key], rtol=0, atol=2e-4)


def test_a_fractional_epoch_trains_what_it_schedules(run):
    length = "--max_steps=-1 --warmup_steps 0 --num_train_epochs 1.5 --logging_steps 1"
    out = run("out", TRAIN, length, "--gradient_accumulation_steps 4")
    assert max(scalars(out)["loss"]) == 3  # 24 questions, 6 batches, 2 updates an epoch


@pytest.mark.parametrize("ratio, steps, total", [(0.17, 2, 12), (0.29, 5, -1)])
def test_the_warmup_as_a_fraction_of_the_updates(run, flags, tmp_path, ratio, steps, total):
    """It fits any number of them: of the 18 updates of three epochs, 5.22."""
    common = f"{TOPK} {RATES} --do_train --save_steps 0 --max_steps={total}"
    expected = run("steps", common, f"--warmup_steps {steps}")
    words = " ".join(flags("ratio", common)).replace("--warmup_steps 1", f"--warmup_ratio {ratio}")
    masked_run_squad.main(words.split())
    assert same(expected, tmp_path / "ratio")


def test_the_warmup_is_rounded_down():
    for ratio, total, updates in ((0.29, 100, 29), (0.1, 30, 3), (0.3, 3, 0), (0, 9, 0)):
        assert warmup_updates(Namespace(warmup_ratio=ratio), total) == updates


def test_bf16_keeps_scores_and_moments_in_float32(run):
    out = run("out", TRAIN, "--bf16 --save_steps 12")
    kept = [entry["exp_avg"] for entry in moments(out / "checkpoint-12").values()]
    assert {tensor.dtype for tensor in (*kept, *weights(out).values())} == {torch.float32}


def test_features_are_cached_and_workers_change_nothing(run):
    out = run("out", TRAIN)
    cached = sorted((out.parent / "cache").rglob("*.arrow"))
    again = run("again", TRAIN, "--num_workers 1")
    assert cached and sorted((out.parent / "cache").rglob("*.arrow")) == cached
    two = run("two", TRAIN, "--overwrite_cache")
    assert same(out, two) and same(out, again)


def poison(patch):
    """The loss of update 8 is not a number."""
    honest, calls = masked_run_squad.span_loss, []

    def poisoned(logits, batch):
        calls.append(1)
        return honest(logits, batch) * (float("nan") if len(calls) == 8 else 1.0)

    patch.setattr(masked_run_squad, "span_loss", poisoned)


def fill_the_disk(patch):
    """No state fits after update 5."""
    honest = torch.save

    def full(state, path):
        if state["step"] > 5:
            raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file")
        honest(state, path)

    patch.setattr(torch, "save", full)


@pytest.mark.parametrize("spoil, said", [
    (poison, ["update 8", "loss/task = nan"]),
    (fill_the_disk, ["cannot write", "checkpoint-10"]),
])  # fmt: skip
def test_what_stops_a_run_breaks_no_checkpoint(run, refused, monkeypatch, spoil, said):
    flags = TRAIN, "--save_steps 5"
    with monkeypatch.context() as patch:
        spoil(patch)
        error = refused(run, "out", *flags, status=1)
    assert all(part in error for part in said)
    out = run("out", *flags, "--resume_from_checkpoint latest")
    assert not list(out.glob(".*")) and same(out, run("undisturbed", *flags))


def test_misaligned_answers_are_skipped_with_their_ids(run, squad_dir, tmp_path, caplog):
    document = read(squad_dir / "train-v1.1.json")
    document["data"][0]["paragraphs"][3]["qas"][0]["answers"][0]["answer_start"] += 1
    (tmp_path / "shifted.json").write_text(json.dumps(document))
    run("out", TRAIN, f"--train_file {tmp_path / 'shifted.json'}")
    said = "skipped 1 training questions"
    assert any(said in message and "q3" in message for message in caplog.messages)


TEXT = "ada lives in oslo . ben lives in rome ."


@pytest.fixture
def squad_file(tmp_path):
    """Write a SQuAD file with one context; returns its path."""

    def write(*questions, name="file.json"):
        article = {"title": "t", "paragraphs": [{"context": TEXT, "qas": questions}]}
        (tmp_path / name).write_text(json.dumps({"data": [article]}))
        return tmp_path / name

    return write


def asked(id_, *starts, **more):
    """A question; its answers are "oslo" at these places."""
    answers = [{"text": "oslo", "answer_start": start} for start in starts]
    return {"id": id_, "question": "where does ada live ?", "answers": answers, **more}


FIVE = [asked("q1", 13), asked("q2", None), asked("q3"), asked("q4", 22.0), asked("q5")]


@pytest.mark.parametrize("questions, v2, trained, skipped", [
    ([asked(262780, 13, is_impossible=False), asked(7, 13)], False, 2, ()),
    ([asked("a", 13), *(asked(f"n{n}") for n in range(3))], True, 4, ()),
    ([asked("q1", 13), asked("q2", -1)], False, 1, ["is not at its answer_start: q2"]),
    (FIVE, False, 1, ["skipped 2 training questions, the answer is", "no answer: q3, q5"]),
    ([asked("q1", 13), asked("q2", is_impossible=1)], True, 2, ()),
])  # fmt: skip
def test_trains_on_files_of_other_tools(run, squad_file, caplog, questions, v2, trained, skipped):
    run("out", TRAIN, f"--train_file {squad_file(*questions)}", "--version_2_with_negative" * v2)
    assert f"training: {trained} examples" in caplog.text
    assert caplog.text.count("skipped") == len(skipped)
    assert all(reason in caplog.text for reason in skipped)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("answers", [None, [], [{"text": " "}]])
def test_without_answers_there_are_predictions_and_no_metrics(run, squad_file, caplog, v2, answers):
    """In the results, the return value and TensorBoard."""
    file = squad_file(*(asked(n) | {"answers": answers} for n in range(3)), name="dev.json")
    flags = f"--predict_file {file} " + "--version_2_with_negative" * v2
    out = run("out", TRAIN, "--do_eval --evaluate_during_training", flags)
    assert set(read(out / "predictions_.json")) == {"0", "1", "2"}
    assert caplog.text.count("no question has an answer: nothing to score") == 4
    assert not {"exact", "f1", "total", "best_f1"} & set(results(out))
    assert not any(tag.startswith("eval/") for tag in scalars(out))


def test_a_dense_model_without_metrics_leaves_an_empty_file_of_results(run, squad_file):
    file = squad_file(asked("a"), name="dev.json")
    out = run("out", DENSE, f"--do_eval --predict_file {file}")
    assert results(out) == {} and (out / "eval_results.txt").read_text() == ""


def test_the_first_samples_only(run, refused, caplog):
    flags = TRAIN, "--save_steps 5 --max_train_samples 7"
    out = run("out", *flags, "--do_eval --max_eval_samples 3")
    assert "training: 7 examples" in caplog.text
    assert set(read(out / "predictions_.json")) == {"q0", "q1", "q2"}
    assert results(out)["total"] == 3
    resume = "--do_eval --resume_from_checkpoint latest"
    assert results(run("out", *flags, resume, "--max_eval_samples 99"))["total"] == 10
    said = refused(run, "out", *flags, resume, "--max_train_samples 8")
    assert "--max_train_samples was 7 and is 8" in said
    said = refused(run, "out", *flags, "--max_train_samples 0")
    assert "--max_train_samples: must be at least 1" in said


def test_the_hub_is_asked_when_no_file_is_given(flags, squad_dir, hub):
    def load_dataset(name, split, **kwargs):
        file = squad_dir / ("train-v1.1.json" if split == "train" else "dev-v1.1.json")
        return squad_read.read_examples(file, False).remove_columns("is_impossible")

    asked, words = hub(load_dataset), flags("out", TRAIN, "--do_eval")
    words[words.index("--data_dir") : words.index("--output_dir")] = []
    masked_run_squad.main(words)
    found = sorted((*names, options["split"]) for names, options in asked)
    assert found == [("rajpurkar/squad", "train"), ("rajpurkar/squad", "validation")]


def test_updates_that_the_gradient_scaler_skips_are_counted_and_not_averaged():
    figures = Means(World(torch.device("cpu")))
    for loss, norm, skipped in ((1.0, 2.0, False), (math.inf, math.nan, True), (3.0, 4.0, False)):
        figures.add({"loss": torch.tensor(loss)}, torch.tensor(norm), skipped)
    assert figures.take() == {"skipped_updates": 1, "loss": 2.0, "gradient_norm": 3.0}
    figures.add({"loss": torch.tensor(math.inf)}, torch.tensor(math.nan), True)
    assert figures.take() == {"skipped_updates": 1}


def test_token_types_are_the_models_whatever_the_tokenizer_lists(run, tiny_bert, tmp_path):
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    edit(other / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    assert same(run("one", TRAIN), run("two", TRAIN, model=other))


def test_the_masks_of_a_masked_teacher_are_found_once(run, monkeypatch):
    teacher, found, find = run("teacher", TRAIN), [], masks.find_masks
    note = lambda model, *args, **kwargs: found.append(model) or find(model, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(masks, "find_masks", note)
    teach = f"--teacher_type masked_bert --teacher_name_or_path {teacher}"
    run("student", TRAIN, RUNS["magnitude"], teach)
    counts = collections.Counter(map(id, found))  # the teacher's, the student's at every update
    assert sorted(counts.values())[0] == 1 and len(counts) == 2
