"""What the tasks share: checks of input, caches, and the padding of a batch.

Examples and features are memory-mapped Arrow files in the cache of `datasets`, named by hashes of
all that they depend on: a cache is never stale. Without a writable cache they stay in memory.
"""

import contextlib
import copy
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter
from datasets.table import MemoryMappedTable
from multiprocess import active_children
from multiprocess.util import register_after_fork
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emmental.errors import TrainingError, UserError, handled_signals
from emmental.files import file_digest, write_file
from emmental.inputs import MODEL_INPUTS, longest_input

logger = logging.getLogger(__name__)

BATCH = 1000  # rows per step
DAY = 24 * 60 * 60  # seconds
STOPS = signal.SIGTERM, signal.SIGINT
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
    """`record[name]`, or `default` if it is missing or null; 0 and 1 are false and true.

    Raises UserError unless it is a `kind`.
    """
    if not isinstance(record, dict):
        raise UserError(f'{where}: must be an object with "{name}", not {brief(record)}')
    value = record.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f'{where}: "{name}" is missing or null; correct it')
    if kind is bool and value in (0, 1):
        value = bool(value)
    if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
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


def row_tuples(examples: Dataset, names: list[str]) -> Iterator[tuple]:
    """Yield the values of these columns for each row, reading a batch at a time."""
    for batch in examples.select_columns(names).iter(batch_size=BATCH):
        yield from zip(*(batch[name] for name in names))


# ------------------------------------------------------------------------------------------- cache


def content_hash(*parts) -> str:
    """Hash of values that JSON can hold, and of the content of files (`Path`)."""
    values = [file_digest(part) if isinstance(part, Path) else part for part in parts]
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cached_rows(
    rows: Callable[[], Iterator[dict]], features: Features, key: str, cache_dir: str | None
) -> Dataset:
    """The rows that `rows()` yields, from the cache if it holds them under this key."""
    path = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "emmental" / f"{key}.arrow"

    def write(target: Path) -> None:
        with ArrowWriter(path=str(target), features=features) as writer:
            for row in rows():
                writer.write(row)
            writer.finalize()

    def read() -> Dataset:
        return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key)

    with contextlib.suppress(OSError, pa.ArrowInvalid):  # missing or damaged
        return read()
    try:
        write_file(path, write)
        return read()
    except TrainingError as error:
        logger.warning(f"{error}; continuing without the cache")
        return Dataset.from_list(list(rows()), features=features)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in a cache, if it is unchanged for a day."""
    for path in (*folder.glob(".writing-*"), *folder.glob("tmp" + "[a-z0-9_]" * 8)):
        with contextlib.suppress(OSError):  # another process removes it, or may not
            changes = [part.stat().st_mtime for part in (path, *path.rglob("*"))]
            if max(changes) < time.time() - DAY:
                shutil.rmtree(path) if path.name.startswith(".") else path.unlink()


def cached_map(
    examples: Dataset,
    featurize: Callable,
    columns: list[str],
    *,
    key: str,
    with_indices: bool = False,
    num_proc: int = 1,
    overwrite_cache: bool = False,
) -> Dataset:
    """Map batches of these columns to Arrow tables of features, cached beside the examples.

    key: hash of everything else that the features depend on. Rows do not depend on `num_proc`.
    """
    for folder in {Path(file["filename"]).parent for file in examples.cache_files}:
        remove_leftovers(folder)
    build = functools.partial(
        examples.map,
        featurize,
        batched=True,
        batch_size=BATCH,
        with_indices=with_indices,
        input_columns=columns,
        num_proc=min(num_proc, len(examples)) if num_proc > 1 else None,
        new_fingerprint=content_hash(examples._fingerprint, key),
        desc="features",
    )
    stops = STOPS if num_proc > 1 else ()
    register_after_fork(build, _end_at_once)  # in the workers of `multiprocess` alone
    try:
        with handled_signals(_stop_workers, *stops):
            return build(load_from_cache_file=not overwrite_cache)
    except (OSError, pa.ArrowInvalid) as error:  # a full disk, a damaged cache
        logger.warning(f"cannot use the cache ({brief(error, 300)}); continuing without the cache")
        return build(load_from_cache_file=False, keep_in_memory=True)


def _stop_workers(number: int, frame) -> None:
    """Handle a signal by ending at once: an exception would wait for the workers for ever."""
    for worker in active_children():
        worker.kill()
    print(f"\nerror: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    os._exit(128 + number)


def _end_at_once(_) -> None:
    """Let signals end a worker: a handler of Python's may never run while it waits for work."""
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)


