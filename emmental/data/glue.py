"""GLUE and tasks of one's own: reading, features, metrics, predictions. Imports no other part of `emmental`.

A sentence becomes `[CLS] text_a [SEP]`, a pair `[CLS] text_a [SEP] text_b [SEP]`, cut to a length at the end
of the longer text. Features are unpadded; `collate` pads a batch to its longest row. They are cached on disk.

GLUE (Wang et al. 2018) comes as tab-separated files, in which quotes are text and columns are found by the
header, or from the hub. Sources number the labels differently, so they meet by name: a class index is always
an index into `Task.labels`.
"""

import collections
import csv
import functools
import itertools
import json
import logging
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Features, Value

from emmental.data.features import (
    MODEL_INPUTS,
    cached_map,
    cached_rows,
    content_hash,
    fast_backend,
    one_line,
    pad_batch,
    quoted,
    ragged,
    row_tuples,
    text_problem,
)
from emmental.data.glue_tasks import custom_task, listed, plain
from emmental.errors import UserError

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when the features of the same input change: old caches are then ignored
HUB_NAME = "nyu-mll/glue"
CUSTOM_SUFFIXES = (".tsv", ".csv", ".jsonl")


# ---------------------------------------------------------------------------------------- examples


def read_examples(task, data_dir, split, cache_dir=None):
    """Read and check the file of a split (one of `task.splits`) in GLUE's original layout.

    Returns a `Dataset` with the columns index (int64: the test file's own, else the number of the
    row from 0), text_a, text_b (None where the task has single sentences) and, but for test splits, label
    (int64 index into `task.labels`; float64 for a regression), stored beside the features. Rows of QQP with too few
    fields are skipped, save in the test file, where every index needs a prediction: there a missing text is empty.
    Raises `UserError` for whatever is wrong with the file.
    """
    path, labelled = _split_file(task, data_dir, split), split not in task.submissions
    rows = functools.partial(_examples, task, path, labelled)
    return _stored(rows, path, [task.name, split], labelled, task.is_regression, cache_dir)


def _examples(task, path, labelled):
    rows = _tsv_rows(path)
    header = task.headerless if labelled and task.headerless else _header(path, rows)
    wanted = (*task.text_columns, *((task.label_column,) if labelled else ()))
    places = _places(path, header, wanted)
    index_place = next(
        (header.index(name) for name in ("index", "id") if name in header and not labelled), None
    )
    parse_label = _label_parser(task)
    count, short, long = 0, [], []
    for line, fields in rows:
        where = f"{path}:{line}"
        if fields == [""] != header:
            continue  # a blank line
        if len(fields) > len(header):
            long.append(line)
        elif len(fields) < len(header):
            if not task.short_rows:
                raise _wrong_width(where, fields, header)
            short.append(line)
            if labelled:
                continue
            fields += [""] * (len(header) - len(fields))
        values = [fields[place] for place in places]
        example = {"index": count if index_place is None else _index(fields[index_place], where)}
        if labelled:
            example["label"] = parse_label(values.pop(), where)
        yield example | _texts(values, wanted, where)
        count += 1
    for lines, what in (
        (short, f"too few fields, which {'are skipped' if labelled else 'get empty texts'}"),
        (long, "too many fields, of which the last are ignored"),
    ):
        if lines:
            logger.warning(f"{path}: rows with {what}: {len(lines)} (the first in line {lines[0]})")


def _texts(texts, columns, where):
    for text, column in zip(texts, columns):
        if problem := text_problem(text):
            raise UserError(f"{where}: {column} {problem}")
    return {"text_a": texts[0], "text_b": texts[1] if len(texts) > 1 else None}


