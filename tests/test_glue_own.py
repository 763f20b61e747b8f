"""Tasks of one's own: .tsv, .csv and .jsonl files, their labels, and every refusal."""

import json

import numpy as np
import pytest
from datasets import Value
from tiny import refusal, write

from emmental.data.glue import count_labels, find_labels, read_examples, split_file, submission
from emmental.data.glue_tasks import custom_task
from emmental.data.reading import name_outputs

pytestmark = pytest.mark.usefixtures("cache")
OWN = custom_task((), ("a", "b"), "y")
SINGLE = custom_task((), ("a",), "y")


def own(path, labels=(), task=OWN):
    """The rows of a file, and the labels: by default those in the file."""
    labels = labels or find_labels(path, task)
    task = custom_task(labels, task.text_columns, task.label_column)
    return list(read_examples(task, path.parent, path.stem)), labels


def names_of(outputs, path):
    """The names of a model's outputs for a file."""
    return name_outputs(outputs, tuple(count_labels(path, SINGLE)), path)


def test_files_of_your_own(tmp_path):
    said = f"{tmp_path} must hold exactly one file train.tsv or train.csv or train.jsonl"
    assert said in refusal(split_file, OWN, tmp_path, "train")
    write(tmp_path / "train.csv", "")
    assert split_file(OWN, tmp_path, "train") == tmp_path / "train.csv"
    write(tmp_path / "train.tsv", "")
    assert said in refusal(split_file, OWN, tmp_path, "train")


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
    first, second = {"index": 0, "text_a": 'say "hi, there'}, {"index": 1}
    second["text_a"] = "line \u2028 two"
    assert labels == ("no", "yes") and examples == [
        first | {"text_b": 'p "q', "label": 1}, second | {"text_b": "", "label": 0}
    ]  # fmt: skip
    assert [row["label"] for row in own(path, ("yes", "maybe", "no"))[0]] == [0, 2]
    test = write(tmp_path / f"test{path.suffix}", CUSTOM[name])
    for row, example in enumerate((first, second)):  # the index is a text, as an id may be
        example |= {"index": str(row), "text_b": None}
    assert own(test, labels, SINGLE)[0] == [first, second]


@pytest.mark.parametrize("name, content, index", [
    ("test.csv", "id,a\nx-7,one\n007,two\n", ["x-7", "007"]),
    ("test.tsv", "index\ta\n12\tone\nnull\ttwo\n", ["12", "null"]),
    ("test.csv", 'index,id,a\n0,"x\ty\nz",one\n1,b,two\n', ["x y z", "b"]),
    ("test.jsonl", '{"id": 12345678901234567890, "a": "one"}\n{"id": "b", "a": "two"}\n',
     ["12345678901234567890", "b"]),
    ("test.csv", "a\none\ntwo\n", ["0", "1"]),
])  # fmt: skip
def test_predictions_have_the_ids_of_the_file(tmp_path, name, content, index):
    path = write(tmp_path / name, content)
    task = custom_task(("no", "yes"), ("a",), "y")
    examples = read_examples(task, tmp_path, "test")
    lines = submission(task, examples, np.eye(2)).splitlines()
    assert lines == ["index\tprediction", f"{index[0]}\tno", f"{index[1]}\tyes"]
    if path.suffix == ".jsonl":
        write(path, '{"id": 0.5, "a": "one"}')
        said = refusal(read_examples, task, tmp_path, "test")
        assert 'test.jsonl:1: "id" must be a string or a whole number, not 0.5' in said


def test_csv_texts_may_hold_line_ends(tmp_path):
    path = write(tmp_path / "train.csv", 'a,y\n"one\n\ntwo\rthree",0\nx,1\n')
    assert [row["text_a"] for row in own(path, task=SINGLE)[0]] == ["one\n\ntwo\rthree", "x"]
    write(path, 'a,y\n"one\n\ntwo",0\nx,2\n')
    assert "train.csv:5" in refusal(own, path, ("0", "1"), SINGLE)


