"""What the data of every task share: the cache on disk, limits, ragged columns, and the padding of a batch.

Examples and features are Arrow files, read through a memory map: however large a data set is, what is in memory is
the part in use. They are cached under a hash of all that they depend on, so a cache is never stale and is never
named by the user. A cache that cannot be read is built again, and one that cannot be written is done without: the
data are then held in memory.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import uuid
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
BATCH = 1000  # rows worked on at a time, and fewer where their texts are long:
BATCH_TEXT = 2**24  # characters of them
MAX_TEXT = 10_000_000  # characters of a text; a tokenizer takes some hundred bytes for each


def shown(text, longest=60):
    """A text as Python writes it, cut to so many characters, for a message."""
    return repr(text if len(text) <= longest else f"{text[: longest - 3]}...")


def why_no_text(text):
    """What is wrong with a string as a text of an example; None for nothing."""
    if len(text) > MAX_TEXT:
        return f"has {len(text):,} characters, and {MAX_TEXT:,} are the most that can be worked on; split it"
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        return "holds half a surrogate pair, which is no text; correct it"
    return None


def one_line(error):
    """Type and message of an exception, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def fast_backend(tokenizer, error):
    """A copy of the Rust tokenizer below `tokenizer`, without truncation and padding.

    Raises `error`, the task's exception type, for a slow tokenizer or one without [CLS] and [SEP].
    """
    if not getattr(tokenizer, "is_fast", False):
        raise error(f"{type(tokenizer).__name__} is not a fast tokenizer; use a --tokenizer_name with one")
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise error("the tokenizer has no [CLS] or [SEP]; use the --tokenizer_name of an encoder such as BERT")
    # A copy, because files like tokenizer.json may switch on truncation, and the caller's stays as it is.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def pair_frame(backend, error):
    """The ids that a tokenizer puts before, between and after a pair of texts: [CLS] a [SEP] b [SEP] and the like.

    Raises `error`, the task's exception type, for a tokenizer that puts nothing there.
    """
    encoding = backend.encode("a", "b")
    owners = encoding.sequence_ids
    first, second = owners.index(0), owners.index(1)
    ends = [len(owners) - owners[::-1].index(text) for text in (0, 1)]
    frame = encoding.ids[:first], encoding.ids[ends[0] : second], encoding.ids[ends[1] :]
    if not all(frame):
        raise error("the tokenizer puts no [CLS] and [SEP] around two texts: its tokenizer.json lacks a post-processor")
    return frame


def row_tuples(examples, names):
    """Yield a tuple of the values of these columns for each row, reading a batch at a time."""
    for batch in examples.select_columns(list(names)).iter(batch_size=batch_rows(examples)):
        yield from zip(*(batch[name] for name in names))