def load_hub_examples(task, split, cache_dir=None):
    """Load a split of GLUE from the hub, with the columns of `read_examples`.

    Raises `UserError` when it can neither be downloaded nor found in the cache, or has other labels.
    """
    _check_split(task, split)
    hub_split = split.replace("dev", "validation")
    where = f"{HUB_NAME} ({task.hub_config}, {hub_split})"
    try:
        hub = datasets.load_dataset(HUB_NAME, task.hub_config, split=hub_split, cache_dir=cache_dir)
    except (
        Exception
    ) as error:  # no network, offline mode, missing cache: each has its own type, some of httpx
        raise UserError(
            f"{where}: cannot be loaded from the hub ({one_line(error)}); pass local files with --data_dir"
        ) from error
    columns, labelled = task.hub_columns or task.text_columns, split not in task.submissions
    parse_label = _label_parser(task)
    names = hub.features["label"].names if labelled and not task.is_regression else ()

    def rows():
        for row, (label, *texts) in enumerate(
            row_tuples(hub, ["label" if labelled else "idx", *columns])
        ):
            example = {"index": row if labelled else label}
            if labelled:
                label = names[label] if names and label >= 0 else label
                example["label"] = parse_label(str(label), f"{where}, row {row}")
            yield example | _texts(texts, columns, f"{where}, row {row}")

    return _stored(
        rows, where, [task.name, hub._fingerprint], labelled, task.is_regression, cache_dir
    )


def custom_files(data_dir, splits):
    """The files of these splits (train, dev, test) with the suffix .tsv, .csv or .jsonl: {split: path}.

    Raises `UserError` when one is missing, or when there are two for a split.
    """
    files = {}
    for split in splits:
        found = [
            path
            for suffix in CUSTOM_SUFFIXES
            if (path := Path(data_dir) / f"{split}{suffix}").is_file()
        ]
        if len(found) > 1:
            raise UserError(
                f"{data_dir}: holds both {found[0].name} and {found[1].name}; keep one of them"
            )
        if not found:
            names = " or ".join(f"{split}{suffix}" for suffix in CUSTOM_SUFFIXES)
            raise UserError(f"{data_dir}: holds no {names}; check --data_dir")
        files[split] = found[0]
    return files


def read_custom_examples(
    path,
    *,
    text_column,
    text_pair_column=None,
    label_column=None,
    labels=None,
    regression=False,
    cache_dir=None,
):
    """Read a .tsv, .csv (with the usual quoting) or .jsonl file of a task of one's own.

    Returns (examples with the columns of `read_examples`, label names). The names are `labels`, which the
    file's must be among, or else those that occur in it, sorted. Labels may be strings, whole numbers or
    booleans, and are names in any case; with `regression` they are numbers, and there are no names: ().
    Without a `label_column` the examples have no label. Raises `UserError` for whatever is wrong with the file.
    """
    wanted = [name for name in (text_column, text_pair_column, label_column) if name]
    if len(set(wanted)) < len(wanted):
        raise UserError(
            "--text_column, --text_pair_column and --label_column must name different columns"
        )
    text_columns = [name for name in (text_column, text_pair_column) if name]

    def checked():
        for row, (where, record) in enumerate(_custom_rows(Path(path), wanted)):
            texts = [_text(record, column, where) for column in text_columns]
            label = _label_text(record, label_column, where, regression) if label_column else None
            yield where, label, {"index": row} | _texts(texts, text_columns, where)

    if label_column and not regression and not labels:
        counts = collections.Counter(label for _, label, _ in checked())
        labels = sorted(counts)
        if len(labels) == 1:
            raise UserError(
                f"{path}: has the label {quoted(labels[0])} alone; a classification needs at least two"
            )
        if len(labels) > max(20, counts.total() / 10):
            logger.warning(
                f"{path}: has {len(labels)} labels in {counts.total()} rows; are they numbers (--regression)?"
            )
    parse_label = _label_parser(custom_task(() if regression else labels or ()))

    def rows():
        for where, label, example in checked():
            yield example | ({"label": parse_label(label, where)} if label_column else {})

    examples = _stored(
        rows, Path(path), [wanted, labels, regression], bool(label_column), regression, cache_dir
    )
    return examples, () if regression else tuple(labels or ())


def _stored(rows, where, settings, labelled, regression, cache_dir):
    """The examples that `rows()` yields. where: their file, or the name of the hub's data set."""
    kinds = {"index": Value("int64"), "text_a": Value("string"), "text_b": Value("string")}
    if labelled:
        kinds["label"] = Value("float64" if regression else "int64")
    key = content_hash("glue", VERSION, where, settings, labelled)
    return cached_rows(
        rows,
        Features(kinds),
        key,
        cache_dir,
        f"{where}: holds no examples; give a file with examples",
    )


def _check_split(task, split):
    if split not in task.splits:
        raise UserError(
            f"{task.name} has no split {split}; its splits are {', '.join(task.splits)}"
        )


