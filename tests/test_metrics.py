"""The metrics of SQuAD and GLUE, by hand and against formulas written out."""

import json
import math

import numpy as np
import pytest
from tiny import document, examples_of

from emmental.data.glue_tasks import TASKS, custom_task
from emmental.data.metrics import glue_metrics, mean_entropy, squad_metrics

pytestmark = pytest.mark.usefixtures("cache")


# --- SQuAD ---


@pytest.fixture
def score(tmp_path):
    """The metrics of predictions for questions with these gold answers; [] has none, in v2."""

    def call(golds, *predicted, v2=False):
        asked = [
            {"id": str(n), "question": "q", "is_impossible": v2 and not texts}
            | {"answers": [{"text": text, "answer_start": 0} for text in texts]}
            for n, texts in enumerate(golds)
        ]
        examples = examples_of(tmp_path, document(("c", asked)), v2)
        return squad_metrics(examples, *predicted, version_2_with_negative=v2)

    return call


@pytest.mark.parametrize("v2, gold, prediction, exact, f1", [
    (False, ["the Cat"], "A cat!", 1, 1),
    (False, ["theatre"], "theatre a", 1, 1),
    (False, ["big black cat"], "black cat", 0, 0.8),
    (False, ["dog dog cat"], "dog dog dog", 0, 2 / 3),
    (False, ["x y", "black cat", "black"], "black cat sat", 0, 0.8),
    (False, ["U.S."], "US", 1, 1),
    (False, ["well-known"], "well known", 0, 0),
    (False, ["cat"], "", 0, 0),
    (False, ["the"], "a", 1, 0),
    (False, ["the", "cat"], "cat", 1, 1),
    (True, [], "", 1, 1),
    (True, [], "cat", 0, 0),
    (True, [], "the", 1, 1),
    (True, ["cat"], "", 0, 0),
    (True, ["the"], "a", 1, 1),
    (True, ["the", "cat"], "", 0, 0),  # "the" is no gold answer: it normalises to nothing
    (True, ["big black cat"], "black cat", 0, 0.8),
])  # fmt: skip
def test_one_answer_by_hand(score, v2, gold, prediction, exact, f1):
    numbers = {"exact": 100 * exact, "f1": pytest.approx(100 * f1), "total": 1}
    prefix = "HasAns" if gold else "NoAns"
    groups = {f"{prefix}_{name}": value for name, value in numbers.items()} if v2 else {}
    assert score([gold], {"0": prediction}, v2=v2) == numbers | groups


def test_v1_averages_and_counts_missing_predictions_as_wrong(score):
    metrics = score([["cat"], ["dog"], ["black dog"], [""]], {"0": "cat", "2": "dog"})
    assert metrics == {"exact": 25.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 4), "total": 4}


def test_v1_questions_without_answer_are_not_scored(score, caplog):
    metrics = score([["cat"], [], ["dog"]], {"0": "cat", "1": "x", "2": "x"})
    assert metrics == {"exact": 50.0, "f1": 50.0, "total": 2}
    assert "1 questions have no answer and are not scored" in caplog.text


