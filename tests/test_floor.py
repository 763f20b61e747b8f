"""The floor of a task: what a bag of words reaches, which reads no order of words."""

import pytest

from emmental.system.errors import UserError
from paper.floor import bag_of_words

WIN, LOSE = "yes indeed", "no way"


def write_rows(folder, name, header, rows):
    folder.mkdir(exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in ([header] if header else []) + rows]
    (folder / name).write_text("\n".join(lines) + "\n")


def floor_of(folder, task, **args):
    return bag_of_words(
        {"task_name": task, "data_dir": str(folder), "cache_dir": f"{folder}/c"} | args
    )


def test_floor_of_sentences(tmp_path):
    train = [[WIN, 1], [LOSE, 0]] * 8
    dev = [[WIN, 1], [LOSE, 0], ["INDEED", 1], ["yes", 0]]  # three of four, in any case
    write_rows(tmp_path, "train.tsv", ["sentence", "label"], train)
    write_rows(tmp_path, "dev.tsv", ["sentence", "label"], dev)
    assert floor_of(tmp_path, "sst-2") == {"acc": 75.0}


def test_floor_of_pairs_tells_the_two_texts_apart(tmp_path):
    rows = [[1, "a", "b", WIN, LOSE], [0, "a", "b", LOSE, WIN]] * 4
    for split in ("train", "dev"):
        header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        write_rows(tmp_path, f"{split}.tsv", header, rows)
    assert floor_of(tmp_path, "mrpc") == {"acc": 100.0, "f1": 100.0}


def test_floor_of_both_sets_of_mnli(tmp_path):
    header = ["sentence1", "sentence2", "gold_label"]
    labels = ["neutral", "entailment", "contradiction"]
    rows = [[f"word {label}", "x", label] for label in labels]
    write_rows(tmp_path, "train.tsv", header, rows * 4)
    write_rows(tmp_path, "dev_matched.tsv", header, rows)
    write_rows(tmp_path, "dev_mismatched.tsv", header, [[*rows[0][:2], "entailment"], rows[1]])
    assert floor_of(tmp_path, "mnli") == {"acc_matched": 100.0, "acc_mismatched": 50.0}


def test_floor_of_your_own_task(tmp_path):
    for split in ("train", "dev"):
        write_rows(tmp_path, f"{split}.tsv", ["text", "mood"], [[WIN, "good"], [LOSE, "bad"]] * 4)
    own = {"text_column": "text", "text_pair_column": None, "label_column": "mood"}
    assert floor_of(tmp_path, "custom", regression=False, **own) == {"acc": 100.0}
    assert floor_of(tmp_path, "custom", regression=True, **own) is None


def test_no_floor(tmp_path):
    assert floor_of("gone", "sts-b") is None and bag_of_words({"data_dir": "gone"}) is None
    write_rows(tmp_path / "one", "train.tsv", ["sentence", "label"], [[WIN, 1]] * 4)
    with pytest.raises(UserError, match="one: "):
        floor_of(tmp_path / "one", "sst-2")
    for split, labels in ("train", (1, 0)), ("dev", (1, 1)):
        labelled = [["source", label, "", text] for label, text in zip(labels, (WIN, LOSE))]
        write_rows(tmp_path / "two", f"{split}.tsv", None, labelled * 4)
    with pytest.raises(UserError, match="two: its metrics are undefined"):
        floor_of(tmp_path / "two", "cola")