def test_json_labels(tmp_path):
    lines = [{"a": "x", "y": label} for label in (10, True, "1", " two\twords ", 9)]
    path = write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, lines)))
    examples, labels = own(path, task=SINGLE)
    assert labels == ("1", "10", "9", "True", "two words")
    assert [row["label"] for row in examples] == [1, 3, 0, 4, 2]


def csv_of(path, labels):
    return write(path, "a,y\n" + "".join(f"x,{label}\n" for label in labels))


def read_as(path, labels, *names):
    """The names of the classes in a file of these labels, for a model of these names."""
    return [names[row["label"]] for row in own(csv_of(path, labels), names, SINGLE)[0]]


def test_labels_that_differ_by_case_are_two_and_others_one(tmp_path):
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    assert find_labels(csv_of(train, "MmfM"), SINGLE) == ("M", "f", "m")
    assert read_as(dev, "MmfM", "M", "f", "m") == ["M", "m", "f", "M"]
    assert read_as(dev, "MmF", "M", "f", "m") == ["M", "m", "f"]
    assert read_as(dev, ["NO", "Yes"], "no", "yes") == ["no", "yes"]
    said = refusal(read_as, dev, ["yes", "no", "Yes"], "no", "yes")
    assert "dev.csv:4: the labels yes and Yes differ by case alone" in said
    said = refusal(read_as, dev, ["YES"], "Yes", "no", "yes")
    assert "the label 'YES' is not one of Yes, no, yes" in said


def test_labels_of_a_column_with_a_gap_are_whole_numbers(tmp_path):
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    assert find_labels(csv_of(train, ["2", "1.0", "2.0", "1.5"]), SINGLE) == ("1.0", "1.5", "2")
    assert read_as(dev, ["2.0", "1", "2"], "1.0", "2") == ["2", "1.0", "2"]
    path = write(tmp_path / "test.jsonl", '{"a": "x", "y": 2.0}\n{"a": "x", "y": 1}\n')
    assert find_labels(path, SINGLE) == ("1", "2")
    outputs = ("LABEL_0", "LABEL_1", "LABEL_2")
    assert names_of(outputs, csv_of(train, ["2.0", "0.0"])) == ("0", "1", "2")


@pytest.mark.parametrize("labels", [
    [str(n) for n in range(12)],
    ["-10", "-9", "0", "2", "10"],
    ["0.0", "1.0", "2.0", "10.0"],
    [f"LABEL_{n}" for n in range(12)],
    ["01", "1", "2", "10"],
    ["1", "10", "2", "two"],  # not all are numbers
    ["1.5", "10.5", "2.5"],
])  # fmt: skip
def test_whole_numbers_sort_as_numbers(tmp_path, labels):
    path = write(tmp_path / "train.csv", "a,y\n" + "".join(f"x,{y}\n" for y in labels[::-1]))
    assert list(find_labels(path, SINGLE)) == labels


def test_outputs_without_names_take_those_of_a_file(tmp_path):
    def named(outputs, labels):
        text = "a,y\n" + "".join(f"x,{label}\n" for label in labels)
        return names_of(outputs, write(tmp_path / "dev.csv", text))

    three = ("LABEL_0", "LABEL_1", "LABEL_2")
    assert named(("no", "yes"), ["yes"]) == ("no", "yes")  # the model's own
    assert named(three, "cba") == ("a", "b", "c")
    assert named(three, ["10", "9", "8"]) == ("8", "9", "10")
    assert named(three, "20") == ("0", "1", "2")  # indices: one class may be missing
    assert named(three, "123") == ("1", "2", "3")
    assert named(three, ["LABEL_2"]) == three
    said = refusal(named, three, "ab")
    assert all(x in said for x in ("dev.csv: has 2 labels (a, b)", "3 outputs", "id2label"))
    assert "dev.csv: has 2 labels (0, 3)" in refusal(named, three, "03")


