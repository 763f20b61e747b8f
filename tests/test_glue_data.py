"""GLUE data: every task's files, every refusal, your own files, features, metrics, submissions."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tiny import TOKENIZERS, tokenizer_of
from transformers import BertTokenizerFast

from emmental.data import glue, glue_tasks
from emmental.data.glue import (
    build_features,
    collate,
    find_labels,
    load_hub_examples,
    name_outputs,
    read_examples,
    split_file,
    submission,
)
from emmental.data.glue_tasks import TASKS, custom_task, task_name
from emmental.data.metrics import glue_metrics, mean_entropy
from emmental.errors import UserError

PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
MNLI = f"index promptID pairID genre {PARSES} sentence1 sentence2"
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
PAIR = ["sentence1", "sentence2"]
STRINGS = ["#1 String", "#2 String"]
# Headers of the labelled and of the test files, text columns, label column, labels in the files.
LAYOUTS = {
    "cola": (
        ["source", "label", "mark", "sentence"],
        ["index", "sentence"],
        ["sentence"],
        "label",
        "01",
    ),
    "sst-2": (["sentence", "label"], ["index", "sentence"], ["sentence"], "label", "01"),
    "mrpc": (
        ["Quality", "#1 ID", "#2 ID", *STRINGS],
        ["index", "#1 ID", "#2 ID", *STRINGS],
        STRINGS,
        "Quality",
        "01",
    ),
    "sts-b": ([*STSB.split(), "score"], STSB.split(), PAIR, "score", ["0.000", "5.000", "3.25"]),
    "qqp": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["id", "question1", "question2"],
        ["question1", "question2"],
        "is_duplicate",
        "01",
    ),
    "mnli": (
        [*MNLI.split(), "label1", "gold_label"],
        MNLI.split(),
        PAIR,
        "gold_label",
        ["contradiction", "entailment", "neutral"],
    ),
    "qnli": (
        ["index", "question", "sentence", "label"],
        ["index", "question", "sentence"],
        ["question", "sentence"],
        "label",
        ["entailment", "not_entailment"],
    ),
    "rte": (
        ["index", *PAIR, "label"],
        ["index", *PAIR],
        PAIR,
        "label",
        ["entailment", "not_entailment"],
    ),
    "wnli": (["index", *PAIR, "label"], ["index", *PAIR], PAIR, "label", "01"),
}
LAYOUTS["mnli-mm"] = LAYOUTS["ax"] = LAYOUTS["mnli"]
# Characters that separate lines or fields elsewhere: quotes, Unicode separators, a lone \r.
ODD = "Say \"it, 'é' \u2028\x85\x0b\x0c\x1c\r 漢😀, \""
HUB_NAMES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "ax": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test sees the cache of another, nor that of the user."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(header, rows, newline="\n"):
    return "".join("\t".join(fields) + newline for fields in ([header] if header else []) + rows)


def labelled_rows(name, texts=None):
    """Three rows of the task's training file, and the examples they hold."""
    header, _, columns, label_column, labels = LAYOUTS[name]
    texts = texts or [[f"{column} of row {row}" for column in columns] for row in range(3)]
    values = [labels[row % len(labels)] for row in range(3)]
    rows = [
        [
            dict(zip(columns, texts[row]), **{label_column: values[row]}).get(column, f"x{row}")
            for column in header
        ]
        for row in range(3)
    ]
    parsed = (
        [float(value) for value in values]
        if name == "sts-b"
        else [row % len(labels) for row in range(3)]
    )
    wanted = [
        {
            "index": row,
            "text_a": text[0],
            "text_b": text[1] if len(text) > 1 else None,
            "label": label,
        }
        for row, (text, label) in enumerate(zip(texts, parsed))
    ]
    return rows, wanted


def refused(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# ------------------------------------------------------------------------------------------- tasks


def test_tasks():
    assert " ".join(TASKS) == "cola sst-2 mrpc sts-b qqp mnli mnli-mm qnli rte wnli ax"
    assert TASKS["mnli"].labels == TASKS["ax"].labels == ("contradiction", "entailment", "neutral")
    assert {name for name, task in TASKS.items() if task.is_regression} == {"sts-b"}
    assert TASKS["mnli"].evaluation_splits == ("dev_matched", "dev_mismatched")
    assert TASKS["mnli-mm"].evaluation_splits == ("dev_mismatched",)
    assert TASKS["ax"].evaluation_splits == () and TASKS["rte"].evaluation_splits == ("dev",)
    keys = {"cola": "mcc", "mrpc": "acc_and_f1", "qqp": "acc_and_f1", "sts-b": "corr"}
    assert {name: task.key_metric for name, task in TASKS.items()} == {
        name: keys.get(name, "acc") for name in TASKS
    }


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("SST-2", "sst-2"),
        ("sst2", "sst-2"),
        ("STSB", "sts-b"),
        ("sts_b", "sts-b"),
        ("mnli_mm", "mnli-mm"),
        ("MNLI-MM", "mnli-mm"),
        ("CoLA", "cola"),
        ("AX", "ax"),
    ],
)
def test_task_name(spelling, name):
    assert task_name(spelling) == name


