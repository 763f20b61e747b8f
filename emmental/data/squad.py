"""SQuAD v1.1 and v2.0: reading, features, answers.

A question and its paragraph become one or more features `[CLS] question [SEP] window [SEP]`;
windows overlap as in BERT (Devlin et al. 2019, section 4.2, and its `run_squad.py`). Every context
token keeps its start and end character, so an answer is a slice of the original text. Each distinct
context is tokenized once, not once per question.
"""

import codecs
import collections
import functools
import itertools
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from emmental.data.features import (
    brief,
    cached_map,
    cached_rows,
    collate_features,
    content_hash,
    fast_backend,
    json_field,
    load_hub,
    ragged,
    row_tuples,
)
from emmental.errors import UserError

VERSION = 3  # raise it when the features of the same input change: old caches are then ignored
HUB_NAMES = {False: "rajpurkar/squad", True: "rajpurkar/squad_v2"}
NO_SPAN_ODDS = 1e6  # null odds of a question without a valid span: finite, above every real score
SPACES = [place for place in range(0x3001) if chr(place).isspace()]  # all that Unicode has
EXAMPLE_FEATURES = Features(
    id=Value("string"),
    title=Value("string"),
    context=Value("string"),
    question=Value("string"),
    answers={"text": List(Value("string")), "answer_start": List(Value("int32"))},
    is_impossible=Value("bool"),
)


# ---------------------------------------------------------------------------------------- examples


def read_examples(
    path: Path | str,
    version_2_with_negative: bool,
    unique_ids: bool = True,
    cache_dir: str | None = None,
) -> Dataset:
    """Read and check a SQuAD JSON file.

    Returns the columns id, title, context, question, answers {text: list of str, answer_start:
    list of int, in characters} and is_impossible. Predictions are keyed by id, so an evaluation
    needs `unique_ids`; training does not. Raises UserError for errors in the file.
    """
    path = Path(path)
    key = content_hash("squad", VERSION, version_2_with_negative, unique_ids, path)
    rows = functools.partial(_questions, path, version_2_with_negative, unique_ids)
    examples = cached_rows(rows, EXAMPLE_FEATURES, key, cache_dir)
    if not len(examples):
        raise UserError(f"{path}: is empty; it holds no questions")
    return examples


def _questions(path: Path, version_2_with_negative: bool, unique_ids: bool) -> Iterator[dict]:
    """Check and yield the questions of a file, as rows of the data set."""
    ids = set()
    for article, in_article in _items(_read_json(path), "data", str(path)):
        title = json_field(article, "title", str, in_article, default="")
        for paragraph, in_paragraph in _items(article, "paragraphs", in_article):
            context = json_field(paragraph, "context", str, in_paragraph)
            for qa, where in _items(paragraph, "qas", in_paragraph):
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


def is_unanswerable(answers: dict[str, list]) -> bool:
    """Whether a question has no answer: in v2.0 that is right, v1.1 cannot train on it."""
    return not any(text.strip() for text in answers["text"])


def _read_json(path: Path) -> object:
    content = path.read_bytes()
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON in UTF-8: {_what_it_is(content, error)}") from error


def _what_it_is(content: bytes, error: Exception) -> str:
    """What a file is that is not JSON, and what to do."""
    start = content[:200].removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs; run `git lfs pull` in its repository"
    if start.startswith(b"<"):
        return "it is HTML or XML, such as a web page; download the file itself"
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        return "it is compressed; unpack it"
    if not json.detect_encoding(content).startswith("utf-8"):
        return "it is UTF-16 or UTF-32; save it as UTF-8"
    if isinstance(error, UnicodeDecodeError):
        return f"{error}; save it as UTF-8"
    if start and not start.startswith((b"{", b"[")):
        return (
            f"it is other text, such as CSV ({brief(start.decode(errors='replace'))!r}); convert it"
        )
    if not isinstance(error, json.JSONDecodeError):  # nested too deeply, an endless number
        return f"{error}; correct it"
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if not after or error.msg.startswith("Unterminated"):
        return f"{error}: it ends early; download it again"
    trailing = ": a trailing comma" if before.endswith(",") and after[0] in "]}" else ""
    return f"{error}{trailing}; correct it"


