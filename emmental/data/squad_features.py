"""SQuAD: features of examples.

A question and its paragraph become one or more features `[CLS] question [SEP] window [SEP]`;
windows overlap as in BERT (Devlin et al. 2019, section 4.2, and its `run_squad.py`). Every context
token keeps its start and end character, so an answer is a slice of the original text. Each distinct
context is tokenized once, not once per question.
"""

import collections
import functools
import itertools
import unicodedata

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..system.errors import UserError
from .cache import cached_map, content_hash, ragged, row_tuples
from .padding import collate_features, fast_backend
from .reading import brief
from .squad_read import VERSION, is_unanswerable
from .windows import best_windows, windows_of

SPACES = [place for place in range(0x3001) if chr(place).isspace()]  # all that Unicode has


def drop_misaligned(examples: Dataset) -> tuple[Dataset, dict[str, list[str]]]:
    """Drop the questions that cannot be trained on; returns (the others, {reason: dropped ids}).

    Dropped are questions of v1.1 without an answer, and questions whose first answer is blank or
    not at its `answer_start`.
    """
    usable = []
    dropped = collections.defaultdict(list)
    names = ["id", "context", "answers", "is_impossible"]
    for row, (id_, context, answers, is_impossible) in enumerate(row_tuples(examples, names)):
        text, start = next(zip(answers["text"], answers["answer_start"]), ("", -1))
        if is_impossible or (text.strip() and start >= 0 and context.startswith(text, start)):
            usable.append(row)
        elif is_unanswerable(answers):
            dropped["no answer"].append(id_)
        else:
            dropped["the answer is not at its answer_start"].append(id_)
    if dropped:
        examples = examples.select(usable, keep_in_memory=True)
    return examples, dropped


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
    tokens, spans, max_context = [], [], []
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
        windows = windows_of(len(context_ids), room, doc_stride)
        if training:
            first, last = _answer_tokens(answer, context_spans)
        else:
            best_window = best_windows(len(context_ids), windows)
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
                max_context.append(best_window[begin:end] == n)

    table = {"input_ids": ragged(tokens, columns["length"])}
    table |= {name: pa.array(values, pa.int32()) for name, values in columns.items()}
    if not training:
        table["offsets"] = ragged(spans, [len(span) for span in spans])
        table["max_context"] = ragged(max_context, [len(mask) for mask in max_context])
    return pa.table(table)


def _spans(offsets, text):
    """Characters [start, end) of each token, without white space around: int32 (tokens, 2).

    Starts and ends ascend. A token of white space alone ends before it starts.
    """
    spans = np.array(offsets, np.int32).reshape(-1, 2)
    if not text.isascii() and any(unicodedata.category(char) == "Mn" for char in text):
        # The normaliser strips combining accents: extend each token over accents that follow.
        for span, limit in zip(spans, [*spans[1:, 0], len(text)]):
            while span[1] < limit and unicodedata.category(text[span[1]]) == "Mn":
                span[1] += 1
    # With add_prefix_space, the place of the space after a special token is that of the next word.
    spans[:, 0] = np.minimum.accumulate(spans[::-1, 0])[::-1]
    is_space = np.isin(np.frombuffer(text.encode("utf-32-le"), np.uint32), SPACES)
    places = np.arange(len(text), dtype=np.int32)
    begins = np.append(np.where(is_space, len(text), places), len(text))
    ends = np.append(0, np.where(is_space, 0, places + 1))
    begins = np.minimum.accumulate(begins[::-1])[::-1]  # from each place, the next non-space
    ends = np.maximum.accumulate(ends)  # before each place, the end of the last non-space
    return np.stack([begins[spans[:, 0]], ends[spans[:, 1]]], axis=1).astype(np.int32)


def _answer_tokens(answers, spans):
    """First and last context token of the first answer; (-1, -1) if it has none."""
    if not answers["text"]:
        return -1, -1
    start = answers["answer_start"][0]
    first = np.searchsorted(spans[:, 1], start, side="right")
    last = np.searchsorted(spans[:, 0], start + len(answers["text"][0]), side="left") - 1
    return (int(first), int(last)) if first <= last else (-1, -1)


collate = functools.partial(collate_features, second_start="context_start")
