"""Tagged words: reading, features, predictions.

A sentence becomes `[CLS] pieces [SEP]`. Each word has its tag at its first piece. Sentences come
from columns as of CoNLL (a word a line, a blank line after a sentence), from JSON lines or the hub.
"""

import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from ..system.errors import UserError
from .cache import cached_map, cached_rows, content_hash, ragged, row_tuples
from .entities import ENTITY_TAG, has_entities
from .padding import fast_backend
from .reading import brief, file_rows, in_order, json_field, load_hub
from .windows import best_windows, windows_of

logger = logging.getLogger(__name__)

VERSION = 2  # raise it when the features of the same input change: old caches are then ignored
STEMS = {"train": ("train",), "dev": ("dev", "valid"), "test": ("test",)}
WORDS, TAGS = ("words", "tokens"), ("tags", "ner_tags")  # fields of JSON lines and of the hub
IGNORED = -100  # tag of tokens that do not count: not the first piece, or another window is better

Columns = tuple[str | None, str | None]  # columns of word and tag; None: the usual ones
Sentence = tuple[int, list[str], list[str] | None]  # line, words, tags


def split_file(data_dir: Path | str, split: str) -> Path:
    """The file of a split; raises UserError unless there is exactly one."""
    stems = STEMS[split]
    files = [x for stem in stems for x in sorted(Path(data_dir).glob(f"{stem}.*")) if x.is_file()]
    if len(files) != 1:
        names = " or ".join(f"{stem}.*" for stem in stems)
        present = ", ".join(file.name for file in files) or "none"
        raise UserError(f"--data_dir {data_dir} must hold exactly one file {names}, has {present}")
    return files[0]


def read_examples(path: Path, columns: Columns, test: bool, cache_dir: str | None) -> Dataset:
    """The sentences of a file: words, their tags, and line, where they begin.

    test: the file may lack tags, and so do the sentences then. Raises UserError for errors in the
    file.
    """
    is_json = path.suffix in (".json", ".jsonl")
    read = functools.partial(_json_sentences if is_json else _sentences, path, columns, test)
    key = content_hash("tags", VERSION, path, path.suffix, columns, test)
    return _cached(read, str(path), key, cache_dir)


def load_hub_examples(
    name: tuple[str, ...], split: str, columns: Columns, cache_dir: str | None
) -> Dataset:
    """A split of a data set (name, configuration) on the hub, in the columns of `read_examples`."""
    hub_split = split.replace("dev", "validation")
    hub = load_hub(*name, split=hub_split, cache_dir=cache_dir)
    where = f"{', '.join(name)} ({hub_split})"
    fields = [_field(column, usual, hub.features) for column, usual in zip(columns, (WORDS, TAGS))]
    kind = getattr(hub.features.get(fields[1]), "feature", None)
    names = dict(enumerate(getattr(kind, "names", None) or ()))  # a ClassLabel has names

    def read() -> Iterator[Sentence]:
        for row, record in enumerate(hub.select_columns([x for x in fields if x in hub.features])):
            if names and isinstance(tags := record[fields[1]], list):
                record[fields[1]] = [names.get(tag, tag) for tag in tags]
            yield from _of_record(row, record, f"{where}, row {row}", columns, split == "test")

    key = content_hash("tags", VERSION, hub._fingerprint, columns, split)
    return _cached(read, where, key, cache_dir)


def _cached(read: Callable, where: str, key: str, cache_dir: str | None) -> Dataset:
    _, _, tags = next(read(), (0, [], []))
    kinds = {"line": Value("int64"), "words": [Value("string")], "tags": [Value("string")]}
    if tags is None:
        del kinds["tags"]

    def rows() -> Iterator[dict]:
        for sentence in read():
            if "tags" in kinds and sentence[2] is None:
                raise UserError(f"{where}:{sentence[0]}: has no tags, and the first sentence has")
            yield {name: x for name, x in zip(("line", "words", "tags"), sentence) if name in kinds}

    examples = cached_rows(rows, Features(kinds), key, cache_dir)
    if not len(examples):
        raise UserError(f"{where}: is empty; it holds no sentence")
    return examples