def _items(record: dict, name: str, where: str, **default) -> Iterator[tuple[object, str]]:
    """Yield the items of the list `record[name]`, each with its place in the file."""
    for n, item in enumerate(json_field(record, name, list, where, **default)):
        yield item, f"{where}, {name}[{n}]"


def load_hub_examples(
    split: str, version_2_with_negative: bool, cache_dir: str | None = None
) -> Dataset:
    """Load `split` ("train" or "validation") from the hub, with the columns of `read_examples`."""
    name = HUB_NAMES[version_2_with_negative]
    hub = load_hub(name, split=split, cache_dir=cache_dir)
    is_impossible = [version_2_with_negative and is_unanswerable(a) for a in hub["answers"]]
    return hub.add_column("is_impossible", is_impossible).select_columns(list(EXAMPLE_FEATURES))


def drop_misaligned(examples: Dataset) -> tuple[Dataset, dict[str, list[str]]]:
    """Drop the questions that cannot be trained on; returns (the others, {reason: dropped ids}).

    These are questions of v1.1 without an answer, and those whose first answer is blank or not at
    its `answer_start`.
    """
    keep, dropped = [], collections.defaultdict(list)
    names = ["id", "context", "answers", "is_impossible"]
    for row, (id_, context, answers, is_impossible) in enumerate(row_tuples(examples, names)):
        text, start = next(zip(answers["text"], answers["answer_start"]), ("", -1))
        if is_impossible or (text.strip() and start >= 0 and context.startswith(text, start)):
            keep.append(row)
        elif is_unanswerable(answers):
            dropped["no answer"].append(id_)
        else:
            dropped["the answer is not at its answer_start"].append(id_)
    return (examples.select(keep, keep_in_memory=True) if dropped else examples), dropped


# ---------------------------------------------------------------------------------------- features


def build_features(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    doc_stride: int,
    max_query_length: int,
    training: bool,
    **caching,
) -> Dataset:
    """Turn examples into features, one per window of a context; lengths and strides are in tokens.

    Returns, in the order of the examples: input_ids (list of `length` int32, unpadded), length,
    context_start (index of the first context token: token types are 0 before it, 1 from it on),
    example_index. For training also start_position and end_position (indices of the first and last
    token of the first answer, or of [CLS] if the window does not hold all of it); else offsets
    (start, end, start, end, ...: characters of the context tokens, see `_spans`) and max_context
    (bool per context token: whether this window shows most of its surroundings). `caching` are
    options of `cached_map`. Raises UserError if the lengths leave no room for a context.
    """
    backend = fast_backend(tokenizer)
    sizes = max_seq_length, doc_stride, max_query_length
    settings = {"frame": _frame(backend), "sizes": sizes, "training": training}
    return cached_map(
        examples,
        functools.partial(_featurize, backend=backend, **settings),
        ["id", "question", "context", "answers"],
        key=content_hash(VERSION, backend.to_str(), settings),
        with_indices=True,
        **caching,
    )


