"""SQuAD v1.1 and v2.0: the examples of a file or of the hub."""

import collections
import functools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, List, Value

from ..system.errors import UserError
from .cache import cached_rows, content_hash
from .reading import brief, json_field, load_hub

logger = logging.getLogger(__name__)

VERSION = 4  # raise it when the features of the same input change: old caches are then ignored
HUB_NAMES = {False: "rajpurkar/squad", True: "rajpurkar/squad_v2"}
EXAMPLE_FEATURES = Features(
    id=Value("string"),
    title=Value("string"),
    context=Value("string"),
    question=Value("string"),
    answers={"text": List(Value("string")), "answer_start": List(Value("int32"))},
    is_impossible=Value("bool"),
)
NULL = re.compile(rb'"(title|paragraphs|context|qas|id|question|answers|text)"\s*:\s*null\b')


def read_examples(
    path: Path | str,
    version_2_with_negative: bool,
    unique_ids: bool = True,
    cache_dir: str | None = None,
) -> Dataset:
    """Read and check a SQuAD JSON file.

    Returns the columns id, title, context, question, answers {text: list of str, answer_start:
    list of int, in characters} and is_impossible. Predictions are keyed by id, so an evaluation
    needs `unique_ids`; training does not. Texts and lists that are null count as absent, and so
    does all that needs them, with a warning. Raises UserError for errors in the file.
    """
    path = Path(path)
    key = content_hash("squad", VERSION, version_2_with_negative, unique_ids, path)
    rows = functools.partial(_questions, path, version_2_with_negative, unique_ids)
    examples = cached_rows(rows, EXAMPLE_FEATURES, key, cache_dir)
    nulls = collections.Counter(match[1].decode() for match in NULL.finditer(path.read_bytes()))
    if nulls:
        counts = ", ".join(f"{count} {name}" for name, count in nulls.items())
        logger.warning(f"{path}: null counts as absent: {counts}")
    if not len(examples):
        raise UserError(f"{path}: is empty; it holds no questions")
    return examples


def load_hub_examples(
    split: str, version_2_with_negative: bool, cache_dir: str | None = None
) -> Dataset:
    """Load `split` ("train" or "validation") from the hub, with the columns of `read_examples`."""
    name = HUB_NAMES[version_2_with_negative]
    hub = load_hub(name, split=split, cache_dir=cache_dir)
    is_impossible = [version_2_with_negative and is_unanswerable(a) for a in hub["answers"]]
    return hub.add_column("is_impossible", is_impossible).select_columns(list(EXAMPLE_FEATURES))


def is_unanswerable(answers: dict[str, list]) -> bool:
    """Whether a question has no answer. v2.0 has such questions; v1.1 cannot train on them."""
    return not any(text.strip() for text in answers["text"])


def _questions(path: Path, version_2_with_negative: bool, unique_ids: bool) -> Iterator[dict]:
    """Check and yield the questions of a file, as rows of the data set."""
    ids = set()
    for article, in_article in _items(_read_json(path), "data", str(path)):
        title = json_field(article, "title", str, in_article, default="")
        for paragraph, in_paragraph in _items(article, "paragraphs", in_article):
            if _has_null(paragraph, "context"):
                continue
            context = json_field(paragraph, "context", str, in_paragraph)
            for qa, where in _items(paragraph, "qas", in_paragraph):
                if _has_null(qa, "id", "question"):
                    continue
                id_ = str(json_field(qa, "id", (str, int), where))
                if unique_ids and id_ in ids:
                    raise UserError(
                        f"{where}: the id {brief(id_)!r} already belongs to another question"
                    )
                ids.add(id_)
                question = json_field(qa, "question", str, where)
                answers = _answers(qa, where, len(context), version_2_with_negative)
                yield {
                    "id": id_,
                    "title": title,
                    "context": context,
                    "question": question,
                    "answers": answers,
                    "is_impossible": version_2_with_negative and is_unanswerable(answers),
                }


def _answers(qa: dict, where: str, length: int, version_2_with_negative: bool) -> dict[str, list]:
    """The answers of a question about a context of `length` characters.

    An `answer_start` that is missing or cannot be is -1: evaluation does not need it.
    """
    marked = json_field(qa, "is_impossible", bool, where, default=False)
    texts, starts = [], []
    for answer, in_answer in _items(qa, "answers", where, default=[]):
        if _has_null(answer, "text"):
            continue
        texts.append(json_field(answer, "text", str, in_answer, default="" if marked else None))
        start = json_field(answer, "answer_start", (int, float), in_answer, default=-1)
        starts.append(start if isinstance(start, int) and 0 <= start < length else -1)
    answers = {"text": texts, "answer_start": starts}
    if marked and not (version_2_with_negative and is_unanswerable(answers)):
        raise UserError(
            f"{where}: is_impossible is true; add --version_2_with_negative and give the question "
            "no answers"
        )
    if version_2_with_negative and is_unanswerable(answers):
        return {"text": [], "answer_start": []}
    return answers


def _read_json(path: Path) -> object:
    content = path.read_bytes()
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        start = brief(content[:200].decode(errors="replace"))
        raise UserError(
            f"{path}: is not JSON in UTF-8: {error}; it begins with {start!r}: correct it, or "
            "download it again"
        ) from error


def _items(record: dict, name: str, where: str, **default) -> Iterator[tuple[object, str]]:
    """Yield the items of the list `record[name]`, each with its place in the file."""
    if _has_null(record, name):
        return
    for n, item in enumerate(json_field(record, name, list, where, **default)):
        yield item, f"{where}, {name}[{n}]"


def _has_null(record: object, *names: str) -> bool:
    """Whether one of these fields is null, as other tools write absent values."""
    return isinstance(record, dict) and any(record.get(name, ...) is None for name in names)
