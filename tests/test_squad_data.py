"""SQuAD data: every refusal, windows, the cache, the n-best search and both metrics."""

import collections
import functools
import gzip
import json
import logging
import os
import pickle
import re
import string
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tiny import TOKENIZERS, tokenizer_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from emmental.data import squad
from emmental.data.features import content_hash
from emmental.data.metrics import squad_metrics
from emmental.data.squad import (
    NO_SPAN_ODDS,
    build_features,
    collate,
    drop_misaligned,
    load_hub_examples,
    postprocess,
    read_examples,
)
from emmental.errors import UserError

ROOT = Path(__file__).parent.parent
CONTEXT = (
    "The Normans (Norman: Nourmands) were the people who gave their name to Normandy, "
    "a region in France."
)
UNICODE = (
    "L'école à Besançon: 漢字 und 😀 𝔘ber cafe\u0301, nai\u0308ve e\u0301tude 한국 "
    "x\u200by İstanbul re\u0301sume\u0301"
)
SIZES = {"max_seq_length": 24, "doc_stride": 5, "max_query_length": 6}


def make_tokenizer(words=("the", "normans", "people", "france", "region", "##s", "name")):
    letters = string.ascii_lowercase + string.digits + string.punctuation + "漢字😀𝔘"
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{char}" for char in letters),
        *words,
    ]
    model = models.WordPiece(
        {token: n for n, token in enumerate(dict.fromkeys(vocab))}, unk_token="[UNK]"
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test sees the cache of another, nor that of the user."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def files(cache):
    """The Arrow files of features that a cache holds; beside them are those of examples."""
    return sorted(cache.rglob("cache-*.arrow"))


def qa(id_, context, *texts, question="who gave the name?", **more):
    answers = [{"text": text, "answer_start": context.index(text)} for text in texts]
    return {"id": id_, "question": question, "answers": answers, **more}


def document(*paragraphs, title="Normans"):
    paragraphs = [{"context": context, "qas": qas} for context, qas in paragraphs]
    return {"version": "1.1", "data": [{"title": title, "paragraphs": paragraphs}]}


def good():
    a, b, c = ["Normans", "The Normans"], ["France"], ["a region"]
    d, e, f = ["Besançon"], ["漢字 und 😀"], ["nai\u0308ve"]
    return document(
        (CONTEXT, [qa(id_, CONTEXT, *texts) for id_, texts in zip("abc", (a, b, c))]),
        (UNICODE, [qa(id_, UNICODE, *texts) for id_, texts in zip("def", (d, e, f))]),
    )


def write(tmp_path, content, name="squad.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def examples_of(tmp_path, content, version_2_with_negative=False):
    return read_examples(write(tmp_path, content), version_2_with_negative)


# ---------------------------------------------------------------------------------------- examples


def test_reads_all_columns(tmp_path):
    examples = examples_of(tmp_path, good())
    assert examples.column_names == [
        "id",
        "title",
        "context",
        "question",
        "answers",
        "is_impossible",
    ]
    assert examples[0] == {
        "id": "a",
        "title": "Normans",
        "context": CONTEXT,
        "question": "who gave the name?",
        "answers": {"text": ["Normans", "The Normans"], "answer_start": [4, 0]},
        "is_impossible": False,
    }
    assert list(examples["id"]) == list("abcdef")
    assert examples_of(tmp_path, good(), version_2_with_negative=True)[:] == examples[:]


def test_reads_a_changed_file_anew_and_tolerates_a_bom(tmp_path):
    assert examples_of(tmp_path, good())[0]["context"] == CONTEXT
    changed = "\ufeff" + json.dumps(
        document(("Other Normans.", [qa("a", "Other Normans.", "Other")]))
    )
    assert examples_of(tmp_path, changed)[0]["context"] == "Other Normans."


def broken(change):
    content = good()
    change(
        content["data"][0],
        content["data"][0]["paragraphs"][1],
        content["data"][0]["paragraphs"][1]["qas"][2],
    )
    return content


PARAGRAPH = "data[0], paragraphs[1]"
QUESTION = f"{PARAGRAPH}, qas[2]"


@pytest.mark.parametrize(
    "content, parts",
    [
        ("", ["not JSON"]),
        ('{"data": [', ["not JSON", "char 10", "download it again"]),
        ("[1]", ['must be an object with "data", not [1]']),
        ({"version": "1.1"}, ['"data" is missing']),
        ({"data": {}}, ['"data" must be a list, not {}']),
        ({"data": ["x"]}, ["data[0]: ", 'must be an object with "title", not x']),
        ({"data": []}, ["is empty"]),
        (document((CONTEXT, [])), ["is empty"]),
        (
            broken(lambda a, p, q: a.update(title=3)),
            ["data[0]: ", '"title" must be a string, not 3'],
        ),
        (broken(lambda a, p, q: a.pop("paragraphs")), ["data[0]: ", '"paragraphs" is missing']),
        (broken(lambda a, p, q: p.pop("context")), [PARAGRAPH, '"context" is missing']),
        (
            broken(lambda a, p, q: p.update(context=None)),
            [PARAGRAPH, '"context" is missing or null'],
        ),
        (
            broken(lambda a, p, q: p.update(context="x\ud83d")),
            [PARAGRAPH, '"context" holds half a surrogate pair'],
        ),
        (broken(lambda a, p, q: p.pop("qas")), [PARAGRAPH, '"qas" is missing']),
        (broken(lambda a, p, q: q.pop("id")), [QUESTION, '"id" is missing']),
        (broken(lambda a, p, q: q.update(id=1.5)), [QUESTION, '"id" must be a string']),
        (broken(lambda a, p, q: q.update(id=True)), [QUESTION, '"id" must be a string']),
        (broken(lambda a, p, q: q.pop("question")), [QUESTION, '"question" is missing']),
        (broken(lambda a, p, q: q.update(answers="x")), [QUESTION, '"answers" must be a list']),
        (
            broken(lambda a, p, q: q["answers"][0].pop("text")),
            [f"{QUESTION}, answers[0]", '"text" is missing'],
        ),
        (
            broken(lambda a, p, q: q["answers"][0].update(answer_start="3")),
            [QUESTION, "must be a whole number"],
        ),
        (
            broken(lambda a, p, q: q["answers"][0].update(answer_start=True)),
            [QUESTION, "whole number, not true"],
        ),
        (
            broken(lambda a, p, q: q.update(is_impossible=2)),
            [QUESTION, '"is_impossible" must be true or false'],
        ),
        (
            broken(lambda a, p, q: q.update(is_impossible="true")),
            [QUESTION, '"is_impossible" must be true or false'],
        ),
        (broken(lambda a, p, q: q.update(is_impossible=True)), [QUESTION, "no answers"]),
        (broken(lambda a, p, q: q.update(is_impossible=1)), [QUESTION, "no answers"]),
        (
            broken(lambda a, p, q: q.update(is_impossible=True, answers=[])),
            [QUESTION, "--version_2_with_negative"],
        ),
        (
            broken(lambda a, p, q: q.update(id="a")),
            [QUESTION, "the id 'a' already belongs to another question"],
        ),
    ],
)
def test_refuses_bad_files(tmp_path, content, parts):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_examples(path, version_2_with_negative=False)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    for part in parts:
        assert part in message


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 30288272\n"


@pytest.mark.parametrize(
    "content, said",
    [
        (LFS, "it is a pointer of git-lfs; run `git lfs pull`"),
        (b"\n<!DOCTYPE html><html>", "it is HTML or XML"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>", "it is HTML or XML"),
        (json.dumps(good()).encode("utf-16"), "it is UTF-16 or UTF-32; save it as UTF-8"),
        (json.dumps(good()).encode("utf-16-le"), "it is UTF-16 or UTF-32"),
        ('{"data": "é"}'.encode("latin-1"), "can't decode byte 0xe9 in position 10"),
        (gzip.compress(b"{}", mtime=0), "it is compressed; unpack it"),
        (b"id,question\n1,who?\n", "it is other text, such as CSV ('id,question 1,who?')"),
        (b'{"data": [\n  1,\n ]}', "trailing comma"),
        (b'{"data": [], }', "trailing comma"),
        (b'{"data" []}', "line 1 column 9 (char 8); correct it"),
        (b'{"data": ["on', "it ends early; download it again"),
        (b"", "it ends early; download it again"),
    ],
)
def test_says_what_a_file_is_that_is_not_json(tmp_path, content, said):
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_examples(tmp_path / "other.json", False)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/other.json: is not JSON in UTF-8: ") and said in message
    assert message.count("download it again") == ("ends early" in said)


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
    assert list(examples["id"]) == [str(2**40 + n) for n in range(6)] + ["none"]
    assert set(examples["title"]) == {""} and not any(examples["is_impossible"])
    assert [answers["answer_start"] for answers in examples["answers"]] == (
        [[22], [-1], [-1], [-1], [-1], [-1], []]
    )
    kept, skipped = drop_misaligned(examples)
    assert not len(kept)
    ids = list(examples["id"])
    assert skipped == {"the answer is not at its answer_start": ids[:6], "no answer": ["none"]}


def test_an_integer_id_and_its_text_are_the_same(tmp_path):
    content = document((CONTEXT, [qa(7, CONTEXT, "France"), qa("7", CONTEXT, "France")]))
    with pytest.raises(UserError, match="the id '7' already belongs to another question"):
        examples_of(tmp_path, content)


def test_a_last_character_is_not_found_from_the_end(tmp_path):
    """In Python, -1 is a place: that of the last character."""
    question = qa("a", "x y", "y")
    question["answers"][0]["answer_start"] = -1
    _, skipped = drop_misaligned(examples_of(tmp_path, document(("x y", [question]))))
    assert skipped == {"the answer is not at its answer_start": ["a"]}


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
    path = write(
        tmp_path, document((CONTEXT, [qa("a", CONTEXT, "France"), qa("a", CONTEXT, "Normans")]))
    )
    assert list(read_examples(path, False, unique_ids=False)["id"]) == ["a", "a"]


def test_drop_misaligned(tmp_path):
    off, blank, beyond = (qa(name, CONTEXT, "France") for name in ("off", "blank", "beyond"))
    off["answers"][0]["answer_start"] += 1
    blank["answers"][0]["text"] = " "
    beyond["answers"][0]["answer_start"] = 10_000
    second = qa("second", CONTEXT, "Normans", "France")
    second["answers"][1]["answer_start"] = 0
    impossible = qa("impossible", CONTEXT, is_impossible=True)
    questions = [
        off,
        second,
        qa("none", CONTEXT),
        blank,
        impossible,
        beyond,
        qa("z", CONTEXT, "people"),
    ]
    kept, skipped = drop_misaligned(examples_of(tmp_path, document((CONTEXT, questions)), True))
    assert skipped == {"the answer is not at its answer_start": ["off", "beyond"]}
    assert list(kept["id"]) == ["second", "none", "blank", "impossible", "z"]
    assert drop_misaligned(kept) == (kept, {})


@pytest.mark.parametrize("v2, name", [(False, "rajpurkar/squad"), (True, "rajpurkar/squad_v2")])
def test_hub(tmp_path, monkeypatch, v2, name):
    wanted = read_examples(
        write(tmp_path, document((CONTEXT, [qa("a", CONTEXT, "France"), qa("b", CONTEXT)]))), v2
    )
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return wanted.remove_columns("is_impossible").select_columns(
            ["answers", "id", "title", "question", "context"]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_hub_examples("validation", v2, cache_dir=tmp_path / "elsewhere")
    assert calls == [((name,), {"split": "validation", "cache_dir": tmp_path / "elsewhere"})]
    assert examples.features == wanted.features
    assert examples.remove_columns("is_impossible")[:] == wanted.remove_columns("is_impossible")[:]
    assert list(examples["is_impossible"]) == [False, v2]
    assert drop_misaligned(examples)[1] == ({} if v2 else {"no answer": ["b"]})


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="rajpurkar/squad .*ConnectionError: no route.*--data_dir"):
        load_hub_examples("train", False, None)


# ---------------------------------------------------------------------------------------- features


KINDS = ("roberta", "modernbert", "xlm-roberta", "albert", "deberta-v2")  # and BERT's


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_features_are_the_pairs_of_the_stock_tokenizer(tmp_path, kind):
    tokenizer, examples = tokenizer_of(kind), examples_of(tmp_path, good())
    sizes = {"max_seq_length": 300, "doc_stride": 5, "max_query_length": 64}
    features = build_features(examples, tokenizer, training=False, **sizes)
    for feature, example in zip(features, examples, strict=True):
        stock = tokenizer(example["question"], example["context"])
        assert feature["input_ids"] == stock["input_ids"]
        assert feature["context_start"] == stock.sequence_ids().index(1)
        assert len(feature["max_context"]) == stock.sequence_ids().count(1)
    before, after = (stock.sequence_ids().index(0), stock.sequence_ids()[::-1].index(1))
    short = build_features(examples, tokenizer, training=False, **{**sizes, "max_seq_length": 60})
    assert max(short["length"]) == 60  # all that the frame leaves is for the context
    for feature in short:
        whole = features[feature["example_index"]]["input_ids"]
        assert feature["input_ids"][:before] == whole[:before]
        assert feature["input_ids"][-after:] == whole[-after:]
        context = feature["input_ids"][feature["context_start"] : -after]
        assert len(context) == len(feature["max_context"])


SPACED = " ada  lives\n\tin\u00a0oslo 😀 "


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_white_space_is_no_part_of_an_answer(tmp_path, kind):
    answers = ["ada", "lives", "in", "oslo", "😀", "ada  lives", "  lives\n", "oslo 😀 "]
    questions = [qa(text, SPACED, text) for text in answers]
    examples = examples_of(tmp_path, document((SPACED, questions)))
    sizes = {"max_seq_length": 60, "doc_stride": 8, "max_query_length": 6}
    training, evaluation = (
        build_features(examples, tokenizer_of(kind), training=training, **sizes)
        for training in (True, False)
    )
    for text, labels, feature in zip(answers, training, evaluation, strict=True):
        begins, ends = np.array(feature["offsets"]).reshape(-1, 2).T
        first = labels["start_position"] - labels["context_start"]
        last = labels["end_position"] - labels["context_start"]
        assert SPACED[begins[first] : ends[last]] == text.strip()
        assert (np.diff(begins) >= 0).all() and (np.diff(ends) >= 0).all()
    zeros = [np.zeros(length) for length in training["length"]]  # every span scores the same
    _, nbest, _ = search(examples, evaluation, zeros, zeros, n=1000)
    for rows in nbest.values():
        assert len(rows) >= 15 and all(row["text"] == row["text"].strip() != "" for row in rows)


def test_a_space_that_the_tokenizer_adds_inside_a_text(tmp_path):
    context = "ada</s>漢字"  # of the space before the first of the bytes, it says that it is behind
    examples = examples_of(tmp_path, document((context, [qa("a", context, "漢")])))
    tokenizer = tokenizer_of("roberta", add_prefix_space=True)
    sizes = {"max_seq_length": 60, "doc_stride": 8, "max_query_length": 6}
    (labels,) = build_features(examples, tokenizer, training=True, **sizes)
    span = labels["input_ids"][labels["start_position"] : labels["end_position"] + 1]
    assert tokenizer.decode(span) == " 漢"


def context_tokens(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("doc_stride", [1, 5, 15, 400])
def test_windows_cover_every_token_as_bert_lays_them_out(tmp_path, tokenizer, doc_stride):
    examples = examples_of(tmp_path, good())
    features = build_features(
        examples, tokenizer, training=False, **{**SIZES, "doc_stride": doc_stride}
    )
    wanted = []
    for row, example in enumerate(examples):
        question = context_tokens(tokenizer, example["question"])[:6]
        context = context_tokens(tokenizer, example["context"])
        room, begin = 24 - 3 - len(question), 0
        while True:  # BERT's own loop
            length = min(room, len(context) - begin)
            ids = [
                tokenizer.cls_token_id,
                *question,
                tokenizer.sep_token_id,
                *context[begin : begin + length],
            ]
            wanted.append((row, [*ids, tokenizer.sep_token_id], 2 + len(question)))
            if begin + length == len(context):
                break
            begin += min(length, doc_stride)
    got = [(f["example_index"], f["input_ids"], f["context_start"]) for f in features]
    assert got == wanted
    assert list(features["length"]) == [len(ids) for _, ids, _ in wanted]
    assert max(features["length"]) == 24 and len(features) > 2 * len(examples)


@pytest.mark.parametrize("max_seq_length, doc_stride", [(24, 4), (24, 5), (210, 129)])
def test_max_context_is_the_one_of_bert_and_unique(tmp_path, tokenizer, max_seq_length, doc_stride):
    # With a stride of 4 two windows tie; long windows weigh more than a token.
    long = " ".join("abcdefgh" * 44)
    examples = examples_of(
        tmp_path, document((CONTEXT, [qa("a", CONTEXT)]), (long, [qa("b", long)]))
    )
    sizes = {"max_seq_length": max_seq_length, "doc_stride": doc_stride, "max_query_length": 6}
    features = build_features(examples, tokenizer, training=False, **sizes)
    for row, example in enumerate(examples):
        windows = [
            feature["max_context"] for feature in features if feature["example_index"] == row
        ]
        windows = [(n * doc_stride, mask) for n, mask in enumerate(windows)]
        assert len(windows) > 2 or max_seq_length > 24
        for token in range(len(context_tokens(tokenizer, example["context"]))):
            scores = {
                n: min(token - begin, begin + len(mask) - 1 - token) + 0.01 * len(mask)
                for n, (begin, mask) in enumerate(windows)
                if begin <= token < begin + len(mask)
            }
            marked = [n for n in scores if windows[n][1][token - windows[n][0]]]
            assert marked == [max(scores, key=lambda n: (scores[n], -n))]


def test_offsets_give_the_original_text(tmp_path, tokenizer):
    examples = examples_of(tmp_path, good())
    whole = build_features(examples, tokenizer, training=False, **{**SIZES, "max_seq_length": 300})
    assert len(whole) == len(examples)
    offsets = np.array(whole[3]["offsets"]).reshape(-1, 2)
    assert len(offsets) == len(context_tokens(tokenizer, UNICODE))
    words = re.findall(r"[^\s,:']+", UNICODE)
    assert {"cafe\u0301", "nai\u0308ve", "😀", "𝔘ber", "한국", "re\u0301sume\u0301"} <= set(words)
    for word in words:
        start = UNICODE.index(word)
        inside = offsets[(offsets[:, 0] >= start) & (offsets[:, 1] <= start + len(word))]
        if word == "漢字":
            assert [UNICODE[a:b] for a, b in inside] == ["漢", "字"]
        assert UNICODE[inside[0, 0] : inside[-1, 1]] == word


def test_accents_that_are_tokens_are_not_taken_twice():
    """A cased vocabulary keeps them."""
    assert squad._spans([(0, 1), (1, 2), (2, 3)], "e\u0301x").tolist() == [[0, 1], [1, 2], [2, 3]]


ANSWERS = ["L'école", "Besançon", "漢字 und 😀", "字", "𝔘ber cafe\u0301", "nai\u0308ve"]
ANSWERS += ["한국", "İstanbul", "re\u0301sume\u0301"]


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_answer_positions_read_back_to_the_exact_text(tmp_path, tokenizer, kind):
    tokenizer, size = (tokenizer_of(kind), 36) if kind else (tokenizer, SIZES["max_seq_length"])
    questions = [qa(str(n), UNICODE, text) for n, text in enumerate(ANSWERS)]
    examples = examples_of(tmp_path, document((UNICODE, questions)))
    sizes = {**SIZES, "doc_stride": 8, "max_seq_length": size}
    training = build_features(examples, tokenizer, training=True, **sizes)
    evaluation = build_features(examples, tokenizer, training=False, **sizes)
    assert list(training["input_ids"]) == list(evaluation["input_ids"])
    found, outside = collections.Counter(), 0
    for train, evaluate in zip(training, evaluation):
        answer = ANSWERS[train["example_index"]]
        begin, end = UNICODE.index(answer), UNICODE.index(answer) + len(answer)
        offsets = np.array(evaluate["offsets"]).reshape(-1, 2)
        start, stop = train["start_position"], train["end_position"]
        if start == 0:
            part = bool(kind)  # the window may begin or end inside a character
            assert stop == 0
            assert not (offsets[0, 0] + part <= begin and offsets[-1, 1] - part >= end)
            outside += 1
        else:
            first, last = start - train["context_start"], stop - train["context_start"]
            assert UNICODE[offsets[first, 0] : offsets[last, 1]] == answer
            found[answer] += 1
    assert set(found) == set(ANSWERS) and outside > 0


def test_only_the_first_answer_counts_and_none_is_cls(tmp_path, tokenizer):
    questions = [qa("a", CONTEXT, "people", "France"), qa("b", CONTEXT, is_impossible=True)]
    examples = examples_of(tmp_path, document((CONTEXT, questions)), True)
    a, b = build_features(examples, tokenizer, training=True, **{**SIZES, "max_seq_length": 200})
    assert tokenizer.decode(a["input_ids"][a["start_position"] : a["end_position"] + 1]) == "people"
    assert (b["start_position"], b["end_position"]) == (0, 0)


def test_context_without_tokens_still_has_a_feature(tmp_path, tokenizer):
    examples = examples_of(tmp_path, document(("", [qa("a", "")]), (" ", [qa("b", " ")])))
    features = build_features(examples, tokenizer, training=False, **SIZES)
    assert list(features["example_index"]) == [0, 1]
    assert (
        features[0]["input_ids"][-2:] == [tokenizer.sep_token_id] * 2
        and features[0]["offsets"] == []
    )
    predictions, nbest, _ = search(examples, features, [np.zeros(24)] * 2, [np.zeros(24)] * 2)
    assert predictions == {"a": "", "b": ""}


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(tmp_path):
    examples = examples_of(tmp_path, good())
    wanted = build_features(examples, make_tokenizer(), training=False, **SIZES)
    other = make_tokenizer()
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=300)
    before = other.backend_tokenizer.to_str()
    got = build_features(examples, other, training=False, **SIZES)
    assert got[:] == wanted[:]
    assert other.backend_tokenizer.to_str() == before


def test_processes_give_the_same_rows(tmp_path, tokenizer):
    contexts = [f"{CONTEXT} {n} {UNICODE}"[: 20 + 7 * n] for n in range(15)]
    content = document(
        *((c, [qa(f"{n}-{k}", c, c[:9]) for k in range(3)]) for n, c in enumerate(contexts))
    )
    examples = examples_of(tmp_path, content)
    for training in (True, False):
        one, two = (
            build_features(
                examples, tokenizer, training=training, num_proc=n, overwrite_cache=True, **SIZES
            )
            for n in (1, 2)
        )
        assert one[:] == two[:] and one.features == two.features


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"max_seq_length": 9},
            "question 'a' has 6 tokens.*--max_seq_length 9.*--max_query_length",
        ),
        ({"max_seq_length": 9, "num_proc": 2}, "--max_seq_length 9"),
    ],
)
def test_refuses_impossible_sizes(tmp_path, tokenizer, changes, match):
    with pytest.raises(UserError, match=match):
        build_features(
            examples_of(tmp_path, good()), tokenizer, training=True, **{**SIZES, **changes}
        )


