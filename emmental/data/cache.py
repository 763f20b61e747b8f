"""The cache of examples and features.

Examples and features are memory-mapped Arrow files in the cache of `datasets`, named by hashes of
all that they depend on: a cache is never stale. Without a writable cache, they stay in memory.
"""

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter
from datasets.table import MemoryMappedTable

from ..system.errors import TrainingError
from ..system.files import file_digest, write_file
from .reading import brief

logger = logging.getLogger(__name__)
BATCH = 1000  # rows per step
DAY = 24 * 60 * 60  # seconds


def row_tuples(examples: Dataset, names: list[str]) -> Iterator[tuple]:
    """Yield the values of these columns for each row, reading a batch at a time."""
    for batch in examples.select_columns(names).iter(batch_size=BATCH):
        yield from zip(*(batch[name] for name in names))


def ragged(pieces: list[np.ndarray], lengths: list[int]) -> pa.ListArray:
    """Arrow list column: the concatenated `pieces`, cut into rows of these lengths."""
    ends = pa.array(np.cumsum([0, *lengths]), pa.int32())
    return pa.ListArray.from_arrays(ends, pa.array(np.concatenate(pieces)))


def content_hash(*parts) -> str:
    """A hash of values that JSON can hold, and of the content of files (`Path`)."""
    values = [file_digest(part) if isinstance(part, Path) else part for part in parts]
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cached_rows(
    rows: Callable[[], Iterator[dict]], features: Features, key: str, cache_dir: str | None
) -> Dataset:
    """The rows that `rows()` yields, from the cache if the cache has them under this key."""
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


def cached_map(
    examples: Dataset,
    featurize: Callable,
    columns: list[str],
    *,
    key: str,
    with_indices: bool = False,
    overwrite_cache: bool = False,
) -> Dataset:
    """Map batches of these columns to Arrow tables of features, cached beside the examples.

    key: hash of everything else that the features depend on. One process makes the features,
    because tokenizers use all cores by themselves.
    """
    fingerprint = content_hash(examples._fingerprint, key)
    build = functools.partial(
        examples.map,
        featurize,
        batched=True,
        batch_size=BATCH,
        with_indices=with_indices,
        input_columns=columns,
        new_fingerprint=fingerprint,
        desc="features",
    )
    in_memory = functools.partial(build, keep_in_memory=True, load_from_cache_file=False)
    if not examples.cache_files:
        return in_memory()
    folder = Path(examples.cache_files[0]["filename"]).parent
    name = f"cache-{fingerprint}.arrow"
    _remove_leftovers(folder)

    try:
        if overwrite_cache or not (folder / name).exists():
            write_file(folder / name, lambda path: build(cache_file_name=str(path)))
        return build(cache_file_name=str(folder / name))
    except (TrainingError, OSError, pa.ArrowInvalid) as error:  # a full disk, a damaged cache
        logger.warning(f"cannot use the cache ({brief(error, 300)}); continuing without the cache")
        return in_memory()


def _remove_leftovers(folder: Path) -> None:
    """Remove half-written files of killed processes from a cache, if unchanged for a day."""
    for aside in folder.glob(".writing-*"):
        with contextlib.suppress(OSError):  # another process removes the file, or nobody may
            if max(p.stat().st_mtime for p in (aside, *aside.rglob("*"))) < time.time() - DAY:
                shutil.rmtree(aside)
