"""Features of tagged words: each counts once, at its first piece, where it has most context."""

import random

import numpy as np
import pytest
import tiny
from datasets import Dataset
from tiny import TOKENIZERS, refusal, tokenizer_of

from emmental.checkpoints.tokenizer import put_spaces_before_words
from emmental.data import tags

LABELS = ("O", "name")


def build(sentences, tokenizer, labels=LABELS, max_seq_length=32, stride=8, **columns):
    examples = Dataset.from_dict({"words": sentences, **columns})
    sizes = {"max_seq_length": max_seq_length, "stride": stride}
    return examples, tags.build_features(examples, tokenizer, labels, **sizes)


def spaced(model_type):
    tokenizer = tokenizer_of(model_type)
    put_spaces_before_words(tokenizer)
    return tokenizer


@pytest.mark.parametrize("model_type", TOKENIZERS)
def test_features_are_those_of_the_stock_tokenizer(model_type):
    """With a tag at the first piece of each word, of which some have several."""
    tokenizer = spaced(model_type)
    sentences = [["ada", "lives", "in", "oslo", "."], ["ben", "adaoslo", "x,y", "Where"], ["is"]]
    named = [[LABELS[word[0] in "ab"] for word in words] for words in sentences]
    _, features = build(sentences, tokenizer, tags=named)
    for words, row, feature in zip(sentences, named, features, strict=True):
        stock = tokenizer(words, is_split_into_words=True)
        assert feature["input_ids"] == stock.input_ids
        assert feature["length"] == len(stock.input_ids)
        before, expected = None, []
        for word in stock.word_ids():
            is_first = word is not None and word != before
            expected.append(LABELS.index(row[word]) if is_first else tags.IGNORED)
            before = word
        assert feature["tags"] == expected
        texts = tokenizer(" ".join(words)).input_ids
        assert "," in "".join(words) or feature["input_ids"] == texts  # read as in a text


@pytest.mark.parametrize("stride", [1, 5, 8, 1000])
def test_every_word_counts_once_where_it_has_the_most_context(stride, tokenizer):
    rng = random.Random(stride)
    room, words = 12, [rng.choice(["name", "france", "abcdefgh", "xy", "a"]) for _ in range(60)]
    examples, features = build([words], tokenizer, max_seq_length=room + 2, stride=stride)
    pieces = [tokenizer.tokenize(word) for word in words]
    ids = tokenizer.convert_tokens_to_ids([piece for word in pieces for piece in word])
    begins = range(0, len(ids) - room + min(stride, room), min(stride, room))
    windows = [(begin, min(begin + room, len(ids))) for begin in begins]
    expected = []
    for first in np.cumsum([0, *map(len, pieces)])[:-1]:
        context = max(min(first - a, b - 1 - first) for a, b in windows if a <= first < b)
        expected.append((ids[first], context))
    found = []
    for feature in features:
        assert feature["length"] == len(feature["input_ids"]) <= room + 2
        for place, mark in enumerate(feature["tags"]):
            if mark != tags.IGNORED:
                context = min(place - 1, feature["length"] - 2 - place)
                found.append((feature["input_ids"][place], context))
    assert found == expected
    tag = {id_: str(id_ % 3) for id_ in ids}  # as the model sees a word, wherever it stands
    logits = [np.eye(3)[np.array(row) % 3] for row in features["input_ids"]]
    predicted = tags.predicted_tags(examples, features, logits, ("0", "1", "2"))
    assert predicted == [[tag[ids[first]] for first in np.cumsum([0, *map(len, pieces)])[:-1]]]


def test_windows_without_a_word_are_left_out(tokenizer):
    """The rest of a word that is longer than two windows: a loss would have nothing to average."""
    _, features = build([["abcdefghijklmnop" * 4, "name"]], tokenizer, max_seq_length=12, stride=5)
    counts = [sum(mark >= 0 for mark in row) for row in features["tags"]]
    assert counts == [1, 1]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "albert", "modernbert"])
def test_words_without_pieces_are_unknown_tokens(model_type):
    tokenizer = spaced(model_type)
    sentences = [["ada", "", "oslo"], [""], ["\u200b", "\x00", "ada"]]
    examples, features = build(sentences, tokenizer)
    assert tokenizer.unk_token_id == features["input_ids"][1][1]
    logits = [np.array([[0, 1]] * length) for length in features["length"]]
    predicted = tags.predicted_tags(examples, features, logits, LABELS)
    assert predicted == [["name"] * 3, ["name"], ["name"] * 3]


def test_predictions_are_columns_that_can_be_read_again(tmp_path, cache):
    examples = Dataset.from_dict({"words": [["a\tb", "", "漢"], ["x"]], "line": [1, 2]})
    predicted = [["O", "B-x", "O"], ["O"]]
    text = tags.columns_of(examples, predicted)
    assert text == "a b\tO\n\tB-x\n漢\tO\n\nx\tO\n\n"
    path = tiny.write(tmp_path / "train.conll", text)
    again = tags.read_examples(path, (None, None), False, None)
    assert list(again["tags"]) == predicted
    with_tags = examples.add_column("tags", predicted)
    assert tags.columns_of(with_tags, predicted).splitlines()[0] == "a b\tO\tO"


def test_there_must_be_room_for_a_word(tokenizer):
    said = refusal(build, [["name"]], tokenizer, max_seq_length=2)
    assert said == "--max_seq_length is 2, but must be at least 3"
