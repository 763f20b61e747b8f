"""The GLUE tasks (Wang et al. 2018), and your own: what distinguishes them."""

import functools
import math
import re
from dataclasses import dataclass, field

CUSTOM = "custom"  # the name of every task of your own


@dataclass(frozen=True)
class Task:
    """What distinguishes a task. Splits are named as their files: train, dev, dev_matched, test...

    labels: names of the classes, in the order of the model's outputs; none for a regression.
    metrics: keys of `glue_metrics`.
    submissions: file of predictions for each test split.
    numbered: files and submissions hold the class indices, not the names.
    score_range: lowest and highest label of a regression.
    headerless: columns of the training and evaluation files, if these have no header.
    short_rows: training and evaluation files have broken rows, with too few fields.
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
    score_range: tuple[float, float] = (-math.inf, math.inf)
    headerless: tuple[str, ...] = ()
    short_rows: bool = False

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers, and the model has one output."""
        return not self.labels

    @property
    def key_metric(self) -> str:
        """The metric to compare runs by."""
        return self.metrics[-1]

    @functools.cached_property
    def indices(self) -> dict[str, int]:
        """Class index of every label, and of every number if the files hold numbers."""
        indices = {name: index for index, name in enumerate(self.labels)}
        if self.numbered:
            indices |= {str(index): index for index in range(len(self.labels))}
        return indices


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_ACC_AND_F1 = ("acc", "f1", "acc_and_f1")
_CORRELATIONS = ("pearson", "spearmanr", "corr")
_MNLI = {
    "labels": ("contradiction", "entailment", "neutral"),
    "text_columns": _SENTENCES,
    "label_column": "gold_label",
    "hub_config": "mnli",
    "hub_columns": ("premise", "hypothesis"),
}
_TASKS = (
    Task("cola", ("unacceptable", "acceptable"), ("sentence",), hub_config="cola", metrics=("mcc",),
         headerless=("source", "label", "mark", "sentence"), submissions={"test": "CoLA.tsv"},
         numbered=True),
    Task("sst-2", ("negative", "positive"), ("sentence",), hub_config="sst2",
         submissions={"test": "SST-2.tsv"}, numbered=True),
    Task("mrpc", ("not_equivalent", "equivalent"), ("#1 String", "#2 String"), "Quality",
         hub_config="mrpc", hub_columns=_SENTENCES, metrics=_ACC_AND_F1,
         submissions={"test": "MRPC.tsv"}, numbered=True),
    Task("sts-b", (), _SENTENCES, "score", hub_config="stsb", metrics=_CORRELATIONS,
         submissions={"test": "STS-B.tsv"}, score_range=(0.0, 5.0)),
    Task("qqp", ("not_duplicate", "duplicate"), ("question1", "question2"), "is_duplicate",
         hub_config="qqp", metrics=_ACC_AND_F1, submissions={"test": "QQP.tsv"}, numbered=True,
         short_rows=True),
    Task("mnli", **_MNLI, evaluation_splits=("dev_matched", "dev_mismatched"),
         submissions={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}),
    Task("mnli-mm", **_MNLI, evaluation_splits=("dev_mismatched",),
         submissions={"test_mismatched": "MNLI-mm.tsv"}),
    Task("qnli", _ENTAILMENT, ("question", "sentence"), hub_config="qnli",
         submissions={"test": "QNLI.tsv"}),
    Task("rte", _ENTAILMENT, _SENTENCES, hub_config="rte", submissions={"test": "RTE.tsv"}),
    Task("wnli", _ENTAILMENT[::-1], _SENTENCES, hub_config="wnli", submissions={"test": "WNLI.tsv"},
         numbered=True),
    Task("ax", **(_MNLI | {"hub_config": "ax"}), evaluation_splits=(),
         submissions={"test": "AX.tsv"}),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}

CUSTOM_SUBMISSION = "predictions.tsv"
SUBMISSION_FILES = sorted(
    {CUSTOM_SUBMISSION, *(file for task in _TASKS for file in task.submissions.values())}
)


def task_name(text: str) -> str:
    """The name of a task from any spelling ("SST-2", "sst2", "mnli_mm"); other texts unchanged."""
    names = {name.replace("-", ""): name for name in (*TASKS, CUSTOM)} | {"mnlim": "mnli"}
    return names.get(re.sub("[-_ ]", "", text.lower()), text)


def custom_task(
    labels: tuple[str, ...], text_columns: tuple[str, ...] = (), label_column: str = "label"
) -> Task:
    """A task of your own; without labels, a regression."""
    metrics, submissions = ("acc",) if labels else _CORRELATIONS, {"test": CUSTOM_SUBMISSION}
    options = {"metrics": metrics, "submissions": submissions}
    return Task(CUSTOM, tuple(labels), text_columns, label_column, **options)
