"""SQuAD: from start and end logits to answers."""

import collections

import numpy as np
from datasets import Dataset

from .cache import row_tuples

NO_SPAN_ODDS = 1e6  # null odds of a question without a valid span: finite, above every real score


def postprocess(
    examples: Dataset,
    features: Dataset,
    start_logits: list[np.ndarray],
    end_logits: list[np.ndarray],
    *,
    n_best_size: int,
    max_answer_length: int,
    version_2_with_negative: bool,
    null_score_diff_threshold: float,
) -> tuple[dict[str, str], dict[str, list[dict]], dict[str, float]]:
    """Logits -> answers, by BERT's n-best search.

    features: those of `build_features(training=False)`; logits: a float array of at least `length`
    for each. A candidate pairs one of the `n_best_size` best starts in a window with one of the
    best ends. A candidate has at most `max_answer_length` tokens, and its start has its maximum
    context in this window. The earlier one wins a tie. The null score is the lowest score of [CLS]
    in all windows.

    Returns, ready for JSON: predictions {id: text}, the n best {id: list of {text, probability,
    start_logit, end_logit}} and, for v2.0, null odds {id: null score - best score}. A prediction is
    "" if the null odds exceed `null_score_diff_threshold` (v2.0), or without a valid candidate;
    then the null odds are `NO_SPAN_ODDS`.
    """
    candidates = collections.defaultdict(list)
    nulls = {}
    names = ["example_index", "context_start", "offsets", "max_context"]
    windows = row_tuples(features.with_format("numpy"), names)
    for start, end, (row, *window) in zip(start_logits, end_logits, windows, strict=True):
        candidates[row].append(_candidates(start, end, *window, n_best_size, max_answer_length))
        null = float(start[0]) + float(end[0]), float(start[0]), float(end[0])
        nulls[row] = min(nulls.get(row, null), null)

    predictions, nbest, null_odds = {}, {}, {}
    for row, (id_, context) in enumerate(row_tuples(examples, ["id", "context"])):
        pool = np.concatenate(candidates[row])
        spans = {}  # text -> (score, start logit, end logit), best first
        for candidate in np.argsort(-pool[:, 0], kind="stable"):
            *scores, begin, end = pool[candidate].tolist()
            spans.setdefault(context[int(begin) : int(end)], scores)
            if len(spans) == n_best_size:
                break
        predictions[id_] = next(iter(spans), "")
        if version_2_with_negative:
            odds = nulls[row][0] - spans[predictions[id_]][0] if spans else NO_SPAN_ODDS
            if odds > null_score_diff_threshold:
                predictions[id_] = ""
            null_odds[id_] = odds
            spans[""] = nulls[row]
        nbest[id_] = _nbest_list(spans or {"": (0.0, 0.0, 0.0)}, n_best_size)
    return predictions, nbest, null_odds


def _candidates(start, end, context_start, offsets, max_context, n_best_size, max_answer_length):
    """Valid spans of a window: rows of score, start logit, end logit, begin, end (characters)."""
    offsets = offsets.reshape(-1, 2)
    start = np.asarray(start[context_start : context_start + len(offsets)], np.float64)
    end = np.asarray(end[context_start : context_start + len(offsets)], np.float64)
    # Sorted by place in the text, so that the earlier span wins a tie.
    first = np.sort(np.argsort(-start, kind="stable")[:n_best_size])[:, None]
    last = np.sort(np.argsort(-end, kind="stable")[:n_best_size])[None, :]
    valid = (last >= first) & (last - first < max_answer_length) & max_context[first]
    valid &= offsets[first, 0] < offsets[last, 1]  # white space alone is no answer
    starts, ends = np.nonzero(valid)
    first = first[starts, 0]
    last = last[0, ends]
    scores = start[first] + end[last], start[first], end[last]
    return np.stack([*scores, offsets[first, 0], offsets[last, 1]], axis=1)


def _nbest_list(spans, n_best_size):
    ranked = sorted(spans.items(), key=lambda item: -item[1][0])
    if len(ranked) > n_best_size and ranked[-1][0]:
        ranked.pop()  # the null answer counts as one of the n best, unless it is the last
    weights = np.exp(np.array([scores[0] for _, scores in ranked]) - ranked[0][1][0])
    return [
        {"text": text, "probability": probability, "start_logit": start, "end_logit": end}
        for (text, (_, start, end)), probability in zip(ranked, (weights / weights.sum()).tolist())
    ]