def _sentences(path: Path, columns: Columns, test: bool) -> Iterator[Sentence]:
    """The sentences of a file of columns, split at tabs if the first row has one, or at spaces."""
    numbers = []
    for name, column in zip(("word", "tag"), columns):
        if column is not None and not (column.isdecimal() and int(column)):
            raise UserError(
                f"--{name}_column {column}: {path} has columns, whose numbers begin at 1"
            )
        numbers.append(int(column or 0))
    word, tag = numbers[0] or 1, numbers[1]
    needed = max(word, tag or word + 1)
    width = None
    lines = file_rows(path)
    if path.suffix == ".conllu":  # without comments, ranges (1-2) and empty nodes (2.1)
        lines = (row for row in lines if not re.match(r"#|\d+[-.]", row[1][0]))
    for is_sentence, rows in itertools.groupby(lines, key=_has_word):
        if not is_sentence:
            continue
        rows = [*rows]
        if width is None:
            first, fields = rows[0]
            spaced = len(fields) == 1
            width = len(_split(fields) if spaced else fields)
            has_tags = width >= needed or not (test and width >= word)
            if has_tags and width < needed:
                number = f"{width} column{'s' * (width > 1)}"
                raise UserError(f"{path}:{first}: has {number}; a word and its tag need {needed}")
        words, tags = [], []
        for line, fields in rows:
            fields = _split(fields) if spaced else fields
            if len(fields) != width:
                number = f"{len(fields)} column{'s' * (len(fields) > 1)}"
                raise UserError(
                    f"{path}:{line}: has {number}, and line {first} has {width}; correct it"
                )
            words.append(fields[word - 1].strip(" "))
            if has_tags:
                tags.append(_tag(fields[tag - 1], f"{path}:{line}"))
        yield rows[0][0], words, tags if has_tags else None


def _split(fields: list[str]) -> list[str]:
    return re.split("[ \t]+", "\t".join(fields).strip(" \t"))


def _has_word(row: tuple[int, list[str]]) -> bool:
    """Whether a row of a file of columns belongs to a sentence; the others separate sentences."""
    fields = row[1]
    return any(map(str.strip, fields)) and fields[0].split()[:1] != ["-DOCSTART-"]


def _tag(text: str, where: str) -> str:
    tag = " ".join(text.split())
    if not tag:
        raise UserError(f"{where}: the tag is empty; correct it")
    return tag


def _json_sentences(path: Path, columns: Columns, test: bool) -> Iterator[Sentence]:
    for line, record in file_rows(path):
        yield from _of_record(line, record, f"{path}:{line}", columns, test)


def _of_record(
    line: int, record: object, where: str, columns: Columns, test: bool
) -> Iterator[Sentence]:
    """The sentence of a record, or nothing if it has no words."""
    names = record if isinstance(record, dict) else ()
    word_field, tag_field = (_field(x, usual, names) for x, usual in zip(columns, (WORDS, TAGS)))
    words = json_field(record, word_field, list, where)
    tags = None
    if not test or record.get(tag_field) is not None:
        tags = json_field(record, tag_field, list, where)
        if len(tags) != len(words):
            raise UserError(
                f"{where}: has {len(words)} {word_field} and {len(tags)} {tag_field}; correct it"
            )
    words = _checked(words, word_field, str, where)
    if tags is not None:
        tags = [_tag(str(x), where) for x in _checked(tags, tag_field, (str, int), where)]
    if words:
        yield line, words, tags


def _checked(values: list, name: str, kind: type | tuple[type, ...], where: str) -> list:
    entries = {f"{name}[{place}]": value for place, value in enumerate(values)}
    return [json_field(entries, entry, kind, where) for entry in entries]


def _field(given: str | None, usual: tuple[str, ...], names) -> str:
    return given or next((name for name in usual if name in names), usual[0])


def tag_places(examples: Dataset, where: str) -> dict[str, str]:
    """The tags of examples in order, each with a place that has it. where: their file."""
    lines = {}
    if "tags" in examples.column_names:
        for line, tags in row_tuples(examples, ["line", "tags"]):
            for tag in tags:
                lines.setdefault(tag, line)
    return {tag: f"{where}:{lines[tag]}" for tag in in_order(lines)}


def labels_of(places: dict[str, str], where: str) -> tuple[str, ...]:
    """The tags of a training file; raises UserError unless they are several, in one scheme."""
    if len(places) < 2:
        raise UserError(f"{where}: has {len(places)} different tags; it must have two or more")
    _check_scheme(places, places)
    return tuple(places)


def _check_scheme(places: dict[str, str], labels: Iterable[str]) -> None:
    if not has_entities(labels):
        return
    for tag, place in places.items():
        if not ENTITY_TAG.fullmatch(tag):
            raise UserError(
                f"{place}: its sentence has the tag {brief(tag)!r}; beside tags such as B-name, "
                "tags must be O, or B-, I-, E- or S- (BILOU: L- or U-) and a type"
            )