def test_refuses_a_tokenizer_without_special_tokens(tmp_path, tokenizer):
    examples = examples_of(tmp_path, good())
    unframed = make_tokenizer()
    unframed.backend_tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(UserError, match=r"adds no \[CLS\] and \[SEP\]"):
        build_features(examples, unframed, training=True, **SIZES)


# ------------------------------------------------------------------------------------------- cache


@pytest.fixture
def builds(monkeypatch):
    """Counts the runs of the feature builder."""
    calls = []
    original = squad._featurize

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(squad, "_featurize", counted)
    return calls


def test_cache_is_reused_and_never_stale(tmp_path, cache, builds, tokenizer, monkeypatch):
    def build(content=None, tokenizer=tokenizer, training=False, cache_dir=None, **changes):
        before = len(builds)
        examples = read_examples(write(tmp_path, content or good()), False, cache_dir=cache_dir)
        features = build_features(examples, tokenizer, training=training, **{**SIZES, **changes})
        return len(builds) - before, features

    n, first = build()
    assert n == 1 and len(files(cache)) == 1
    for same in ({}, {"tokenizer": make_tokenizer()}, {"num_proc": 1}):
        n, again = build(**same)
        assert n == 0 and again[:] == first[:]
    assert build(overwrite_cache=True)[0] == 1
    assert build(cache_dir=str(tmp_path / "elsewhere"))[0] == 1

    answer = good()
    answer["data"][0]["paragraphs"][0]["qas"][0]["answers"][0] = {
        "text": "Norman",
        "answer_start": 13,
    }
    context = good()
    context["data"][0]["paragraphs"][1]["context"] += "!"
    question = good()
    question["data"][0]["paragraphs"][1]["qas"][0]["question"] += "?"
    changes = [{"content": content} for content in (answer, context, question)]
    changes += [{"tokenizer": make_tokenizer(["norman"])}, {"training": True}]
    changes += [{"max_seq_length": 25}, {"doc_stride": 6}, {"max_query_length": 5}]
    for change in changes:
        assert build(**change)[0] == 1, change
        assert build(**change)[0] == 0, change
    monkeypatch.setattr(squad, "VERSION", squad.VERSION + 1)
    assert build()[0] == 1
    assert len(files(cache)) == 2 + len(changes)