# ---------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "ax"])
def test_reads_labelled_files(tmp_path, name, newline, caplog):
    task = TASKS[name]
    header, _, columns, _, _ = LAYOUTS[name]
    texts = [[f"{ODD} {column} {row}" for column in columns] for row in range(3)]
    rows, wanted = labelled_rows(name, texts)
    content = table(None if name == "cola" else header, rows, newline)
    for number, split in enumerate(["train", *task.evaluation_splits]):
        # The last line of CoLA's dev.tsv has no end; MRPC's files start with a byte order mark.
        text = content.removesuffix(newline) if number else content
        write(tmp_path / f"{split}.tsv", ("\ufeff" if name == "mrpc" else "") + text)
        examples = read_examples(task, tmp_path, split)
        assert list(examples) == wanted
        assert examples.features["index"] == Value("int64") and examples.features[
            "text_b"
        ] == Value("string")
        assert examples.features["label"] == Value("float64" if name == "sts-b" else "int64")
    assert not caplog.records


@pytest.mark.parametrize("name", LAYOUTS)
def test_reads_test_files(tmp_path, name):
    task = TASKS[name]
    _, header, columns, _, _ = LAYOUTS[name]
    row = {column: f"{ODD} {column}" for column in columns} | {header[0]: "17"}
    content = ("\ufeff" if name == "mrpc" else "") + table(
        header, [[row.get(column, "x") for column in header]]
    )
    for split in task.submissions:
        write(tmp_path / ("diagnostic.tsv" if name == "ax" else f"{split}.tsv"), content)
        (example,) = examples = read_examples(task, tmp_path, split)
        texts = [row[column] for column in columns]
        assert example == {
            "index": 17,
            "text_a": texts[0],
            "text_b": texts[1] if texts[1:] else None,
        }
        assert "label" not in examples.column_names


def test_columns_are_found_by_name_and_labels_by_name_too(tmp_path):
    header = ["extra", "label", "sentence2", "sentence1"]
    write(
        tmp_path / "train.tsv", table(header, [["", "entailment", "b", "a"], ["", "1", "d", "c"]])
    )
    examples = read_examples(TASKS["wnli"], tmp_path, "train")
    assert list(examples) == [
        {"index": 0, "text_a": "a", "text_b": "b", "label": 1},
        {"index": 1, "text_a": "c", "text_b": "d", "label": 1},
    ]
    write(
        tmp_path / "train.tsv", table(["sentence", "label"], [["x", "negative"], ["", "positive"]])
    )
    assert list(read_examples(TASKS["sst-2"], tmp_path, "train")["label"]) == [0, 1]
    assert list(read_examples(TASKS["sst-2"], tmp_path, "train")["text_a"]) == ["x", ""]


def test_a_test_file_without_index_is_numbered(tmp_path):
    write(tmp_path / "test.tsv", table(["sentence"], [["x"], ["y"]]))
    assert list(read_examples(TASKS["sst-2"], tmp_path, "test")["index"]) == [0, 1]


def test_short_rows_of_qqp(tmp_path, caplog):
    """They are skipped and counted, each time that the file is used."""
    header, test_header = LAYOUTS["qqp"][:2]
    short = [["2", "1", "2", "half"], ["4"]]
    rows = [["1", "1", "2", "a", "b", "0"], short[0], ["3", "1", "2", "c", "d", "1"], short[1]]
    for split in ("train", "train", "dev"):
        caplog.clear()
        write(tmp_path / f"{split}.tsv", table(header, rows))
        assert list(read_examples(TASKS["qqp"], tmp_path, split)["text_a"]) == ["a", "c"]
        assert f"{split}.tsv: 2 rows with too few fields are skipped" in caplog.text
    write(tmp_path / "test.tsv", table(test_header, [["0", "a", "b"], ["1", "c"]]))
    refused(lambda: read_examples(TASKS["qqp"], tmp_path, "test"), "test.tsv:3: has 2 fields")


def test_extra_fields_are_ignored(tmp_path):
    write(tmp_path / "dev.tsv", table(["sentence", "label"], [["x", "0", "more"], ["y", "1"]]))
    assert list(read_examples(TASKS["sst-2"], tmp_path, "dev")["label"]) == [0, 1]


SST = "sentence\tlabel\n"
RTE = "index\tsentence1\tsentence2\tlabel\n"
STS = f"{STSB} score".replace(" ", "\t") + "\n"
MNLI_ROW = "\t".join(["x"] * 11)
MNLI_HEADER = f"{MNLI} label1 gold_label".replace(" ", "\t") + "\n"


