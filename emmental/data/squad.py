"""SQuAD v1.1 and v2.0: reading, features, answers, metrics. Imports no other part of `emmental`.

A question and its paragraph become one or more features `[CLS] question [SEP] window [SEP]`; windows
overlap as in BERT (Devlin et al. 2019, section 4.2 and the published `run_squad.py`). Every token of a
context keeps its start and end character, so an answer is a slice of the original text and nothing has
to be aligned afterwards. Every distinct context is tokenized once, not once per question.

Features are unpadded; `collate` pads a batch to its longest row. They are cached on disk.
"""

import collections
import functools
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value

from emmental.data.features import (
    BATCH,
    MODEL_INPUTS,
    cached_map,
    cached_rows,
    content_hash,
    fast_backend,
    one_line,
    pad_batch,
    pair_frame,
    quoted,
    ragged,
    row_tuples,
    text_problem,
)
from emmental.errors import UserError

VERSION = 1  # raise it when the features of the same input change: old caches are then ignored
NO_SPAN_ODDS = (
    1e6  # null odds of a question without any valid span: finite, and above every real score
)
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

    Returns a `Dataset` with the columns id, title, context, question, answers {text: list of str,
    answer_start: list of int, in characters} and is_impossible (False where the file does not say).
    Predictions are keyed by id, so repeated ids are refused; training can do with them
    (`unique_ids=False`). Raises UserError for whatever is wrong with the file.
    """
    path = Path(path)
    key = content_hash("squad", VERSION, version_2_with_negative, unique_ids, path)
    questions = functools.partial(_checked, path, version_2_with_negative, unique_ids)
    empty = f"{path}: holds no questions; give a SQuAD file with questions"
    return cached_rows(questions, EXAMPLE_FEATURES, key, cache_dir, empty)


def _checked(path: Path, version_2_with_negative: bool, unique_ids: bool) -> Iterator[dict]:
    """Yield the questions of a file; refuse those that do not fit the version, and ids that repeat."""
    places = {}
    for question, where in _questions(path):
        if question["is_impossible"] and not version_2_with_negative:
            raise UserError(
                f"{where}: is_impossible is true (SQuAD v2.0); add --version_2_with_negative or give a v1.1 file"
            )
        if unique_ids:
            first = places.setdefault(question["id"], where)
            if first is not where:
                raise UserError(
                    f'{where}: "id" {quoted(question["id"])} already belongs to {first}; give it another one'
                )
        yield question


def load_hub_examples(split, version_2_with_negative, cache_dir=None):
    """Load `split` ("train" or "validation") of SQuAD from the hub, with the columns of `read_examples`.

    Raises `UserError` when it can neither be downloaded nor found in the cache.
    """
    name = "rajpurkar/squad_v2" if version_2_with_negative else "rajpurkar/squad"
    try:
        hub = datasets.load_dataset(name, split=split, cache_dir=cache_dir)
    except (
        Exception
    ) as error:  # no network, offline mode, missing cache: each has its own type, some of httpx
        raise UserError(
            f"{name} ({split}): cannot be loaded from the hub ({one_line(error)}); "
            "pass local files with --data_dir, or with --train_file and --predict_file"
        ) from error
    names = ["id", "title", "context", "question", "answers"]

    def questions():
        for *values, answers in row_tuples(hub, names):
            yield dict(zip(names, [*values, answers]), is_impossible=not answers["text"])

    key = content_hash("squad", VERSION, hub._fingerprint)
    return cached_rows(questions, EXAMPLE_FEATURES, key, cache_dir, f"{name}: holds no questions")


def drop_misaligned(examples):
    """Drop the questions that cannot be trained on; returns (the other examples, the ids of the dropped).

    Dropped are answerable questions without an answer, and those whose first answer is blank or does not
    stand at its `answer_start`. Unanswerable questions stay.
    """
    keep, skipped = [], []
    for row, (id_, context, answers, is_impossible) in enumerate(
        row_tuples(examples, ["id", "context", "answers", "is_impossible"])
    ):
        text, start = next(zip(answers["text"], answers["answer_start"]), ("", 0))
        if is_impossible or (text.strip() and context.startswith(text, start)):
            keep.append(row)
        else:
            skipped.append(id_)
    return (examples.select(keep, keep_in_memory=True) if skipped else examples), skipped


def _articles(path: Path) -> list:
    """The articles of a SQuAD file, the values of its "data". Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise UserError(f"{path}: is empty; give a SQuAD file with questions")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON in UTF-8 ({error}); download it again") from error
    return _get(content, "data", list, path)