def test_the_cache_goes_by_content_alone(tmp_path, cache, builds, tokenizer):
    """Not by the name of the file, nor by what differs between processes."""
    for name in "one", "two":
        (tmp_path / name).mkdir()
        examples = examples_of(tmp_path / name, good())
        build_features(examples, tokenizer, training=True, **SIZES)
        assert examples._fingerprint == content_hash(
            "squad", squad.VERSION, False, True, tmp_path / name / "squad.json"
        )
    assert len(builds) == 1 and len(files(cache)) == 1


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
def test_damaged_cache_is_done_without(tmp_path, cache, builds, tokenizer, caplog, damage):
    examples = examples_of(tmp_path, good())
    wanted = build_features(examples, tokenizer, training=True, **SIZES)[:]
    (arrow,) = files(cache)
    content = arrow.read_bytes()
    arrow.write_bytes(
        {"truncate": content[: len(content) // 2], "garbage": b"garbage", "empty": b""}[damage]
    )
    builds.clear()
    assert build_features(examples, tokenizer, training=True, **SIZES)[:] == wanted
    assert len(builds) == 1 and "cannot use the cache" in caplog.text
    build_features(examples, tokenizer, training=True, overwrite_cache=True, **SIZES)
    assert build_features(examples, tokenizer, training=True, **SIZES)[:] == wanted
    assert len(builds) == 2


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_examples_are_read_again(tmp_path, cache, damage, caplog):
    wanted = examples_of(tmp_path, good())[:]
    (path,) = cache.rglob("*.arrow")
    path.unlink() if damage is None else path.write_bytes(damage)
    for _ in range(2):
        assert examples_of(tmp_path, good())[:] == wanted
    assert "cache" not in caplog.text


def test_unwritable_cache(tmp_path, tokenizer, caplog):
    (tmp_path / "file").write_text("not a folder")
    wanted = build_features(examples_of(tmp_path, good()), tokenizer, training=True, **SIZES)
    with caplog.at_level(logging.WARNING):
        for stride in (5, 6):
            examples = read_examples(
                write(tmp_path, good()), False, cache_dir=str(tmp_path / "file")
            )
            got = build_features(
                examples, tokenizer, training=True, **{**SIZES, "doc_stride": stride}
            )
            assert stride == 6 or got[:] == wanted[:]
    assert caplog.text.count("continuing without the cache") == 2


def test_a_bad_file_leaves_nothing_in_the_cache(tmp_path, cache):
    content = good()
    content["data"][0]["paragraphs"][1]["qas"][0]["id"] = [3]
    with pytest.raises(UserError, match='"id" must be a string'):
        examples_of(tmp_path, content)
    assert not list(cache.rglob("*.arrow"))


def test_leftovers_of_killed_processes_are_removed_after_a_day(tmp_path, cache, tokenizer):
    examples = examples_of(tmp_path, good())
    place, now = cache / "emmental", time.time()
    for name, hours in {"old": 25, "new": 23}.items():
        folder = place / f".writing-{name}"
        (folder / "new").mkdir(parents=True)
        (folder / "new" / "x.arrow").write_text("half")
        (place / f"tmp{name}_0abc").write_text("half")
        for path in (*folder.rglob("*"), folder, place / f"tmp{name}_0abc"):
            os.utime(path, (now, now - hours * 3600))
    (place / ".writing-busy").mkdir()
    (place / ".writing-busy" / "x.arrow").write_text("growing")
    os.utime(place / ".writing-busy", (0, 0))
    (place / "tmp.json").write_text("mine")
    os.utime(place / "tmp.json", (0, 0))
    build_features(examples, tokenizer, training=True, **SIZES)
    left = {path.name for path in place.iterdir() if path.suffix != ".arrow"}
    assert left == {".writing-new", ".writing-busy", "tmpnew_0abc", "tmp.json"}


# ----------------------------------------------------------------------------------------- collate


def test_collate():
    short = {
        "input_ids": [2, 7, 3, 8, 3],
        "context_start": 3,
        "start_position": 3,
        "end_position": 3,
        "length": 5,
    }
    long = {
        "input_ids": [2, 7, 3, 8, 9, 5, 3],
        "context_start": 3,
        "start_position": 0,
        "end_position": 0,
    }
    batch = pickle.loads(pickle.dumps(functools.partial(collate, pad_token_id=4)))([short, long])
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 7, 3, 8, 3, 4, 4, 4], [2, 7, 3, 8, 9, 5, 3, 4]],
        "attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]],
        "token_type_ids": [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]],
        "start_positions": [3, 0],
        "end_positions": [3, 0],
    }
    evaluation = {"input_ids": list(range(8)), "context_start": 2, "max_context": [True] * 5}
    batch = collate([evaluation], 0)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"} and batch[
        "input_ids"
    ].shape == (1, 8)
    assert collate([long], 0, multiple_of=1)["input_ids"].shape == (1, 7)