def sts_row(score):
    return STS + "\t".join([*["x"] * 9, "1.0"]) + "\n" + "\t".join([*["x"] * 9, score]) + "\n"


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("sst-2", "", ["dev.tsv", "the file is empty"]),
        ("sst-2", "\ufeff\n\n", ["dev.tsv", "the file is empty"]),
        ("cola", "", ["dev.tsv: is empty"]),
        ("cola", "\n", ["dev.tsv: is empty"]),
        ("sst-2", SST, ["dev.tsv: is empty"]),
        ("sst-2", b"sentence\tlabel\nok\t1\ncaf\xe9\t1\n", ["dev.tsv:3: is not UTF-8 TSV"]),
        (
            "sst-2",
            "fine film\t1\n",
            ["dev.tsv: the header has no column sentence; found: fine film, 1"],
        ),
        ("sst-2", "sentence\tlabels\nx\t1\n", ["no column label", "found: sentence, labels"]),
        ("sst-2", "label\tsentence\tlabel\n1\tx\t1\n", ["two columns label"]),
        (
            "mrpc",
            f"Quality\t{STRINGS[0]}\n1\tx\n",
            ["no column #2 String; found: Quality, #1 String"],
        ),
        ("sst-2", SST + "ok\t1\nshort\n", ["dev.tsv:3: has 1 fields for 2 columns"]),
        ("cola", "gj04\t1\t\tok\ngj04\t1\n", ["dev.tsv:2: has 2 fields for 4"]),
        (
            "sst-2",
            SST + "ok\t1\nx\t2\n",
            ["dev.tsv:3: the label '2' is not one of negative, positive, 0, 1"],
        ),
        ("sst-2", SST + "ok\t1\n\nx\t\n", ["dev.tsv:4: label is empty"]),
        (
            "cola",
            "source\tlabel\tmark\tsentence\n",
            ["dev.tsv:1: the label 'label' is not one of unacceptable"],
        ),
        (
            "rte",
            RTE + "0\ta\tb\t2\n",
            ["dev.tsv:2: the label '2' is not one of entailment, not_entailment, 0, 1"],
        ),
        ("sst-2", "sentence\tlabel\rfine\t1\r", ["dev.tsv: its lines end in CR alone"]),
        ("cola", "gj04\t1\t\tok\rgj04\t0\t*\tnot ok\r\n", ["its lines end in CR alone"]),
        ("rte", RTE + "0\ta\tb\tneutral\n", ["dev.tsv:2: the label 'neutral'"]),
        (
            "mnli",
            MNLI_HEADER + f"{MNLI_ROW}\t-\n",
            ["dev_matched.tsv:2: the label '-' is not one of contradiction"],
        ),
        (
            "sts-b",
            sts_row("good"),
            ["dev.tsv:3: the label 'good' is not a finite number in [0, 5]"],
        ),
        ("sts-b", sts_row(""), ["dev.tsv:3: the label ''"]),
        ("sts-b", sts_row("nan"), ["dev.tsv:3: the label 'nan'"]),
        ("sts-b", sts_row("inf"), ["dev.tsv:3: the label 'inf'"]),
        ("sts-b", sts_row("5.001"), ["dev.tsv:3: the label '5.001'"]),
        ("sts-b", sts_row("-0.1"), ["dev.tsv:3: the label '-0.1'"]),
    ],
)
def test_refuses_bad_files(tmp_path, name, content, parts):
    split = TASKS[name].evaluation_splits[0]
    write(tmp_path / f"{split}.tsv", content)
    refused(lambda: read_examples(TASKS[name], tmp_path, split), tmp_path, *parts)


@pytest.mark.parametrize("name", ["rte", "qnli", "mnli"])
def test_numbers_are_indices_in_the_order_of_the_task(tmp_path, name, caplog):
    task, (header, _, _, label_column, _) = TASKS[name], LAYOUTS[name]
    split, count = task.evaluation_splits[0], len(task.labels)
    numbers = [*map(str, range(count)), task.labels[0]]
    rows = [[value if column == label_column else "x" for column in header] for value in numbers]
    for _ in range(2):  # from the file, then from the cache
        caplog.clear()
        write(tmp_path / f"{split}.tsv", table(header, rows))
        assert list(read_examples(task, tmp_path, split)["label"]) == [*range(count), 0]
        said = "0 contradiction, 1 entailment, 2 neutral; the hub has another order"
        assert (said in caplog.text) == (name == "mnli")
    examples = read_examples(task, tmp_path, split)
    predicted = submission(task, examples, np.eye(count)[examples["label"]])
    assert predicted.split()[3::2] == [*task.labels, task.labels[0]]  # names, as before


@pytest.mark.parametrize("index", ["", "x", "-1", "1.5"])
def test_refuses_a_bad_index(tmp_path, index):
    write(tmp_path / "test.tsv", f"index\tsentence\n0\ta\n{index}\tb\n")
    refused(
        lambda: read_examples(TASKS["sst-2"], tmp_path, "test"),
        "test.tsv:3: the index",
        "not a whole number",
    )


def test_refuses_missing_files(tmp_path):
    said = f"--data_dir {tmp_path} must hold exactly one file dev.tsv"
    refused(lambda: read_examples(TASKS["sst-2"], tmp_path, "dev"), said)


# --------------------------------------------------------------------------------------------- hub


def hub_data(task, labels):
    columns = task.hub_columns or task.text_columns
    label = Value("float32") if task.is_regression else ClassLabel(names=HUB_NAMES[task.hub_config])
    rows = {column: [f"{column} {row}" for row in range(len(labels))] for column in columns}
    rows |= {"label": labels, "idx": [40 + row for row in range(len(labels))]}
    kinds = {column: Value("string") for column in columns} | {
        "label": label,
        "idx": Value("int32"),
    }
    return Dataset.from_dict(rows, features=Features(kinds))


@pytest.fixture
def hub(monkeypatch):
    """Put a data set in the place of the hub; returns what it was asked for."""

    def put(data):
        calls = []
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or data
        )
        return calls

    return put