def compared(
    examples: Dataset, places: dict[str, str], labels: tuple[str, ...], where: str, test: bool
) -> Dataset:
    """The examples. A test file with tags of another task than the labels loses its tags.

    Any other file of another task is refused with a UserError, and so is a tag that fits no scheme.
    Warns of tags that are not among the labels.
    """
    lacking = {tag: place for tag, place in places.items() if tag not in labels}
    if lacking and not (places.keys() & {*labels}) - {"O"}:
        given, known = (brief(", ".join(names), 200) for names in (places, labels))
        problem = f"{where}: has the tags {given}, and the model {known}"
        if not test:
            raise UserError(f"{problem}: give a model and files of the same task")
        logger.warning(f"{problem}: these tags are not compared")
        return examples.remove_columns("tags")
    _check_scheme(lacking, labels)
    for tag, place in lacking.items():
        logger.warning(
            f"{place}: its sentence has the tag {brief(tag)!r}, which the model does not have: it "
            "counts as an error"
        )
    return examples


def build_features(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...],
    *,
    max_seq_length: int,
    stride: int,
    **caching,
) -> Dataset:
    """Turn examples into features, one per window of a sentence; lengths and strides are in tokens.

    Returns, in the order of the words: input_ids (list of `length` int32, unpadded), length, tags:
    for each token the index of its word's tag in `labels` (0 if there is none), if it is the first
    piece of a word that no other window shows with more context, else IGNORED. So each word counts
    once. A word without pieces, such as a control character, is an unknown token. caching: options
    of `cached_map`. Raises UserError for a length that leaves no room for words.
    """
    backend = fast_backend(tokenizer)
    framed = backend.encode(["a"], is_pretokenized=True)
    inside = [place for place, number in enumerate(framed.sequence_ids) if number == 0]
    frame = framed.ids[: inside[0]], framed.ids[inside[-1] + 1 :]
    least = sum(map(len, frame)) + 1
    if max_seq_length < least:
        raise UserError(f"--max_seq_length is {max_seq_length}, but must be at least {least}")
    sizes = max_seq_length - least + 1, stride
    settings = {"frame": frame, "sizes": sizes, "unknown": tokenizer.unk_token_id or 0}
    settings["indices"] = {tag: index for index, tag in enumerate(labels)}
    return cached_map(
        examples,
        functools.partial(_featurize, backend=backend, **settings),
        [name for name in ("words", "tags") if name in examples.column_names],
        key=content_hash("tags", VERSION, backend.to_str(), settings),
        **caching,
    )


def _featurize(sentences, tags=None, *, backend, frame, sizes, unknown, indices):
    """One batch of examples -> a table of features."""
    before, after = (np.array(ids, np.int32) for ids in frame)
    around = [np.full(len(ids), IGNORED, np.int32) for ids in (before, after)]
    tokens, marks, lengths = [], [], []
    encodings = backend.encode_batch(sentences, is_pretokenized=True, add_special_tokens=False)
    for words, row, encoding in zip(sentences, tags or itertools.repeat(()), encodings):
        pieces = [[] for _ in words]
        for id_, word in zip(encoding.ids, encoding.word_ids):
            pieces[word].append(id_)
        pieces = [ids or [unknown] for ids in pieces]
        ids = np.fromiter(itertools.chain.from_iterable(pieces), np.int32)
        firsts = np.cumsum([0, *map(len, pieces)])[:-1]
        mark = np.full(len(ids), IGNORED, np.int32)
        mark[firsts] = [indices.get(tag, 0) for tag in row] or 0
        windows = windows_of(len(ids), *sizes)
        best = best_windows(len(ids), windows)
        for n, (begin, end) in enumerate(windows):
            shown = np.where(best[begin:end] == n, mark[begin:end], IGNORED)
            if (shown != IGNORED).any():
                tokens += (before, ids[begin:end], after)
                marks += (around[0], shown, around[1])
                lengths.append(len(before) + end - begin + len(after))
    table = {"input_ids": ragged(tokens, lengths), "length": pa.array(lengths, pa.int32())}
    return pa.table(table | {"tags": ragged(marks, lengths)})


def predicted_tags(
    examples: Dataset, features: Dataset, logits: list[np.ndarray], labels: tuple[str, ...]
) -> list[list[str]]:
    """The tags of the words of each example. logits: (tokens, labels) of each feature."""
    tags = iter(
        labels[index]
        for row, (marks,) in zip(logits, row_tuples(features, ["tags"]), strict=True)
        for index in row[: len(marks)][np.array(marks) != IGNORED].argmax(-1)
    )
    return [[*itertools.islice(tags, len(words))] for (words,) in row_tuples(examples, ["words"])]


def columns_of(examples: Dataset, predicted: list[list[str]]) -> str:
    """The words, their tags if there are some, and the predicted tags, as a file of columns."""
    names = [name for name in ("words", "tags") if name in examples.column_names]
    text = ""
    for *columns, tags in zip(*(examples[name] for name in names), predicted, strict=True):
        rows = zip(*columns, tags, strict=True)
        text += "".join("\t".join(re.sub(r"\s", " ", x) for x in row) + "\n" for row in rows) + "\n"
    return text
