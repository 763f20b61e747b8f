"""The metrics of SQuAD and GLUE."""

import collections
import logging
import re
import string

import numpy as np
from datasets import Dataset
from scipy.special import entr, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from .cache import row_tuples
from .glue_tasks import Task

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
    Questions of v1.1 without an answer are not counted, with a warning.
    """
    exact, f1, has_answer = {}, {}, {}
    for id_, answers in row_tuples(examples, ["id", "answers"]):
        golds = [_words(text) for text in answers["text"]]
        has_answer[id_] = bool(golds)
        if not (golds or version_2_with_negative):
            continue
        if version_2_with_negative:
            golds = [gold for gold in golds if gold] or [[]]
        if id_ not in predictions:
            golds = []
        words = _words(predictions.get(id_, ""))
        exact[id_] = max((float(words == gold) for gold in golds), default=0.0)
        f1[id_] = max((_f1(words, gold, version_2_with_negative) for gold in golds), default=0.0)

    def averages(prefix: str, ids: list[str]) -> dict[str, float]:
        means = {
            f"{prefix}{name}": 100.0 * sum(scores[id_] for id_ in ids) / len(ids)
            for name, scores in (("exact", exact), ("f1", f1))
        }
        return means | {f"{prefix}total": len(ids)}

    if unscored := len(has_answer) - len(exact):
        logger.warning(f"{unscored} questions have no answer and are not scored")
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
    precision = shared / max(len(prediction), 1)
    recall = shared / max(len(gold), 1)
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


GLUE_METRICS = {  # functions of labels and predictions
    "acc": accuracy_score,
    "f1": f1_score,
    "mcc": matthews_corrcoef,
    "pearson": lambda labels, predictions: pearsonr(predictions, labels).statistic,
    "spearmanr": lambda labels, predictions: spearmanr(predictions, labels).statistic,
}
MEANS = {"acc_and_f1": ("acc", "f1"), "corr": ("pearson", "spearmanr")}


def glue_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of `task.metrics`: fractions of 1, correlations from -1 to 1.

    logits: (examples, labels of the task), or for a regression (examples, 1) or (examples,).
    labels: (examples,). F1 is that of the second label. Undefined metrics are left out, with a
    warning.
    """
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(labels)
    predictions = logits.reshape(len(labels)) if task.is_regression else logits.argmax(axis=1)
    metrics = {}
    undefined = []
    for name in task.metrics:
        if name in MEANS:
            if metrics.keys() >= set(MEANS[name]):
                metrics[name] = sum(metrics[part] for part in MEANS[name]) / 2
        elif reason := _why_undefined(name, predictions, labels):
            undefined.append(f"{name} ({reason})")
        else:
            metrics[name] = float(GLUE_METRICS[name](labels, predictions))
    if undefined:
        logger.warning(f"undefined and left out: {', '.join(undefined)}")
    return metrics


def _why_undefined(name: str, predictions: np.ndarray, labels: np.ndarray) -> str | None:
    """Why a metric has no value; None if it has one."""
    if name == "f1" and not (predictions.any() or labels.any()):
        return "no label and no prediction is positive"
    series = {"labels": labels, "predictions": predictions}
    if name == "mcc":
        del series["predictions"]  # a model that predicts one class has an mcc of 0
    if name in ("mcc", "pearson", "spearmanr"):
        for title, values in series.items():
            if not 0 < np.ptp(values) < np.inf:
                return f"all {title} are equal"
    return None


def mean_entropy(logits: np.ndarray) -> float:
    """Mean entropy in nats of the predictions with these logits: (examples, labels)."""
    return float(entr(softmax(np.asarray(logits, np.float64), axis=1)).sum(axis=1).mean())
