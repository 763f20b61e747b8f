"""Reading examples: checks of a field, the hub, the first rows."""

import json
import re
from typing import Any

import datasets
from datasets import Dataset

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


def load_hub(*name: str, split: str, cache_dir: str | None) -> Dataset:
    """Load a split of a data set (name, configuration) from the hub; raises UserError."""
    try:
        return datasets.load_dataset(*name, split=split, cache_dir=cache_dir)
    except Exception as error:  # of many types: no network, offline mode, no cache
        reason = brief(f"{type(error).__name__}: {error}", 300)
        raise UserError(
            f"{', '.join(name)} ({split}): cannot be loaded from the hub ({reason}); "
            "pass local files with --data_dir"
        ) from error


def take_first(examples: Dataset, count: int | None) -> Dataset:
    """The first `count` examples; None for all."""
    return examples if count is None else examples.select(range(min(count, len(examples))))
