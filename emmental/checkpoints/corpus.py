"""Read the texts of a corpus: from text files, tables and JSON."""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..system.errors import UserError, first_line

BATCH = 1000  # texts that are tokenized at once


def corpus_files(paths: Sequence[str]) -> list[Path]:
    """The files at these paths, and in the folders among them. Raises UserError for none."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--keep_vocabulary_of {path} does not exist")
        inside = (file for file in path.rglob("*") if not file.name.startswith("."))
        files += sorted(filter(Path.is_file, inside)) if path.is_dir() else [path]
    if paths and not files:
        raise UserError(f"--keep_vocabulary_of {' '.join(paths)}: there is no file")
    return files


def batches_of(files: Sequence[Path]) -> Iterator[list[str]]:
    """The texts of files, and each of their words, in lists. Raises UserError."""
    texts = _texts(files)
    while batch := list(itertools.islice(texts, BATCH)):
        yield batch


def _texts(files: Sequence[Path]) -> Iterator[str]:
    """The texts of files, then their words, alone and behind a space, as words stand in texts."""
    words = set()
    for file in files:
        try:
            with file.open(encoding="utf-8-sig") as lines:
                for text in _texts_of(lines, file.suffix.lower()):
                    words.update(text.split())
                    yield text
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise UserError(
                f"{file} cannot be read as text ({first_line(error)}): leave it out, or correct it"
            ) from error
    if not words:
        raise UserError(f"--keep_vocabulary_of: there is no text in {', '.join(map(str, files))}")
    for word in sorted(words):
        yield from (word, f" {word}")


def _texts_of(lines: Iterable[str], suffix: str) -> Iterator[str]:
    """All strings of JSON or JSON lines; of any other file its lines, and the fields of tables."""
    if suffix in (".json", ".jsonl"):
        content = "".join(lines)
        try:
            values = [json.loads(content)]
        except ValueError:
            values = [json.loads(line) for line in content.split("\n") if line.strip()]
        yield from _strings(values)
        return
    lines = [line.rstrip("\n") for line in lines]
    if any("\0" in line for line in lines):
        raise ValueError("it holds null characters")
    yield from lines
    csv.field_size_limit(2**31 - 1)
    tables = {".csv": csv.reader(f"{line}\n" for line in lines)}
    tables[".tsv"] = (line.split("\t") for line in lines)
    yield from itertools.chain.from_iterable(tables.get(suffix, ()))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value.encode(errors="ignore").decode()  # without halves of surrogate pairs
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