# ----------------------------------------------------------------------------------------- answers


def search(examples, features, start, end, n=20, length=30, v2=False, threshold=0.0):
    return postprocess(
        examples,
        features,
        start,
        end,
        n_best_size=n,
        max_answer_length=length,
        version_2_with_negative=v2,
        null_score_diff_threshold=threshold,
    )


def one_feature(tmp_path, tokenizer, v2=False):
    """[CLS] q [SEP] a b c d [SEP]: the context starts at 3."""
    examples = examples_of(
        tmp_path, document(("a b  c d", [qa("x", "a b  c d", "a", question="q")])), v2
    )
    features = build_features(examples, tokenizer, training=False, **SIZES)
    assert len(features) == 1 and features[0]["context_start"] == 3
    return examples, features


def logits(**at):
    array = np.zeros(16, np.float32)  # longer than the feature, as in a padded batch
    for position, value in at.items():
        array[int(position[1:])] = value
    return [array]


def test_postprocess_by_hand_v1(tmp_path, tokenizer):
    examples, features = one_feature(tmp_path, tokenizer)
    # Outside the context, all these would win.
    start = logits(p0=90, p1=90, p7=90, p12=90, p4=5, p5=3)
    end = logits(p0=90, p1=90, p7=90, p12=90, p5=4, p3=6, p4=1)
    predictions, nbest, odds = search(examples, features, start, end, n=2)
    # Best starts b, c; best ends a, c. (b, a) and (c, a) run backwards.
    assert predictions == {"x": "b  c"} and odds == {}
    weights = np.exp([0.0, -2.0])
    assert [(e["text"], e["start_logit"], e["end_logit"]) for e in nbest["x"]] == [
        ("b  c", 5, 4),
        ("c", 3, 4),
    ]
    assert [e["probability"] for e in nbest["x"]] == pytest.approx(weights / weights.sum())
    json.dumps([predictions, nbest])
    assert search(examples, features, start, end, n=2, length=1)[0] == {"x": "c"}