def _questions(path):
    """Yield (question as a row of the data set, its place in the file), checking the form on the way."""
    for a, article in enumerate(_articles(path)):
        title = _get(article, "title", str, f"{path}: article {a}", default="")
        in_article = f"{path}: article {a} ({quoted(title)})"
        for p, paragraph in enumerate(_get(article, "paragraphs", list, in_article)):
            in_paragraph = f"{in_article}, paragraph {p}"
            context = _get(paragraph, "context", str, in_paragraph)
            for q, qa in enumerate(_get(paragraph, "qas", list, in_paragraph)):
                where = f"{in_paragraph}, question {q}"
                row = {"id": _get(qa, "id", str, where), "title": title, "context": context}
                row["question"] = _get(qa, "question", str, where)
                row["answers"] = {"text": [], "answer_start": []}
                for n, answer in enumerate(_get(qa, "answers", list, where, default=[])):
                    for key, kind in ("text", str), ("answer_start", int):
                        row["answers"][key].append(_get(answer, key, kind, f"{where}, answer {n}"))
                row["is_impossible"] = _get(qa, "is_impossible", bool, where, default=False)
                if row["is_impossible"] and row["answers"]["text"]:
                    raise UserError(
                        f'{where}: "is_impossible" is true, yet it has answers; remove one of the two'
                    )
                yield row, where


_REQUIRED = object()
_JSON_NAMES = {
    dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a whole number",
    float: "a fraction", type(None): "null",
}  # fmt: skip


def _get(record, key, kind, where, default=_REQUIRED):
    """`record[key]`, which must be of the type `kind`."""
    if type(record) is not dict:
        raise UserError(
            f'{where}: must be an object with "{key}", not {_JSON_NAMES[type(record)]}; correct it'
        )
    value = record.get(key, default)
    if value is _REQUIRED:
        raise UserError(f'{where}: "{key}" is missing; add it, or give a file in the SQuAD form')
    if type(value) is not kind:
        raise UserError(
            f'{where}: "{key}" must be {_JSON_NAMES[kind]}, not {_JSON_NAMES[type(value)]}; correct it'
        )
    if kind is int and not 0 <= value < 2**31:
        raise UserError(
            f'{where}: "{key}" is {value}, but must be an index into the context; correct it'
        )
    if kind is str and (problem := text_problem(value)):
        raise UserError(f'{where}: "{key}" {problem}')
    return value


# ---------------------------------------------------------------------------------------- features


def build_features(
    examples, tokenizer, *,
    max_seq_length, doc_stride, max_query_length, training, num_proc=1, overwrite_cache=False,
):  # fmt: skip
    """Turn examples into features, one per window of a context; lengths and strides are in tokens.

    Returns a `Dataset` whose rows are in the order of the examples, at least one for each:
    input_ids (list of `length` int32, unpadded), length, context_start (index of the first context token:
    token types are 0 before it, 1 from it on), example_index (row of `examples`);
    when training, start_position and end_position (indices into input_ids of the first and last token of
    the first answer; 0, 0 = [CLS] when it is not wholly in the window or there is none);
    else offsets (start, end, start, end, ...: the characters of each context token in the context) and
    max_context (one bool per context token: is this the window that shows most of its surroundings).

    They are cached beside the examples. `num_proc` processes give the same rows as one.
    Raises `UserError` for a slow tokenizer, or lengths that leave no room for the context.
    """
    backend = fast_backend(tokenizer)
    for flag, value in ("--doc_stride", doc_stride), ("--max_query_length", max_query_length):
        if value < 1:
            raise UserError(f"{flag} is {value}, but must be at least 1 token")
    if not len(examples):
        raise UserError("there is no question to make features of; check the data file")

    settings = dict(
        frame=pair_frame(backend), max_seq_length=max_seq_length,
        doc_stride=doc_stride, max_query_length=max_query_length, training=training,
    )  # fmt: skip
    return cached_map(
        examples,
        functools.partial(_featurize, backend=backend, **settings),
        ["id", "question", "context", "answers"],
        name="squad",
        key=content_hash(VERSION, backend.to_str(), settings),
        num_proc=num_proc,
        overwrite_cache=overwrite_cache,
        with_indices=True,
    )


def _featurize(
    ids, questions, contexts, answers, rows, *,
    backend, frame, max_seq_length, doc_stride, max_query_length, training,
):  # fmt: skip
    """One batch of examples -> a table of features. Columns are flat arrays, cut up by Arrow, for speed."""
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
                f"question {quoted(id_)} has {len(question)} tokens, which leaves no room for its context in "
                f"--max_seq_length {max_seq_length}; raise it, or lower --max_query_length ({max_query_length})"
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
    """The windows [(begin, end), ...] over a context; as in BERT the last is the first to reach its end."""
    stride = min(doc_stride, room)
    begins = range(0, max(n_tokens - room, 0) + stride, stride)
    return [(begin, min(begin + room, n_tokens)) for begin in begins]


def _spans(offsets, text):
    """Characters [start, end) of each token: int32 of shape (tokens, 2)."""
    spans = np.array(offsets, np.int32).reshape(-1, 2)
    if not text.isascii() and any(unicodedata.category(char) == "Mn" for char in text):
        # The normaliser strips accents, and those written as characters of their own go missing at the end.
        limits = [*spans[1:, 0], len(text)]
        for span, limit in zip(spans, limits):
            while span[1] < limit and unicodedata.category(text[span[1]]) == "Mn":
                span[1] += 1
    return spans


