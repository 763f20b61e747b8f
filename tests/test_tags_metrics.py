"""The metrics of tags: exactly those of seqeval's default for entities."""

import random
import warnings

import pytest
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU, Entities

from emmental.data.entities import entities, entity_metrics, has_entities, tag_accuracy

SCHEMES = {"IO": "I", "BIO": "BI", "BIOES": "BIES", "bare": "BI"}


def random_tags(rng, scheme):
    """The tags of some sentences, in any order: most are broken."""
    kinds = [""] if scheme == "bare" else ["-person", "-place", "-a-b"]
    tags = ["O", "O", *(prefix + kind for prefix in SCHEMES[scheme] for kind in kinds)]
    return [[rng.choice(tags) for _ in range(length)] for length in (0, 1, 2, 5, 9, 20)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_entities_and_their_metrics_are_those_of_seqeval(scheme):
    rng = random.Random(scheme)
    for _ in range(40):
        gold, predicted = (random_tags(rng, scheme) for _ in range(2))
        for tags, other in zip(gold, predicted):
            assert entities(tags) == set(get_entities(tags))
            for place, tag in enumerate(tags):  # some entities are right
                other[place] = rng.choice([tag, other[place]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is undefined, and 0
            report = classification_report(gold, predicted, output_dict=True)
            overall = [score(gold, predicted) for score in (precision_score, recall_score)]
            overall.append(f1_score(gold, predicted))
        names = ("precision", "recall", "f1")
        expected = dict(zip(names, overall))
        for kind, row in report.items():
            if not kind.endswith(" avg"):
                values = (row[name] for name in ("precision", "recall", "f1-score"))
                expected |= {f"{name}_{kind}": value for name, value in zip(names, values)}
        assert entity_metrics(gold, predicted) == pytest.approx(expected)


def test_bilou_is_bioes_in_other_letters():
    """In broken sequences, too; of sound ones, it has the entities of seqeval's own scheme."""
    for tags in random_tags(random.Random(0), "BIOES"):
        assert entities([x.replace("E-", "L-").replace("S-", "U-") for x in tags]) == entities(tags)
    tags = "U-x B-x I-x L-x O B-y L-y U-y B-y L-y".split()
    strict = [entity.to_tuple()[1:] for entity in Entities([tags], BILOU).entities[0]]
    assert entities(tags) == {(kind, begin, end - 1) for kind, begin, end in strict}


def test_no_entity_at_all_scores_0():
    assert entity_metrics([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}


def test_tags_that_mark_no_entity_have_an_accuracy():
    assert tag_accuracy([["A", "B"], ["A"]], [["A", "A"], ["A"]]) == {"acc": pytest.approx(2 / 3)}
    for labels in (["O", "I-x"], ["O", "B-x", "PER"], ["B", "I", "O"], ["S-x", "O"], ["U-x", "O"]):
        assert has_entities(labels)
    for labels in (["NOUN", "VERB"], ["0", "1"], ["O", "S"], ["I", "N"], ["IN-x", "O"]):
        assert not has_entities(labels)