def _split_file(task, data_dir, split):
    _check_split(task, split)
    folder, name = Path(data_dir), "diagnostic.tsv" if task.name == "ax" else f"{split}.tsv"
    if not (folder / name).exists():
        if not folder.is_dir():
            raise UserError(
                f"{folder / name}: cannot be read, there is no folder {folder}; check --data_dir"
            )
        below = [
            f for f in folder.iterdir() if plain(f.name) == task.hub_config and (f / name).is_file()
        ]
        hint = (
            f"did you mean --data_dir {below[0]}?"
            if below
            else f"check --data_dir and --task_name {task.name}"
        )
        raise UserError(f"{folder / name}: there is no file {name} in the folder {folder}; {hint}")
    return folder / name


def _lines(path):
    """Yield (number from 1, text) of each line. Only \\n and \\r\\n end one: all else may stand in a text."""
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: is not UTF-8 ({error.reason}); convert the file"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check --data_dir"
        ) from error
    if not number:
        raise UserError(f"{path}: is empty; give a file with examples")


def _tsv_rows(path):
    for line, text in _lines(path):
        yield line, text.split("\t")


def _csv_rows(path):
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((f"{text}\n" for _, text in _lines(path)), strict=True)
    try:
        for fields in reader:
            yield reader.line_num, fields or [""]
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.line_num}: is not CSV ({error}); check the quotes"
        ) from error


def _header(path, rows):
    header = next((fields for _, fields in rows if fields != [""]), None)
    if header is None:
        raise UserError(f"{path}: is empty; give a file with examples")
    return header


def _places(path, header, wanted):
    for name in wanted:
        if header.count(name) != 1:
            problem = "two columns" if name in header else "no column"
            raise UserError(
                f"{path}: the header, its first line, has {problem} {name}; "
                f"expected: {listed(wanted)}; found: {listed(header)}"
            )
    return [header.index(name) for name in wanted]


def _wrong_width(where, fields, header):
    return UserError(
        f"{where}: has {len(fields)} fields, but there are {len(header)} columns; correct the row"
    )


def _custom_rows(path, wanted):
    """Yield (place in the file, {column: value}) of each row."""
    if path.suffix == ".jsonl":
        for line, text in _lines(path):
            if text.strip():
                yield f"{path}:{line}", _json_record(text, f"{path}:{line}", wanted)
        return
    rows = _csv_rows(path) if path.suffix == ".csv" else _tsv_rows(path)
    header = _header(path, rows)
    places = _places(path, header, wanted)
    for line, fields in rows:
        if fields == [""]:
            if len(header) == 1:  # a text, or the end of the file? an index hangs on it
                raise UserError(f"{path}:{line}: is blank; give it a text, or remove it")
            continue
        if len(fields) != len(header):
            raise _wrong_width(f"{path}:{line}", fields, header)
        yield f"{path}:{line}", {name: fields[place] for name, place in zip(wanted, places)}


def _json_record(text, where, wanted):
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error}); each line must be one object") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: must be an object like {{"{wanted[0]}": ...}}; correct it')
    for name in wanted:
        if name not in record:
            raise UserError(
                f"{where}: has no column {name}; expected: {listed(wanted)}; found: {listed(record)}"
            )
    return record


def _text(record, column, where):
    text = record[column]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {column} must be a text, not {json.dumps(text)[:40]}; correct it"
        )
    return text


def _label_text(record, column, where, regression):
    label = record[column]
    if isinstance(label, float) and not regression:
        raise UserError(
            f"{where}: {column} is {label}, but only a regression has fractions as labels; correct it"
        )
    if not isinstance(label, (int, float)):  # a bool is an int
        label = " ".join(_text(record, column, where).split())
        if not label:
            raise UserError(f"{where}: {column} is empty; correct it")
        if problem := text_problem(label):
            raise UserError(f"{where}: {column} {problem}")
    return str(label)


def _label_parser(task):
    """A function (text of a label, its place) -> class index, or number in a regression."""
    if task.is_regression:
        return functools.partial(_number, limits=task.score_range)
    indices = {name: index for index, name in enumerate(task.labels)}
    if task.numbered:
        indices |= {str(index): index for index in range(len(task.labels))}

    def parse(label, where):
        if label not in indices:
            raise UserError(
                f"{where}: the label {listed([label])!r} is not one of {listed(indices)}; correct it"
            )
        return indices[label]

    return parse