def test_postprocess_ties_and_repeats(tmp_path, tokenizer):
    examples, features = one_feature(tmp_path, tokenizer)
    _, nbest, _ = search(examples, features, logits(), logits(), n=2)
    assert [e["text"] for e in nbest["x"]] == ["a", "a b"]
    assert [e["probability"] for e in nbest["x"]] == [0.5, 0.5]
    start, end = (
        logits(p3=2000, p4=2001),
        logits(p3=2001, p4=2000),
    )  # "a" and "b" tie, and exp overflows
    _, nbest, _ = search(examples, features, start, end, n=2)
    assert [(e["text"], e["probability"]) for e in nbest["x"]] == [("a", 0.5), ("b", 0.5)]
    same = examples_of(tmp_path, document(("a a a", [qa("x", "a a a", "a", question="q")])))
    _, nbest, _ = search(
        same, build_features(same, tokenizer, training=False, **SIZES), logits(p4=2), logits(p4=2)
    )
    assert [e["text"] for e in nbest["x"]] == ["a", "a a", "a a a"]
    assert nbest["x"][0]["start_logit"] == 2


def test_postprocess_without_a_valid_span(tmp_path, tokenizer):
    start, end = logits(p0=1, p6=9), logits(p0=2, p3=9)  # start after the end
    examples, features = one_feature(tmp_path, tokenizer)
    predictions, nbest, odds = search(examples, features, start, end, n=1)
    assert predictions == {"x": ""} and odds == {}
    assert nbest == {"x": [{"text": "", "probability": 1.0, "start_logit": 0.0, "end_logit": 0.0}]}
    predictions, nbest, odds = search(examples, features, start, end, n=1, v2=True, threshold=1e9)
    assert predictions == {"x": ""} and odds == {"x": NO_SPAN_ODDS}
    assert nbest == {"x": [{"text": "", "probability": 1.0, "start_logit": 1.0, "end_logit": 2.0}]}


