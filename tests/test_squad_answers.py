"""SQuAD answers: the n-best search over logits, and the way back to the text."""

import functools
import json

import numpy as np
import pytest
import tiny
from tiny import CONTEXT, UNICODE, document, examples_of, features_of, good_document, qa

from emmental.data.metrics import squad_metrics
from emmental.data.squad_answers import NO_SPAN_ODDS, postprocess

pytestmark = pytest.mark.usefixtures("cache")
SPACED = " ada  lives\n\tin\u00a0oslo 😀 "


def search(examples, features, start, end, n=20, length=30, v2=False, threshold=0.0):
    options = {"n_best_size": n, "max_answer_length": length, "version_2_with_negative": v2}
    options["null_score_diff_threshold"] = threshold
    return postprocess(examples, features, start, end, **options)


def one_feature(tmp_path, tokenizer, v2=False):
    """[CLS] q [SEP] a b c d [SEP]: the context starts at 3."""
    content = document(("a b  c d", [qa("x", "a b  c d", "a", question="q")]))
    examples = examples_of(tmp_path, content, v2)
    features = features_of(examples, tokenizer)
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
    found = [(e["text"], e["start_logit"], e["end_logit"]) for e in nbest["x"]]
    assert found == [("b  c", 5, 4), ("c", 3, 4)]
    assert [e["probability"] for e in nbest["x"]] == pytest.approx(weights / weights.sum())
    json.dumps([predictions, nbest])
    assert search(examples, features, start, end, n=2, length=1)[0] == {"x": "c"}


def test_postprocess_ties_and_repeats(tmp_path, tokenizer):
    examples, features = one_feature(tmp_path, tokenizer)
    _, nbest, _ = search(examples, features, logits(), logits(), n=2)
    assert [e["text"] for e in nbest["x"]] == ["a", "a b"]
    assert [e["probability"] for e in nbest["x"]] == [0.5, 0.5]
    # "a" and "b" tie, and exp overflows.
    start, end = logits(p3=2000, p4=2001), logits(p3=2001, p4=2000)
    _, nbest, _ = search(examples, features, start, end, n=2)
    assert [(e["text"], e["probability"]) for e in nbest["x"]] == [("a", 0.5), ("b", 0.5)]
    same = examples_of(tmp_path, document(("a a a", [qa("x", "a a a", "a", question="q")])))
    _, nbest, _ = search(same, features_of(same, tokenizer), logits(p4=2), logits(p4=2))
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
    for threshold, text in (1.0, "a"), (0.5, ""):  # null must be above
        assert search(examples, features, start, end, v2=True, threshold=threshold)[0]["x"] == text
    low = logits(p0=-9, p3=5)
    predictions, nbest, odds = search(examples, features, low, end, n=2, v2=True)
    assert predictions == {"x": "a"} and odds == {"x": -12.0}
    assert [e["text"] for e in nbest["x"]] == ["a", "a b", ""]  # null is listed in addition


def test_postprocess_takes_the_lowest_null_score_of_the_windows(tmp_path, tokenizer):
    examples = examples_of(tmp_path, document((CONTEXT, [qa("x", CONTEXT, "France")])), True)
    features = features_of(examples, tokenizer)
    assert len(features) > 2
    start = [np.full(24, -50, np.float32) for _ in range(len(features))]
    end = [array.copy() for array in start]
    for n, array in enumerate(start):
        array[0] = [7, 2, 5][n % 3]
    _, nbest, odds = search(examples, features, start, end, v2=True)
    assert odds == {"x": 2 - 50 - (-100)}
    assert (nbest["x"][0]["text"], nbest["x"][0]["start_logit"]) == ("", 2)


def test_postprocess_equals_a_naive_search(tmp_path, tokenizer):
    examples = examples_of(tmp_path, good_document(), True)
    features = features_of(examples, tokenizer)
    rng = np.random.default_rng(0)
    start, end = rng.normal(0, 3, (2, len(features), 24)).astype(np.float32)
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
        wanted = "" if null - max(found)[0] > threshold else next(iter(best))
        assert predictions[example["id"]] == wanted
        (empty,) = [entry for entry in nbest[example["id"]] if not entry["text"]]
        assert empty["start_logit"] + empty["end_logit"] == null
        listed = [entry["text"] for entry in nbest[example["id"]] if entry["text"]]
        assert listed == list(best)[: len(listed)] and len(listed) >= min(3, len(best))


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_white_space_is_no_part_of_an_answer(tmp_path, kind):
    answers = ["ada", "lives", "in", "oslo", "😀", "ada  lives", "  lives\n", "oslo 😀 "]
    questions = [qa(text, SPACED, text) for text in answers]
    examples = examples_of(tmp_path, document((SPACED, questions)))
    sizes = {"max_seq_length": 60, "doc_stride": 8, "max_query_length": 6}
    training, evaluation = (
        features_of(examples, tiny.tokenizer_of(kind), training, **sizes)
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


def test_context_without_tokens_still_has_a_feature(tmp_path, tokenizer):
    examples = examples_of(tmp_path, document(("", [qa("a", "")]), (" ", [qa("b", " ")])))
    features = features_of(examples, tokenizer)
    assert list(features["example_index"]) == [0, 1]
    first = features[0]
    assert first["input_ids"][-2:] == [tokenizer.sep_token_id] * 2 and first["offsets"] == []
    predictions, nbest, _ = search(examples, features, [np.zeros(24)] * 2, [np.zeros(24)] * 2)
    assert predictions == {"a": "", "b": ""}


def test_perfect_logits_give_the_answers(tmp_path, tokenizer):
    """Through the windows and back: the longest way an offset can go wrong."""
    questions = [qa(str(n), UNICODE, text) for n, text in enumerate(tiny.ANSWERS)]
    examples = examples_of(tmp_path, document((UNICODE, questions)))
    training = features_of(examples, tokenizer, True, max_seq_length=32)
    evaluation = features_of(examples, tokenizer, max_seq_length=32)
    start, end = np.zeros((2, len(training), 32), np.float32)
    for n, feature in enumerate(training):
        start[n][feature["start_position"]] = end[n][feature["end_position"]] = 9
    predictions, _, _ = search(examples, evaluation, start, end, n=5)
    assert list(predictions.values()) == tiny.ANSWERS
    assert squad_metrics(examples, predictions, version_2_with_negative=False)["exact"] == 100.0
