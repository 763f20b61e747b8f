"""masked_run_glue.py as a user runs it: every task through its main, and its files."""

import json
import random
import shutil

import datasets
import numpy as np
import pytest
import torch
from tiny import (
    RUNS,
    TOPK,
    edit,
    events,
    read,
    same,
    scalars,
    sentence,
    table,
    weights,
    write_split,
)
from transformers import BertConfig, BertForSequenceClassification, pipeline

import bertarize
import counts_parameters
import masked_run_glue
from emmental import MaskedBertForSequenceClassification
from emmental.data import glue_tasks

TRAIN = f"{TOPK} --do_train --max_steps 8 --warmup_steps 2 --save_steps 0 --logging_steps 4"
DENSE = "--model_type bert"
ALL = "--do_eval --do_predict"
SHORT = "--do_train --max_steps 2"
KEYS = {
    "cola": {"mcc", "entropy"},
    "sts-b": {"pearson", "spearmanr", "corr"},
    "mrpc": {"acc", "f1", "acc_and_f1", "entropy"},
    "qqp": {"acc", "f1", "acc_and_f1", "entropy"},
    "mnli": {"acc_matched", "entropy_matched", "acc_mismatched", "entropy_mismatched"},
}
MASK_KEYS = {"remaining_percent", "remaining_percent_linear"}
MASK_KEYS |= {"pruning_method", "threshold", "global_topk"}
CUSTOM = "--text_column premise --text_pair_column claim --label_column verdict"


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory):
    """Folder with a folder of GLUE files for each task."""
    folder = tmp_path_factory.mktemp("glue")
    for name, task in glue_tasks.TASKS.items():
        (folder / name).mkdir()
        for seed, split in enumerate(("train", *task.evaluation_splits, *task.submissions)):
            file = folder / name / f"{'diagnostic' if name == 'ax' else split}.tsv"
            rows = 24 if split == "train" else 9
            write_split(file, name, rows, seed, test=split in task.submissions)
    return folder


@pytest.fixture
def run(tmp_path, tiny_bert, glue_dir):
    """Run the script on a task's small files, in the folder `output`; later flags win."""

    def call(task, *words, output="out", model=tiny_bert, data=None):
        short = "--do_lower_case --max_seq_length 48 --per_gpu_train_batch_size 4"
        places = f"--model_name_or_path {model} --output_dir {tmp_path / output}"
        places += f" --data_dir {data or glue_dir / task} --cache_dir {tmp_path / 'cache'}"
        flags = f"--task_name {task} --model_type masked_bert {places} {short} {' '.join(words)}"
        masked_run_glue.main(flags.split())
        return tmp_path / output

    return call


def results(folder):
    return read(folder / "eval_results.json")


def predictions(path):
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction"
    return [line.split("\t") for line in lines]


def strip_names(folder, count):
    edit(folder / "config.json", "id2label", "label2id", num_labels=count)


@pytest.mark.parametrize("name", [name for name in glue_tasks.TASKS if name != "ax"])
def test_every_task_trains_evaluates_predicts_and_bertarizes(run, name):
    # Until it has learned something, it predicts one class, and CoLA has no metric.
    longer = "--max_steps 60 --learning_rate 3e-3" if name == "cola" else ""
    out = run(name, TRAIN, longer, ALL)
    task = glue_tasks.TASKS[name]
    names = """README.md config.json model.safetensors tokenizer.json tokenizer_config.json
        training_args.json training_summary.json eval_results.txt eval_results.json""".split()
    found = {file.name for file in out.iterdir() if not file.name.startswith("events.out.tfevents")}
    assert found == {*names, *task.submissions.values()}
    assert results(out).keys() == KEYS.get(name, {"acc", "entropy"}) | MASK_KEYS
    for file in task.submissions.values():
        indices, texts = zip(*predictions(out / file))
        assert [int(index) for index in indices] == list(range(100, 109))
        if task.is_regression:
            assert all(0 <= float(text) <= 5 for text in texts)
        else:
            allowed = map(str, range(len(task.labels))) if task.numbered else task.labels
            assert set(texts) <= set(allowed)
    counts = counts_parameters.main(["--serialization_dir", str(out)])
    assert counts.linear_percent == pytest.approx(results(out)["remaining_percent_linear"])
    target = bertarize.main(["--model_name_or_path", str(out)])
    plain, info = BertForSequenceClassification.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()) and plain.config.model_type == "bert"
    classify = pipeline("text-classification", model=str(target))
    pair = "ada lives in oslo", "dan lives in rome"
    said = classify(dict(zip(("text", "text_pair"), pair)))
    said = said[0] if isinstance(said, list) else said
    if task.is_regression:
        logits = plain.eval()(**classify.tokenizer(*pair, return_tensors="pt")).logits
        assert said["score"] == pytest.approx(logits.item(), rel=1e-4)  # not a probability
    else:
        assert said["label"] in task.labels
        assert set(plain.config.id2label.values()) == set(task.labels)