@pytest.mark.parametrize("name", [name for name in TASKS if name != "ax"])
def test_hub(hub, name, tmp_path):
    task = TASKS[name]
    labels = [2.5, 0.0, 5.0] if task.is_regression else list(range(len(task.labels)))
    calls = hub(hub_data(task, labels))
    for split in ("train", *task.evaluation_splits):
        examples = load_hub_examples(task, split, cache_dir=tmp_path / "elsewhere")
        wanted = {"split": split.replace("dev", "validation"), "cache_dir": tmp_path / "elsewhere"}
        assert calls.pop() == (("nyu-mll/glue", task.hub_config), wanted)
        columns = task.hub_columns or task.text_columns
        assert list(examples["text_a"]) == [f"{columns[0]} {row}" for row in range(len(labels))]
        assert examples["text_b"][1] == (f"{columns[1]} 1" if columns[1:] else None)
        assert list(examples["index"]) == list(range(len(labels)))
        got = list(examples["label"])
        assert (
            got == labels
            if task.is_regression
            else [task.labels[i] for i in got] == HUB_NAMES[task.hub_config]
        )


def test_hub_numbering_of_mnli_is_not_that_of_the_task(hub):
    hub(hub_data(TASKS["mnli"], [0, 1, 2]))
    assert list(load_hub_examples(TASKS["mnli"], "train")["label"]) == [1, 2, 0]


@pytest.mark.parametrize("name", ["cola", "sts-b", "mnli", "mnli-mm", "ax"])
def test_hub_test_splits_have_no_label(hub, name):
    task = TASKS[name]
    calls = hub(hub_data(task, [-1, -1]))
    for split in task.submissions:
        examples = load_hub_examples(task, split)
        assert "label" not in examples.column_names and list(examples["index"]) == [40, 41]
        assert calls.pop()[1]["split"] == split


def test_hub_and_files_give_the_same_columns(tmp_path, hub):
    for name in ("sst-2", "sts-b"):
        write(tmp_path / "train.tsv", table(LAYOUTS[name][0], labelled_rows(name)[0]))
        hub(hub_data(TASKS[name], [1, 0]))
        local = read_examples(TASKS[name], tmp_path, "train")
        assert load_hub_examples(TASKS[name], "train").features == local.features


def test_hub_refusals(hub, monkeypatch):
    hub(hub_data(TASKS["rte"], [0, -1]))
    refused(
        lambda: load_hub_examples(TASKS["rte"], "dev"),
        "nyu-mll/glue (rte, validation), row 1: the label '-1'",
    )
    hub(hub_data(TASKS["wnli"], [0, 1]).cast_column("label", ClassLabel(names=["no", "yes"])))
    refused(
        lambda: load_hub_examples(TASKS["wnli"], "train"),
        "row 0: the label 'no' is not one of not_entailment",
    )

    def unreachable(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused(
        lambda: load_hub_examples(TASKS["sst-2"], "train"),
        "nyu-mll/glue, sst2 (train): cannot be loaded from the hub (ConnectionError: no route)",
        "--data_dir",
    )


# ------------------------------------------------------------------------------------ custom tasks

OWN = custom_task((), ("a", "b"), "y")
SINGLE = custom_task((), ("a",), "y")


def own(path, labels=(), task=OWN):
    """The rows of a file, and the labels: by default those in the file."""
    labels = labels or find_labels(path, task)
    task = custom_task(labels, task.text_columns, task.label_column)
    return list(read_examples(task, path.parent, path.stem)), labels


def test_files_of_your_own(tmp_path):
    said = f"{tmp_path} must hold exactly one file train.tsv or train.csv or train.jsonl"
    refused(lambda: split_file(OWN, tmp_path, "train"), said)
    write(tmp_path / "train.csv", "")
    assert split_file(OWN, tmp_path, "train") == tmp_path / "train.csv"
    write(tmp_path / "train.tsv", "")
    refused(lambda: split_file(OWN, tmp_path, "train"), said)


CUSTOM = {
    "train.tsv": 'y\tb\tz\ta\nyes\tp "q\t\tsay "hi, there\nno\t\t\tline \u2028 two\n',
    "train.csv": '\ufeffy,b,z,a\r\nyes,"p ""q",,"say ""hi, there"\r\n\r\n'
    " no ,,,line \u2028 two\r\n",
    "train.jsonl": '{"y": "yes", "a": "say \\"hi, there", "b": "p \\"q", "z": []}\n\n'
    '{"y": "no", "a": "line \u2028 two", "b": ""}\n',
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_examples(tmp_path, name):
    path = write(tmp_path / name, CUSTOM[name])
    examples, labels = own(path)
    assert labels == ("no", "yes")
    assert examples == [
        {"index": 0, "text_a": 'say "hi, there', "text_b": 'p "q', "label": 1},
        {"index": 1, "text_a": "line \u2028 two", "text_b": "", "label": 0},
    ]
    assert [row["label"] for row in own(path, ("yes", "maybe", "no"))[0]] == [0, 2]
    test = write(tmp_path / f"test{path.suffix}", CUSTOM[name])
    assert own(test, labels, SINGLE)[0] == [
        {"index": 0, "text_a": 'say "hi, there', "text_b": None},
        {"index": 1, "text_a": "line \u2028 two", "text_b": None},
    ]


def test_csv_texts_may_hold_line_ends(tmp_path):
    path = write(tmp_path / "train.csv", 'a,y\n"one\n\ntwo\rthree",0\nx,1\n')
    assert [row["text_a"] for row in own(path, task=SINGLE)[0]] == ["one\n\ntwo\rthree", "x"]
    write(path, 'a,y\n"one\n\ntwo",0\nx,2\n')
    refused(lambda: own(path, ("0", "1"), SINGLE), "train.csv:5")


def test_json_labels(tmp_path):
    lines = [{"a": "x", "y": label} for label in (10, True, "1", " two\twords ", 9)]
    path = write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, lines)))
    examples, labels = own(path, task=SINGLE)
    assert labels == ("1", "10", "9", "True", "two words")
    assert [row["label"] for row in examples] == [1, 3, 0, 4, 2]