def test_postprocess_by_hand_v2(tmp_path, tokenizer):
    examples, features = one_feature(tmp_path, tokenizer, v2=True)
    start, end = logits(p0=4, p3=5, p4=1), logits(p0=4, p3=2, p4=1)  # null 8, "a" 7, "a b" 6, "b" 2
    predictions, nbest, odds = search(examples, features, start, end, n=3, v2=True)
    assert predictions == {"x": ""} and odds == {"x": 1.0}
    assert [e["text"] for e in nbest["x"]] == ["", "a", "a b"]  # null takes one of the three places
    weights = np.exp([0.0, -1.0, -2.0])
    assert [e["probability"] for e in nbest["x"]] == pytest.approx(weights / weights.sum())
    assert (nbest["x"][0]["start_logit"], nbest["x"][0]["end_logit"]) == (4, 4)
    assert search(examples, features, start, end, v2=True, threshold=1.0)[0] == {
        "x": "a"
    }  # not above
    assert search(examples, features, start, end, v2=True, threshold=0.5)[0] == {"x": ""}
    low = logits(p0=-9, p3=5)
    predictions, nbest, odds = search(examples, features, low, end, n=2, v2=True)
    assert predictions == {"x": "a"} and odds == {"x": -12.0}
    assert [e["text"] for e in nbest["x"]] == ["a", "a b", ""]  # null is listed in addition


