"""The metrics of SQuAD and GLUE."""

import collections
import logging
import math
import re
import string
import warnings

import numpy as np
from scipy.special import entr, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from emmental.data.features import row_tuples

logger = logging.getLogger(__name__)


def squad_metrics(examples, predictions, null_odds=None, *, version_2_with_negative):
    """Exact match and F1 in percent, as by the official evaluate-v1.1.py or evaluate-v2.0.py.

    Keys: exact, f1, total; for v2.0 also HasAns_* and NoAns_* (where there are such questions) and, with
    `null_odds`, best_exact, best_exact_thresh, best_f1, best_f1_thresh: the best that another threshold on
    the null odds could do for the given predictions. A question without a prediction counts as wrong.
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

    metrics = _averages(exact, f1, list(exact))
    if version_2_with_negative:
        for prefix, answered in ("HasAns_", True), ("NoAns_", False):
            if ids := [id_ for id_ in exact if has_answer[id_] is answered]:
                metrics |= {
                    prefix + name: value for name, value in _averages(exact, f1, ids).items()
                }
        if null_odds is not None:
            for name, scores in ("exact", exact), ("f1", f1):
                best, threshold = _best_threshold(scores, predictions, null_odds, has_answer)
                metrics |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return metrics


def _averages(exact, f1, ids):
    percent = [100.0 * sum(scores[id_] for id_ in ids) / len(ids) for scores in (exact, f1)]
    return {"exact": percent[0], "f1": percent[1], "total": len(ids)}


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text):
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _f1(prediction, gold, version_2_with_negative):
    if version_2_with_negative and not (prediction and gold):
        return float(prediction == gold)
    shared = (collections.Counter(prediction) & collections.Counter(gold)).total()
    # The official quotient of precision and recall, in its order of rounding.
    precision, recall = shared / max(len(prediction), 1), shared / max(len(gold), 1)
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def _best_threshold(scores, predictions, null_odds, has_answer):
    """Walk up the null odds: below the threshold the prediction counts, above it the null answer does."""
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


def glue_metrics(task, logits, labels):
    """The metrics of `task.metrics` as plain floats: fractions of 1, correlations from -1 to 1.

    logits: (examples, labels of the task, in its order), or (examples, 1) or (examples,) for a regression.
    labels: (examples,), as in the examples. F1 is that of the second label. A correlation that is not defined,
    as where all predictions are equal, is 0.0, with a warning.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if task.is_regression:
        scores = logits.reshape(len(labels))
        pearson = _correlation("pearson", pearsonr, scores, labels)
        spearman = _correlation("spearmanr", spearmanr, scores, labels)
        return {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}
    predictions = logits.argmax(axis=1)
    if task.key_metric == "mcc":
        return {"mcc": float(matthews_corrcoef(labels, predictions))}
    metrics = {"acc": float(accuracy_score(labels, predictions))}
    if "f1" in task.metrics:
        metrics["f1"] = float(f1_score(labels, predictions, zero_division=0.0))
        metrics["acc_and_f1"] = (metrics["acc"] + metrics["f1"]) / 2
    return metrics


def _correlation(name, correlate, scores, labels):
    constant = [
        what
        for what, values in (("predictions", scores), ("labels", labels))
        if np.ptp(values) == 0
    ]
    value = math.nan
    if not constant and np.isfinite(scores).all():
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of nearly constant predictions: there is a value all the same
            value = float(correlate(scores, labels).statistic)
    if math.isfinite(value):
        return value
    reason = (
        f"all {constant[0]} are equal"
        if constant
        else "the predictions are not finite or out of scale"
    )
    logger.warning(f"{name} is not defined, because {reason}; it counts as 0.0")
    return 0.0


def mean_entropy(logits):
    """Entropy of the predicted distribution over the labels, in nats, averaged over the examples.

    logits: (examples, labels). From 0, where every prediction is certain, to log(labels).
    """
    return float(entr(softmax(np.asarray(logits, np.float64), axis=1)).sum(axis=1).mean())
