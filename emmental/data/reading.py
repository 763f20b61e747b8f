"""Read examples: the rows of a file, fields and their checks, the hub, names of labels."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from ..models.outputs import whole_number
from ..system.errors import UserError

LABEL = (str, int, bool)
JSON_TYPES = {
    list: "a list",
    str: "a string",
    bool: "true or false",
    (int, float): "a whole number",
    (str, int): "a string or a whole number",
    LABEL: "a string or a whole number, unless --regression is given",
}
SURROGATE = re.compile("[\ud800-\udfff]")


def brief(text: object, longest: int = 60) -> str:
    """A text in one line of at most `longest` characters, for a message."""
    line = " ".join(str(text).split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def json_field(
    record: object, name: str, kind: type | tuple[type, ...], where: str, default=None
) -> Any:
    """`record[name]`, or `default` if it is missing or null; 0 and 1 are false and true, 1.0 is 1.

    Raises UserError unless it is a `kind`.
    """
    if not isinstance(record, dict):
        raise UserError(f'{where}: must be an object with "{name}", not {brief(record)}')
    kinds = kind if isinstance(kind, tuple) else (kind,)
    value = record.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f'{where}: "{name}" is missing or null; correct it')
    if kind is bool and value in (0, 1):
        value = bool(value)
    if int in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) not in kinds:
        given = brief(json.dumps(value))
        raise UserError(f'{where}: "{name}" must be {JSON_TYPES[kind]}, not {given}')
    if isinstance(value, str) and SURROGATE.search(value):
        raise UserError(f'{where}: "{name}" holds half a surrogate pair; correct it')
    return value


def file_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line number, row): lists of strings, or the JSON values of JSON lines.

    Only \\n and \\r\\n end a line: a text may hold any other separator.
    """
    number = 0
    with open(path, "rb") as file:
        first = file.readline()
        second = file.readline()
    is_csv = path.suffix == ".csv" and b"\0" not in first  # not UTF-16
    if b"\r" in first.rstrip(b"\r\n") and (is_csv or not second):
        raise UserError(f"{path}: its lines end in CR alone; save it with LF or CRLF line ends")

    def lines() -> Iterator[str]:
        nonlocal number
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text.removesuffix("\n").removesuffix("\r")

    if path.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)
        rows = csv.reader((f"{line}\n" for line in lines()), strict=True)
    elif path.suffix in (".jsonl", ".json"):
        rows = (json.loads(line) for line in lines() if line.strip())
    else:
        rows = (line.split("\t") for line in lines())
    try:
        for row in rows:
            yield number, row
    except (ValueError, RecursionError, csv.Error) as error:
        kind = path.suffix[1:].upper()
        raise UserError(f"{path}:{number}: is not UTF-8 {kind} ({error}); correct it") from error


def load_hub(*name: str, split: str, cache_dir: str | None) -> Dataset:
    """Load a split of a data set (name, configuration) from the hub; raises UserError."""
    try:
        return datasets.load_dataset(*name, split=split, cache_dir=cache_dir)
    except Exception as error:  # many types: no network, offline mode, no cache
        reason = brief(f"{type(error).__name__}: {error}", 300)
        raise UserError(
            f"{', '.join(name)} ({split}): cannot be loaded from the hub ({reason}); "
            "pass local files with --data_dir"
        ) from error


def take_first(examples: Dataset, count: int | None) -> Dataset:
    """The first `count` examples; None for all."""
    return examples if count is None else examples.select(range(min(count, len(examples))))


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels sorted by name, or all whole numbers by value: 1, 2, 10."""
    labels = sorted(labels)
    numbers = {x: re.fullmatch(r"(?:LABEL_)?([+-]?\d{1,18})(?:\.0+)?", x) for x in labels}
    return sorted(labels, key=lambda x: int(numbers[x][1])) if all(numbers.values()) else labels


def name_outputs(
    outputs: tuple[str, ...], labels: tuple[str, ...], where: Path | str
) -> tuple[str, ...]:
    """The names of a model's outputs; if these are only LABEL_0, ..., the labels of a file.

    labels: of the file, in order; names or indices. Raises UserError if they do not fit the model.
    """
    if outputs != tuple(f"LABEL_{index}" for index in range(len(outputs))):
        return outputs
    for names in (outputs, tuple(map(str, range(len(outputs))))):
        if {*map(whole_number, labels)} <= set(names):
            return names
    if len(labels) == len(outputs):
        return labels
    raise UserError(
        f"{where}: has {len(labels)} labels ({brief(', '.join(labels))}), and the model has "
        f"{len(outputs)} outputs without names: name them in id2label of its config.json"
    )