def test_postprocess_takes_the_lowest_null_score_of_the_windows(tmp_path, tokenizer):
    examples = examples_of(tmp_path, document((CONTEXT, [qa("x", CONTEXT, "France")])), True)
    features = build_features(examples, tokenizer, training=False, **SIZES)
    assert len(features) > 2
    start = [np.full(24, -50, np.float32) for _ in range(len(features))]
    end = [array.copy() for array in start]
    for n, array in enumerate(start):
        array[0] = [7, 2, 5][n % 3]
    _, nbest, odds = search(examples, features, start, end, v2=True)
    assert odds == {"x": 2 - 50 - (-100)}
    assert (nbest["x"][0]["text"], nbest["x"][0]["start_logit"]) == ("", 2)


def test_postprocess_equals_a_naive_search(tmp_path, tokenizer):
    examples = examples_of(tmp_path, good(), True)
    features = build_features(examples, tokenizer, training=False, **SIZES)
    rng = np.random.default_rng(0)
    start, end = (
        [rng.normal(0, 3, 24).astype(np.float32) for _ in range(len(features))] for _ in range(2)
    )
    naive = functools.partial(search, examples, features, start, end, n=4, length=5, v2=True)
    threshold = float(np.median(list(naive()[2].values())))
    predictions, nbest, odds = naive(threshold=threshold)
    assert list(predictions.values()).count("") == 3
    for row, example in enumerate(examples):
        found, null = [], np.inf
        for s, e, f in zip(start, end, features):
            if f["example_index"] != row:
                continue
            null = min(null, float(s[0]) + float(e[0]))
            first, n = f["context_start"], len(f["max_context"])
            starts = sorted(range(n), key=lambda k: -s[first + k])[:4]
            ends = sorted(range(n), key=lambda k: -e[first + k])[:4]
            for i in starts:
                for j in ends:
                    if i <= j < i + 5 and f["max_context"][i]:
                        text = example["context"][f["offsets"][2 * i] : f["offsets"][2 * j + 1]]
                        found.append((float(s[first + i]) + float(e[first + j]), text))
        best = dict.fromkeys(text for _, text in sorted(found, key=lambda item: -item[0]))
        assert odds[example["id"]] == pytest.approx(null - max(found)[0])
        assert predictions[example["id"]] == (
            "" if null - max(found)[0] > threshold else next(iter(best))
        )
        (empty,) = [entry for entry in nbest[example["id"]] if not entry["text"]]
        assert empty["start_logit"] + empty["end_logit"] == null
        listed = [entry["text"] for entry in nbest[example["id"]] if entry["text"]]
        assert listed == list(best)[: len(listed)] and len(listed) >= min(3, len(best))


def test_perfect_logits_give_the_answers(tmp_path, tokenizer):
    """Through the windows and back: the longest way an offset can go wrong."""
    questions = [qa(str(n), UNICODE, text) for n, text in enumerate(ANSWERS)]
    examples = examples_of(tmp_path, document((UNICODE, questions)))
    sizes = {**SIZES, "max_seq_length": 32}
    training = build_features(examples, tokenizer, training=True, **sizes)
    evaluation = build_features(examples, tokenizer, training=False, **sizes)
    start, end = ([np.zeros(32, np.float32) for _ in training] for _ in range(2))
    for n, feature in enumerate(training):
        start[n][feature["start_position"]] = end[n][feature["end_position"]] = 9
    predictions, _, _ = search(examples, evaluation, start, end, n=5)
    assert list(predictions.values()) == ANSWERS
    assert squad_metrics(examples, predictions, version_2_with_negative=False)["exact"] == 100.0


# ----------------------------------------------------------------------------------------- metrics


def gold_examples(tmp_path, golds, v2=False):
    """One question per list of gold answers; no answers make it unanswerable in v2."""
    questions = [
        {
            "id": str(n),
            "question": "q",
            "answers": [{"text": text, "answer_start": 0} for text in texts],
            "is_impossible": v2 and not texts,
        }
        for n, texts in enumerate(golds)
    ]
    return examples_of(tmp_path, document(("c", questions)), v2)


@pytest.mark.parametrize(
    "gold, prediction, exact, f1",
    [
        (["the Cat"], "A cat!", 1, 1),
        (["theatre"], "theatre a", 1, 1),
        (["big black cat"], "black cat", 0, 0.8),
        (["dog dog cat"], "dog dog dog", 0, 2 / 3),
        (["x y", "black cat", "black"], "black cat sat", 0, 0.8),
        (["U.S."], "US", 1, 1),
        (["well-known"], "well known", 0, 0),
        (["cat"], "", 0, 0),
        (["the"], "a", 1, 0),
        (["the", "cat"], "cat", 1, 1),
    ],
)
def test_v1_metrics_by_hand(tmp_path, gold, prediction, exact, f1):
    examples = gold_examples(tmp_path, [gold])
    metrics = squad_metrics(examples, {"0": prediction}, version_2_with_negative=False)
    assert metrics == {"exact": 100 * exact, "f1": pytest.approx(100 * f1), "total": 1}


