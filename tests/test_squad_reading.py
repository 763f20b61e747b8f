"""SQuAD files and the hub: what is read, every refusal, and what is left out of the training."""

import gzip
import json

import pytest
from tiny import CONTEXT, document, examples_of, good_document, qa, write

from emmental.data.squad_features import drop_misaligned
from emmental.data.squad_read import load_hub_examples, read_examples
from emmental.system.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")
NOT_THERE = "the answer is not at its answer_start"


def test_reads_all_columns(tmp_path):
    examples = examples_of(tmp_path, good_document())
    assert examples[0] == {
        "id": "a",
        "title": "Normans",
        "context": CONTEXT,
        "question": "who gave the name?",
        "answers": {"text": ["Normans", "The Normans"], "answer_start": [4, 0]},
        "is_impossible": False,
    }
    assert examples.column_names == list(examples[0])
    assert list(examples["id"]) == list("abcdef")
    assert examples_of(tmp_path, good_document(), True)[:] == examples[:]


def test_reads_a_changed_file_anew_and_tolerates_a_bom(tmp_path):
    assert examples_of(tmp_path, good_document())[0]["context"] == CONTEXT
    changed = document(("Other Normans.", [qa("a", "Other Normans.", "Other")]))
    examples = examples_of(tmp_path, "\ufeff" + json.dumps(changed))
    assert examples[0]["context"] == "Other Normans."


def broken(place, **changes):
    """The good document with these values in its last paragraph; `...` takes one out."""
    content = good_document()
    article = content["data"][0]
    paragraph = article["paragraphs"][1]
    question = paragraph["qas"][2]
    places = {"article": article, "paragraph": paragraph, "question": question}
    record = (places | {"answer": question["answers"][0]})[place]
    record |= changes
    for name in [name for name, value in record.items() if value is ...]:
        del record[name]
    return content


PARAGRAPH = "data[0], paragraphs[1]"
QUESTION = f"{PARAGRAPH}, qas[2]"
BOOLEAN = '"is_impossible" must be true or false'


@pytest.mark.parametrize("content, parts", [
    ("", ["not JSON"]),
    ('{"data": [', ["not JSON", "char 10", "download it again"]),
    ("[1]", ['must be an object with "data", not [1]']),
    ({"version": "1.1"}, ['"data" is missing']),
    ({"data": {}}, ['"data" must be a list, not {}']),
    ({"data": ["x"]}, ["data[0]: ", 'must be an object with "title", not x']),
    ({"data": []}, ["is empty"]),
    ({"data": None}, ["is empty"]),
    (document((CONTEXT, [])), ["is empty"]),
    (broken("article", title=3), ["data[0]: ", '"title" must be a string, not 3']),
    (broken("article", paragraphs=...), ["data[0]: ", '"paragraphs" is missing']),
    (broken("paragraph", context=...), [PARAGRAPH, '"context" is missing']),
    (broken("paragraph", context="x\ud83d"), [PARAGRAPH, '"context" holds half a surrogate pair']),
    (broken("paragraph", qas=...), [PARAGRAPH, '"qas" is missing']),
    (broken("question", id=...), [QUESTION, '"id" is missing']),
    (broken("question", id=1.5), [QUESTION, '"id" must be a string']),
    (broken("question", id=True), [QUESTION, '"id" must be a string']),
    (broken("question", question=...), [QUESTION, '"question" is missing']),
    (broken("question", answers="x"), [QUESTION, '"answers" must be a list']),
    (broken("answer", text=...), [f"{QUESTION}, answers[0]", '"text" is missing']),
    (broken("answer", answer_start="3"), [QUESTION, "must be a whole number"]),
    (broken("answer", answer_start=True), [QUESTION, "whole number, not true"]),
    (broken("question", is_impossible=2), [QUESTION, BOOLEAN]),
    (broken("question", is_impossible="true"), [QUESTION, BOOLEAN]),
    (broken("question", is_impossible=True), [QUESTION, "no answers"]),
    (broken("question", is_impossible=1), [QUESTION, "no answers"]),
    (broken("question", is_impossible=True, answers=[]), [QUESTION, "--version_2_with_negative"]),
    (broken("question", id="a"), [QUESTION, "the id 'a' already belongs to another question"]),
    (  # an integer and its text are the same
        document((CONTEXT, [qa(7, CONTEXT, "France"), qa("7", CONTEXT, "France")])),
        ["the id '7' already belongs to another question"],
    ),
])  # fmt: skip
def test_refuses_bad_files(tmp_path, content, parts):
    with pytest.raises(UserError) as error:
        examples_of(tmp_path, content)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/squad.json") and "\n" not in message
    assert [part for part in parts if part not in message] == []


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 30288272\n"
EXPECTING = "Expecting value: line 1 column 1 (char 0)"