def _answer_tokens(answers, spans):
    """First and last context token that share a character with the first answer; (-1, -1) without any."""
    if not answers["text"]:
        return -1, -1
    start = answers["answer_start"][0]
    first = np.searchsorted(spans[:, 1], start, side="right")
    last = np.searchsorted(spans[:, 0], start + len(answers["text"][0]), side="left") - 1
    return (int(first), int(last)) if first <= last else (-1, -1)


def _max_context(n_tokens, windows):
    """For each context token the window in which the smaller of its two contexts is largest."""
    owner = np.zeros(n_tokens, np.int32)
    if len(windows) > 1:
        best = np.full(n_tokens, -1.0)
        for n, (begin, end) in enumerate(windows):
            position = np.arange(end - begin)
            score = np.minimum(position, position[::-1]) + 0.01 * (end - begin)
            better = score > best[begin:end]
            best[begin:end][better] = score[better]
            owner[begin:end][better] = n
    return owner


def collate(features, pad_token_id, multiple_of=8, input_names=MODEL_INPUTS):
    """Pad features to the longest of the batch, rounded up to a multiple of `multiple_of` tokens.

    Returns int64 tensors: input_ids, attention_mask and token_type_ids (batch, tokens), as far as the model takes
    them (`input_names`), and, for features made for training, start_positions and end_positions (batch,).
    """
    second_starts = [feature["context_start"] for feature in features]
    batch = pad_batch(features, second_starts, pad_token_id, multiple_of, input_names)
    if "start_position" in features[0]:
        for name in ("start_position", "end_position"):
            batch[f"{name}s"] = torch.tensor([int(feature[name]) for feature in features])
    return batch


# ----------------------------------------------------------------------------------------- answers


def postprocess(
    examples, features, start_logits, end_logits, *,
    n_best_size, max_answer_length, version_2_with_negative, null_score_diff_threshold,
):  # fmt: skip
    """Logits -> answers, by BERT's n-best search.

    `features` are those of `build_features(training=False)`; `start_logits` and `end_logits` hold one float
    array of at least `length` per feature. Candidates are the pairs out of the `n_best_size` best starts and
    ends among the context tokens of a window, of at most `max_answer_length` tokens, with the start in the
    window of its maximum context; the earlier one wins a tie. The null score is the lowest [CLS] score.

    Returns (predictions {id: text}, n-best {id: list of {text, probability, start_logit, end_logit}}, null
    odds {id: null score - best span's score; empty for v1.1}), all ready for JSON. A prediction is "" when
    the null odds are above `null_score_diff_threshold` (v2.0), or when no span is valid; then the null odds
    are `NO_SPAN_ODDS`, and the n-best list holds the null answer alone (v1.1: with logits 0).
    """
    candidates, nulls = collections.defaultdict(list), {}
    for start, end, (row, *window) in zip(start_logits, end_logits, _rows(features), strict=True):
        candidates[row].append(_candidates(start, end, *window, n_best_size, max_answer_length))
        nulls[row] = min(
            nulls.get(row, (np.inf,)),
            (float(start[0]) + float(end[0]), float(start[0]), float(end[0])),
        )

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


def _rows(features):
    names = ["example_index", "context_start", "offsets", "max_context"]
    for batch in features.select_columns(names).with_format("numpy").iter(batch_size=BATCH):
        yield from zip(*(batch[name] for name in names))


def _candidates(start, end, context_start, offsets, max_context, n_best_size, max_answer_length):
    """Valid spans of a window: rows of score, start logit, end logit, first character, end character."""
    offsets = offsets.reshape(-1, 2)
    start = np.asarray(start[context_start : context_start + len(offsets)], np.float64)
    end = np.asarray(end[context_start : context_start + len(offsets)], np.float64)
    # Back in the order of the text, so that the earlier span wins a tie.
    first = np.sort(np.argsort(-start, kind="stable")[:n_best_size])[:, None]
    last = np.sort(np.argsort(-end, kind="stable")[:n_best_size])[None, :]
    valid = (last >= first) & (last - first < max_answer_length) & max_context[first]
    i, j = np.nonzero(valid)
    first, last = first[i, 0], last[0, j]
    return np.stack(
        [start[first] + end[last], start[first], end[last], offsets[first, 0], offsets[last, 1]],
        axis=1,
    )


def _nbest_list(spans, n_best_size):
    ranked = sorted(spans.items(), key=lambda item: -item[1][0])
    if len(ranked) > n_best_size and ranked[-1][0]:
        ranked.pop()  # the null answer took a place above; below all others it is listed in addition
    weights = np.exp(np.array([scores[0] for _, scores in ranked]) - ranked[0][1][0])
    return [
        {"text": text, "probability": probability, "start_logit": start, "end_logit": end}
        for (text, (_, start, end)), probability in zip(ranked, (weights / weights.sum()).tolist())
    ]
