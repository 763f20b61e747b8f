"""masked_run_glue.py as a user runs it: every task through its main, and its files."""

import json
import random
import shutil

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_glue_data import LAYOUTS, table
from tiny import NAMES, PLACES
from transformers import BertConfig, BertForSequenceClassification, pipeline

import bertarize
import counts_parameters
import masked_run_glue
from emmental import MaskedBertForSequenceClassification
from emmental.data import glue_tasks

TOPK = "--pruning_method topK --initial_threshold 1 --final_threshold 0.2".split()
METHODS = {
    "topK": TOPK,
    "magnitude": ["--pruning_method", "magnitude", *TOPK[2:]],
    "soft": (
        "--pruning_method sigmoied_threshold --initial_threshold 0 --final_threshold 0.5 "
        "--regularization l1 --final_lambda 20"
    ).split(),
    "l0": (
        "--pruning_method l0 --initial_threshold 1 --final_threshold 1 --mask_scale 2.197 "
        "--regularization l0 --final_lambda 20 --mask_scores_learning_rate 0.1"
    ).split(),
    "global topK": [*TOPK, "--global_topk"],
}
TRAIN = "--do_train --max_steps 8 --warmup_steps 2 --save_steps 0 --logging_steps 4".split()
KEYS = {
    "cola": {"mcc", "entropy"},
    "sts-b": {"pearson", "spearmanr", "corr"},
    "mrpc": {"acc", "f1", "acc_and_f1", "entropy"},
    "qqp": {"acc", "f1", "acc_and_f1", "entropy"},
    "mnli": {"acc_matched", "entropy_matched", "acc_mismatched", "entropy_mismatched"},
}
MASK_KEYS = {
    "remaining_percent",
    "remaining_percent_linear",
    "pruning_method",
    "threshold",
    "global_topk",
}


def sentence(rng, column, label):
    """A text that gives its label away, by how many places it names: something to learn."""
    return f'"{rng.choice(NAMES)} lives in {" and ".join([rng.choice(PLACES)] * (1 + label))} .'


def write_split(path, name, rows, seed, *, test=False):
    """A file in GLUE's layout, with a byte order mark, quotes and QQP's short rows."""
    labelled, unlabelled, columns, label_column, labels = LAYOUTS[name]
    header, rng, lines = (unlabelled if test else labelled), random.Random(seed), []
    for row in range(rows):
        label = row % len(labels)
        fields = {column: sentence(rng, column, label) for column in columns} | {
            label_column: labels[label]
        }
        fields |= {column: str(100 + row) for column in ("index", "id")}
        lines.append([fields.get(column, "x") for column in header])
    if name == "qqp" and not test:
        lines.insert(1, lines[0][:3])
    text = table(None if name == "cola" and not test else header, lines)
    path.write_text(("\ufeff" if name == "mrpc" else "") + text, encoding="utf-8")


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory):
    """Folder with a folder of GLUE files for each task."""
    folder = tmp_path_factory.mktemp("glue")
    for name, task in glue_tasks.TASKS.items():
        (folder / name).mkdir()
        for seed, split in enumerate(("train", *task.evaluation_splits, *task.submissions)):
            file = "diagnostic" if name == "ax" else split
            write_split(
                folder / name / f"{file}.tsv",
                name,
                24 if split == "train" else 9,
                seed,
                test=split in task.submissions,
            )
    return folder


@pytest.fixture
def run(tmp_path, tiny_bert, glue_dir):
    """Run the script on a task's small files; later flags win."""

    def run_glue(task, *flags, output="out", model_type="masked_bert", model=tiny_bert, data=None):
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
            str(data or glue_dir / task),
            "--cache_dir",
            str(tmp_path / "cache"),
            "--do_lower_case",
        ]
        short = "--max_seq_length 48 --per_gpu_train_batch_size 4".split()
        masked_run_glue.main([*common, "--task_name", task, *data, *short, *flags])
        return tmp_path / output

    return run_glue