@pytest.mark.parametrize("content, parts", [
    (LFS, [EXPECTING, "begins with 'version https://git-lfs.github.com/spec/v1 "]),
    (b"\n<!DOCTYPE html><html>", ["line 2 column 1", "begins with '<!DOCTYPE html>"]),
    (b"\xef\xbb\xbf<?xml version='1.0'?>", ["begins with", "<?xml version"]),
    (json.dumps(good_document()).encode("utf-16"), ["can't decode byte 0xff in position 0"]),
    (json.dumps(good_document()).encode("utf-16-le"), ["Expecting property name", "'{"]),
    ('{"data": "é"}'.encode("latin-1"), ["can't decode byte 0xe9 in position 10"]),
    (gzip.compress(b"{}", mtime=0), ["can't decode byte 0x8b in position 1"]),
    (b"id,question\n1,who?\n", [EXPECTING, "begins with 'id,question 1,who?'"]),
    (b'{"data": [\n  1,\n ]}', ["line 3 column 2"]),
    (b'{"data" []}', ["line 1 column 9 (char 8); it begins with", "'{\"data\" []}'"]),
    (b'{"data": ["on', ["line 1 column 11"]),
    (b"", ["it begins with ''"]),
])  # fmt: skip
def test_says_what_is_not_json(tmp_path, content, parts):
    with pytest.raises(UserError) as error:
        examples_of(tmp_path, content)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/squad.json: is not JSON in UTF-8: ")
    assert message.endswith("correct it, or download it again") and "\n" not in message
    assert [part for part in parts if part not in message] == []


def test_reads_what_other_tools_write(tmp_path):
    """Integer ids, null for what is absent, and places that do not matter in an evaluation."""
    starts = (22, -1, None, 22.0, 10_000, len(CONTEXT))
    questions = [
        qa(2**40 + n, CONTEXT) | {"answers": [{"text": "France", "answer_start": start}]}
        for n, start in enumerate(starts)
    ]
    del questions[2]["answers"][0]["answer_start"]
    questions[0] |= {"is_impossible": None}
    questions[1] |= {"is_impossible": 0, "plausible_answers": None}
    content = document((CONTEXT, [*questions, qa("none", CONTEXT, answers=None)]), title=None)
    examples = examples_of(tmp_path, content)
    ids = list(examples["id"])
    assert ids == [str(2**40 + n) for n in range(6)] + ["none"]
    assert set(examples["title"]) == {""} and not any(examples["is_impossible"])
    found = [answers["answer_start"] for answers in examples["answers"]]
    assert found == [[22], [-1], [-1], [22], [-1], [-1], []]
    _, skipped = drop_misaligned(examples)
    assert skipped == {NOT_THERE: ids[:6], "no answer": ["none"]}


def test_starts_of_a_column_with_a_gap_are_whole_numbers(tmp_path):
    question = qa("a", CONTEXT, "France") | {"id": 7.0}
    question["answers"][0]["answer_start"] *= 1.0  # as pandas writes them
    (example,), skipped = drop_misaligned(examples_of(tmp_path, document((CONTEXT, [question]))))
    assert example["answers"]["answer_start"] == [CONTEXT.index("France")]
    assert example["id"] == "7" and not skipped


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("place, name, left", [
    ("article", "title", "abcdef"),
    ("article", "paragraphs", "y"),
    ("paragraph", "context", "abc"),
    ("paragraph", "qas", "abc"),
    ("question", "id", "abcde"),
    ("question", "question", "abcde"),
    ("question", "answers", "abcdef"),
    ("answer", "text", "abcdef"),
])  # fmt: skip
def test_null_counts_as_absent_and_does_not_stop_a_file(tmp_path, caplog, place, name, left, v2):
    content = broken(place, **{name: None})
    if name == "paragraphs":
        content["data"] += document((CONTEXT, [qa("y", CONTEXT, "France")]))["data"]
    for _ in range(2):  # from the file, then from the cache
        caplog.clear()
        examples = examples_of(tmp_path, content, v2)
        assert "".join(examples["id"]) == left
        assert caplog.messages == [f"{tmp_path}/squad.json: null counts as absent: 1 {name}"]
    if place == "answer" or name == "answers":
        assert examples[-1]["answers"] == {"text": [], "answer_start": []}
        assert examples[-1]["is_impossible"] == v2
        assert drop_misaligned(examples)[1] == ({} if v2 else {"no answer": ["f"]})