def test_a_dense_model_learns_and_evaluates_alone_to_the_same_results(run, glue_dir):
    out = run("sst-2", DENSE, "--max_steps 60 --learning_rate 3e-3 --save_steps 0 --do_train", ALL)
    assert results(out)["acc"] == 1.0 and results(out)["entropy"] < 0.2
    assert not MASK_KEYS & results(out).keys()
    alone = run("SST2", DENSE, ALL, model=out, output="alone", data=glue_dir / "sst-2")
    files = {"eval_results.txt", "eval_results.json", "SST-2.tsv"}
    assert {file.name for file in alone.iterdir()} == files
    assert results(alone) == pytest.approx(results(out))
    assert (alone / "SST-2.tsv").read_text() == (out / "SST-2.tsv").read_text()


def test_sparse_inference_gives_the_same_results_and_submissions(run):
    model = run("mnli", TRAIN)
    dense = run("mnli", ALL, model=model, output="dense")
    sparse = run("mnli", ALL, "--sparse_inference", model=model, output="sparse")
    numbers = {name: x for name, x in results(dense).items() if isinstance(x, float)}
    close = {name: pytest.approx(x, rel=1e-5) for name, x in numbers.items()}
    assert results(sparse) == results(dense) | close
    for file in ("MNLI-m.tsv", "MNLI-mm.tsv"):
        assert predictions(dense / file) == predictions(sparse / file)


def test_a_model_of_mnli_answers_the_diagnostics_and_the_mismatched_set(run):
    out = run("mnli", TRAIN, "--do_eval")
    mismatched = results(run("mnli-mm", "--do_eval", model=out, output="mm"))
    assert mismatched["acc"] == results(out)["acc_mismatched"]
    ax = run("ax", "--do_predict", model=out, output="ax")
    assert {file.name for file in ax.iterdir()} == {"AX.tsv"}
    assert len(predictions(ax / "AX.tsv")) == 9


def test_labels_meet_by_name_whatever_their_order(run, tmp_path):
    """The hub numbers MNLI's labels differently from the files; its models follow the hub."""
    out = run("mnli", DENSE, "--do_train --max_steps 30", ALL)
    model = BertForSequenceClassification.from_pretrained(out)
    assert list(model.config.id2label.values()) == ["contradiction", "entailment", "neutral"]
    with torch.no_grad():
        for values in (model.classifier.weight, model.classifier.bias):
            values.copy_(values[[1, 2, 0]].clone())
    model.config.id2label = dict(enumerate(["ENTAILMENT", "NEUTRAL", "CONTRADICTION"]))
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    hub = tmp_path / "hub"
    model.save_pretrained(hub)
    for file in out.glob("tokenizer*"):
        shutil.copy(file, hub)
    other = run("mnli", DENSE, ALL, model=hub, output="other")
    assert results(other) == pytest.approx(results(out))
    assert (other / "MNLI-m.tsv").read_text() == (out / "MNLI-m.tsv").read_text()
    still = f"{TOPK} --do_train --max_steps 1 --learning_rate 1e-9"
    further = run("mnli", still, model=hub, output="further")
    assert read(further / "config.json")["id2label"]["0"] == "contradiction"
    ours, theirs = (weights(folder)["classifier.weight"] for folder in (further, out))
    torch.testing.assert_close(ours, theirs)


