"""What the data of every task share: caches, ragged columns, and the padding of a batch.

Examples and features are Arrow files in the cache of `datasets`, read through a memory map. Their
fingerprints are hashes of all that they depend on, so a cache is never stale and is never named by
the user. Where the cache cannot be written, the data are held in memory.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emmental.errors import UserError
from emmental.files import file_digest

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
BATCH = 1000  # rows worked on at a time


def quoted(text: str, longest: int = 60) -> str:
    """A text as Python writes it, cut to so many characters, for a message."""
    return repr(text if len(text) <= longest else f"{text[: longest - 3]}...")


def text_problem(text: str) -> str | None:
    """What is wrong with a string as a text of an example; None for nothing."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        return "holds half a surrogate pair, which is not text; correct it"
    return None


def one_line(error: Exception) -> str:
    """Type and message of an exception, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer below `tokenizer`, without truncation and padding.

    Raises UserError for a slow tokenizer or one without [CLS] and [SEP].
    """
    if not getattr(tokenizer, "is_fast", False):
        name = type(tokenizer).__name__
        raise UserError(f"{name} is not a fast tokenizer; use a --tokenizer_name with one")
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise UserError(
            "the tokenizer has no [CLS] or [SEP]; use the --tokenizer_name of an encoder such as BERT"
        )
    # A copy: files like tokenizer.json may switch on truncation, and the caller's must stay as it is.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def pair_frame(backend: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """The ids before, between and after a pair of texts: [CLS] a [SEP] b [SEP] and the like.

    Raises UserError for a tokenizer that puts nothing there.
    """
    encoding = backend.encode("a", "b")
    owners = encoding.sequence_ids
    first, second = owners.index(0), owners.index(1)
    ends = [len(owners) - owners[::-1].index(text) for text in (0, 1)]
    frame = encoding.ids[:first], encoding.ids[ends[0] : second], encoding.ids[ends[1] :]
    if not all(frame):
        raise UserError(
            "the tokenizer puts no [CLS] and [SEP] around two texts: its tokenizer.json lacks a "
            "post-processor"
        )
    return frame


def row_tuples(examples: Dataset, names: list[str]) -> Iterator[tuple]:
    """Yield a tuple of the values of these columns for each row, reading a batch at a time."""
    for batch in examples.select_columns(list(names)).iter(batch_size=BATCH):
        yield from zip(*(batch[name] for name in names))


def ragged(pieces: list[np.ndarray], lengths: list[int]) -> pa.ListArray:
    """Arrow list column whose rows, of these lengths, stand one after the other in `pieces`."""
    ends = pa.array(np.cumsum([0, *lengths]), pa.int32())
    return pa.ListArray.from_arrays(ends, pa.array(np.concatenate(pieces)))


def padding_of(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict:
    """How batches for the model are padded: the options of `pad_batch`."""
    accepted = inspect.signature(model.forward).parameters
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "input_names": [name for name in MODEL_INPUTS if name in accepted],
        "multiple_of": 8 if model.config.max_position_embeddings % 8 == 0 else 1,
    }


def pad_batch(
    features: list[dict],
    second_starts: list[int],
    pad_token_id: int,
    multiple_of: int,
    input_names: Iterable[str],
) -> dict[str, Tensor]:
    """Pad `input_ids` to the longest of the batch, rounded up to a multiple of so many tokens.

    `second_starts` holds the index of the first token of type 1 for each feature. Returns int64
    tensors (batch, tokens): those of `MODEL_INPUTS` that are in `input_names`.
    """
    longest = max(len(feature["input_ids"]) for feature in features)
    shape = (len(features), -(-longest // multiple_of) * multiple_of)
    batch = {"input_ids": torch.full(shape, pad_token_id)}
    batch |= {name: torch.zeros(shape, dtype=torch.int64) for name in MODEL_INPUTS[1:]}
    for row, (feature, second_start) in enumerate(zip(features, second_starts)):
        length = len(feature["input_ids"])
        batch["input_ids"][row, :length] = torch.as_tensor(feature["input_ids"])
        batch["attention_mask"][row, :length] = 1
        batch["token_type_ids"][row, second_start:length] = 1
    return {name: tensor for name, tensor in batch.items() if name in input_names}


# ------------------------------------------------------------------------------------------- cache


def content_hash(*parts) -> str:
    """Hash of values that JSON can hold, and of the content of files (`Path`).

    Raises UserError for a file that cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            try:
                part = file_digest(part)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{part}: cannot be read ({reason}); check --data_dir") from error
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def cached_rows(
    rows: Callable[[], Iterator[dict]],
    features: Features,
    key: str,
    cache_dir: str | None,
    empty: str,
) -> Dataset:
    """The examples that `rows()` yields, unless the cache of `datasets` holds those of this key.

    What `rows()` raises is raised; where there is no row, UserError with the message `empty`.
    """

    def checked() -> Iterator[dict]:
        row = None
        for row in rows():
            yield row
        if row is None:
            raise UserError(empty)

    options = {"features": features, "cache_dir": cache_dir, "fingerprint": key}
    for attempt in range(2):
        try:
            with _quiet():
                return Dataset.from_generator(checked, **options)
        except (DatasetGenerationError, OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            if not isinstance(cause, OSError | ValueError):
                raise cause from None
            if attempt == 0:  # perhaps a damaged cache: build it again
                root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "generator"
                shutil.rmtree(root / f"default-fingerprint={key}", ignore_errors=True)
    _warn_once(f"cannot write the cache ({one_line(cause)}); going on without")
    return Dataset.from_list(list(checked()), features=features)


def cached_map(
    examples: Dataset,
    featurize: Callable,
    columns: list[str],
    *,
    name: str,
    key: str,
    num_proc: int,
    overwrite_cache: bool,
    with_indices: bool = False,
) -> Dataset:
    """Map batches of the `columns` of examples to Arrow tables of features.

    They are cached beside the examples under `key`, the hash of all else that they depend on.
    `num_proc` processes give the same rows as one.
    """

    def build(**options) -> Dataset:
        return examples.map(
            featurize,
            batched=True,
            batch_size=BATCH,
            with_indices=with_indices,
            input_columns=columns,
            num_proc=min(num_proc, len(examples)) if num_proc > 1 else None,
            new_fingerprint=content_hash(examples._fingerprint, key),
            desc=f"{name} features",
            **options,
        )

    try:
        return build(load_from_cache_file=not overwrite_cache)
    except (OSError, pa.ArrowInvalid) as error:  # a full disk, a damaged cache
        _warn_once(f"cannot use the cache ({one_line(error)}); going on without")
        return build(load_from_cache_file=False, keep_in_memory=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the bars of `datasets` for what takes a moment."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning the first time that it is given."""
    logger.warning(message)
