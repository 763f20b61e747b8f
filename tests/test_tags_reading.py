"""Tagged words: files of columns, JSON lines, the hub, and every refusal."""

import json

import datasets
import pytest
from tiny import refusal, write

from emmental.data import tags

pytestmark = pytest.mark.usefixtures("cache")
ADA = [(["Ada", "lives"], ["B-name", "O"]), (["Oslo"], ["B-place"])]


def read(path, words=None, named=None, test=False):
    """The sentences of a file, each as its words and tags, if there are any."""
    rows = tags.read_examples(path, (words, named), test, None)
    if "tags" not in rows.column_names:
        return list(rows["words"])
    return list(zip(rows["words"], rows["tags"]))


COLUMNS = {
    "spaces": "Ada B-name\nlives O\n\nOslo B-place\n",
    "tabs": "Ada \tB-name \nlives\tO\n\nOslo\tB-place\n",
    "no end": "\n\nAda\tB-name\nlives\tO\n \t \n\t\nOslo\tB-place",
    "windows": "\ufeffAda\tB-name\r\nlives\tO\r\n\t\r\nOslo\tB-place\r\n",
    "documents": "-DOCSTART- -X- -X- O\n\nAda NN x B-name\nlives VB  x O\n-DOCSTART- -X- -X- O\n"
    "Oslo NN x B-place\n",
    "document": "-DOCSTART-\n\nAda\tB-name\nlives\tO\n-DOCSTART-\tO\nOslo\tB-place\n",
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns(tmp_path, name):
    assert read(write(tmp_path / "train.conll", COLUMNS[name])) == ADA


def test_columns_by_number(tmp_path):
    path = write(tmp_path / "train.txt", "1 Ada NN B-name\n2 lives VB O\n")
    assert read(path, "2") == ADA[:1]
    assert read(path, "2", "3") == [(["Ada", "lives"], ["NN", "VB"])]


def test_universal_dependencies(tmp_path):
    rows = ["1-2\tAda's\t_", "1\tAda\tB-name", "1.1\tis\t_", "2\t's\tO", "3\t#\tO", ""]
    text = "\n".join(["# text = Ada's #", *rows, "# text = Oslo", "1\tOslo\tB-place", ""])
    path = write(tmp_path / "train.conllu", text)
    assert read(path, "2") == [(["Ada", "'s", "#"], ["B-name", "O", "O"]), (["Oslo"], ["B-place"])]


def test_words_may_be_empty_or_hold_spaces(tmp_path):
    path = write(tmp_path / "train.tsv", "New York\tB-place\n\tO\nx\u2028y\u00a0\tO\n\t\n")
    assert read(path) == [(["New York", "", "x\u2028y\u00a0"], ["B-place", "O", "O"])]
    spaces = write(tmp_path / "train.txt", "a\u00a0b O\n")
    assert read(spaces) == [(["a\u00a0b"], ["O"])]


def test_a_test_file_may_lack_tags(tmp_path):
    words = [words for words, _ in ADA]
    path = write(tmp_path / "test.conll", "Ada\nlives\n\nOslo\n")
    assert read(path, test=True) == words
    assert read(write(path, COLUMNS["tabs"]), test=True) == ADA
    assert read(path, None, "3", test=True) == words
    lines = "".join(json.dumps({"words": x}) + "\n" for x in words)
    assert read(write(tmp_path / "test.jsonl", lines), test=True) == words
    assert "need 2" in refusal(read, write(path, "Ada\n"))


@pytest.mark.parametrize("fields", [("words", "tags"), ("tokens", "ner_tags"), ("w", "t")])
def test_json_lines(tmp_path, fields):
    rows = [dict(zip(fields, sentence)) for sentence in [*ADA, ([], [])]]
    text = "".join(json.dumps(row) + "\r\n" for row in rows)
    columns = fields if fields == ("w", "t") else ()
    for name in ("train.jsonl", "train.json"):
        assert read(write(tmp_path / name, f"\ufeff{text}"), *columns) == ADA


def test_tags_may_be_numbers(tmp_path):
    path = write(tmp_path / "train.jsonl", '{"words": ["a", "b", "c"], "tags": [10, 2.0, "9"]}\n')
    rows = tags.read_examples(path, (None, None), False, None)
    assert list(tags.tag_places(rows, path)) == ["2", "9", "10"]


def test_the_hub(hub):
    names = datasets.ClassLabel(names=["O", "B-name", "B-place"])
    kinds = {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)}
    data = {"tokens": [words for words, _ in ADA], "ner_tags": [[1, 0], [2]]}
    asked = hub(datasets.Dataset.from_dict(data, datasets.Features(kinds)))
    rows = tags.load_hub_examples(("people", "en"), "dev", (None, None), None)
    assert list(zip(rows["words"], rows["tags"])) == ADA
    assert [(names, more["split"]) for names, more in asked] == [(("people", "en"), "validation")]
    said = refusal(tags.load_hub_examples, ("people",), "dev", (None, "pos"), None)
    assert 'people (validation), row 0: "pos" is missing' in said