@pytest.fixture
def refused(run, capsys, tmp_path):
    """Run the script, expect status 2 and return the one line that it printed."""

    def expect(*args, **kwargs):
        with pytest.raises(SystemExit) as stop:
            run(*args, **kwargs)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "Traceback" not in error, error
        assert not (tmp_path / "out" / "model.safetensors").exists()
        return error

    return expect


def results(folder):
    return json.loads((folder / "eval_results.json").read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


def predictions(path):
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction"
    return [line.split("\t") for line in lines]


@pytest.mark.parametrize("name", [name for name in glue_tasks.TASKS if name != "ax"])
def test_every_task_trains_evaluates_predicts_and_bertarizes(run, name, capsys):
    # Until it has learned something, it predicts one class, and CoLA has no metric.
    longer = "--max_steps 60 --learning_rate 3e-3".split() if name == "cola" else []
    out = run(name, *TOPK, *TRAIN, *longer, "--do_eval", "--do_predict")
    task = glue_tasks.TASKS[name]
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
        *task.submissions.values(),
    }
    assert results(out).keys() == KEYS.get(name, {"acc", "entropy"}) | MASK_KEYS
    for file in task.submissions.values():
        rows = predictions(out / file)
        assert [int(index) for index, _ in rows] == list(range(100, 109))
        allowed = [str(i) for i in range(len(task.labels))] if task.numbered else task.labels
        assert (
            all(0 <= float(text) <= 5 for _, text in rows)
            if task.is_regression
            else {t for _, t in rows} <= set(allowed)
        )

    counts = counts_parameters.main(["--serialization_dir", str(out)])
    assert counts.linear_percent == pytest.approx(results(out)["remaining_percent_linear"])
    target = bertarize.main(["--model_name_or_path", str(out)])
    plain, info = BertForSequenceClassification.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()) and plain.config.model_type == "bert"
    said = pipeline("text-classification", model=str(target))(
        {"text": "ada lives in oslo", "text_pair": "dan lives in rome"}
    )
    said = said[0] if isinstance(said, list) else said
    if task.is_regression:
        inputs = pipeline("text-classification", model=str(target)).tokenizer(
            "ada lives in oslo", "dan lives in rome", return_tensors="pt"
        )
        assert said["score"] == pytest.approx(
            plain.eval()(**inputs).logits.item(), rel=1e-4
        )  # a score, not a probability
    else:
        assert said["label"] in task.labels and set(plain.config.id2label.values()) == set(
            task.labels
        )


def test_a_dense_model_learns_and_evaluates_alone_to_the_same_results(run, glue_dir):
    flags = (
        "--max_steps 60 --learning_rate 3e-3 --save_steps 0 --do_train --do_eval --do_predict"
    ).split()
    out = run("sst-2", *flags, model_type="bert")
    assert results(out)["acc"] == 1.0 and results(out)["entropy"] < 0.2
    assert not MASK_KEYS & results(out).keys()
    alone = run(
        "SST2",
        "--do_eval",
        "--do_predict",
        model_type="bert",
        model=out,
        output="alone",
        data=glue_dir / "sst-2",
    )
    assert {file.name for file in alone.iterdir()} == {
        "eval_results.txt",
        "eval_results.json",
        "SST-2.tsv",
    }
    assert results(alone) == pytest.approx(results(out))
    assert (alone / "SST-2.tsv").read_text() == (out / "SST-2.tsv").read_text()


def test_sparse_inference_gives_the_same_results_and_submissions(run):
    model = run("mnli", *TOPK, *TRAIN)
    flags = ("--do_eval", "--do_predict")
    dense = run("mnli", *flags, model=model, output="dense")
    sparse = run("mnli", *flags, "--sparse_inference", model=model, output="sparse")
    for name, value in results(dense).items():
        assert results(sparse)[name] == (
            pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        )
    for file in ("MNLI-m.tsv", "MNLI-mm.tsv"):
        assert predictions(dense / file) == predictions(sparse / file)