def batch_rows(examples):
    """How many rows of a data set to work on at a time."""
    return max(1, min(BATCH, BATCH_TEXT * len(examples) // max(1, examples.data.nbytes)))


def ragged(pieces, lengths):
    """Arrow list column whose rows, of these lengths, lie one after the other in the arrays `pieces`."""
    ends = pa.array(np.cumsum([0, *lengths]), pa.int32())
    return pa.ListArray.from_arrays(ends, pa.array(np.concatenate(pieces)))


def pad_batch(features, second_starts, pad_token_id, multiple_of, input_names):
    """Pad `input_ids` to the longest of the batch, rounded up to a multiple of `multiple_of` tokens.

    `second_starts` holds the index of the first token of type 1 for each feature. Returns int64 tensors
    (batch, tokens): those of input_ids, attention_mask and token_type_ids that are in `input_names`.
    """
    longest = max(len(feature["input_ids"]) for feature in features)
    shape = (len(features), -(-longest // multiple_of) * multiple_of)
    batch = {"input_ids": torch.full(shape, pad_token_id)}
    batch |= {name: torch.zeros(shape, dtype=torch.int64) for name in ("attention_mask", "token_type_ids")}
    for row, (feature, second_start) in enumerate(zip(features, second_starts)):
        length = len(feature["input_ids"])
        batch["input_ids"][row, :length] = torch.as_tensor(feature["input_ids"])
        batch["attention_mask"][row, :length] = 1
        batch["token_type_ids"][row, second_start:length] = 1
    return {name: tensor for name, tensor in batch.items() if name in input_names}


# ------------------------------------------------------------------------------------------- cache


def content_hash(settings, batches):
    """Hash of `settings` and of an iterable of batches, all of them values that JSON can hold."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for batch in batches:
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def stored_rows(rows, features, *, name, cache_dir):
    """The examples that the iterator `rows()` yields, dictionaries with the columns of `features`, as a `Dataset`.

    They are stored in `<cache_dir>/movement_pruning/<name>-<hash of them>.arrow`. What `rows()` raises is raised, and
    leaves nothing behind.
    """
    schema = features.arrow_schema

    def batches():
        return (pa.RecordBatch.from_pylist(batch, schema) for batch in _batched(rows()))

    def write(path):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            for batch in batches():
                stream.write_batch(batch)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return path.parent.parent / f"{name}-{digest}.arrow"

    stored = _store(_root(cache_dir) / name, write, Dataset.from_file)
    return Dataset(pa.Table.from_batches(batches(), schema)) if stored is None else stored


def cached_map(
    examples, featurize, columns, *,
    name, key, is_complete, num_proc, cache_dir, overwrite_cache, with_indices=False,
):  # fmt: skip
    """Map batches of the `columns` of examples to Arrow tables of features, unless the cache holds them.

    They are cached in `<cache_dir>/movement_pruning/<name>-<key>` (`cache_dir=None`: that of `datasets`),
    where `key` is the hash of all that they depend on. `is_complete(features)` tells whether what was found
    there is whole. `num_proc` processes give the same rows as one.
    """

    def build(**where):
        return examples.map(
            featurize,
            batched=True,
            batch_size=batch_rows(examples),
            writer_batch_size=batch_rows(examples),
            with_indices=with_indices,
            input_columns=columns,
            num_proc=min(num_proc, len(examples)) if num_proc > 1 else None,
            new_fingerprint=key,
            desc=f"{name} features",
            **where,
        )

    def write(folder):
        parts = folder.with_name("parts")
        parts.mkdir()
        _save_quietly(build(cache_file_name=str(parts / "features.arrow"), load_from_cache_file=False), folder)
        return target

    target = _root(cache_dir) / f"{name}-{key}"
    features = None if overwrite_cache else _load(target, is_complete)
    if features is None:
        features = _store(target, write, Dataset.load_from_disk)
    return build(keep_in_memory=True) if features is None else features


def _root(cache_dir):
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "movement_pruning"


def _batched(rows):
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(batch) == BATCH or characters > BATCH_TEXT:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _load(folder, is_complete):
    if not folder.exists():
        return None
    try:
        features = Dataset.load_from_disk(str(folder))
        if is_complete(features):
            return features
        reason = "it is incomplete"
    except Exception as error:  # half a folder fails in as many ways as there are libraries below
        reason = one_line(error)
    logger.warning(f"the feature cache {folder} cannot be used ({reason}); building it again")
    return None


def _store(place, write, load):
    """Load what `write(path)` makes aside, once it has been moved to where `write` says; None where it cannot be written.

    place: about where it goes, in the same folder.
    """
    aside, target = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp"), place
    try:
        aside.mkdir(parents=True)
        target = write(aside / "new")
        if target.is_dir():  # a file is replaced at once, a folder is not
            os.rename(target, aside / "old")
        os.replace(aside / "new", target)
        return load(str(target))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) and target.exists():
            with contextlib.suppress(Exception):  # another run was a little faster, with the same
                return load(str(target))
        warn_once(f"cannot write the cache in {place.parent} ({error.strerror or error}); going on without")
        return None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _save_quietly(features, folder):
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # it takes a moment: the bar of `map` is the one to watch
    try:
        features.save_to_disk(folder)
    finally:
        if not hidden:
            datasets.enable_progress_bars()


@functools.cache
def warn_once(message):
    """Log a warning the first time that it is given."""
    logger.warning(message)
