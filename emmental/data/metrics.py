"""The metrics of SQuAD and GLUE."""

import collections
import logging
import re
import string
from collections.abc import Callable

import numpy as np
from datasets import Dataset
from scipy.special import entr, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from emmental.data.features import row_tuples
from emmental.data.glue_tasks import Task

logger = logging.getLogger(__name__)


def squad_metrics(
    examples: Dataset,
    predictions: dict[str, str],
    null_odds: dict[str, float] | None = None,
    *,
    version_2_with_negative: bool,
) -> dict[str, float]:
    """Exact match and F1 in percent, as by the official evaluate-v1.1.py or evaluate-v2.0.py.

    Keys: exact, f1, total; for v2.0 also HasAns_* and NoAns_* (if there are such questions) and,
    with `null_odds`, best_exact, best_exact_thresh, best_f1, best_f1_thresh: the best scores that
    another threshold on the null odds would give. A question without a prediction counts as wrong.
    """
    exact, f1, has_answer = {}, {}, {}
    for id_, answers in row_tuples(examples, ["id", "answers"]):
        golds = [_words(text) for text in answers["text"]]
        has_answer[id_] = bool(golds)
        if version_2_with_negative:
            golds = [gold for gold in golds if gold] or [[]]
        if id_ not in predictions:
            golds = []
        words = _words(predictions.get(id_, ""))
        exact[id_] = max((float(words == gold) for gold in golds), default=0.0)
        f1[id_] = max((_f1(words, gold, version_2_with_negative) for gold in golds), default=0.0)

    def averages(prefix: str, ids: list[str]) -> dict[str, float]:
        sums = [sum(scores[id_] for id_ in ids) for scores in (exact, f1)]
        means = [100.0 * total / len(ids) for total in sums]
        return dict(zip((f"{prefix}exact", f"{prefix}f1", f"{prefix}total"), (*means, len(ids))))

    metrics = averages("", list(exact))
    if version_2_with_negative:
        for prefix, answered in ("HasAns_", True), ("NoAns_", False):
            if ids := [id_ for id_ in exact if has_answer[id_] is answered]:
                metrics |= averages(prefix, ids)
    if version_2_with_negative and null_odds is not None:
        for name, scores in ("exact", exact), ("f1", f1):
            best, threshold = _best_threshold(scores, predictions, null_odds, has_answer)
            metrics |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return metrics


def _words(text):
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction, gold, version_2_with_negative):
    if version_2_with_negative and not (prediction and gold):
        return float(prediction == gold)
    shared = (collections.Counter(prediction) & collections.Counter(gold)).total()
    # In the order of the official script, so that rounding is the same.
    precision, recall = shared / max(len(prediction), 1), shared / max(len(gold), 1)
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def _best_threshold(scores, predictions, null_odds, has_answer):
    """Try each of the null odds: up to the threshold the prediction counts, above it no answer."""
    current = best = sum(not answered for answered in has_answer.values())
    threshold = 0.0
    for id_ in sorted((id_ for id_ in null_odds if id_ in scores), key=null_odds.get):
        if has_answer[id_]:
            current += scores[id_]
        elif predictions.get(id_):
            current -= 1
        if current > best:
            best, threshold = current, null_odds[id_]
    return 100.0 * best / len(scores), threshold


def glue_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of `task.metrics`: fractions of 1, correlations from -1 to 1.

    logits: (examples, labels of the task), or for a regression (examples, 1) or (examples,).
    labels: (examples,). F1 is that of the second label. Undefined correlations count as 0.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if task.is_regression:
        scores = logits.reshape(len(labels))
        pearson, spearman = (_correlation(f, scores, labels) for f in (pearsonr, spearmanr))
        return {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}
    predictions = logits.argmax(axis=1)
    if task.key_metric == "mcc":
        return {"mcc": float(matthews_corrcoef(labels, predictions))}
    metrics = {"acc": float(accuracy_score(labels, predictions))}
    if "f1" in task.metrics:
        metrics["f1"] = float(f1_score(labels, predictions, zero_division=0.0))
        metrics["acc_and_f1"] = (metrics["acc"] + metrics["f1"]) / 2
    return metrics


def _correlation(correlate: Callable, scores: np.ndarray, labels: np.ndarray) -> float:
    if all(0 < np.ptp(values) < np.inf for values in (scores, labels)):
        return float(correlate(scores, labels).statistic)
    logger.warning(
        f"{correlate.__name__} is undefined for equal predictions or labels; it counts as 0"
    )
    return 0.0


def mean_entropy(logits: np.ndarray) -> float:
    """Mean entropy in nats of the predictions with these logits: (examples, labels)."""
    return float(entr(softmax(np.asarray(logits, np.float64), axis=1)).sum(axis=1).mean())
