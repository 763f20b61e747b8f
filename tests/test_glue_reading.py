"""GLUE's tasks: names, files, every refusal, the hub, and submissions."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tiny import LAYOUTS, MNLI, STSB, refusal, table, write

from emmental.data import glue_tasks
from emmental.data.glue import load_hub_examples, read_examples, submission
from emmental.data.glue_tasks import TASKS, custom_task, task_name

pytestmark = pytest.mark.usefixtures("cache")
# Characters that separate lines or fields elsewhere: quotes, Unicode separators, a lone \r.
ODD = "Say \"it, 'é' \u2028\x85\x0b\x0c\x1c\r 漢😀, \""
YES_NO = ["entailment", "not_entailment"]
HUB_NAMES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "wnli": YES_NO[::-1],
    **dict.fromkeys(("qnli", "rte"), YES_NO),
    **dict.fromkeys(("mnli", "ax"), ["entailment", "neutral", "contradiction"]),
}
labelled = pytest.mark.parametrize("name", [name for name in TASKS if name != "ax"])


# --- tasks ---


def test_tasks():
    assert " ".join(TASKS) == "cola sst-2 mrpc sts-b qqp mnli mnli-mm qnli rte wnli ax"
    assert TASKS["mnli"].labels == TASKS["ax"].labels == ("contradiction", "entailment", "neutral")
    assert {name for name, task in TASKS.items() if task.is_regression} == {"sts-b"}
    assert TASKS["mnli"].evaluation_splits == ("dev_matched", "dev_mismatched")
    assert TASKS["mnli-mm"].evaluation_splits == ("dev_mismatched",)
    assert TASKS["ax"].evaluation_splits == () and TASKS["rte"].evaluation_splits == ("dev",)
    keys = {"cola": "mcc", "mrpc": "acc_and_f1", "qqp": "acc_and_f1", "sts-b": "corr"}
    found = {name: task.key_metric for name, task in TASKS.items()}
    assert found == {name: keys.get(name, "acc") for name in TASKS}


@pytest.mark.parametrize("spellings, name", [
    ("SST-2 sst2", "sst-2"), ("STSB sts_b", "sts-b"), ("mnli_mm MNLI-MM", "mnli-mm"),
    ("CoLA", "cola"), ("AX", "ax"),
])  # fmt: skip
def test_task_name(spellings, name):
    assert {task_name(spelling) for spelling in spellings.split()} == {name}


# --- files ---


def rows_of(name):
    """Three rows of the task's training file, and the examples they hold."""
    header, _, columns, (label_column,), labels = LAYOUTS[name]
    rows, wanted = [], []
    for row in range(3):
        texts, value = [f"{ODD} {column} {row}" for column in columns], labels[row % len(labels)]
        fields = dict(zip(columns, texts)) | {label_column: value}
        rows.append([fields.get(column, f"x{row}") for column in header])
        label = float(value) if name == "sts-b" else row % len(labels)
        own = {"text_a": texts[0], "text_b": texts[1] if len(texts) > 1 else None}
        wanted.append({"index": row, **own, "label": label})
    return rows, wanted


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@labelled
def test_reads_labelled_files(tmp_path, name, newline, caplog):
    task, (rows, wanted) = TASKS[name], rows_of(name)
    content = table(None if name == "cola" else LAYOUTS[name][0], rows, newline)
    for number, split in enumerate(["train", *task.evaluation_splits]):
        # The last line of CoLA's dev.tsv has no end; MRPC's files start with a byte order mark.
        text = content.removesuffix(newline) if number else content
        write(tmp_path / f"{split}.tsv", ("\ufeff" if name == "mrpc" else "") + text)
        examples = read_examples(task, tmp_path, split)
        assert list(examples) == wanted
        kinds = {key: value.dtype for key, value in examples.features.items()}
        assert kinds["index"] == "int64" and kinds["text_b"] == "string"
        assert kinds["label"] == ("float64" if name == "sts-b" else "int64")
    assert not caplog.records