def test_null_in_a_text_is_text(tmp_path, caplog):
    context = 'She wrote "text": null in "France".'
    examples_of(tmp_path, document((context, [qa("a", context, "France")])))
    assert not caplog.messages


def test_a_last_character_is_not_found_from_the_end(tmp_path):
    """In Python, -1 is a place: that of the last character."""
    question = qa("a", "x y", "y")
    question["answers"][0]["answer_start"] = -1
    _, skipped = drop_misaligned(examples_of(tmp_path, document(("x y", [question]))))
    assert skipped == {NOT_THERE: ["a"]}


BLANK = {"answers": [{"text": " ", "answer_start": -1}]}
NULL = {"answers": [{"text": None, "answer_start": None}], "is_impossible": True}


def test_questions_without_answer_are_unanswerable_in_v2_alone(tmp_path):
    marks = [{}, {"is_impossible": None}, {"is_impossible": False}, BLANK, {"answers": None}]
    only_v2 = [{"is_impossible": True}, {"is_impossible": 1}, BLANK | {"is_impossible": 1}, NULL]
    for v2 in (False, True):
        used = marks + only_v2 * v2
        questions = [qa(f"n{n}", CONTEXT) | mark for n, mark in enumerate(used)]
        content = document((CONTEXT, [qa("a", CONTEXT, "France"), *questions]))
        examples = examples_of(tmp_path, content, v2)
        assert list(examples["is_impossible"]) == [False, *[v2] * len(used)]
        kept, skipped = drop_misaligned(examples)
        assert skipped == ({} if v2 else {"no answer": [f"n{n}" for n in range(len(used))]})
        assert len(kept) == (len(used) + 1 if v2 else 1)
    assert list(examples["answers"])[1:] == [{"text": [], "answer_start": []}] * len(used)


def test_repeated_ids_are_allowed_on_request(tmp_path):
    content = document((CONTEXT, [qa("a", CONTEXT, "France"), qa("a", CONTEXT, "Normans")]))
    assert list(examples_of(tmp_path, content, unique_ids=False)["id"]) == ["a", "a"]


def test_drop_misaligned(tmp_path):
    off, blank, beyond = (qa(name, CONTEXT, "France") for name in ("off", "blank", "beyond"))
    off["answers"][0]["answer_start"] += 1
    blank["answers"][0]["text"] = " "
    beyond["answers"][0]["answer_start"] = 10_000
    second = qa("second", CONTEXT, "Normans", "France")
    second["answers"][1]["answer_start"] = 0
    impossible = qa("impossible", CONTEXT, is_impossible=True)
    questions = [off, second, qa("none", CONTEXT), blank, impossible, beyond]
    questions.append(qa("z", CONTEXT, "people"))
    kept, skipped = drop_misaligned(examples_of(tmp_path, document((CONTEXT, questions)), True))
    assert skipped == {NOT_THERE: ["off", "beyond"]}
    assert list(kept["id"]) == ["second", "none", "blank", "impossible", "z"]
    assert drop_misaligned(kept) == (kept, {})


@pytest.mark.parametrize("v2, name", [(False, "rajpurkar/squad"), (True, "rajpurkar/squad_v2")])
def test_hub(tmp_path, hub, v2, name):
    content = document((CONTEXT, [qa("a", CONTEXT, "France"), qa("b", CONTEXT)]))
    wanted = examples_of(tmp_path, content, v2)
    columns = ["answers", "id", "title", "question", "context"]
    calls = hub(wanted.select_columns(columns))
    examples = load_hub_examples("validation", v2, cache_dir=tmp_path / "elsewhere")
    assert calls == [((name,), {"split": "validation", "cache_dir": tmp_path / "elsewhere"})]
    assert examples.features == wanted.features
    assert examples.remove_columns("is_impossible")[:] == wanted.remove_columns("is_impossible")[:]
    assert list(examples["is_impossible"]) == [False, v2]
    assert drop_misaligned(examples)[1] == ({} if v2 else {"no answer": ["b"]})


def test_hub_out_of_reach(hub):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no\nroute")

    hub(unreachable)
    with pytest.raises(UserError, match="rajpurkar/squad .*ConnectionError: no route.*--data_dir"):
        load_hub_examples("train", False, None)


def test_a_bad_file_leaves_nothing_in_the_cache(tmp_path, cache):
    with pytest.raises(UserError, match='"id" must be a string'):
        read_examples(write(tmp_path / "squad.json", broken("question", id=[3])), False)
    assert not list(cache.rglob("*.arrow"))