def test_v2_groups_and_best_thresholds_by_hand(score):
    predictions = {"0": "cat", "1": "x", "2": "dog", "3": "", "4": "ox"}
    null_odds = {"0": -3.0, "1": 2.0, "2": -1.0, "3": 0.5, "4": 9.0}
    golds, f1 = [["black cat"], [], ["dog"], [], ["cow"]], 2 / 3
    wanted = {"exact": 40.0, "f1": 20 * (2 + f1), "total": 5}
    wanted |= {"HasAns_exact": 100 / 3, "HasAns_f1": 100 * (1 + f1) / 3, "HasAns_total": 3}
    wanted |= {"NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2}
    # All null: 2 right. Up to -1 "dog" (for F1 also "cat") is won; from 2 on "x" is lost.
    wanted |= {"best_exact": 60.0, "best_exact_thresh": -1.0}
    wanted |= {"best_f1": 20 * (3 + f1), "best_f1_thresh": -1.0}
    assert score(golds, predictions, null_odds, v2=True) == pytest.approx(wanted)


def test_best_threshold_is_zero_when_no_prediction_helps(score):
    metrics = score([[]], {"0": "x"}, {"0": -1.0}, v2=True)
    assert (metrics["best_exact"], metrics["best_exact_thresh"]) == (100.0, 0.0)


def test_best_thresholds_equal_trying_them_all(score):
    rng = np.random.default_rng(1)
    pool = ["cat", "black cat", "a black dog", "dog cat", ""]
    golds = [[] if rng.random() < 0.2 else [str(rng.choice(pool[:4]))] for _ in range(60)]
    predictions = {str(n): str(rng.choice(pool)) for n in range(60)}
    odds = {str(n): float(rng.normal(0 if gold else 2)) for n, gold in enumerate(golds)}
    metrics, tried = score(golds, predictions, odds, v2=True), {}
    for threshold in [-1e9, *odds.values()]:
        cut = {id_: text * (odds[id_] <= threshold) for id_, text in predictions.items()}
        tried[threshold] = score(golds, cut, v2=True)
    for name in ("exact", "f1"):
        best = max(each[name] for each in tried.values())
        assert metrics[f"best_{name}"] == pytest.approx(best)
        assert tried[metrics[f"best_{name}_thresh"]][name] == pytest.approx(best)
        assert metrics[f"best_{name}"] > metrics[name]


def plain_f1(gold, prediction):
    """F1 by counting, independent of the module."""
    gold, prediction = gold.split(), prediction.split()
    shared = sum(min(gold.count(word), prediction.count(word)) for word in set(gold))
    return 0.0 if not shared else 2 * shared / (len(gold) + len(prediction))


@pytest.mark.parametrize("v2", [False, True])
def test_f1_equals_an_independent_one_on_random_words(score, v2):
    rng = np.random.default_rng(2)
    texts = [" ".join(rng.choice(list("uvwxyz"), rng.integers(1, 7))) for _ in range(200)]
    golds, given = [texts[n : n + 2] for n in range(0, 200, 4)], texts[2::4]
    wanted = 100 * np.mean([max(plain_f1(g, p) for g in gold) for gold, p in zip(golds, given)])
    predictions = {str(n): text for n, text in enumerate(given)}
    assert score(golds, predictions, v2=v2)["f1"] == pytest.approx(wanted)


# --- GLUE ---


def random_classes(classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 200)
    logits = rng.normal(0, 1, (200, classes)).astype(np.float32)
    logits[np.arange(200), labels] += 0.7
    return logits, labels, logits.argmax(1)


@pytest.mark.parametrize("name", ["sst-2", "mnli", "mnli-mm", "qnli", "rte", "wnli", "ax", "own"])
def test_accuracy(name):
    task = custom_task("abcde") if name == "own" else TASKS[name]
    logits, labels, predictions = random_classes(len(task.labels))
    wanted = {"acc": pytest.approx((labels == predictions).mean())}
    assert glue_metrics(task, logits, labels) == wanted


def test_matthews_correlation():
    logits, labels, predictions = random_classes(2)
    counts = ((predictions == p) & (labels == y) for p, y in ((1, 1), (0, 0), (1, 0), (0, 1)))
    tp, tn, fp, fn = (int(found.sum()) for found in counts)
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue_metrics(TASKS["cola"], logits, labels) == {"mcc": pytest.approx(wanted)}
    mixed = np.eye(2)[[0, 1, 0, 1]]
    assert glue_metrics(TASKS["cola"], mixed, [0, 1, 1, 0]) == {"mcc": 0.0}


@pytest.mark.parametrize("label", [0, 1])
def test_the_matthews_correlation_of_one_predicted_class_is_0(label, caplog):
    """A collapsed model scores as badly as guessing; its run counts in a mean over seeds."""
    constant = np.eye(2)[[label] * 4]
    assert glue_metrics(TASKS["cola"], constant, [0, 1, 1, 1]) == {"mcc": 0.0}
    assert not caplog.records


CORRELATIONS = ("pearson (all ", "spearmanr (all ")


@pytest.mark.parametrize("name, logits, labels, said", [
    ("cola", np.eye(2)[[0, 1, 0]], [1, 1, 1], ["mcc (all labels are equal)"]),
    ("sts-b", [[2.0], [2.0], [2.0]], [1.0, 2.0, 3.0], CORRELATIONS),
    ("sts-b", [1.0, 2.0, 3.0], [4.0, 4.0, 4.0], CORRELATIONS),
    ("sts-b", [1.0], [4.0], CORRELATIONS),
    ("sts-b", [1.0, math.nan, 2.0], [1.0, 2.0, 3.0], CORRELATIONS),
])  # fmt: skip
def test_undefined_metrics_are_left_out(name, logits, labels, said, caplog):
    assert glue_metrics(TASKS[name], np.array(logits), labels) == {} and len(caplog.records) == 1
    assert f"undefined and left out: {said[0]}" in caplog.text and said[-1] in caplog.text


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_is_that_of_the_equivalent(name, caplog):
    logits, labels, predictions = random_classes(2, seed=3)
    labels[:50] = 1
    shared, ones = ((predictions == 1) & (labels == 1)).sum(), (predictions == 1).sum()
    acc, f1 = (labels == predictions).mean(), 2 * shared / (ones + (labels == 1).sum())
    wanted = {"acc": acc, "f1": f1, "acc_and_f1": (acc + f1) / 2}
    assert glue_metrics(TASKS[name], logits, labels) == pytest.approx(wanted)
    never, wanted = np.array([[1.0, 0.0]] * 3), {"acc": 2 / 3, "f1": 0.0, "acc_and_f1": 1 / 3}
    assert glue_metrics(TASKS[name], never, [0, 0, 1]) == pytest.approx(wanted)
    assert not caplog.records
    assert glue_metrics(TASKS[name], never, [0, 0, 0]) == {"acc": 1.0}
    assert "left out: f1 (no label and no prediction is positive)" in caplog.text


def ranks(values):
    """Average ranks, by counting."""
    return np.array([(values < x).sum() + ((values == x).sum() + 1) / 2 for x in values])


def correlation(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum())


def test_correlations():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 11, 100) / 2
    logits = (labels + rng.normal(0, 1, 100)).round(1).astype(np.float32)
    pearson = correlation(logits.astype(float), labels)
    spearman = correlation(ranks(logits), ranks(labels))
    wanted = {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}
    for task in (TASKS["sts-b"], custom_task(())):
        for shape in ((100,), (100, 1)):
            assert glue_metrics(task, logits.reshape(shape), labels) == pytest.approx(wanted)


@pytest.mark.parametrize("name", TASKS)
def test_metrics_are_plain_floats(name):
    task = TASKS[name]
    logits, labels, _ = random_classes(max(len(task.labels), 1))
    labels = labels / 2 + np.arange(200) % 3 if task.is_regression else labels
    metrics = glue_metrics(task, logits, labels)
    assert tuple(metrics) == task.metrics
    assert all(type(value) is float for value in metrics.values())
    json.dumps(metrics, allow_nan=False)


def test_mean_entropy():
    logits = np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [1000.0, 0.0, 0.0]], np.float32)
    p = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    assert mean_entropy(logits) == pytest.approx((math.log(3) - (p * np.log(p)).sum()) / 3)
    assert mean_entropy(logits[2:]) == 0.0 and type(mean_entropy(logits)) is float
