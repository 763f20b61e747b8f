"""GLUE and your own tasks: reading, features, submissions.

A sentence becomes `[CLS] text_a [SEP]`, a pair `[CLS] text_a [SEP] text_b [SEP]`. GLUE (Wang et al.
2018) comes from the hub or as tab-separated files, in which quotes are text. Hub and files number
the labels differently, so labels are matched by name. A class index is an index into `Task.labels`.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from ..models.outputs import whole_number
from ..system.errors import UserError
from .cache import cached_map, cached_rows, content_hash, ragged, row_tuples
from .glue_tasks import CUSTOM, Task
from .padding import collate_features, fast_backend
from .reading import LABEL, brief, file_rows, in_order, json_field, load_hub

logger = logging.getLogger(__name__)

VERSION = 2  # raise it when the features of the same input change: old caches are then ignored
HUB_NAME = "nyu-mll/glue"


def split_file(task: Task, data_dir: Path | str, split: str) -> Path:
    """The file of a split; raises UserError unless there is exactly one."""
    stem = "diagnostic" if task.name == "ax" else split
    suffixes = (".tsv", ".csv", ".jsonl") if task.name == CUSTOM else (".tsv",)
    files = [Path(data_dir, stem + suffix) for suffix in suffixes]
    present = [file for file in files if file.is_file()]
    if len(present) != 1:
        names = " or ".join(file.name for file in files)
        raise UserError(f"--data_dir {data_dir} must hold exactly one file {names}")
    return present[0]


def read_examples(
    task: Task, data_dir: Path | str, split: str, cache_dir: str | None = None
) -> Dataset:
    """Read and check the file of a split.

    Returns the columns index (of a test file: its id or index; else the number of the row),
    text_a, text_b (None for single sentences) and, except for test splits, label (index into
    `task.labels`, or float). Raises UserError for errors in the file.
    """
    path = split_file(task, data_dir, split)
    labelled = split not in task.submissions
    records = functools.partial(_records, path, task, labelled)
    examples = _cached(records, task, labelled, path, cache_dir)
    if not len(examples):
        raise UserError(f"{path}: is empty; it holds no examples")
    if task.name.startswith("mnli") and labelled:
        where, record = next(records())
        if whole_number(_class_name(record, task, where)).isdecimal():
            order = ", ".join(f"{index} {name}" for index, name in enumerate(task.labels))
            logger.warning(f"{path}: labels are read as {order}; the hub has another order")
    if task.short_rows and labelled:
        skipped = sum(1 for _ in file_rows(path)) - 1 - len(examples)
        if skipped:
            logger.warning(f"{path}: {skipped} rows with too few fields are skipped")
    return examples


def load_hub_examples(task: Task, split: str, cache_dir: str | None = None) -> Dataset:
    """Load a split of GLUE from the hub, with the columns of `read_examples`."""
    hub_split = split.replace("dev", "validation")
    labelled = split not in task.submissions
    hub = load_hub(HUB_NAME, task.hub_config, split=hub_split, cache_dir=cache_dir)
    names = hub.features["label"].names if labelled and not task.is_regression else ()
    columns = ["label" if labelled else "idx", *(task.hub_columns or task.text_columns)]

    def records() -> Iterator[tuple[str, dict]]:
        for row, (value, *texts) in enumerate(row_tuples(hub, columns)):
            record = dict(zip(task.text_columns, texts))
            if labelled:
                record[task.label_column] = names[value] if names and value >= 0 else value
            else:
                record["index"] = value
            yield f"{HUB_NAME} ({task.hub_config}, {hub_split}), row {row}", record

    return _cached(records, task, labelled, hub._fingerprint, cache_dir)


def find_labels(path: Path, task: Task) -> tuple[str, ...]:
    """The labels in a file of your own task, in order; raises UserError if all are the same."""
    counts = count_labels(path, task)
    rows = counts.total()
    if len(counts) < 2:
        raise UserError(f"{path}: has {len(counts)} different labels; it must have two or more")
    if len(counts) > max(20, rows / 10):
        logger.warning(
            f"{path}: has {len(counts)} labels in {rows} rows; if they are numbers to predict, "
            "add --regression"
        )
    return tuple(counts)


def count_labels(path: Path, task: Task) -> collections.Counter:
    """The labels in a file of your own task, sorted (1, 2, 10 as numbers), with their counts."""
    records = _records(path, task, True)
    counts = collections.Counter(_class_name(record, task, where) for where, record in records)
    for name in [*counts]:
        if (whole := whole_number(name)) != name and whole in counts:
            counts[whole] += counts.pop(name)
    return collections.Counter({name: counts[name] for name in in_order(counts)})


def _cached(
    records: Callable, task: Task, labelled: bool, data: Path | str, cache_dir: str | None
) -> Dataset:
    """The examples made of records, from the cache if they are there. data: what they depend on."""
    ids = "string" if task.name == CUSTOM and not labelled else "int64"
    kinds = {"index": Value(ids), "text_a": Value("string"), "text_b": Value("string")}
    if labelled:
        kinds["label"] = Value("float64" if task.is_regression else "int64")
    key = content_hash("glue", VERSION, data, dataclasses.asdict(task), labelled)
    rows = functools.partial(_examples, records, task, labelled)
    return cached_rows(rows, Features(kinds), key, cache_dir)


def _examples(records: Callable, task: Task, labelled: bool) -> Iterator[dict]:
    """Check the records and yield them as rows."""
    spellings = {}
    for row, (where, record) in enumerate(records()):
        texts = [json_field(record, name, str, where) for name in task.text_columns]
        example = {"index": row, "text_a": texts[0], "text_b": texts[1] if texts[1:] else None}
        if labelled:
            example["label"] = _label(record, task, where, spellings)
        elif task.name == CUSTOM:
            id_ = next((name for name in ("id", "index") if name in record), None)
            text = str(json_field(record, id_, (str, int), where) if id_ else row)
            example["index"] = " ".join(text.split())  # in one field of the predictions
        else:
            index = whole_number(str(record.get("index", record.get("id", row))))
            if not index.isdecimal():
                raise UserError(f"{where}: the index {brief(index)!r} is not a whole number")
            example["index"] = int(index)
        yield example


def _records(path: Path, task: Task, labelled: bool) -> Iterator[tuple[str, dict]]:
    """Yield (place in the file, {column: value}) for each row of a file."""
    rows = file_rows(path)
    if path.suffix == ".jsonl":
        yield from ((f"{path}:{line}", record) for line, record in rows)
        return
    header = task.headerless if labelled and task.headerless else next(rows, (1, []))[1]
    for name in (*task.text_columns, *([task.label_column] if labelled else [])):
        if header.count(name) != 1:
            number = "two columns" if name in header else "no column"
            columns = brief(", ".join(header), 300) or "nothing, the file is empty"
            raise UserError(f"{path}: the header has {number} {name}; found: {columns}")
    for line, fields in rows:
        where = f"{path}:{line}"
        extra = len(fields) - len(header)
        is_blank = fields in ([], [""])
        if (is_blank and len(header) > 1) or (extra < 0 and task.short_rows and labelled):
            continue
        if is_blank:  # an empty text, or no text? The indices of the predictions depend on it
            raise UserError(f"{where}: is blank; give it a text, or remove it")
        if extra < 0 or (extra > 0 and task.name == CUSTOM):
            raise UserError(
                f"{where}: has {len(fields)} fields for {len(header)} columns; correct it"
            )
        yield where, dict(zip(header, fields))


def _class_name(record: dict, task: Task, where: str) -> str:
    """The label of a record as a text."""
    name = " ".join(str(json_field(record, task.label_column, LABEL, where)).split())
    if not name:
        raise UserError(f"{where}: {task.label_column} is empty; correct it")
    return name


def _label(record: dict, task: Task, where: str, spellings: dict) -> int | float:
    """The class index of a record, or its number in a regression.

    spellings: those of the classes so far. M and m in one file are two classes, or an error.
    """
    if task.is_regression:
        label = record.get(task.label_column)
        low, high = task.score_range
        with contextlib.suppress(ValueError, TypeError):
            if math.isfinite(number := float(label)) and low <= number <= high:
                return number
        expected = f"a finite number in [{low:g}, {high:g}]"
    else:
        label = _class_name(record, task, where)
        if (index := task.indices.find(label)) is not None:
            whole = whole_number(label)
            before = spellings.setdefault((index, whole.casefold()), whole)
            if before != whole:
                raise UserError(
                    f"{where}: the labels {brief(before)} and {brief(whole)} differ by case alone, "
                    "and the task has one of them; correct one"
                )
            return index
        expected = f"one of {brief(', '.join(task.indices), 300)}"
    raise UserError(f"{where}: the label {brief(label)!r} is not {expected}; correct it")


def build_features(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_seq_length: int, **caching
) -> Dataset:
    """Turn examples into features of at most `max_seq_length` tokens, one per example, in order.

    Returns input_ids (list of `length` int32, unpadded), length, second_start (index of the first
    token of text_b: token types are 0 before it, 1 from it on; `length` for a single sentence) and
    the label, if there is one. Truncation is `longest_first` of transformers. `caching` are
    options of `cached_map`. Raises UserError for a length that leaves no room for the texts.
    """
    backend = fast_backend(tokenizer)
    texts = 1 if examples[0]["text_b"] is None else 2
    least = backend.num_special_tokens_to_add(is_pair=texts == 2) + texts
    if max_seq_length < least:
        raise UserError(f"--max_seq_length is {max_seq_length}, but must be at least {least}")
    backend.enable_truncation(max_seq_length, direction=tokenizer.truncation_side)
    return cached_map(
        examples,
        functools.partial(_featurize, backend=backend),
        [name for name in ("text_a", "text_b", "label") if name in examples.column_names],
        key=content_hash(VERSION, backend.to_str()),
        **caching,
    )


def _featurize(texts_a, texts_b, labels=None, *, backend):
    """One batch of examples -> a table of features."""
    pairs = [a if b is None else (a, b) for a, b in zip(texts_a, texts_b)]
    encodings = backend.encode_batch_fast(pairs)
    lengths = [len(encoding) for encoding in encodings]
    second_starts = [len(encoding) - sum(encoding.type_ids) for encoding in encodings]
    tokens = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
    columns = {
        "input_ids": ragged([np.fromiter(tokens, np.int32)], lengths),
        "length": pa.array(lengths, pa.int32()),
        "second_start": pa.array(second_starts, pa.int32()),
    }
    return pa.table(columns if labels is None else columns | {"label": pa.array(labels)})


collate = functools.partial(collate_features, second_start="second_start")


def submission(task: Task, examples: Dataset, logits: np.ndarray) -> str:
    """The predictions for a test split, as the text of a file in GLUE's submission format.

    logits: as in `glue_metrics`. Scores are clipped to the task's range.
    """
    if task.is_regression:
        scores = np.clip(np.asarray(logits, np.float32).reshape(len(examples)), *task.score_range)
        predictions = [str(x) if task.name == CUSTOM else f"{x:.3f}" for x in scores]
    else:
        names = range(len(task.labels)) if task.numbered else task.labels
        predictions = [names[index] for index in np.argmax(logits, axis=1)]
    rows = zip(examples["index"], predictions, strict=True)
    return "index\tprediction\n" + "".join(f"{index}\t{text}\n" for index, text in rows)