def test_the_file_of_a_split(tmp_path):
    said = refusal(tags.split_file, tmp_path, "dev")
    assert "must hold exactly one file dev.* or valid.*, has none" in said
    valid = write(tmp_path / "valid.txt", "")
    assert tags.split_file(tmp_path, "dev") == valid
    write(tmp_path / "dev.conll", "")
    assert "has dev.conll, valid.txt" in refusal(tags.split_file, tmp_path, "dev")


@pytest.mark.parametrize("name, content, said", [
    ("train.conll", "", "train.conll: is empty"),
    ("train.conll", "\n \n-DOCSTART- O\n", "train.conll: is empty"),
    ("train.conll", "\nAda\n", "train.conll:2: has 1 column; a word and its tag need 2"),
    ("train.conll", "Ada O\n\nlives\n", "train.conll:3: has 1 column, and line 1 has 2"),
    ("train.conll", "Ada\tO\nNew York O\n", "train.conll:2: has 1 column, and line 1 has 2"),
    ("train.conll", "Ada O\nNew York O\n", "train.conll:2: has 3 columns, and line 1 has 2"),
    ("train.conll", "Ada\tO\nlives\t \n", "train.conll:2: the tag is empty"),
    ("train.conll", b"Ada O\n\xff O\n", "train.conll:2: is not UTF-8 CONLL"),
    ("train.conll", "Ada O\rlives O\r", "train.conll: its lines end in CR alone"),
    ("train.jsonl", '{"words": ["a"]}', 'train.jsonl:1: "tags" is missing'),
    ("train.jsonl", '{"words": "a", "tags": ["O"]}', '"words" must be a list, not "a"'),
    ("train.jsonl", '{"words": ["a"], "tags": []}', ":1: has 1 words and 0 tags"),
    ("train.jsonl", '\n{"words": [3], "tags": ["O"]}', ':2: "words[0]" must be a string, not 3'),
    ("train.jsonl", '{"words": ["a"], "tags": [0.5]}', '"tags[0]" must be a string or a whole'),
    ("train.jsonl", '{"words": ["a"], "tags": [null]}', '"tags[0]" is missing or null'),
    ("train.jsonl", '{"words": ["a"], "tags": [" "]}', "train.jsonl:1: the tag is empty"),
    ("train.jsonl", '["a"]', 'train.jsonl:1: must be an object with "words"'),
    ("train.jsonl", '{"words": ["\\ud83d"], "tags": ["O"]}', "half a surrogate"),
])  # fmt: skip
def test_refuses_bad_files(tmp_path, name, content, said):
    assert said in refusal(read, write(tmp_path / name, content))


def test_refuses_bad_columns(tmp_path):
    path = write(tmp_path / "train.conll", "Ada O\n")
    said = "--tag_column tags: "
    assert said in refusal(read, path, None, "tags")
    assert "--word_column 0: " in refusal(read, path, "0")
    assert "has 2 columns; a word and its tag need 3" in refusal(read, path, "2")  # tags are words
    assert read(path, "2", test=True) == [["O"]]
    assert "train.conll:1: has 2 columns; a word and its tag need 3" in refusal(
        read, path, None, "3"
    )
    path = write(tmp_path / "test.jsonl", '{"words": ["a"], "tags": ["O"]}\n{"words": ["b"]}\n')
    assert "test.jsonl:2: has no tags" in refusal(read, path, test=True)


def places(path, content):
    rows = tags.read_examples(write(path, content), (None, None), False, None)
    return tags.tag_places(rows, path)


def compared(path, content, labels, test=False):
    rows = tags.read_examples(write(path, content), (None, None), test, None)
    return tags.compared(rows, tags.tag_places(rows, path), labels, path, test)


def test_tags_of_one_scheme(tmp_path):
    path = tmp_path / "train.conll"
    tags.labels_of(places(path, "a B-x\nb I-x\nc E-x\nd S-x\ne O\n"), path)
    tags.labels_of(places(path, "a NOUN\nb VERB\n"), path)
    said = refusal(tags.labels_of, places(path, "a B-x\n\nb O\nc PER\n"), path)
    assert "train.conll:3: its sentence has the tag 'PER'" in said and "B-, I-, E- or S-" in said
    said = refusal(compared, path, "a B-x\n\nb M-x\n", ("B-x", "O"))
    assert "train.conll:3: its sentence has the tag 'M-x'; beside tags such as B-name" in said
    said = refusal(tags.labels_of, places(path, "a O\nb O\n"), path)
    assert "train.conll: has 1 different tags" in said


def test_tags_that_the_model_lacks_are_reported(tmp_path, caplog):
    path, labels = tmp_path / "dev.conll", ("B-x", "O")
    compared(path, "a B-x\n\nb B-y\n", labels)
    assert "dev.conll:3: its sentence has the tag 'B-y'" in caplog.text
    compared(path, "a O\n", labels)
    said = refusal(compared, path, "a O\nb B-y\n", labels)
    assert "dev.conll: has the tags B-y, O, and the model B-x, O: give a model" in said
    assert "tags" not in compared(path, "a O\nb B-y\n", labels, test=True).column_names