@pytest.mark.parametrize("name", LAYOUTS)
def test_reads_test_files(tmp_path, name):
    _, header, columns, _, _ = LAYOUTS[name]
    row = {column: f"{ODD} {column}" for column in columns} | {header[0]: "17"}
    content = table(header, [[row.get(column, "x") for column in header]])
    content = ("\ufeff" if name == "mrpc" else "") + content
    for split in TASKS[name].submissions:
        write(tmp_path / ("diagnostic.tsv" if name == "ax" else f"{split}.tsv"), content)
        (example,) = read_examples(TASKS[name], tmp_path, split)
        text_a, text_b = [*(row[column] for column in columns), None][:2]
        assert example == {"index": 17, "text_a": text_a, "text_b": text_b}


def test_columns_are_found_by_name_and_labels_by_name_too(tmp_path):
    header = ["extra", "label", "sentence2", "sentence1"]
    rows = [["", "entailment", "b", "a"], ["", "1", "d", "c"]]
    write(tmp_path / "train.tsv", table(header, rows))
    assert list(read_examples(TASKS["wnli"], tmp_path, "train")) == [
        {"index": 0, "text_a": "a", "text_b": "b", "label": 1},
        {"index": 1, "text_a": "c", "text_b": "d", "label": 1},
    ]
    rows = [["x", "negative"], ["", "positive"]]
    write(tmp_path / "train.tsv", table(["sentence", "label"], rows))
    examples = read_examples(TASKS["sst-2"], tmp_path, "train")
    assert list(examples["label"]) == [0, 1] and list(examples["text_a"]) == ["x", ""]


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
    said = refusal(read_examples, TASKS["qqp"], tmp_path, "test")
    assert "test.tsv:3: has 2 fields" in said


def test_extra_fields_are_ignored(tmp_path):
    write(tmp_path / "dev.tsv", table(["sentence", "label"], [["x", "0", "more"], ["y", "1"]]))
    assert list(read_examples(TASKS["sst-2"], tmp_path, "dev")["label"]) == [0, 1]


SST, RTE = "sentence\tlabel\n", "index\tsentence1\tsentence2\tlabel\n"
MNLI_ROW = f"{MNLI},label1,gold_label\n".replace(",", "\t") + "x\t" * 11
STS = "x\t" * 9
STS = f"{STSB},score\n".replace(",", "\t") + f"{STS}1.0\n{STS}"
SCORE = "dev.tsv:3: the label '{}' is not a finite number in [0, 5]"
CR = "its lines end in CR alone"


@pytest.mark.parametrize("name, content, said", [
    ("sst-2", "", "the file is empty"),
    ("sst-2", "\ufeff\n\n", "the file is empty"),
    ("cola", "", "dev.tsv: is empty"),
    ("cola", "\n", "dev.tsv: is empty"),
    ("sst-2", SST, "dev.tsv: is empty"),
    ("sst-2", b"sentence\tlabel\nok\t1\ncaf\xe9\t1\n", "dev.tsv:3: is not UTF-8 TSV"),
    ("sst-2", "fine film\t1\n", "dev.tsv: the header has no column sentence; found: fine film, 1"),
    ("sst-2", "sentence\tlabels\nx\t1\n", "no column label; found: sentence, labels"),
    ("sst-2", "label\tsentence\tlabel\n1\tx\t1\n", "two columns label"),
    ("mrpc", "Quality\t#1 String\n1\tx\n", "no column #2 String; found: Quality, #1 String"),
    ("sst-2", f"{SST}ok\t1\nshort\n", "dev.tsv:3: has 1 fields for 2 columns"),
    ("cola", "gj04\t1\t\tok\ngj04\t1\n", "dev.tsv:2: has 2 fields for 4"),
    ("sst-2", f"{SST}ok\t1\nx\t2\n", ":3: the label '2' is not one of negative, positive, 0, 1"),
    ("sst-2", f"{SST}ok\t1\n\nx\t\n", "dev.tsv:4: label is empty"),
    ("cola", "source\tlabel\tmark\tsentence\n", ":1: the label 'label' is not one of unacceptable"),
    ("rte", f"{RTE}0\ta\tb\t2\n", "the label '2' is not one of entailment, not_entailment, 0, 1"),
    ("rte", f"{RTE}0\ta\tb\tneutral\n", "dev.tsv:2: the label 'neutral'"),
    ("sst-2", "sentence\tlabel\rfine\t1\r", f"dev.tsv: {CR}"),
    ("cola", "gj04\t1\t\tok\rgj04\t0\t*\tnot ok\r\n", CR),
    ("mnli", f"{MNLI_ROW}-\n", "dev_matched.tsv:2: the label '-' is not one of contradiction"),
    *(("sts-b", f"{STS}{score}\n", SCORE.format(score))
      for score in ("good", "", "nan", "inf", "5.001", "-0.1")),
])  # fmt: skip
def test_refuses_bad_files(tmp_path, name, content, said):
    split = TASKS[name].evaluation_splits[0]
    write(tmp_path / f"{split}.tsv", content)
    message = refusal(read_examples, TASKS[name], tmp_path, split)
    assert f"{tmp_path}/{split}.tsv" in message and said in message