@pytest.mark.parametrize(
    "labels",
    [
        [str(n) for n in range(12)],
        ["-10", "-9", "0", "2", "10"],
        ["0.0", "1.0", "2.0", "10.0"],
        [f"LABEL_{n}" for n in range(12)],
        ["01", "1", "2", "10"],
        ["1", "10", "2", "two"],  # not all are numbers
        ["1.5", "10.5", "2.5"],
    ],
)
def test_whole_numbers_sort_as_numbers(tmp_path, labels):
    path = write(tmp_path / "train.csv", "a,y\n" + "".join(f"x,{y}\n" for y in labels[::-1]))
    assert list(find_labels(path, SINGLE)) == labels


def test_outputs_without_names_take_those_of_a_file(tmp_path):
    def named(outputs, *labels):
        text = "a,y\n" + "".join(f"x,{label}\n" for label in labels)
        return name_outputs(outputs, write(tmp_path / "dev.csv", text), SINGLE)

    three = ("LABEL_0", "LABEL_1", "LABEL_2")
    assert named(("no", "yes"), "yes") == ("no", "yes")  # the model's own
    assert named(three, "c", "b", "a") == ("a", "b", "c")
    assert named(three, "10", "9", "8") == ("8", "9", "10")
    assert named(three, "2", "0") == ("0", "1", "2")  # indices: one class may be missing
    assert named(three, "1", "2", "3") == ("1", "2", "3")
    assert named(three, "LABEL_2") == three
    refused(lambda: named(three, "a", "b"), "dev.csv: has 2 labels (a, b)", "3 outputs", "id2label")
    refused(lambda: named(three, "0", "3"), "dev.csv: has 2 labels (0, 3)")


def test_custom_regression(tmp_path):
    lines = [{"a": "x", "y": label} for label in (10, -0.1, "1e3")]
    path = write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, lines)))
    assert SINGLE.is_regression
    examples = read_examples(SINGLE, tmp_path, "train")
    assert list(examples["label"]) == [10.0, -0.1, 1000.0]
    assert examples.features["label"] == Value("float64")
    for label in ('"many"', "NaN", "Infinity", "null", '"nan"'):
        write(path, f'{{"a": "x", "y": {label}}}')
        refused(
            lambda: read_examples(SINGLE, tmp_path, "train"),
            "train.jsonl:1: the label",
            "not a finite number",
        )


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("train.csv", "", "the file is empty"),
        ("train.csv", "a,y\nx,1\n", "train.csv: the header has no column b; found: a, y"),
        ("train.csv", "a,b,y,y\nx,z,1,1\n", "the header has two columns y"),
        ("train.tsv", "a\tb\ty\nx\tz\n", "train.tsv:2: has 2 fields for 3"),
        ("train.tsv", "a\tb\ty\nx\tz\t1\t2\n", "train.tsv:2: has 4 fields"),
        ("train.csv", 'a,b,y\n"x,z,1\nx,z,2\n', "train.csv:3: is not UTF-8 CSV"),
        ("train.csv", 'a,b,y\n"x"z,z,1\n', "train.csv:2: is not UTF-8 CSV"),
        ("train.csv", "a,b,y\nx,z, \n", "train.csv:2: y is empty"),
        ("train.csv", "a,b,y\rx,z,1\r", "train.csv: its lines end in CR alone"),
        ("train.csv", 'a,b,y\rx,"z\nz",1\r', "train.csv: its lines end in CR alone"),
        ("train.tsv", "a\tb\ty\rx\tz\t1\r\n", "train.tsv: its lines end in CR alone"),
        ("train.jsonl", '{"a": "x"}\r{"a": "y"}', "train.jsonl: its lines end in CR alone"),
        ("train.csv", "a,b,y\n" + "x" * 200_000 + ",z,1\n", "has 1 different labels"),
        ("train.csv", b"a,b,y\nx,z,\xff\n", "train.csv:2: is not UTF-8 CSV"),
        ("train.csv", "a,b,y\r\nx,z,1\r\n".encode("utf-16"), "train.csv:1: is not UTF-8 CSV"),
        ("train.jsonl", '{"a": "x", "b": "z", "y": 1}\n{"a"', "train.jsonl:2: is not UTF-8 JSONL"),
        ("train.jsonl", "[" * 100_000, "train.jsonl:1: is not UTF-8 JSONL"),
        ("train.jsonl", '["x"]', 'train.jsonl:1: must be an object with "y"'),
        ("train.jsonl", '{"a": "x", "z": 1}', 'train.jsonl:1: "y" is missing'),
        ("train.jsonl", '{"a": "x", "b": "", "y": 0.5}', "not 0.5"),
        ("train.jsonl", '{"a": "x", "b": "", "y": 0.5}', "unless --regression"),
        ("train.jsonl", '{"a": "x", "b": "", "y": [1]}', "not [1]"),
        ("train.jsonl", '{"a": "x", "b": "", "y": null}', '"y" is missing or null'),
    ],
)
def test_refuses_bad_custom_files(tmp_path, name, content, said):
    refused(lambda: own(write(tmp_path / name, content)), said)


