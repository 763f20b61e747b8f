"""The GLUE tasks (Wang et al. 2018) and tasks of one's own: what tells one from another."""

import difflib
import re
from dataclasses import dataclass, field

from emmental.errors import UserError

CUSTOM = "custom"  # the name of every task of one's own


@dataclass(frozen=True)
class Task:
    """What tells one task from another. A split is named as its file is: train, dev, dev_matched, test, ...

    labels: names of the classes, in the order of the model's outputs; none for a regression.
    metrics: keys of `glue_metrics`; the last is the task's own score.
    submissions: file of predictions for each test split, whose labels are secret.
    numbered: files and submissions hold the class indices, not the names.
    score_range: lowest and highest value of a regression's labels, where they are limited.
    headerless: columns of the training and evaluation files, where these have no header.
    short_rows: files are known to have rows with too few fields.
    """

    name: str
    labels: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_column: str = "label"
    hub_config: str = ""
    hub_columns: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("acc",)
    evaluation_splits: tuple[str, ...] = ("dev",)
    submissions: dict[str, str] = field(default_factory=dict)
    numbered: bool = False
    score_range: tuple[float, float] | None = None
    headerless: tuple[str, ...] = ()
    short_rows: bool = False

    @property
    def is_regression(self):
        """Is a label a number, and the model's output one value?"""
        return not self.labels

    @property
    def key_metric(self):
        """The metric to compare runs by."""
        return self.metrics[-1]

    @property
    def splits(self):
        """All splits with data: training (where there is any evaluation), evaluation, test."""
        return (
            *(("train",) if self.evaluation_splits else ()),
            *self.evaluation_splits,
            *self.submissions,
        )


_SENTENCES = ("sentence1", "sentence2")
_MNLI = {
    "labels": ("contradiction", "entailment", "neutral"),
    "text_columns": _SENTENCES,
    "label_column": "gold_label",
    "hub_config": "mnli",
    "hub_columns": ("premise", "hypothesis"),
}
_ENTAILMENT = ("entailment", "not_entailment")
_ACC_AND_F1 = ("acc", "f1", "acc_and_f1")
_CORRELATIONS = ("pearson", "spearmanr", "corr")

TASKS = {
    task.name: task
    for task in (
        Task("cola", ("unacceptable", "acceptable"), ("sentence",), hub_config="cola", metrics=("mcc",),
             submissions={"test": "CoLA.tsv"}, numbered=True, headerless=("source", "label", "mark", "sentence")),
        Task("sst-2", ("negative", "positive"), ("sentence",), hub_config="sst2",
             submissions={"test": "SST-2.tsv"}, numbered=True),
        Task("mrpc", ("not_equivalent", "equivalent"), ("#1 String", "#2 String"), "Quality", hub_config="mrpc",
             hub_columns=_SENTENCES, metrics=_ACC_AND_F1, submissions={"test": "MRPC.tsv"}, numbered=True),
        Task("sts-b", (), _SENTENCES, "score", hub_config="stsb", metrics=_CORRELATIONS,
             submissions={"test": "STS-B.tsv"}, score_range=(0.0, 5.0)),
        Task("qqp", ("not_duplicate", "duplicate"), ("question1", "question2"), "is_duplicate", hub_config="qqp",
             metrics=_ACC_AND_F1, submissions={"test": "QQP.tsv"}, numbered=True, short_rows=True),
        Task("mnli", **_MNLI, evaluation_splits=("dev_matched", "dev_mismatched"),
             submissions={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}),
        Task("mnli-mm", **_MNLI, evaluation_splits=("dev_mismatched",),
             submissions={"test_mismatched": "MNLI-mm.tsv"}),
        Task("qnli", _ENTAILMENT, ("question", "sentence"), hub_config="qnli", submissions={"test": "QNLI.tsv"}),
        Task("rte", _ENTAILMENT, _SENTENCES, hub_config="rte", submissions={"test": "RTE.tsv"}),
        Task("wnli", _ENTAILMENT[::-1], _SENTENCES, hub_config="wnli", submissions={"test": "WNLI.tsv"},
             numbered=True),
        Task("ax", **(_MNLI | {"hub_config": "ax"}), evaluation_splits=(), submissions={"test": "AX.tsv"}),
    )
}  # fmt: skip

CUSTOM_SUBMISSION = "predictions.tsv"
SUBMISSION_FILES = sorted(
    {CUSTOM_SUBMISSION, *(file for task in TASKS.values() for file in task.submissions.values())}
)


def find_task(name):
    """The GLUE task of this name, in any case and with or without its hyphen ("SST-2", "sst2", "mnli_mm").

    Raises `UserError` naming the nearest task when there is none.
    """
    tasks = {plain(task): task for task in (*TASKS, CUSTOM)} | {"mnlim": "mnli"}
    found = tasks.get(plain(name))
    if found not in TASKS:
        nearest = difflib.get_close_matches(plain(name), tasks, n=1, cutoff=0.4)
        hint = f"; did you mean {tasks[nearest[0]]}?" if nearest else ""
        raise UserError(f"{name!r} is not one of {', '.join(TASKS)}, {CUSTOM}{hint}")
    return TASKS[found]


def custom_task(labels):
    """A task of one's own, with the labels that `read_custom_examples` returned."""
    metrics = ("acc",) if labels else _CORRELATIONS
    return Task(CUSTOM, tuple(labels), (), metrics=metrics, submissions={"test": CUSTOM_SUBMISSION})


def plain(name):
    return re.sub("[-_ ]", "", name.lower())


def listed(names):
    names = [str(name) if len(str(name)) <= 40 else f"{str(name)[:37]}..." for name in names]
    return ", ".join(names if len(names) <= 12 else [*names[:11], f"... ({len(names)})"])
