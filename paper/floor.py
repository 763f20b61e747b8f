"""The floor: what a bag of words, which knows no grammar and no pre-training, reaches on a task."""

import logging
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from emmental.data.glue import find_labels, read_examples, split_file
from emmental.data.glue_tasks import TASKS, Task, custom_task
from emmental.data.metrics import glue_metrics
from emmental.system.errors import UserError, first_line

from .points import METRICS

logger = logging.getLogger(__name__)


def bag_of_words(args: dict) -> dict[str, float] | None:
    """The metrics in percent of logistic regression on the words of each text, in lower case.

    args: training_args.json of a run. The model is trained on the whole train file in `data_dir`,
    and evaluated on the development set. Spaces separate words; the words of the two texts of a
    pair are told apart. Returns None for a regression and SQuAD. Raises UserError without readable
    data.
    """
    name = args.get("task_name")  # SQuAD's runs have none
    folder = args["data_dir"]
    if name is None or args.get("regression") or (name in TASKS and TASKS[name].is_regression):
        return None
    if not folder:
        raise UserError("the data came from the hub, not from a folder")
    task = TASKS.get(name) or _custom_task(args)
    examples = read_examples(task, folder, "train", args["cache_dir"])
    logger.info(f"{name}: fitting a bag of words to {len(examples)} examples")
    model = make_pipeline(CountVectorizer(binary=True, analyzer=_words), LogisticRegression())
    try:
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            model.fit(examples, examples["label"])
    except ValueError as error:  # one label only, no word at all
        raise UserError(f"{folder}: {first_line(error)}") from error
    metrics = {}
    for split in task.evaluation_splits:
        examples = read_examples(task, folder, split, args["cache_dir"])
        logits = np.eye(len(task.labels))[model.predict(examples)]
        suffix = split.removeprefix("dev") if len(task.evaluation_splits) > 1 else ""
        for metric, value in glue_metrics(task, logits, examples["label"]).items():
            metrics[metric + suffix] = 100 * value
    if not metrics:
        raise UserError(f"{folder}: its metrics are undefined for these predictions")
    return {name: metrics[name] for name in METRICS if name in metrics}


def _words(example: dict) -> list[str]:
    """The words of an example, each with the name of its text."""
    texts = {name: example[name] or "" for name in ("text_a", "text_b")}
    return [f"{name} {word}" for name, text in texts.items() for word in text.lower().split()]


def _custom_task(args: dict) -> Task:
    columns = tuple(filter(None, (args["text_column"], args["text_pair_column"])))
    task = custom_task((), columns, args["label_column"])
    labels = find_labels(split_file(task, args["data_dir"], "train"), task)
    return custom_task(labels, columns, args["label_column"])