@pytest.mark.parametrize(
    "record, said",
    [
        ('{"a": 3, "b": "z", "y": 1}', 'train.jsonl:1: "a" must be a string, not 3'),
        ('{"a": "x", "b": null, "y": 1}', 'train.jsonl:1: "b" is missing or null'),
        ('{"a": "x", "b": "\\ud83d", "y": 1}', '"b" holds half a surrogate pair'),
        ('{"a": "x", "b": "", "y": 2}', "the label '2' is not one of 0, 1"),
    ],
)
def test_refuses_bad_records(tmp_path, record, said):
    refused(lambda: own(write(tmp_path / "train.jsonl", record), ("0", "1")), said)


def test_a_blank_line_in_a_single_column_is_refused(tmp_path):
    """If it were skipped, the indices of the following predictions would be wrong."""
    for suffix in ("tsv", "csv"):
        path = write(tmp_path / f"test.{suffix}", "a\none\n\ntwo\n")
        refused(lambda: own(path, ("0", "1"), SINGLE), f"test.{suffix}:3: is blank")  # noqa: B023
        path.unlink()
    path = write(tmp_path / "test.csv", "a,z\none,1\n\ntwo,2\n")
    assert [row["text_a"] for row in own(path, ("0", "1"), SINGLE)[0]] == ["one", "two"]


def test_labels_that_look_like_numbers_give_a_warning(tmp_path, caplog):
    path = write(tmp_path / "train.csv", "a,y\n" + "".join(f"x,{n / 7}\n" for n in range(30)))
    assert len(find_labels(path, SINGLE)) == 30
    assert "30 labels in 30 rows" in caplog.text and "--regression" in caplog.text


# ---------------------------------------------------------------------------------------- features

LONG = "ada lives in oslo and ben lives in rome . who lives in cairo , and where does dan live ?"
TEXTS = [
    ("ada lives in oslo .", "where does ada live ?"),
    (LONG, "no"),
    ("who ?", LONG),
    (LONG, LONG),
    ("", ""),
    ("gus [SEP] hana", "Ünknown [MASK] words\u2028"),
    ("", LONG),
]
ONE_TYPE = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their tokenizers tell none apart


def make_examples(pair=True, labels=None, texts=TEXTS):
    rows = {"index": list(range(len(texts))), "text_a": [a for a, _ in texts]}
    rows["text_b"] = [b if pair else None for _, b in texts]
    kinds = {"index": Value("int64"), "text_a": Value("string"), "text_b": Value("string")}
    if labels is not None:
        rows["label"] = labels
        kinds["label"] = Value("float64" if isinstance(labels[0], float) else "int64")
    return Dataset.from_dict(rows, features=Features(kinds))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("max_seq_length", [6, 12, 13, 64])
@pytest.mark.parametrize("pair", [True, False])
def test_features_are_those_of_the_stock_tokenizer(pair, max_seq_length, kind):
    examples, tokenizer = make_examples(pair), tokenizer_of(kind)
    before = tokenizer.backend_tokenizer.to_str()
    features = build_features(examples, tokenizer, max_seq_length=max_seq_length)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert features.column_names == ["input_ids", "length", "second_start"]
    assert features.features["input_ids"].feature == Value("int32")
    batch = collate(list(features), tokenizer.pad_token_id, multiple_of=1)
    texts = [list(texts) for texts in zip(*TEXTS)][: 1 + pair]
    options = {"truncation": "longest_first", "return_token_type_ids": True}
    stock = tokenizer(*texts, max_length=max_seq_length, **options)
    for row, (ids, types) in enumerate(
        zip(stock["input_ids"], stock["token_type_ids"], strict=True)
    ):
        assert features[row]["input_ids"] == ids
        assert features[row]["length"] == len(ids) <= max_seq_length
        assert batch["token_type_ids"][row, : len(ids)].tolist() == types
        assert features[row]["second_start"] == (types.index(1) if any(types) else len(ids))
        assert any(types) == (pair and kind not in ONE_TYPE)


def test_features_hold_the_label(tiny_tokenizer):
    for labels, kind in (
        (list(range(len(TEXTS))), "int64"),
        ([n / 4 for n in range(len(TEXTS))], "float64"),
    ):
        features = build_features(make_examples(labels=labels), tiny_tokenizer, max_seq_length=16)
        assert list(features["label"]) == labels and features.features["label"] == Value(kind)