def test_a_model_of_mnli_answers_the_diagnostics_and_the_mismatched_set(run):
    out = run("mnli", *TOPK, *TRAIN, "--do_eval")
    assert (
        results(run("mnli-mm", "--do_eval", model=out, output="mm"))["acc"]
        == results(out)["acc_mismatched"]
    )
    ax = run("ax", "--do_predict", model=out, output="ax")
    assert {file.name for file in ax.iterdir()} == {"AX.tsv"}
    assert len(predictions(ax / "AX.tsv")) == 9


def test_labels_meet_by_name_whatever_their_order(run, tmp_path):
    """The hub numbers MNLI's labels differently from the files; its models follow the hub."""
    out = run(
        "mnli", "--do_train", "--max_steps", "30", "--do_eval", "--do_predict", model_type="bert"
    )
    model = BertForSequenceClassification.from_pretrained(out)
    assert list(model.config.id2label.values()) == ["contradiction", "entailment", "neutral"]
    order = [1, 2, 0]
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.config.id2label = dict(enumerate(["ENTAILMENT", "NEUTRAL", "CONTRADICTION"]))
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    hub = tmp_path / "hub"
    model.save_pretrained(hub)
    for file in out.glob("tokenizer*"):
        (hub / file.name).write_bytes(file.read_bytes())
    other = run("mnli", "--do_eval", "--do_predict", model_type="bert", model=hub, output="other")
    assert results(other) == pytest.approx(results(out))
    assert (other / "MNLI-m.tsv").read_text() == (out / "MNLI-m.tsv").read_text()
    further = run(
        "mnli",
        *TOPK,
        *"--do_train --max_steps 1 --learning_rate 1e-9".split(),
        model=hub,
        output="further",
    )
    assert json.loads((further / "config.json").read_text())["id2label"]["0"] == "contradiction"
    torch.testing.assert_close(
        weights(further)["classifier.weight"], weights(out)["classifier.weight"]
    )


def strip_names(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("id2label"), config.pop("label2id")
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 2}))


def test_labels_without_names_are_read_in_the_order_of_the_task_and_said_so(run, caplog):
    out = run("rte", "--do_train", "--max_steps", "20", "--do_eval", model_type="bert")
    strip_names(out)
    alone = run("rte", "--do_eval", model_type="bert", model=out, output="alone")
    assert results(alone)["acc"] == results(out)["acc"]
    assert any(
        "have no names; they are read as entailment, not_entailment" in message
        for message in caplog.messages
    )
    caplog.clear()
    run(
        "rte",
        *TOPK,
        *TRAIN,
        "--teacher_type",
        "bert",
        "--teacher_name_or_path",
        str(out),
        output="student",
    )
    assert any("have no names" in message for message in caplog.messages)