def test_labels_without_names_are_read_in_the_order_of_the_task_and_said_so(run, caplog):
    out = run("rte", DENSE, "--do_train --max_steps 20 --do_eval")
    strip_names(out, 2)
    alone = run("rte", DENSE, "--do_eval", model=out, output="alone")
    assert results(alone)["acc"] == results(out)["acc"]
    assert "have no names; they are read as entailment, not_entailment" in caplog.text
    caplog.clear()
    run("rte", TRAIN, f"--teacher_type bert --teacher_name_or_path {out}", output="student")
    assert "have no names" in caplog.text


@pytest.mark.parametrize("name", ["mnli", "sts-b"])
def test_distillation_is_a_real_loss(run, name):
    teacher = run(name, DENSE, "--do_train --max_steps 30 --save_steps 0", output="teacher")
    teach = f"--teacher_type bert --teacher_name_or_path {teacher}"
    teach += " --alpha_distil 0.9 --alpha_ce 0.1 --alpha_hidden 0.3 --logging_steps 1"
    curves = scalars(run(name, TRAIN, RUNS["sigmoied_threshold"], teach))
    last = {tag: list(values.values())[-1] for tag, values in curves.items()}
    assert last["loss/distil"] > 1e-4 and last["loss/hidden"] > 1e-4
    expected = 0.9 * last["loss/distil"] + 0.1 * last["loss/task"] + 0.3 * last["loss/hidden"]
    expected += last["lambda"] * last["loss/penalty"]
    assert last["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", RUNS)
def test_resume_is_bit_identical(run, method):
    flags = TRAIN, RUNS[method], "--gradient_accumulation_steps 2 --save_steps 4"
    whole = run("rte", *flags, output="whole")
    stopped = f"--resume_from_checkpoint {whole / 'checkpoint-4'}"
    assert same(whole, run("rte", *flags, stopped, output="resumed"))


def test_checkpoints_are_evaluated_during_and_after_training(run):
    more = "--save_steps 4 --do_eval --eval_all_checkpoints --evaluate_during_training"
    out = run("mrpc", TRAIN, more)
    assert {"f1", "f1_4", "f1_8"} <= results(out).keys()
    curve = scalars(out)["eval/acc"]
    assert list(curve)[:2] == [4, 8] and curve[4] == pytest.approx(results(out)["acc_4"])


def test_the_hub_is_asked_when_there_is_no_data_dir(tmp_path, tiny_bert, hub):
    texts = ["ada lives in oslo .", "dan lives in rome and rome ."] * 6
    rows = {"sentence": texts, "label": [0, 1] * 6, "idx": list(range(12))}
    label = datasets.ClassLabel(names=["negative", "positive"])
    asked = hub(datasets.Dataset.from_dict(rows).cast_column("label", label))
    places = f"--output_dir {tmp_path / 'out'} --cache_dir {tmp_path / 'cache'}"
    flags = f"--model_type masked_bert --model_name_or_path {tiny_bert} --task_name SST-2 {places}"
    masked_run_glue.main(f"{flags} {ALL} --max_seq_length 48 {TRAIN}".split())
    found = sorted((*names, options["split"]) for names, options in asked)
    assert found == [("nyu-mll/glue", "sst2", x) for x in ("test", "train", "validation")]
    assert len(predictions(tmp_path / "out" / "SST-2.tsv")) == 12


# --- tasks of one's own ---


@pytest.fixture
def custom_dir(tmp_path):
    """Function that writes train, dev and test files of a custom task in a format."""

    def write(suffix, labels=("refutes", "supports", "unknown"), folder="mine"):
        (tmp_path / folder).mkdir()
        for seed, (split, count) in enumerate({"train": 24, "dev": 9, "test": 5}.items()):
            rng, header = random.Random(seed), ["premise", "claim", "verdict"][: 3 - (seed == 2)]
            rows = []
            for row in range(count):
                own = [sentence(rng, row % 3), "ada, who lives", labels[row % len(labels)]]
                rows.append(own[: len(header)])
            if suffix == "jsonl":
                text = "".join(json.dumps(dict(zip(header, row))) + "\n" for row in rows)
            elif suffix == "csv":
                quoted = [['"' + str(x).replace('"', '""') + '"' for x in row] for row in rows]
                text = "".join(",".join(row) + "\n" for row in [header, *quoted])
            else:
                text = table(header, [list(map(str, row)) for row in rows])
            (tmp_path / folder / f"{split}.{suffix}").write_text(text)
        return tmp_path / folder

    return write


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_task_of_ones_own(run, custom_dir, suffix):
    data = custom_dir(suffix)
    out = run("custom", CUSTOM, TRAIN, ALL, data=data)
    names = read(out / "config.json")["id2label"]
    assert names == {"0": "refutes", "1": "supports", "2": "unknown"}
    assert results(out).keys() == {"acc", "entropy"} | MASK_KEYS
    assert [int(index) for index, _ in predictions(out / "predictions.tsv")] == list(range(5))
    (data / f"train.{suffix}").unlink()  # evaluating alone needs none: the labels are the model's
    alone = run("custom", CUSTOM, ALL, data=data, model=out, output="alone")
    assert results(alone) == pytest.approx(results(out))
    assert (alone / "predictions.tsv").read_text() == (out / "predictions.tsv").read_text()


