"""GLUE features are those of the stock tokenizer, and are padded to the longest of a batch."""

import pytest
import torch
from datasets import Dataset, Features, Value
from tiny import TOKENIZERS, tokenizer_of

from emmental.data.glue import build_features, collate
from emmental.system.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")
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


def make_examples(pair=True, labels=None):
    rows = {"index": list(range(len(TEXTS))), "text_a": [a for a, _ in TEXTS]}
    rows["text_b"] = [b if pair else None for _, b in TEXTS]
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
    pairs = zip(stock["input_ids"], stock["token_type_ids"], strict=True)
    for row, (ids, types) in enumerate(pairs):
        assert features[row]["input_ids"] == ids
        assert features[row]["length"] == len(ids) <= max_seq_length
        assert batch["token_type_ids"][row, : len(ids)].tolist() == types
        assert features[row]["second_start"] == (types.index(1) if any(types) else len(ids))
        assert any(types) == (pair and kind not in ONE_TYPE)


@pytest.mark.parametrize("labels, kind", [
    (list(range(len(TEXTS))), "int64"),
    ([n / 4 for n in range(len(TEXTS))], "float64"),
])  # fmt: skip
def test_features_hold_the_label(tiny_tokenizer, labels, kind):
    features = build_features(make_examples(labels=labels), tiny_tokenizer, max_seq_length=16)
    assert list(features["label"]) == labels and features.features["label"] == Value(kind)


def test_collate_pads_to_the_longest():
    rows = [
        {"input_ids": [2, 9, 3], "second_start": 3, "label": 1},
        {"input_ids": [2, 9, 9, 3, 8, 3], "second_start": 4, "label": 0},
    ]
    batch = collate(rows, pad_token_id=7)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 9, 3, 7, 7, 7, 7, 7], [2, 9, 9, 3, 8, 3, 7, 7]],
        "attention_mask": [[1] * 3 + [0] * 5, [1] * 6 + [0] * 2],
        "token_type_ids": [[0] * 8, [0, 0, 0, 0, 1, 1, 0, 0]],
        "labels": [1, 0],
    }
    assert collate(rows, 0, multiple_of=1)["input_ids"].shape == (2, 6)
    assert collate([row | {"label": 2.5} for row in rows], 0)["labels"].dtype == torch.float32
    for row in rows:
        del row["label"]
    assert "labels" not in collate(rows, 0)


@pytest.mark.parametrize("pair, least", [(True, 5), (False, 3)])
def test_texts_need_some_room(tiny_tokenizer, pair, least):
    build_features(make_examples(pair), tiny_tokenizer, max_seq_length=least)
    said = f"--max_seq_length is {least - 1}, but must be at least {least}"
    with pytest.raises(UserError, match=said):
        build_features(make_examples(pair), tiny_tokenizer, max_seq_length=least - 1)