@pytest.mark.parametrize("name", ["mnli", "sts-b"])
def test_distillation_is_a_real_loss(run, name):
    teacher = run(
        name,
        *"--do_train --max_steps 30 --save_steps 0".split(),
        model_type="bert",
        output="teacher",
    )
    flags = [
        "--teacher_type",
        "bert",
        "--teacher_name_or_path",
        str(teacher),
        *"--alpha_distil 0.9 --alpha_ce 0.1 --alpha_hidden 0.3".split(),
    ]
    events = EventAccumulator(
        str(run(name, *METHODS["soft"], *TRAIN, *flags, "--logging_steps", "1"))
    )
    events.Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert last["loss/distil"] > 1e-4 and last["loss/hidden"] > 1e-4
    expected = 0.9 * last["loss/distil"] + 0.1 * last["loss/task"] + 0.3 * last["loss/hidden"]
    expected += last["lambda"] * last["loss/penalty"]
    assert last["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_identical(run, method):
    flags = [*METHODS[method], *TRAIN, "--gradient_accumulation_steps", "2", "--save_steps", "4"]
    whole = run("rte", *flags, output="whole")
    resumed = run(
        "rte", *flags, "--resume_from_checkpoint", str(whole / "checkpoint-4"), output="resumed"
    )
    first, second = weights(whole), weights(resumed)
    assert first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def test_checkpoints_are_evaluated_during_and_after_training(run):
    out = run(
        "mrpc",
        *TOPK,
        *TRAIN,
        *("--save_steps 4 --do_eval --eval_all_checkpoints --evaluate_during_training").split(),
    )
    assert {"f1", "f1_4", "f1_8"} <= results(out).keys()
    events = EventAccumulator(str(out))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/acc")][:2] == [4, 8]
    assert events.Scalars("eval/acc")[0].value == pytest.approx(results(out)["acc_4"])


def test_the_hub_is_asked_when_there_is_no_data_dir(tmp_path, tiny_bert, monkeypatch):
    asked = []

    def load_dataset(name, config, split, **kwargs):
        asked.append((name, config, split))
        rows = {
            "sentence": ["ada lives in oslo .", "dan lives in rome and rome ."] * 6,
            "label": [0, 1] * 6,
            "idx": list(range(12)),
        }
        kinds = {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
        }
        return datasets.Dataset.from_dict(
            rows, features=datasets.Features(kinds | {"idx": datasets.Value("int32")})
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    masked_run_glue.main(
        [
            "--model_type",
            "masked_bert",
            "--model_name_or_path",
            str(tiny_bert),
            "--task_name",
            "SST-2",
            "--output_dir",
            str(tmp_path / "out"),
            "--cache_dir",
            str(tmp_path / "cache"),
            *"--do_eval --do_predict --max_seq_length 48".split(),
            *TOPK,
            *TRAIN,
        ]
    )
    assert sorted(asked) == [
        ("nyu-mll/glue", "sst2", split) for split in ("test", "train", "validation")
    ]
    assert len(predictions(tmp_path / "out" / "SST-2.tsv")) == 12


# ------------------------------------------------------------------------------- tasks of one's own


CUSTOM = "--text_column premise --text_pair_column claim --label_column verdict".split()


@pytest.fixture
def custom_dir(tmp_path):
    """Function that writes train, dev and test files of a custom task in a format."""

    def write(suffix, labels=("refutes", "supports", "unknown"), folder="mine"):
        (tmp_path / folder).mkdir()
        for seed, (split, rows) in enumerate({"train": 24, "dev": 9, "test": 5}.items()):
            rng = random.Random(seed)
            records = [
                {
                    "premise": sentence(rng, "", row % 3),
                    "claim": "ada, who lives",
                    "verdict": labels[row % len(labels)],
                }
                for row in range(rows)
            ]
            if split == "test":
                records = [
                    {name: record[name] for name in ("premise", "claim")} for record in records
                ]
            if suffix == "jsonl":
                text = "".join(json.dumps(record) + "\n" for record in records)
            elif suffix == "csv":
                quoted = [
                    ['"' + str(v).replace('"', '""') + '"' for v in record.values()]
                    for record in records
                ]
                text = "\n".join(",".join(row) for row in [list(records[0]), *quoted]) + "\n"
            else:
                text = table(
                    list(records[0]), [list(map(str, record.values())) for record in records]
                )
            (tmp_path / folder / f"{split}.{suffix}").write_text(text)
        return tmp_path / folder

    return write


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_task_of_ones_own(run, custom_dir, suffix):
    data = custom_dir(suffix)
    out = run("custom", *CUSTOM, *TOPK, *TRAIN, "--do_eval", "--do_predict", data=data)
    assert json.loads((out / "config.json").read_text())["id2label"] == {
        "0": "refutes",
        "1": "supports",
        "2": "unknown",
    }
    assert results(out).keys() == {"acc", "entropy"} | MASK_KEYS
    assert [int(index) for index, _ in predictions(out / "predictions.tsv")] == list(range(5))
    (
        data / f"train.{suffix}"
    ).unlink()  # evaluating alone needs no training data: the labels are the model's
    alone = run(
        "custom", *CUSTOM, "--do_eval", "--do_predict", data=data, model=out, output="alone"
    )
    assert results(alone) == pytest.approx(results(out))
    assert (alone / "predictions.tsv").read_text() == (out / "predictions.tsv").read_text()


def test_a_regression_of_ones_own(run, custom_dir):
    data = custom_dir("jsonl", labels=(-1.5, 0.25, 7))
    out = run(
        "custom", *CUSTOM, "--regression", *TOPK, *TRAIN, "--do_eval", "--do_predict", data=data
    )
    assert results(out).keys() == {"pearson", "spearmanr", "corr"} | MASK_KEYS
    assert np.isfinite([float(text) for _, text in predictions(out / "predictions.tsv")]).all()


def test_undefined_metrics_are_left_out(run, glue_dir, tmp_path, caplog):
    """Of the results and of TensorBoard; the others stay."""
    data = tmp_path / "cola"
    shutil.copytree(glue_dir / "cola", data)
    (data / "dev.tsv").write_text("gj04\t1\t\tada lives .\ngj04\t1\t\tben lives .\n")
    out = run("cola", *TOPK, *TRAIN, "--do_eval", "--evaluate_during_training", data=data)
    assert results(out).keys() == {"entropy"} | MASK_KEYS
    assert caplog.text.count("undefined and left out: mcc (all labels are equal)") == 3
    events = EventAccumulator(str(out))
    events.Reload()
    assert [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")] == ["eval/entropy"]


def test_the_first_samples_only(run, caplog):
    """Of each evaluation set; a submission is always whole."""
    few = ["--max_train_samples", "5", "--max_eval_samples", "2"]
    out = run("mnli", *TOPK, *TRAIN, "--do_eval", "--do_predict", *few)
    assert "training: 5 examples" in caplog.text
    assert results(out)["acc_matched"] in (0, 0.5, 1) and results(out)["acc_mismatched"] in (
        0,
        0.5,
        1,
    )
    assert [len(predictions(out / file)) for file in ("MNLI-m.tsv", "MNLI-mm.tsv")] == [9, 9]


def test_files_with_numbers_are_those_with_names(run, glue_dir, tmp_path, caplog):
    data = tmp_path / "numbers"
    shutil.copytree(glue_dir / "mnli", data)
    for file in data.glob("[td][re]*.tsv"):
        text = file.read_text()
        for number, name in enumerate(("contradiction", "entailment", "neutral")):
            text = text.replace(f"\t{name}\n", f"\t{number}\n")
        file.write_text(text)
    out = run("mnli", *TOPK, *TRAIN, "--do_eval", "--do_predict")
    assert "the hub has another order" not in caplog.text
    same = run("mnli", *TOPK, *TRAIN, "--do_eval", "--do_predict", data=data, output="same")
    assert results(same) == results(out) and "the hub has another order" in caplog.text
    assert (same / "MNLI-m.tsv").read_text() == (out / "MNLI-m.tsv").read_text()


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
    anonymous, named = teachers
    for student, teacher in (named, anonymous), (anonymous, named):
        flags = "--do_train --max_steps 1 --save_steps 0 --learning_rate 1e-9 --teacher_type bert"
        flags = [*flags.split(), "--teacher_name_or_path", str(teacher)]
        output = f"student_of_{teacher.name}"
        out = run(
            "custom", *CUSTOM, *flags, data=data, model=student, model_type="bert", output=output
        )
        assert list(json.loads((out / "config.json").read_text())["id2label"].values()) == TWELVE
        events = EventAccumulator(str(out))
        events.Reload()
        assert events.Scalars("loss/distil")[-1].value == pytest.approx(0, abs=1e-6)


def test_evaluating_a_model_without_names_on_ones_own_task(run, refused, custom_dir, caplog):
    data = custom_dir("tsv")
    model = run("custom", *CUSTOM, "--do_train", "--max_steps", "20", data=data, model_type="bert")
    alone = {"model": model, "model_type": "bert", "output": "alone", "data": data}
    run("custom", *CUSTOM, "--do_eval", "--do_predict", **alone)
    wanted = (
        results(model.with_name("alone")),
        (model.with_name("alone") / "predictions.tsv").read_text(),
    )
    config = json.loads((model / "config.json").read_text())
    config.pop("id2label"), config.pop("label2id")
    (model / "config.json").write_text(json.dumps(config | {"num_labels": 3}))
    out = run("custom", *CUSTOM, "--do_eval", "--do_predict", **alone)
    assert (results(out), (out / "predictions.tsv").read_text()) == wanted
    said = "have no names; they are read as refutes, supports, unknown"
    assert caplog.text.count(said) == 1
    out = run("custom", *CUSTOM, "--do_predict", **alone | {"output": "predicted"})
    assert {label for _, label in predictions(out / "predictions.tsv")} <= set(
        ["LABEL_0", "LABEL_1", "LABEL_2"]
    )

    numbers = custom_dir("tsv", labels=("0", "1", "2"), folder="numbers")
    out = run("custom", *CUSTOM, "--do_eval", **alone | {"data": numbers, "output": "numbers"})
    assert results(out) == wanted[0] and "read as 0, 1, 2" in caplog.text
    (model / "model.safetensors").rename(model / "weights")
    two = custom_dir("tsv", labels=("no", "yes"), folder="two")
    assert "dev.tsv: has 2 labels (no, yes), and the model has 3 outputs without names" in refused(
        "custom", *CUSTOM, "--do_eval", **alone | {"data": two}
    )


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "task, flags, said",
    [
        ("mnlli", ["--do_train"], "did you mean 'mnli'?"),
        ("ax", ["--do_eval"], "ax has no labels: give --do_predict"),
        ("rte", ["--text_column", "x", "--do_train"], "--text_column is for --task_name custom"),
        (
            "custom",
            ["--do_train", "--text_column", "premise"],
            "has no column premise; found: index, sentence1",
        ),
        ("rte", [], "give --do_train or --do_eval"),
        ("rte", ["--do_train", "--max_seq_length", "4"], "must be at least 5"),
    ],
)
def test_arguments(refused, glue_dir, task, flags, said):
    assert said in refused(task, *flags, data=glue_dir / "rte")


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("rte", lambda text: "", "the file is empty"),
        ("rte", lambda text: text.replace("sentence2", "second"), "has no column sentence2"),
        (
            "rte",
            lambda text: text.replace("not_entailment", "maybe", 1),
            "dev.tsv:3: the label 'maybe' is not one of",
        ),
        ("rte", lambda text: text + "7\tada\n", "dev.tsv:11: has 2 fields"),
        (
            "sts-b",
            lambda text: text.replace("5.000", "high", 1),
            "dev.tsv:3: the label 'high' is not a finite number in [0, 5]",
        ),
        (
            "sst-2",
            lambda text: text.replace("\t1", "\t2", 1),
            "dev.tsv:3: the label '2' is not one of",
        ),
    ],
)
def test_bad_files_are_refused_before_training(refused, glue_dir, tmp_path, name, damage, said):
    (tmp_path / "bad").mkdir()
    for file in (glue_dir / name).iterdir():
        text = file.read_text()
        (tmp_path / "bad" / file.name).write_text(damage(text) if file.name == "dev.tsv" else text)
    assert said in refused(name, *TOPK, *TRAIN, "--do_eval", data=tmp_path / "bad")