def test_labels_that_differ_by_case(run, custom_dir, caplog):
    data = custom_dir("tsv", labels=("M", "m", "f"))
    dense = run("custom", CUSTOM, DENSE, SHORT, "--do_eval", data=data, output="dense")
    alone = run("custom", CUSTOM, DENSE, "--do_eval", data=data, model=dense, output="alone")
    assert results(alone) == pytest.approx(results(dense))
    run("custom", CUSTOM, TRAIN, data=data, model=dense)
    assert "starts fresh" not in caplog.text


def test_a_regression_of_ones_own(run, custom_dir):
    data = custom_dir("jsonl", labels=(-1.5, 0.25, 7))
    out = run("custom", CUSTOM, "--regression", TRAIN, ALL, data=data)
    assert results(out).keys() == {"pearson", "spearmanr", "corr"} | MASK_KEYS
    assert np.isfinite([float(text) for _, text in predictions(out / "predictions.tsv")]).all()


def test_undefined_metrics_are_left_out(run, glue_dir, tmp_path, caplog):
    """Of the results and of TensorBoard; the others stay."""
    data = shutil.copytree(glue_dir / "cola", tmp_path / "cola")
    (data / "dev.tsv").write_text("gj04\t1\t\tada lives .\ngj04\t1\t\tben lives .\n")
    out = run("cola", TRAIN, "--do_eval --evaluate_during_training", data=data)
    assert results(out).keys() == {"entropy"} | MASK_KEYS
    assert caplog.text.count("undefined and left out: mcc (all labels are equal)") == 3
    assert [tag for tag in scalars(out) if tag.startswith("eval/")] == ["eval/entropy"]


def test_the_first_samples_only(run, caplog):
    """Of each evaluation set; a submission is always whole."""
    out = run("mnli", TRAIN, ALL, "--max_train_samples 5 --max_eval_samples 2")
    assert "training: 5 examples" in caplog.text
    assert {results(out)[f"acc_{name}"] for name in ("matched", "mismatched")} <= {0, 0.5, 1}
    assert [len(predictions(out / file)) for file in ("MNLI-m.tsv", "MNLI-mm.tsv")] == [9, 9]


def test_files_with_numbers_are_those_with_names(run, glue_dir, tmp_path, caplog):
    data = shutil.copytree(glue_dir / "mnli", tmp_path / "numbers")
    for file in data.glob("[td][re]*.tsv"):
        text = file.read_text()
        for number, name in enumerate(("contradiction", "entailment", "neutral")):
            text = text.replace(f"\t{name}\n", f"\t{number}\n")
        file.write_text(text)
    out = run("mnli", TRAIN, ALL)
    assert "the hub has another order" not in caplog.text
    numbered = run("mnli", TRAIN, ALL, data=data, output="same")
    assert results(numbered) == results(out) and "the hub has another order" in caplog.text
    assert (numbered / "MNLI-m.tsv").read_text() == (out / "MNLI-m.tsv").read_text()


TWELVE = [str(number) for number in range(12)]