def ragged(pieces: list[np.ndarray], lengths: list[int]) -> pa.ListArray:
    """Arrow list column: the concatenated `pieces`, cut into rows of these lengths."""
    ends = pa.array(np.cumsum([0, *lengths]), pa.int32())
    return pa.ListArray.from_arrays(ends, pa.array(np.concatenate(pieces)))


# ------------------------------------------------------------------------- tokenizers and batches


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer inside `tokenizer`, without truncation and padding."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    if backend.num_special_tokens_to_add(is_pair=True) < 3:
        raise UserError(
            "the tokenizer adds no [CLS] and [SEP]: its tokenizer.json needs a post-processor"
        )
    return backend


def padding_of(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict:
    """The options of `pad_batch` for a model.

    There are token types if the tokenizer has them, for a teacher that takes them too: a forward
    of `training` gives each model its own inputs. The id of padding is the model's, as RoBERTa
    numbers its positions by it.
    """
    padding = model.get_input_embeddings().padding_idx
    has_types = any(fast_backend(tokenizer).encode("a", "b").type_ids)
    return {
        "pad_token_id": tokenizer.pad_token_id if padding is None else padding,
        "input_names": [name for name in MODEL_INPUTS if has_types or name != "token_type_ids"],
        "multiple_of": 1 if (longest_input(model) or 8) % 8 else 8,
    }


def pad_batch(
    features: list[dict],
    second_starts: list[int] | None = None,
    pad_token_id: int = 0,
    multiple_of: int = 8,
    input_names: tuple[str, ...] = MODEL_INPUTS,
    columns: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """Pad `input_ids` to the longest of the batch, rounded up to a multiple of `multiple_of`.

    second_starts: index of the first token of type 1 for each feature; None if there is none.
    columns: further lists of a feature, such as tags, and what they are padded with. Those with an
    entry for each token get the length of the inputs, others, of words say, that of the longest.
    Returns those of `MODEL_INPUTS` that are in `input_names`, int64 (batch, tokens), and columns.
    """
    ids = [torch.as_tensor(feature["input_ids"]) for feature in features]
    lengths = torch.tensor([[len(row)] for row in ids])
    positions = torch.arange(-(-int(lengths.max()) // multiple_of) * multiple_of)
    is_token = positions < lengths
    starts = lengths if second_starts is None else torch.tensor(second_starts)[:, None]
    is_second = is_token & (positions >= starts)
    input_ids = torch.full(is_token.shape, pad_token_id)
    input_ids[is_token] = torch.cat(ids)
    batch = dict(zip(MODEL_INPUTS, (input_ids, is_token.long(), is_second.long())))
    batch = {name: tensor for name, tensor in batch.items() if name in input_names}
    for name, value in (columns or {}).items():
        rows = [torch.as_tensor(feature[name]) for feature in features]
        per_token = all(len(row) == len(tokens) for row, tokens in zip(rows, ids, strict=True))
        width = len(positions) if per_token else max(map(len, rows))
        batch[name] = torch.full((len(rows), width), value, dtype=rows[0].dtype)
        for place, row in enumerate(rows):
            batch[name][place, : len(row)] = row
    return batch


def collate_features(
    features: list[dict], pad_token_id: int, *, second_start: str, **padding
) -> dict[str, Tensor]:
    """Pad features with `pad_batch`, and add their labels, start_positions and end_positions.

    second_start: column with the index of the first token of type 1. Labels are (batch,) tensors:
    int64, or float32 for a regression.
    """
    starts = [feature[second_start] for feature in features]
    batch = pad_batch(features, starts, pad_token_id, **padding)
    for name in ("label", "start_position", "end_position"):
        if name in features[0]:
            batch[f"{name}s"] = torch.tensor([feature[name] for feature in features])
    return batch