def test_v1_averages_and_counts_missing_predictions_as_wrong(tmp_path):
    examples = gold_examples(tmp_path, [["cat"], ["dog"], ["black dog"], [""]])
    metrics = squad_metrics(examples, {"0": "cat", "2": "dog"}, version_2_with_negative=False)
    assert metrics == {"exact": 25.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 4), "total": 4}


def test_v1_questions_without_answer_are_not_scored(tmp_path, caplog):
    examples = gold_examples(tmp_path, [["cat"], [], ["dog"]])
    predictions = {"0": "cat", "1": "x", "2": "x"}
    metrics = squad_metrics(examples, predictions, version_2_with_negative=False)
    assert metrics == {"exact": 50.0, "f1": 50.0, "total": 2}
    assert "1 questions have no answer and are not scored" in caplog.text


@pytest.mark.parametrize(
    "gold, prediction, exact, f1",
    [
        ([], "", 1, 1),
        ([], "cat", 0, 0),
        ([], "the", 1, 1),
        (["cat"], "", 0, 0),
        (["the"], "a", 1, 1),
        (["the", "cat"], "", 0, 0),  # "the" is no gold answer: it normalises to nothing
        (["big black cat"], "black cat", 0, 0.8),
    ],
)
def test_v2_metrics_by_hand(tmp_path, gold, prediction, exact, f1):
    examples = gold_examples(tmp_path, [gold], v2=True)
    metrics = squad_metrics(examples, {"0": prediction}, version_2_with_negative=True)
    prefix = "HasAns" if gold else "NoAns"
    numbers = {"exact": 100 * exact, "f1": pytest.approx(100 * f1), "total": 1}
    assert metrics == {**numbers, **{f"{prefix}_{name}": value for name, value in numbers.items()}}


def test_v2_groups_and_best_thresholds_by_hand(tmp_path):
    examples = gold_examples(tmp_path, [["black cat"], [], ["dog"], [], ["cow"]], v2=True)
    predictions = {"0": "cat", "1": "x", "2": "dog", "3": "", "4": "ox"}
    null_odds = {"0": -3.0, "1": 2.0, "2": -1.0, "3": 0.5, "4": 9.0}
    f1 = 2 / 3
    metrics = squad_metrics(examples, predictions, null_odds, version_2_with_negative=True)
    assert metrics == pytest.approx(
        {
            "exact": 40.0,
            "f1": 20 * (2 + f1),
            "total": 5,
            "HasAns_exact": 100 / 3,
            "HasAns_f1": 100 * (1 + f1) / 3,
            "HasAns_total": 3,
            "NoAns_exact": 50.0,
            "NoAns_f1": 50.0,
            "NoAns_total": 2,
            # All null: 2 right. Up to -1 "dog" (for F1 also "cat") is won; from 2 on "x" is lost.
            "best_exact": 60.0,
            "best_exact_thresh": -1.0,
            "best_f1": 20 * (3 + f1),
            "best_f1_thresh": -1.0,
        }
    )


def test_best_threshold_is_zero_when_no_prediction_helps(tmp_path):
    examples = gold_examples(tmp_path, [[]], v2=True)
    metrics = squad_metrics(examples, {"0": "x"}, {"0": -1.0}, version_2_with_negative=True)
    assert (metrics["best_exact"], metrics["best_exact_thresh"]) == (100.0, 0.0)


def test_best_thresholds_equal_trying_them_all(tmp_path):
    rng = np.random.default_rng(1)
    pool = ["cat", "black cat", "a black dog", "dog cat", ""]
    golds = [[] if rng.random() < 0.2 else [str(rng.choice(pool[:4]))] for _ in range(60)]
    examples = gold_examples(tmp_path, golds, v2=True)
    predictions = {str(n): str(rng.choice(pool)) for n in range(60)}
    null_odds = {str(n): float(rng.normal(0 if gold else 2)) for n, gold in enumerate(golds)}
    metrics = squad_metrics(examples, predictions, null_odds, version_2_with_negative=True)

    def score(name, threshold):
        cut = {
            id_: text if null_odds[id_] <= threshold else "" for id_, text in predictions.items()
        }
        return squad_metrics(examples, cut, version_2_with_negative=True)[name]

    for name in ("exact", "f1"):
        tried = {threshold: score(name, threshold) for threshold in [-1e9, *null_odds.values()]}
        assert metrics[f"best_{name}"] == pytest.approx(max(tried.values()))
        assert tried[metrics[f"best_{name}_thresh"]] == pytest.approx(max(tried.values()))
        assert metrics[f"best_{name}"] > metrics[name]


def official_f1(gold, prediction):
    """F1 by counting, independent of the module."""
    gold, prediction = gold.split(), prediction.split()
    shared = sum(min(gold.count(word), prediction.count(word)) for word in set(gold))
    return 0.0 if not shared else 2 * shared / (len(gold) + len(prediction))


def test_f1_equals_an_independent_one_on_random_words(tmp_path):
    rng = np.random.default_rng(2)
    texts = [" ".join(rng.choice(list("uvwxyz"), rng.integers(1, 7))) for _ in range(200)]
    golds, given = [texts[n : n + 2] for n in range(0, 200, 4)], texts[2::4]
    predictions = {str(n): text for n, text in enumerate(given)}
    wanted = 100 * np.mean([max(official_f1(g, p) for g in gold) for gold, p in zip(golds, given)])
    for v2 in (False, True):
        metrics = squad_metrics(
            gold_examples(tmp_path, golds, v2), predictions, version_2_with_negative=v2
        )
        assert metrics["f1"] == pytest.approx(wanted)