@pytest.fixture
def teachers(tmp_path, tiny_bert):
    """The same model of twelve classes, with names in another order and without names."""
    model = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=12)
    folders = tmp_path / "anonymous", tmp_path / "named"
    for folder, order in zip(folders, (range(12), range(11, -1, -1)), strict=True):
        if folder.name == "named":
            model.config.id2label = {place: str(label) for place, label in enumerate(order)}
            model.config.label2id = {str(label): place for place, label in enumerate(order)}
            with torch.no_grad():
                for values in (model.classifier.weight, model.classifier.bias):
                    values.copy_(values[list(order)].clone())
        model.save_pretrained(folder)
        for file in tiny_bert.glob("tokenizer*"):
            shutil.copy(file, folder)
    return folders


def test_twelve_numbered_labels_meet_those_of_a_teacher(run, custom_dir, teachers):
    """LABEL_10 is 10, not the third label in the order of texts, and names meet by name."""
    data = custom_dir("csv", labels=TWELVE)
    still = "--do_train --max_steps 1 --save_steps 0 --learning_rate 1e-9 --teacher_type bert"
    for student, teacher in teachers[::-1], teachers:
        own = {"data": data, "model": student, "output": f"student_of_{teacher.name}"}
        out = run("custom", CUSTOM, DENSE, still, f"--teacher_name_or_path {teacher}", **own)
        assert list(read(out / "config.json")["id2label"].values()) == TWELVE
        assert scalars(out)["loss/distil"] == pytest.approx({1: 0}, abs=1e-6)


def test_evaluating_a_model_without_names_on_ones_own_task(run, refused, custom_dir, caplog):
    data = custom_dir("tsv")
    model = run("custom", CUSTOM, DENSE, "--do_train --max_steps 20", data=data)
    alone = {"model": model, "output": "alone", "data": data}

    def found():
        out = run("custom", CUSTOM, DENSE, ALL, **alone)
        return results(out), (out / "predictions.tsv").read_text()

    wanted = found()
    strip_names(model, 3)
    assert found() == wanted
    said = "have no names; they are read as refutes, supports, unknown"
    assert caplog.text.count(said) == 1
    out = run("custom", CUSTOM, DENSE, "--do_predict", **alone | {"output": "predicted"})
    labels = {label for _, label in predictions(out / "predictions.tsv")}
    assert labels <= {"LABEL_0", "LABEL_1", "LABEL_2"}

    numbers = custom_dir("tsv", labels=("0", "1", "2"), folder="numbers")
    own = alone | {"data": numbers, "output": "numbers"}
    out = run("custom", CUSTOM, DENSE, "--do_eval", **own)
    assert results(out) == wanted[0] and "read as 0, 1, 2" in caplog.text
    (model / "model.safetensors").rename(model / "weights")
    alone["data"] = custom_dir("tsv", labels=("no", "yes"), folder="two")
    said = refused(run, "custom", CUSTOM, DENSE, "--do_eval", **alone)
    assert "dev.tsv: has 2 labels (no, yes), and the model has 3 outputs without names" in said


# --- bad input ---


