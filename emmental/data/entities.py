"""The metrics of tagged words: entities by the rules of conlleval, or the accuracy of each word."""

import collections
import re
from collections.abc import Iterable

ENTITY_TAG = re.compile(r"O|[BIESLU](-.*)?")  # IO, BIO, BIOES and BILOU
BIOES = {"L": "E", "U": "S"}  # what the letters of BILOU are in BIOES


def has_entities(labels: Iterable[str]) -> bool:
    """Whether tags mark entities, as B-person and a bare B or I do. Other tags stand alone."""
    labels = set(labels)
    bare = labels <= set("BIESLUO") and not labels.isdisjoint("BI")
    return bare or any(tag[:1] in "BIESLU" and tag[1:2] == "-" for tag in labels)


def entities(tags: Iterable[str]) -> set[tuple[str, int, int]]:
    """The entities of a sentence: (type, first word, last word).

    An entity starts at B and S, after O, E and S, and where the type changes: in IO and in broken
    sequences, too, as for conlleval and for seqeval's default. L is read as E, and U as S.
    """
    spans = []
    before = "O"
    for place, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        prefix, kind = BIOES.get(prefix, prefix), kind or "_"
        if prefix != "O":
            if before in ("O", "E", "S") or prefix in ("B", "S") or kind != spans[-1][0]:
                spans.append([kind, place, place])
            spans[-1][2] = place
        before = prefix
    return {tuple(span) for span in spans}


def entity_metrics(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities, of all (micro) and of each type: precision_person, ...

    gold, predicted: the tags of each sentence. A metric without an entity to count is 0.
    """
    right, wanted, given = counters = [collections.Counter() for _ in range(3)]
    for pair in zip(gold, predicted, strict=True):
        theirs, ours = map(entities, pair)
        for counter, found in zip(counters, (theirs & ours, theirs, ours), strict=True):
            counter.update(kind for kind, _, _ in found)
    metrics = _scores("", *(counter.total() for counter in counters))
    for kind in sorted(wanted | given):
        metrics |= _scores(f"_{kind}", right[kind], wanted[kind], given[kind])
    return metrics


def _scores(suffix: str, right: int, wanted: int, given: int) -> dict[str, float]:
    values = {
        "precision": right / max(given, 1),
        "recall": right / max(wanted, 1),
        "f1": 2 * right / max(wanted + given, 1),
    }
    return {f"{name}{suffix}": value for name, value in values.items()}


def tag_accuracy(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """The fraction of words with the right tag."""
    pairs = [pair for tags in zip(gold, predicted, strict=True) for pair in zip(*tags, strict=True)]
    return {"acc": sum(a == b for a, b in pairs) / len(pairs)}
