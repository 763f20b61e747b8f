"""SQuAD features: windows over the stock tokenizer's tokens, offsets and answer positions."""

import collections
import functools
import pickle
import re

import numpy as np
import pytest
import tiny
import torch
from tiny import CONTEXT, UNICODE, document, examples_of, features_of, good_document, qa
from tokenizers import processors

from emmental.data import squad_features
from emmental.data.squad_features import collate
from emmental.system.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")
KINDS = ("roberta", "modernbert", "xlm-roberta", "albert", "deberta-v2")  # and BERT's


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_features_are_the_pairs_of_the_stock_tokenizer(tmp_path, kind):
    tokenizer, examples = tiny.tokenizer_of(kind), examples_of(tmp_path, good_document())
    sizes = {"max_seq_length": 300, "doc_stride": 5, "max_query_length": 64}
    features = features_of(examples, tokenizer, **sizes)
    for feature, example in zip(features, examples, strict=True):
        stock = tokenizer(example["question"], example["context"])
        assert feature["input_ids"] == stock["input_ids"]
        assert feature["context_start"] == stock.sequence_ids().index(1)
        assert len(feature["max_context"]) == stock.sequence_ids().count(1)
    before, after = stock.sequence_ids().index(0), stock.sequence_ids()[::-1].index(1)
    short = features_of(examples, tokenizer, **(sizes | {"max_seq_length": 60}))
    assert max(short["length"]) == 60  # all that the frame leaves is for the context
    for feature in short:
        whole = features[feature["example_index"]]["input_ids"]
        assert feature["input_ids"][:before] == whole[:before]
        assert feature["input_ids"][-after:] == whole[-after:]
        context = feature["input_ids"][feature["context_start"] : -after]
        assert len(context) == len(feature["max_context"])


def test_a_space_that_the_tokenizer_adds_inside_a_text(tmp_path):
    context = "ada</s>漢字"  # of the space before the first of the bytes, it says that it is behind
    examples = examples_of(tmp_path, document((context, [qa("a", context, "漢")])))
    tokenizer = tiny.tokenizer_of("roberta", add_prefix_space=True)
    sizes = {"max_seq_length": 60, "doc_stride": 8, "max_query_length": 6}
    (labels,) = features_of(examples, tokenizer, True, **sizes)
    span = labels["input_ids"][labels["start_position"] : labels["end_position"] + 1]
    assert tokenizer.decode(span) == " 漢"


def context_tokens(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("doc_stride", [1, 5, 15, 400])
def test_windows_cover_every_token_as_bert_lays_them_out(tmp_path, tokenizer, doc_stride):
    examples = examples_of(tmp_path, good_document())
    features = features_of(examples, tokenizer, doc_stride=doc_stride)
    wanted, cls, sep = [], tokenizer.cls_token_id, tokenizer.sep_token_id
    for row, example in enumerate(examples):
        question = context_tokens(tokenizer, example["question"])[:6]
        context = context_tokens(tokenizer, example["context"])
        room, begin = 24 - 3 - len(question), 0
        while True:  # BERT's own loop
            length = min(room, len(context) - begin)
            ids = [cls, *question, sep, *context[begin : begin + length], sep]
            wanted.append((row, ids, 2 + len(question)))
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
    content = document((CONTEXT, [qa("a", CONTEXT)]), (long, [qa("b", long)]))
    examples = examples_of(tmp_path, content)
    sizes = {"max_seq_length": max_seq_length, "doc_stride": doc_stride, "max_query_length": 6}
    features = features_of(examples, tokenizer, **sizes)
    for row, example in enumerate(examples):
        windows = [f["max_context"] for f in features if f["example_index"] == row]
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
    examples = examples_of(tmp_path, good_document())
    whole = features_of(examples, tokenizer, max_seq_length=300)
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
    assert squad_features._spans([(0, 1), (1, 2), (2, 3)], "e\u0301x").tolist() == [
        [0, 1],
        [1, 2],
        [2, 3],
    ]


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_answer_positions_read_back_to_the_exact_text(tmp_path, tokenizer, kind):
    tokenizer, size = (tiny.tokenizer_of(kind), 36) if kind else (tokenizer, 24)
    questions = [qa(str(n), UNICODE, text) for n, text in enumerate(tiny.ANSWERS)]
    examples = examples_of(tmp_path, document((UNICODE, questions)))
    sizes = {"doc_stride": 8, "max_seq_length": size}
    training = features_of(examples, tokenizer, True, **sizes)
    evaluation = features_of(examples, tokenizer, **sizes)
    assert list(training["input_ids"]) == list(evaluation["input_ids"])
    found, outside = collections.Counter(), 0
    for train, evaluate in zip(training, evaluation):
        answer = tiny.ANSWERS[train["example_index"]]
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
    assert set(found) == set(tiny.ANSWERS) and outside > 0


def test_only_the_first_answer_counts_and_none_is_cls(tmp_path, tokenizer):
    questions = [qa("a", CONTEXT, "people", "France"), qa("b", CONTEXT, is_impossible=True)]
    examples = examples_of(tmp_path, document((CONTEXT, questions)), True)
    a, b = features_of(examples, tokenizer, True, max_seq_length=200)
    assert tokenizer.decode(a["input_ids"][a["start_position"] : a["end_position"] + 1]) == "people"
    assert (b["start_position"], b["end_position"]) == (0, 0)


def test_refuses_a_tokenizer_without_special_tokens(tmp_path, tokenizer):
    examples = examples_of(tmp_path, good_document())
    unframed = tiny.letters_tokenizer()
    unframed.backend_tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(UserError, match=r"adds no \[CLS\] and \[SEP\]"):
        features_of(examples, unframed, True)


def test_refuses_impossible_sizes(tmp_path, tokenizer):
    examples = examples_of(tmp_path, good_document())
    said = "question 'a' has 6 tokens.*--max_seq_length 9.*--max_query_length"
    with pytest.raises(UserError, match=said):
        features_of(examples, tokenizer, True, max_seq_length=9)


def test_collate():
    short = {"input_ids": [2, 7, 3, 8, 3], "context_start": 3, "length": 5}
    long = {"input_ids": [2, 7, 3, 8, 9, 5, 3], "context_start": 3}
    for row, position in (short, 3), (long, 0):
        row |= {"start_position": position, "end_position": position}
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
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch["input_ids"].shape == (1, 8)
    assert collate([long], 0, multiple_of=1)["input_ids"].shape == (1, 7)