def test_a_model_or_teacher_with_other_labels_is_refused(run, refused, glue_dir):
    rte = run("rte", "--do_train", "--max_steps", "2", model_type="bert", output="rte")
    assert (
        "has the labels entailment, not_entailment, but those of the task are negative, positive"
        in refused("sst-2", "--do_eval", model_type="bert", model=rte)
    )
    flags = ["--teacher_type", "bert", "--teacher_name_or_path"]
    assert "has the labels entailment, not_entailment, but those of the task are" in refused(
        "sst-2", *TOPK, *TRAIN, *flags, str(rte)
    )
    mnli = run("mnli", "--do_train", "--max_steps", "2", model_type="bert", output="mnli")
    assert "has 3 outputs, and 2 are needed" in refused("rte", *TOPK, *TRAIN, *flags, str(mnli))


def test_a_head_of_another_task_is_trained_anew(run, caplog):
    mnli = run("mnli", "--do_train", "--max_steps", "2", model_type="bert", output="mnli")
    out = run("rte", *TOPK, *TRAIN, "--do_eval", model=mnli)
    assert MaskedBertForSequenceClassification.from_pretrained(out).classifier.weight.shape[0] == 2
    sst = run(
        "sst-2",
        *TOPK,
        *"--do_train --max_steps 1 --learning_rate 1e-9".split(),
        model=out,
        output="sst",
    )
    assert any(
        "has other labels (entailment, not_entailment): it starts fresh" in m
        for m in caplog.messages
    )
    before, after = (weights(folder)["classifier.weight"] for folder in (out, sst))
    assert (before - after).abs().max() > 1e-3


