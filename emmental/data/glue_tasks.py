"""The GLUE tasks (Wang et al. 2018), and your own."""

import functools
import math
import re
from dataclasses import dataclass, field, replace

from ..models.outputs import Outputs

CUSTOM = "custom"  # the name of every task of your own
CUSTOM_ARGUMENTS = ("text_column", "text_pair_column", "label_column", "regression")
CUSTOM_SUBMISSION = "predictions.tsv"


@dataclass(frozen=True)
class Task:
    """What distinguishes a task. Splits have the names of files: train, dev_matched, test, ..."""

    name: str
    labels: tuple[str, ...]  # in the order of the model's outputs; empty for a regression
    text_columns: tuple[str, ...]
    label_column: str = "label"
    hub_config: str = ""
    hub_columns: tuple[str, ...] = ()  # the texts on the hub, if named differently
    metrics: tuple[str, ...] = ("acc",)  # keys of `glue_metrics`; the last compares runs
    evaluation_splits: tuple[str, ...] = ("dev",)
    submissions: dict[str, str] = field(default_factory=dict)  # test split: file of predictions
    numbered: bool = False  # submissions have class indices, not names
    score_range: tuple[float, float] = (-math.inf, math.inf)  # range of a regression's labels
    headerless: tuple[str, ...] = ()  # columns of the labelled files, if they have no header
    short_rows: bool = False  # labelled files have broken rows, with too few fields

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers, and the model has one output."""
        return not self.labels

    @property
    def key_metric(self) -> str:
        """The metric that compares runs."""
        return self.metrics[-1]

    @functools.cached_property
    def indices(self) -> Outputs:
        """Class index of every label; files of GLUE may hold the indices themselves."""
        indices = {name: index for index, name in enumerate(self.labels)}
        if self.name != CUSTOM:
            indices |= {str(index): index for index in range(len(self.labels))}
        return Outputs(indices)


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_ACC_AND_F1 = ("acc", "f1", "acc_and_f1")
_CORRELATIONS = ("pearson", "spearmanr", "corr")
# fmt: off
_MNLI = Task(
    "mnli", ("contradiction", "entailment", "neutral"), _SENTENCES, "gold_label",
    hub_config="mnli", hub_columns=("premise", "hypothesis"),
    evaluation_splits=("dev_matched", "dev_mismatched"),
    submissions={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
)
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
    _MNLI,
    replace(_MNLI, name="mnli-mm", evaluation_splits=("dev_mismatched",),
            submissions={"test_mismatched": "MNLI-mm.tsv"}),
    Task("qnli", _ENTAILMENT, ("question", "sentence"), hub_config="qnli",
         submissions={"test": "QNLI.tsv"}),
    Task("rte", _ENTAILMENT, _SENTENCES, hub_config="rte", submissions={"test": "RTE.tsv"}),
    Task("wnli", _ENTAILMENT[::-1], _SENTENCES, hub_config="wnli", submissions={"test": "WNLI.tsv"},
         numbered=True),
    replace(_MNLI, name="ax", hub_config="ax", evaluation_splits=(),
            submissions={"test": "AX.tsv"}),
)
# fmt: on
TASKS = {task.name: task for task in _TASKS}
SUBMISSION_FILES = {CUSTOM_SUBMISSION, *(f for task in _TASKS for f in task.submissions.values())}


def task_name(text: str) -> str:
    """The name of a task from any spelling ("SST-2", "sst2", "mnli_mm"); other texts unchanged."""
    names = {name.replace("-", ""): name for name in (*TASKS, CUSTOM)} | {"mnlim": "mnli"}
    return names.get(re.sub("[-_ ]", "", text.lower()), text)


def custom_task(
    labels: tuple[str, ...], text_columns: tuple[str, ...] = (), label_column: str = "label"
) -> Task:
    """A task of your own; without labels, a regression."""
    return Task(
        CUSTOM,
        tuple(labels),
        text_columns,
        label_column,
        metrics=("acc",) if labels else _CORRELATIONS,
        submissions={"test": CUSTOM_SUBMISSION},
    )