def test_collate_pads_to_the_longest(tiny_tokenizer):
    rows = [
        {"input_ids": [2, 9, 3], "second_start": 3, "label": 1},
        {"input_ids": [2, 9, 9, 3, 8, 3], "second_start": 4, "label": 0},
    ]
    batch = collate(rows, pad_token_id=7)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "labels"), torch.int64
    )
    assert batch["input_ids"].tolist() == [[2, 9, 3, 7, 7, 7, 7, 7], [2, 9, 9, 3, 8, 3, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 6 + [0] * 2]
    assert batch["token_type_ids"].tolist() == [[0] * 8, [0, 0, 0, 0, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert collate(rows, 0, multiple_of=1)["input_ids"].shape == (2, 6)
    for row in rows:
        row["label"] = 2.5
    assert collate(rows, 0)["labels"].dtype == torch.float32
    for row in rows:
        del row["label"]
    assert "labels" not in collate(rows, 0)


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(tmp_path, tiny_tokenizer):
    wanted = build_features(make_examples(), tiny_tokenizer, max_seq_length=16)
    other = BertTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=300)
    before = other.backend_tokenizer.to_str()
    assert build_features(make_examples(), other, max_seq_length=16)[:] == wanted[:]
    assert other.backend_tokenizer.to_str() == before


def test_features_refusals(tiny_tokenizer):
    for pair, least in (True, 5), (False, 3):
        build_features(make_examples(pair), tiny_tokenizer, max_seq_length=least)
        refused(
            lambda pair=pair, least=least: build_features(
                make_examples(pair), tiny_tokenizer, max_seq_length=least - 1
            ),
            f"--max_seq_length is {least - 1}, but must be at least {least}",
        )


# ------------------------------------------------------------------------------------------- cache


@pytest.fixture
def builds(monkeypatch):
    """Counts the runs of the feature builder."""
    calls = []
    original = glue._featurize

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(glue, "_featurize", counted)
    return calls


def read_rows(tmp_path, texts=TEXTS, label=0, cache_dir=None):
    """Examples of a file with these pairs of texts."""
    rows = "".join(
        json.dumps({"a": a, "b": b, "y": n % 2 if n else label}) + "\n"
        for n, (a, b) in enumerate(texts)
    )
    write(tmp_path / "train.jsonl", rows)
    return read_examples(custom_task("01", ("a", "b"), "y"), tmp_path, "train", cache_dir)


def test_cache_is_reused_and_never_stale(tmp_path, cache, builds, tiny_tokenizer, monkeypatch):
    def build(tokenizer=tiny_tokenizer, max_seq_length=16, overwrite_cache=False, **rows):
        before = len(builds)
        examples = read_rows(tmp_path, **rows)
        features = build_features(
            examples, tokenizer, max_seq_length=max_seq_length, overwrite_cache=overwrite_cache
        )
        return len(builds) - before, features

    n, first = build()
    assert n == 1
    n, again = build()
    assert n == 0 and again[:] == first[:]
    assert build(overwrite_cache=True)[0] == 1
    assert build(cache_dir=str(tmp_path / "elsewhere"))[0] == 1

    other = BertTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    other.backend_tokenizer.add_tokens(["cairo ,"])
    changes = [
        {"label": 1},
        {"texts": [*TEXTS[:-1], ("x", LONG)]},
        {"texts": [*TEXTS[:-1], ("", f"{LONG}!")]},
        {"max_seq_length": 17},
        {"tokenizer": other},
    ]
    for change in changes:
        assert build(**change)[0] == 1, change
        assert build(**change)[0] == 0, change
    monkeypatch.setattr(glue, "VERSION", glue.VERSION + 1)
    assert build()[0] == 1
    assert len(list(cache.rglob("cache-*.arrow"))) == 2 + len(changes)


def test_unwritable_cache(tmp_path, tiny_tokenizer, caplog):
    write(tmp_path / "file", "not a folder")
    wanted = build_features(read_rows(tmp_path), tiny_tokenizer, max_seq_length=16)
    for _ in range(2):
        examples = read_rows(tmp_path, cache_dir=str(tmp_path / "file"))
        assert build_features(examples, tiny_tokenizer, max_seq_length=16)[:] == wanted[:]
    assert caplog.text.count("continuing without the cache") == 2


def test_processes_give_the_same_rows(tmp_path, tiny_tokenizer):
    examples = make_examples(
        labels=list(range(30)), texts=[(LONG[:n], LONG[n:]) for n in range(30)]
    )
    one, two = (
        build_features(examples, tiny_tokenizer, max_seq_length=16, num_proc=n) for n in (1, 2)
    )
    assert one[:] == two[:] and one.features == two.features


# ----------------------------------------------------------------------------------------- metrics


def random_classes(classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 200)
    logits = rng.normal(0, 1, (200, classes)).astype(np.float32)
    logits[np.arange(200), labels] += 0.7
    return logits, labels, logits.argmax(1)


def test_accuracy():
    for name in ("sst-2", "mnli", "mnli-mm", "qnli", "rte", "wnli", "ax"):
        logits, labels, predictions = random_classes(len(TASKS[name].labels))
        assert glue_metrics(TASKS[name], logits, labels) == {
            "acc": pytest.approx((labels == predictions).mean())
        }
    logits, labels, predictions = random_classes(5)
    task = custom_task("abcde")
    assert glue_metrics(task, logits, labels) == {
        "acc": pytest.approx((labels == predictions).mean())
    }


def test_matthews_correlation():
    logits, labels, predictions = random_classes(2)
    tp, tn, fp, fn = (
        int(((predictions == p) & (labels == y)).sum()) for p, y in ((1, 1), (0, 0), (1, 0), (0, 1))
    )
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue_metrics(TASKS["cola"], logits, labels) == {"mcc": pytest.approx(wanted)}
    mixed = np.eye(2)[[0, 1, 0, 1]]
    assert glue_metrics(TASKS["cola"], mixed, [0, 1, 1, 0]) == {"mcc": 0.0}


@pytest.mark.parametrize(
    "predicted, labels, said",
    [
        ([0, 0, 0], [0, 1, 1], "mcc (all predictions are equal)"),
        ([0, 1, 0], [1, 1, 1], "mcc (all labels are equal)"),
    ],
)
def test_undefined_matthews_correlations_are_left_out(predicted, labels, said, caplog):
    assert glue_metrics(TASKS["cola"], np.eye(2)[predicted], labels) == {}
    assert f"undefined and left out: {said}" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_is_that_of_the_equivalent(name, caplog):
    logits, labels, predictions = random_classes(2, seed=3)
    labels[:50] = 1
    shared_ones = ((predictions == 1) & (labels == 1)).sum()
    acc, f1 = (
        (labels == predictions).mean(),
        2 * shared_ones / ((predictions == 1).sum() + (labels == 1).sum()),
    )
    wanted = {"acc": acc, "f1": f1, "acc_and_f1": (acc + f1) / 2}
    assert glue_metrics(TASKS[name], logits, labels) == pytest.approx(wanted)
    never = np.array([[1.0, 0.0]] * 3)
    assert glue_metrics(TASKS[name], never, [0, 0, 1]) == pytest.approx(
        {"acc": 2 / 3, "f1": 0.0, "acc_and_f1": 1 / 3}
    )
    assert not caplog.records
    assert glue_metrics(TASKS[name], never, [0, 0, 0]) == {"acc": 1.0}
    assert "left out: f1 (no label and no prediction is positive)" in caplog.text


def ranks(values):
    """Average ranks, by counting."""
    return np.array(
        [(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values]
    )


def correlation(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum())


def test_correlations():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 11, 100) / 2
    logits = (labels + rng.normal(0, 1, 100)).round(1).astype(np.float32)
    pearson, spearman = (
        correlation(logits.astype(float), labels),
        correlation(ranks(logits), ranks(labels)),
    )
    wanted = {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}
    for task in (TASKS["sts-b"], custom_task(())):
        for shape in ((100,), (100, 1)):
            assert glue_metrics(task, logits.reshape(shape), labels) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "logits, labels",
    [
        ([[2.0], [2.0], [2.0]], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]),
        ([1.0], [4.0]),
        ([1.0, math.nan, 2.0], [1.0, 2.0, 3.0]),
    ],
)
def test_undefined_correlations_are_left_out(logits, labels, caplog):
    metrics = glue_metrics(TASKS["sts-b"], np.array(logits), labels)
    assert metrics == {} and len(caplog.records) == 1
    assert "left out: pearson (all " in caplog.text and "spearmanr (all " in caplog.text