def test_models_of_another_kind_of_output(run, refused, custom_dir):
    sts = run("sts-b", "--do_train", "--max_steps", "2", model_type="bert", output="sts")
    rte = run("rte", "--do_train", "--max_steps", "2", model_type="bert", output="rte")
    said = refused("sts-b", "--do_eval", model_type="bert", model=rte)
    assert "has 2 outputs, and 1 are needed" in said
    said = refused(
        "custom", *CUSTOM, "--do_predict", data=custom_dir("csv"), model_type="bert", model=sts
    )
    assert "has 1 outputs: add --regression" in said


def test_configurations_and_teachers_that_do_not_fit(run, refused, tmp_path, tiny_bert):
    rte = run("rte", "--do_train", "--max_steps", "2", model_type="bert", output="rte")
    config = json.loads((rte / "config.json").read_text())
    (rte / "config.json").write_text(json.dumps(config | {"id2label": ["a", "b"]}))
    assert "its id2label must name the outputs" in refused(
        "rte", "--do_eval", model_type="bert", model=rte
    )
    small = BertForSequenceClassification(
        BertConfig.from_pretrained(tiny_bert, max_position_embeddings=24)
    )
    small.save_pretrained(tmp_path / "small")
    teach = ["--teacher_type", "bert", "--teacher_name_or_path", str(tmp_path / "small")]
    assert "it takes 24 tokens, and 48 are needed" in refused("rte", *TOPK, *TRAIN, *teach)
    assert "--text_column is empty" in refused(
        "custom", "--do_train", "--text_column", "", data=tmp_path
    )