def test_numbers_of_a_column_with_a_gap_are_whole(tmp_path):
    write(tmp_path / "dev.tsv", table(["sentence", "label"], [["x", "1.0"], ["y", "0"]]))
    assert list(read_examples(TASKS["sst-2"], tmp_path, "dev")["label"]) == [1, 0]
    write(tmp_path / "test.tsv", table(["index", "sentence"], [["7.0", "x"], ["8.0", "y"]]))
    assert list(read_examples(TASKS["sst-2"], tmp_path, "test")["index"]) == [7, 8]


@pytest.mark.parametrize("index", ["", "x", "-1", "1.5"])
def test_refuses_a_bad_index(tmp_path, index):
    write(tmp_path / "test.tsv", f"index\tsentence\n0\ta\n{index}\tb\n")
    said = refusal(read_examples, TASKS["sst-2"], tmp_path, "test")
    assert "test.tsv:3: the index" in said and "not a whole number" in said


def test_refuses_missing_files(tmp_path):
    said = f"--data_dir {tmp_path} must hold exactly one file dev.tsv"
    assert said in refusal(read_examples, TASKS["sst-2"], tmp_path, "dev")


@pytest.mark.parametrize("name", ["rte", "qnli", "mnli"])
def test_numbers_are_indices_in_the_order_of_the_task(tmp_path, name, caplog):
    task, (header, _, _, label_column, _) = TASKS[name], LAYOUTS[name]
    split, count = task.evaluation_splits[0], len(task.labels)
    numbers = [*map(str, range(count)), task.labels[0]]
    rows = [[value if [column] == label_column else "x" for column in header] for value in numbers]
    for _ in range(2):  # from the file, then from the cache
        caplog.clear()
        write(tmp_path / f"{split}.tsv", table(header, rows))
        examples = read_examples(task, tmp_path, split)
        assert list(examples["label"]) == [*range(count), 0]
        said = "0 contradiction, 1 entailment, 2 neutral; the hub has another order"
        assert (said in caplog.text) == (name == "mnli")
    predicted = submission(task, examples, np.eye(count)[examples["label"]])
    assert predicted.split()[3::2] == [*task.labels, task.labels[0]]  # names, as before


# --- the hub ---


def hub_data(task, labels):
    columns = task.hub_columns or task.text_columns
    label = Value("float32") if task.is_regression else ClassLabel(names=HUB_NAMES[task.hub_config])
    rows = {column: [f"{column} {row}" for row in range(len(labels))] for column in columns}
    rows |= {"label": labels, "idx": [40 + row for row in range(len(labels))]}
    kinds = {column: Value("string") for column in columns}
    return Dataset.from_dict(rows, Features(kinds | {"label": label, "idx": Value("int32")}))