def test_metrics_are_plain_floats():
    for name, task in TASKS.items():
        logits, labels, _ = random_classes(max(len(task.labels), 1))
        metrics = glue_metrics(
            task, logits, labels / 2 + np.arange(200) % 3 if task.is_regression else labels
        )
        assert tuple(metrics) == task.metrics, name
        assert all(type(value) is float for value in metrics.values())
        json.dumps(metrics, allow_nan=False)


def test_mean_entropy():
    logits = np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [1000.0, 0.0, 0.0]], np.float32)
    p = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    assert mean_entropy(logits) == pytest.approx((math.log(3) - (p * np.log(p)).sum()) / 3)
    assert mean_entropy(logits[2:]) == 0.0 and type(mean_entropy(logits)) is float


# ------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("name", TASKS)
def test_submissions(name):
    task = TASKS[name]
    examples = make_examples().select([3, 0, 1])
    logits = np.eye(max(len(task.labels), 1))[[0, -1, 0]]
    if task.is_regression:
        logits = np.array([[-0.2], [3.14159], [5.7]])
        wanted = ["0.000", "3.142", "5.000"]
    elif name in ("cola", "sst-2", "mrpc", "qqp", "wnli"):
        wanted = ["0", "1", "0"]
    else:
        wanted = [task.labels[0], task.labels[-1], task.labels[0]]
    names = {"cola": "CoLA", "mnli": "MNLI-m", "mnli-mm": "MNLI-mm"}
    for split, file in task.submissions.items():
        stem = "MNLI-mm" if split == "test_mismatched" else names.get(name, name.upper())
        assert file == f"{stem}.tsv" and file in glue_tasks.SUBMISSION_FILES
    lines = [f"{index}\t{text}\n" for index, text in zip((3, 0, 1), wanted)]
    assert submission(task, examples, logits) == "".join(["index\tprediction\n", *lines])


def test_custom_submissions():
    examples = make_examples().select(range(2))
    assert (
        submission(custom_task(("no", "yes")), examples, np.eye(2))
        == "index\tprediction\n0\tno\n1\tyes\n"
    )
    scores = np.array([-7.5, 1234.0])
    assert (
        submission(custom_task(()), examples, scores)
        == "index\tprediction\n0\t-7.500\n1\t1234.000\n"
    )