def test_a_diverged_model_gives_no_results(run, capsys):
    rte = run("rte", "--do_train", "--max_steps", "2", model_type="bert", output="rte")
    model = BertForSequenceClassification.from_pretrained(rte)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    model.save_pretrained(rte)
    with pytest.raises(SystemExit):
        run("rte", "--do_eval", model_type="bert", model=rte)
    assert "are not finite" in capsys.readouterr().err


def test_overwriting_removes_the_predictions_of_another_task(run):
    out = run("mnli", *TOPK, *TRAIN, "--do_eval", "--do_predict")
    run("rte", *TOPK, *TRAIN, "--overwrite_output_dir")
    assert not list(out.glob("*.tsv")) and not list(out.glob("eval_results.*"))


def test_resuming_a_finished_run_evaluates_at_its_step_and_knows_its_labels(
    run, refused, custom_dir, tmp_path
):
    flags = [*CUSTOM, *TOPK, *TRAIN, "--save_steps", "4"]
    data = custom_dir("tsv")
    out = run("custom", *flags, data=data)
    run("custom", *flags, "--do_eval", "--resume_from_checkpoint", "latest", data=data)
    events = EventAccumulator(str(out))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/acc")] == [8]
    renamed = custom_dir("tsv", labels=("false", "true", "unknown"), folder="renamed")
    (out / "model.safetensors").unlink()
    resume = ["--resume_from_checkpoint", "latest"]
    assert "the training data has changed" in refused("custom", *flags, *resume, data=renamed)


def test_an_unknown_label_in_the_development_set_of_ones_own(refused, custom_dir):
    data = custom_dir("tsv")
    text = (data / "dev.tsv").read_text()
    (data / "dev.tsv").write_text(text.replace("unknown", "unheard", 1))
    assert "dev.tsv:4: the label 'unheard' is not one of refutes, supports, unknown" in refused(
        "custom", *CUSTOM, *TRAIN, "--do_eval", data=data
    )