def _number(label, where, limits):
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    low, high = limits or (-math.inf, math.inf)
    if not (math.isfinite(number) and low <= number <= high):
        kind = f"a number from {low:g} to {high:g}" if limits else "a finite number"
        raise UserError(f"{where}: the label {listed([label])!r} is not {kind}; correct it")
    return number


def _index(text, where):
    try:
        index = int(text)
    except ValueError:
        index = -1
    if not 0 <= index < 2**63:
        raise UserError(f"{where}: the index {listed([text])!r} is not a whole number; correct it")
    return index


# ---------------------------------------------------------------------------------------- features


def build_features(examples, tokenizer, *, max_seq_length, num_proc=1, overwrite_cache=False):
    """Turn examples into features, one for each, of at most `max_seq_length` tokens.

    Returns a `Dataset` whose rows are in the order of the examples: input_ids (list of `length` int32,
    unpadded), length, second_start (index of the first token of text_b: token types are 0 before it, 1 from it
    on; `length` for a single sentence) and, where the examples have one, label. Of too long a pair the longer
    text loses tokens at its end, as by `truncation="longest_first"` of transformers.

    They are cached beside the examples. `num_proc` processes give the same rows as one.
    Raises `UserError` for a slow tokenizer, or a length that leaves no room for the texts.
    """
    backend = fast_backend(tokenizer)
    if not len(examples):
        raise UserError("there is no example to make features of; check the data file")
    texts = 1 if examples[0]["text_b"] is None else 2
    least = backend.num_special_tokens_to_add(is_pair=texts == 2) + texts
    if max_seq_length < least:
        raise UserError(
            f"--max_seq_length is {max_seq_length}, but must be at least {least} for this task"
        )
    backend.enable_truncation(
        max_seq_length, strategy="longest_first", direction=tokenizer.truncation_side
    )
    return cached_map(
        examples,
        functools.partial(_featurize, backend=backend),
        [name for name in ("text_a", "text_b", "label") if name in examples.column_names],
        name="glue",
        key=content_hash(VERSION, backend.to_str()),
        num_proc=num_proc,
        overwrite_cache=overwrite_cache,
    )


def _featurize(texts_a, texts_b, labels=None, *, backend):
    """One batch of examples -> a table of features."""
    encodings = backend.encode_batch_fast(
        [a if b is None else (a, b) for a, b in zip(texts_a, texts_b)]
    )
    lengths = [len(encoding) for encoding in encodings]
    tokens = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
    table = {
        "input_ids": ragged([np.fromiter(tokens, np.int32, sum(lengths))], lengths),
        "length": pa.array(lengths, pa.int32()),
        "second_start": pa.array(
            [len(encoding) - sum(encoding.type_ids) for encoding in encodings], pa.int32()
        ),
    }
    if labels is not None:
        table["label"] = pa.array(labels)
    return pa.table(table)


def collate(features, pad_token_id, multiple_of=8, input_names=MODEL_INPUTS):
    """Pad features to the longest of the batch, rounded up to a multiple of `multiple_of` tokens.

    Returns int64 tensors: input_ids, attention_mask and token_type_ids (batch, tokens), as far as the model takes
    them (`input_names`), and, where the
    features have a label, labels (batch,): int64 class indices, or float32 for a regression.
    """
    second_starts = [feature["second_start"] for feature in features]
    batch = pad_batch(features, second_starts, pad_token_id, multiple_of, input_names)
    if "label" in features[0]:
        labels = [feature["label"] for feature in features]
        batch["labels"] = torch.tensor(
            labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64
        )
    return batch


# ------------------------------------------------------------------------------------- predictions


def submission(task, examples, logits):
    """The predictions for a test split as the text of a file in GLUE's submission format.

    A line for each example: its index, a tab, and its label (a number where GLUE wants one); scores lie in the
    task's range. logits are those of `glue_metrics`.
    """
    logits = np.asarray(logits, np.float64)
    if task.is_regression:
        scores = np.clip(logits.reshape(len(examples)), *(task.score_range or (None, None)))
        predictions = [f"{score:.3f}" for score in scores]
    else:
        names = range(len(task.labels)) if task.numbered else task.labels
        predictions = [names[index] for index in logits.argmax(axis=1)]
    lines = [
        f"{index}\t{text}\n" for index, text in zip(examples["index"], predictions, strict=True)
    ]
    return "".join(["index\tprediction\n", *lines])