@labelled
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
        found = list(examples["label"])
        if task.is_regression:
            assert found == labels
        else:
            assert [task.labels[i] for i in found] == HUB_NAMES[task.hub_config]
        assert found == [1, 2, 0] or not name.startswith("mnli")  # another order


@pytest.mark.parametrize("name", ["cola", "sts-b", "mnli", "mnli-mm", "ax"])
def test_hub_test_splits_have_no_label(hub, name):
    calls = hub(hub_data(TASKS[name], [-1, -1]))
    for split in TASKS[name].submissions:
        examples = load_hub_examples(TASKS[name], split)
        assert "label" not in examples.column_names and list(examples["index"]) == [40, 41]
        assert calls.pop()[1]["split"] == split


@pytest.mark.parametrize("name", ["sst-2", "sts-b"])
def test_hub_and_files_give_the_same_columns(tmp_path, hub, name):
    write(tmp_path / "train.tsv", table(LAYOUTS[name][0], rows_of(name)[0]))
    hub(hub_data(TASKS[name], [1, 0]))
    local = read_examples(TASKS[name], tmp_path, "train")
    assert load_hub_examples(TASKS[name], "train").features == local.features


def unreachable(*args, **kwargs):
    raise ConnectionError("no\nroute")


RENAMED = hub_data(TASKS["wnli"], [0, 1]).cast_column("label", ClassLabel(names=["no", "yes"]))
GONE = "nyu-mll/glue, sst2 (train): cannot be loaded from the hub (ConnectionError: no route)"


@pytest.mark.parametrize("name, data, split, said", [
    ("rte", hub_data(TASKS["rte"], [0, -1]), "dev",
     "nyu-mll/glue (rte, validation), row 1: the label '-1'"),
    ("wnli", RENAMED, "train", "row 0: the label 'no' is not one of not_entailment"),
    ("sst-2", unreachable, "train", f"{GONE}; pass local files with --data_dir"),
])  # fmt: skip
def test_hub_refusals(hub, name, data, split, said):
    hub(data)
    assert said in refusal(load_hub_examples, TASKS[name], split)


# --- submissions ---


def submitted(task, logits):
    """The lines of a submission for the indices 3, 0 and 1."""
    header, *lines = submission(task, Dataset.from_dict({"index": [3, 0, 1]}), logits).splitlines()
    assert header == "index\tprediction"
    indices, predictions = zip(*(line.split("\t") for line in lines))
    assert indices == ("3", "0", "1")
    return list(predictions)


@pytest.mark.parametrize("name", TASKS)
def test_submissions(name):
    task = TASKS[name]
    names = {"cola": "CoLA", "mnli": "MNLI-m", "mnli-mm": "MNLI-mm"}
    for split, file in task.submissions.items():
        stem = "MNLI-mm" if split == "test_mismatched" else names.get(name, name.upper())
        assert file == f"{stem}.tsv" and file in glue_tasks.SUBMISSION_FILES
    if task.is_regression:
        logits = np.array([[-0.2], [3.14159], [5.7]])
        assert submitted(task, logits) == ["0.000", "3.142", "5.000"]
    else:
        numbered = name in ("cola", "sst-2", "mrpc", "qqp", "wnli")
        first, last = ("0", "1") if numbered else (task.labels[0], task.labels[-1])
        assert submitted(task, np.eye(len(task.labels))[[0, -1, 0]]) == [first, last, first]


def test_custom_submissions():
    assert submitted(custom_task(("no", "yes")), np.eye(2)[[0, 1, 1]]) == ["no", "yes", "yes"]
    scores = np.array([-7.5, 0.00012, 1e-7], np.float32)  # GLUE's decimals would lose these
    assert submitted(custom_task(()), scores) == ["-7.5", "0.00012", "1e-07"]