def test_custom_regression(tmp_path):
    lines = [{"a": "x", "y": label} for label in (10, -0.1, "1e3")]
    path = write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, lines)))
    examples = read_examples(SINGLE, tmp_path, "train")
    assert SINGLE.is_regression and list(examples["label"]) == [10.0, -0.1, 1000.0]
    assert examples.features["label"] == Value("float64")
    for label in ('"many"', "NaN", "Infinity", "null", '"nan"'):
        write(path, f'{{"a": "x", "y": {label}}}')
        said = refusal(read_examples, SINGLE, tmp_path, "train")
        assert "train.jsonl:1: the label" in said and "not a finite number" in said


CR = "its lines end in CR alone"
NUMBERS = ("0", "1")


@pytest.mark.parametrize("name, content, said, labels", [(*case, ())[:4] for case in [
    ("train.csv", "", "the file is empty"),
    ("train.csv", "a,y\nx,1\n", "train.csv: the header has no column b; found: a, y"),
    ("train.csv", "a,b,y,y\nx,z,1,1\n", "the header has two columns y"),
    ("train.tsv", "a\tb\ty\nx\tz\n", "train.tsv:2: has 2 fields for 3"),
    ("train.tsv", "a\tb\ty\nx\tz\t1\t2\n", "train.tsv:2: has 4 fields"),
    ("train.csv", 'a,b,y\n"x,z,1\nx,z,2\n', "train.csv:3: is not UTF-8 CSV"),
    ("train.csv", 'a,b,y\n"x"z,z,1\n', "train.csv:2: is not UTF-8 CSV"),
    ("train.csv", "a,b,y\nx,z, \n", "train.csv:2: y is empty"),
    ("train.csv", "a,b,y\rx,z,1\r", f"train.csv: {CR}"),
    ("train.csv", 'a,b,y\rx,"z\nz",1\r', f"train.csv: {CR}"),
    ("train.tsv", "a\tb\ty\rx\tz\t1\r\n", f"train.tsv: {CR}"),
    ("train.jsonl", '{"a": "x"}\r{"a": "y"}', f"train.jsonl: {CR}"),
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
    ("train.jsonl", '{"a": 3, "b": "z", "y": 1}', ':1: "a" must be a string, not 3', NUMBERS),
    ("train.jsonl", '{"a": "x", "b": null, "y": 1}', ':1: "b" is missing or null', NUMBERS),
    ("train.jsonl", '{"a": "x", "b": "\\ud83d", "y": 1}', '"b" holds half a surrogate', NUMBERS),
    ("train.jsonl", '{"a": "x", "b": "", "y": 2}', "the label '2' is not one of 0, 1", NUMBERS),
]])  # fmt: skip
def test_refuses_bad_custom_files(tmp_path, name, content, said, labels):
    path = write(tmp_path / name, content)
    message = refusal(own, path, labels)
    assert name in message and said in message


def test_a_blank_line_in_a_single_column_is_refused(tmp_path):
    """If it were skipped, the indices of the following predictions would be wrong."""
    for suffix in ("tsv", "csv"):
        path = write(tmp_path / f"test.{suffix}", "a\none\n\ntwo\n")
        assert f"test.{suffix}:3: is blank" in refusal(own, path, NUMBERS, SINGLE)
        path.unlink()
    path = write(tmp_path / "test.csv", "a,z\none,1\n\ntwo,2\n")
    assert [row["text_a"] for row in own(path, NUMBERS, SINGLE)[0]] == ["one", "two"]


def test_labels_that_look_like_numbers_give_a_warning(tmp_path, caplog):
    path = write(tmp_path / "train.csv", "a,y\n" + "".join(f"x,{n / 7}\n" for n in range(30)))
    assert len(find_labels(path, SINGLE)) == 30
    assert "30 labels in 30 rows" in caplog.text and "--regression" in caplog.text