@pytest.mark.parametrize("task, flags, said", [
    ("mnlli", "--do_train", "did you mean 'mnli'?"),
    ("ax", "--do_eval", "ax has no labels: give --do_predict"),
    ("rte", "--text_column x --do_train", "--text_column is for --task_name custom"),
    ("custom", "--do_train --text_column premise",
     "has no column premise; found: index, sentence1"),
    ("custom", "--do_train --text_column=", "--text_column is empty"),
    ("rte", "", "give --do_train or --do_eval"),
    ("rte", "--do_train --max_seq_length 4", "must be at least 5"),
])  # fmt: skip
def test_arguments(run, refused, glue_dir, tmp_path, task, flags, said):
    assert said in refused(run, task, flags, data=glue_dir / "rte")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name, old, new, said", [
    ("rte", None, "", "the file is empty"),
    ("rte", "sentence2", "second", "has no column sentence2"),
    ("rte", "not_entailment", "maybe", "dev.tsv:3: the label 'maybe' is not one of"),
    ("rte", "\n103\t", "\n7\tada\n103\t", "dev.tsv:5: has 2 fields"),
    ("sts-b", "5.000", "high", "dev.tsv:3: the label 'high' is not a finite number in [0, 5]"),
    ("sst-2", "\t1\n", "\t2\n", "dev.tsv:3: the label '2' is not one of"),
])  # fmt: skip
def test_a_bad_file_stops_before_training(run, refused, glue_dir, tmp_path, name, old, new, said):
    data = shutil.copytree(glue_dir / name, tmp_path / "bad")
    text = (data / "dev.tsv").read_text()
    (data / "dev.tsv").write_text(text.replace(old or text, new, 1))
    assert said in refused(run, name, TRAIN, "--do_eval", data=data)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_models_and_teachers_that_do_not_fit(run, refused, custom_dir, tmp_path, tiny_bert):
    models = {name: run(name, DENSE, SHORT, output=name) for name in ("rte", "mnli", "sts-b")}
    small = BertConfig.from_pretrained(tiny_bert, max_position_embeddings=24)
    BertForSequenceClassification(small).save_pretrained(tmp_path / "small")
    models["small"] = tmp_path / "small"
    labels = "has the labels entailment, not_entailment, but those of the task are"
    for task, flags, name, said in [
        ("sst-2", "--do_eval", "rte", f"{labels} negative, positive"),
        ("sts-b", "--do_eval", "rte", "has 2 outputs, and 1 are needed"),
        ("custom", f"{CUSTOM} --do_predict", "sts-b", "has 1 outputs: add --regression"),
        ("sst-2", TRAIN, "rte", labels),
        ("rte", TRAIN, "mnli", "has 3 outputs, and 2 are needed"),
        ("rte", TRAIN, "small", "it takes 24 tokens, and 48 are needed"),
    ]:
        own = {"data": custom_dir("csv")} if task == "custom" else {}
        if flags is TRAIN:
            flags += f" --teacher_type bert --teacher_name_or_path {models[name]}"
        else:
            own, flags = own | {"model": models[name]}, f"{DENSE} {flags}"
        assert said in refused(run, task, flags, **own)
    edit(models["rte"] / "config.json", id2label=["a", "b"])
    said = refused(run, "rte", DENSE, "--do_eval", model=models["rte"])
    assert "its id2label must name the outputs" in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_head_of_another_task_is_trained_anew(run, caplog):
    mnli = run("mnli", DENSE, SHORT, output="mnli")
    out = run("rte", TRAIN, "--do_eval", model=mnli)
    assert MaskedBertForSequenceClassification.from_pretrained(out).classifier.weight.shape[0] == 2
    still = f"{TOPK} --do_train --max_steps 1 --learning_rate 1e-9"
    sst = run("sst-2", still, model=out, output="sst")
    said = "has other labels (entailment, not_entailment): it starts fresh"
    assert any(said in message for message in caplog.messages)
    before, after = (weights(folder)["classifier.weight"] for folder in (out, sst))
    assert (before - after).abs().max() > 1e-3


def test_a_diverged_model_gives_no_results(run, refused):
    rte = run("rte", DENSE, SHORT, output="rte")
    model = BertForSequenceClassification.from_pretrained(rte)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    model.save_pretrained(rte)
    assert "are not finite" in refused(run, "rte", DENSE, "--do_eval", model=rte)


def test_overwriting_removes_the_predictions_of_another_task(run):
    out = run("mnli", TRAIN, ALL)
    run("rte", TRAIN, "--overwrite_output_dir")
    assert not list(out.glob("*.tsv")) and not list(out.glob("eval_results.*"))


def test_resuming_a_finished_run_evaluates_at_its_step_and_knows_its_labels(
    run, refused, custom_dir
):
    flags = CUSTOM, TRAIN, "--save_steps 4"
    data = custom_dir("tsv")
    out = run("custom", *flags, data=data)
    run("custom", *flags, "--do_eval --resume_from_checkpoint latest", data=data)
    assert [event.step for event in events(out).Scalars("eval/acc")] == [8]
    renamed = custom_dir("tsv", labels=("false", "true", "unknown"), folder="renamed")
    said = refused(run, "custom", *flags, "--resume_from_checkpoint latest", data=renamed)
    assert "the training data has changed" in said


def test_an_unknown_label_in_the_development_set_of_ones_own(run, refused, custom_dir):
    data = custom_dir("tsv")
    text = (data / "dev.tsv").read_text()
    (data / "dev.tsv").write_text(text.replace("unknown", "unheard", 1))
    said = refused(run, "custom", CUSTOM, TRAIN, "--do_eval", data=data)
    assert "dev.tsv:4: the label 'unheard' is not one of refutes, supports, unknown" in said