def _frame(backend: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """The ids before, between and after a pair of texts: [CLS] a [SEP] b [SEP] and the like."""
    encoding = backend.encode("a", "b")
    runs = itertools.groupby(zip(encoding.sequence_ids, encoding.ids), key=lambda pair: pair[0])
    before, _, between, _, after = ([id_ for _, id_ in run] for _, run in runs)
    return before, between, after


def _featurize(ids, questions, contexts, answers, rows, *, backend, frame, sizes, training):
    """One batch of examples -> a table of features. Arrow cuts up flat arrays, for speed."""
    max_seq_length, doc_stride, max_query_length = sizes
    distinct = list(dict.fromkeys(contexts))
    encodings = backend.encode_batch(distinct, add_special_tokens=False)
    tokenized = {
        text: (np.array(e.ids, np.int32), _spans(e.offsets, text))
        for text, e in zip(distinct, encodings)
    }
    before, between, after = (np.array(ids, np.int32) for ids in frame)
    tokens, spans, best = [], [], []
    columns = collections.defaultdict(list)

    encodings = backend.encode_batch(questions, add_special_tokens=False)
    for id_, encoding, context, answer, row in zip(ids, encodings, contexts, answers, rows):
        question = encoding.ids[:max_query_length]
        head = np.concatenate([before, np.array(question, np.int32), between])
        context_ids, context_spans = tokenized[context]
        room = max_seq_length - len(head) - len(after)
        if room < 1:
            raise UserError(
                f"question {brief(id_)!r} has {len(question)} tokens and leaves no room for its "
                f"context; raise --max_seq_length {max_seq_length} or lower --max_query_length"
            )
        windows = _windows(len(context_ids), room, doc_stride)
        if training:
            first, last = _answer_tokens(answer, context_spans)
        else:
            owner = _max_context(len(context_ids), windows)
        for n, (begin, end) in enumerate(windows):
            tokens += (head, context_ids[begin:end], after)
            columns["length"].append(len(head) + end - begin + len(after))
            columns["context_start"].append(len(head))
            columns["example_index"].append(row)
            if training:
                inside = begin <= first and last < end
                columns["start_position"].append(len(head) + first - begin if inside else 0)
                columns["end_position"].append(len(head) + last - begin if inside else 0)
            else:
                spans.append(context_spans[begin:end].ravel())
                best.append(owner[begin:end] == n)

    table = {"input_ids": ragged(tokens, columns["length"])}
    table |= {name: pa.array(values, pa.int32()) for name, values in columns.items()}
    if not training:
        table["offsets"] = ragged(spans, [len(span) for span in spans])
        table["max_context"] = ragged(best, [len(mask) for mask in best])
    return pa.table(table)


def _windows(n_tokens, room, doc_stride):
    """The windows [(begin, end), ...] over a context; the first to reach its end is the last."""
    stride = min(doc_stride, room)
    begins = range(0, max(n_tokens - room, 0) + stride, stride)
    return [(begin, min(begin + room, n_tokens)) for begin in begins]


def _spans(offsets, text):
    """Characters [start, end) of each token, without white space around: int32 (tokens, 2).

    Both ascend. A token of white space alone ends before it starts.
    """
    spans = np.array(offsets, np.int32).reshape(-1, 2)
    if not text.isascii() and any(unicodedata.category(char) == "Mn" for char in text):
        # The normaliser strips combining accents: extend each token over those that follow it.
        for span, limit in zip(spans, [*spans[1:, 0], len(text)]):
            while span[1] < limit and unicodedata.category(text[span[1]]) == "Mn":
                span[1] += 1
    # The space that add_prefix_space puts after a special token is said to follow the next word.
    spans[:, 0] = np.minimum.accumulate(spans[::-1, 0])[::-1]
    is_space = np.isin(np.frombuffer(text.encode("utf-32-le"), np.uint32), SPACES)
    places = np.arange(len(text), dtype=np.int32)
    begins = np.append(np.where(is_space, len(text), places), len(text))
    ends = np.append(0, np.where(is_space, 0, places + 1))
    begins = np.minimum.accumulate(begins[::-1])[::-1]  # of the first character that is none
    ends = np.maximum.accumulate(ends)  # behind the last
    return np.stack([begins[spans[:, 0]], ends[spans[:, 1]]], axis=1).astype(np.int32)


def _answer_tokens(answers, spans):
    """First and last context token of the first answer; (-1, -1) if it has none."""
    if not answers["text"]:
        return -1, -1
    start = answers["answer_start"][0]
    first = np.searchsorted(spans[:, 1], start, side="right")
    last = np.searchsorted(spans[:, 0], start + len(answers["text"][0]), side="left") - 1
    return (int(first), int(last)) if first <= last else (-1, -1)


def _max_context(n_tokens, windows):
    """For each context token the window in which the smaller of its two contexts is largest."""
    owner, best = np.zeros(n_tokens, np.int32), np.full(n_tokens, -1.0)
    for n, (begin, end) in enumerate(windows):
        position = np.arange(end - begin)
        score = np.minimum(position, position[::-1]) + 0.01 * (end - begin)
        better = score > best[begin:end]
        best[begin:end][better] = score[better]
        owner[begin:end][better] = n
    return owner


collate = functools.partial(collate_features, second_start="context_start")


# ----------------------------------------------------------------------------------------- answers


def postprocess(
    examples: Dataset,
    features: Dataset,
    start_logits: list[np.ndarray],
    end_logits: list[np.ndarray],
    *,
    n_best_size: int,
    max_answer_length: int,
    version_2_with_negative: bool,
    null_score_diff_threshold: float,
) -> tuple[dict[str, str], dict[str, list[dict]], dict[str, float]]:
    """Logits -> answers, by BERT's n-best search.

    features: those of `build_features(training=False)`; logits: a float array of at least `length`
    for each. A candidate pairs one of the `n_best_size` best starts in a window with one of its
    best ends. It has at most `max_answer_length` tokens, and its start has its maximum context in
    this window. The earlier wins a tie. The null score is the lowest score of [CLS] in all windows.

    Returns, ready for JSON: predictions {id: text}, the n best {id: list of {text, probability,
    start_logit, end_logit}} and, for v2.0, null odds {id: null score - best score}. A prediction is
    "" if the null odds exceed `null_score_diff_threshold` (v2.0), or without a valid candidate;
    then the null odds are `NO_SPAN_ODDS`.
    """
    candidates, nulls = collections.defaultdict(list), {}
    names = ["example_index", "context_start", "offsets", "max_context"]
    windows = row_tuples(features.with_format("numpy"), names)
    for start, end, (row, *window) in zip(start_logits, end_logits, windows, strict=True):
        candidates[row].append(_candidates(start, end, *window, n_best_size, max_answer_length))
        null = float(start[0]) + float(end[0]), float(start[0]), float(end[0])
        nulls[row] = min(nulls.get(row, null), null)

    predictions, nbest, null_odds = {}, {}, {}
    for row, (id_, context) in enumerate(row_tuples(examples, ["id", "context"])):
        pool = np.concatenate(candidates[row])
        spans = {}  # text -> (score, start logit, end logit), best first
        for candidate in np.argsort(-pool[:, 0], kind="stable"):
            *scores, begin, end = pool[candidate].tolist()
            spans.setdefault(context[int(begin) : int(end)], scores)
            if len(spans) == n_best_size:
                break
        predictions[id_] = next(iter(spans), "")
        if version_2_with_negative:
            odds = nulls[row][0] - spans[predictions[id_]][0] if spans else NO_SPAN_ODDS
            if odds > null_score_diff_threshold:
                predictions[id_] = ""
            null_odds[id_] = odds
            spans[""] = nulls[row]
        nbest[id_] = _nbest_list(spans or {"": (0.0, 0.0, 0.0)}, n_best_size)
    return predictions, nbest, null_odds


def _candidates(start, end, context_start, offsets, max_context, n_best_size, max_answer_length):
    """Valid spans of a window: rows of score, start logit, end logit, begin, end (characters)."""
    offsets = offsets.reshape(-1, 2)
    start = np.asarray(start[context_start : context_start + len(offsets)], np.float64)
    end = np.asarray(end[context_start : context_start + len(offsets)], np.float64)
    # Sorted by place in the text, so that the earlier span wins a tie.
    first = np.sort(np.argsort(-start, kind="stable")[:n_best_size])[:, None]
    last = np.sort(np.argsort(-end, kind="stable")[:n_best_size])[None, :]
    valid = (last >= first) & (last - first < max_answer_length) & max_context[first]
    valid &= offsets[first, 0] < offsets[last, 1]  # white space alone is no answer
    i, j = np.nonzero(valid)
    first, last = first[i, 0], last[0, j]
    return np.stack(
        [start[first] + end[last], start[first], end[last], offsets[first, 0], offsets[last, 1]],
        axis=1,
    )


def _nbest_list(spans, n_best_size):
    ranked = sorted(spans.items(), key=lambda item: -item[1][0])
    if len(ranked) > n_best_size and ranked[-1][0]:
        ranked.pop()  # the null answer counts as one of the n best, unless it is the last
    weights = np.exp(np.array([scores[0] for _, scores in ranked]) - ranked[0][1][0])
    return [
        {"text": text, "probability": probability, "start_logit": start, "end_logit": end}
        for (text, (_, start, end)), probability in zip(ranked, (weights / weights.sum()).tolist())
    ]
