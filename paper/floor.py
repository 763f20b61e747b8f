"""The floor: what a bag of words, which knows no grammar and no pre-training, reaches on a task."""

import logging
import warnings

import numpy as np
from scipy.sparse import hstack
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from emmental.data.glue import find_labels, read_examples, split_file
from emmental.data.glue_tasks import TASKS, Task, custom_task
from emmental.data.metrics import glue_metrics
from emmental.system.errors import UserError, first_line

from .points import METRICS

logger = logging.getLogger(__name__)


def bag_of_words(args: dict) -> dict[str, float] | None:
    """The metrics in percent of logistic regression on the words of each text, in lower case.

    args: training_args.json of a run. Trains on the whole train file in its `data_dir`, evaluates
    on the development set. Words are what spaces separate; those of the two texts of a pair are
    told apart. Returns None for a regression and SQuAD. Raises UserError without readable data.
    """
    name, folder = args.get("task_name"), args["data_dir"]  # SQuAD's runs have no task_name
    if name is None or args.get("regression") or (name in TASKS and TASKS[name].is_regression):
        return None
    if not folder:
        raise UserError("the data came from the hub, not from a folder")
    task = TASKS.get(name) or _own_task(args)

    def read(split: str) -> tuple[list[list[str]], np.ndarray]:
        rows = read_examples(task, folder, split, args["cache_dir"])
        return [list(rows[f"text_{x}"]) for x in "ab"[: len(task.text_columns)]], np.array(
            rows["label"]
        )

    texts, labels = read("train")
    logger.info(f"{name}: fitting a bag of words to {len(labels)} examples")
    counters = [CountVectorizer(binary=True, token_pattern=r"\S+") for _ in texts]
    model, metrics = LogisticRegression(), {}
    try:
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            model.fit(hstack([c.fit_transform(t) for c, t in zip(counters, texts)]), labels)
    except ValueError as error:  # one label only, no word at all
        raise UserError(f"{folder}: {first_line(error)}") from error
    for split in task.evaluation_splits:
        texts, labels = read(split)
        found = model.predict(hstack([c.transform(t) for c, t in zip(counters, texts)]))
        suffix = split.removeprefix("dev") if len(task.evaluation_splits) > 1 else ""
        scores = glue_metrics(task, np.eye(len(task.labels))[found], labels)
        metrics |= {f"{name}{suffix}": 100 * value for name, value in scores.items()}
    if not metrics:
        raise UserError(f"{folder}: its metrics are undefined for these predictions")
    return {name: metrics[name] for name in METRICS if name in metrics}


def _own_task(args: dict) -> Task:
    columns = tuple(filter(None, (args["text_column"], args["text_pair_column"])))
    task = custom_task((), columns, args["label_column"])
    labels = find_labels(split_file(task, args["data_dir"], "train"), task)
    return custom_task(labels, columns, args["label_column"])
