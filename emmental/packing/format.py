"""The format of packed files: a fine-pruned model close to the entropy of its weights.

A file holds the plain (bertarized) model: its configuration, any tokenizer and model card, and each
tensor as one stream of `coding.py`. Nothing in a file is executed. Integers are little-endian:

    offset  size  content
    0       8     b"PRUNBERT"
    8       4     version, 1
    12      4     H, length of the deflated header
    16      4     length of the header
    20      16    BLAKE2b of the first 20 bytes and the deflated header
    36      H     header: JSON, deflated
    36 + H  ...   the tokenizer's files (LZMA), then the tensors' streams (32-bit words),
                  both in the header's order

The header has `architecture`, `config`, `bits`, `base_model` (None, or {name, digest}), `files`
({name, bytes, size, digest}) and `tensors` ({name, shape, kept, by_row, bytes, digest,
position_entropy, value_entropy}, entropies in bits). A digest is the BLAKE2b (8 bytes) of the
stored bytes. A file with a base model does not contain the embeddings: they are loaded from the
base model, whose embeddings must have the recorded digest (16 bytes). `architecture` names the
class to load. The `model_type` of `config` must be one of `FAMILIES`, or compact, and have it.
"""

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.families import FAMILIES, HEADS, class_of, is_masked, prefix_of, stock_type
from ..system.errors import UserError, first_line
from ..system.files import write_file
from . import coding

MAGIC, VERSION = b"PRUNBERT", 1
PREFIX = struct.Struct("<8sIII")
TEXT_FILES = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.(json|txt)"
    r"|chat_template\.jinja|README\.md"
)


@dataclass
class Packed:
    """An opened packed file: its header, and the offset of the first byte after the header."""

    path: Path
    header: dict
    start: int

    @property
    def config(self) -> PreTrainedConfig:
        return self.model_class.config_class.from_dict(self.header["config"])

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Raises ValueError unless the family of the configuration has a class of that name."""
        name = self.header["architecture"]
        model_type = self.header["config"]["model_type"]
        if stock_type(model_type) in FAMILIES and not is_masked(model_type):
            for model_class in (class_of(model_type, head) for head in HEADS):
                if model_class and model_class.__name__ == name:
                    return model_class
        raise ValueError(f"unknown architecture {name!r} of type {model_type!r}")

    def size(self, kind: str) -> int:
        """Bytes of all `files` or `tensors`."""
        return sum(entry["bytes"] for entry in self.header[kind])

    def streams(self, kind: str) -> Iterator[tuple[dict, bytes]]:
        """The entries of `files` or `tensors` with their bytes. Raises UserError for damage."""
        with self.path.open("rb") as file:
            file.seek(self.start + (self.size("files") if kind == "tensors" else 0))
            for entry in self.header[kind]:
                content = file.read(entry["bytes"])
                if digest(content) != entry["digest"]:
                    raise UserError(
                        f"{self.path} is damaged: the checksum of {entry['name']} does not match"
                    )
                yield entry, content

    def tensors(self, csr: str | None = None) -> Iterator[tuple[dict, np.ndarray | csr_array]]:
        """The entries of `tensors` with their arrays. Raises UserError for damage.

        csr: the start of the names of matrices that come as csr_array, and are never made dense.
        """
        for entry, content in self.streams("tensors"):
            shape = tuple(entry["shape"])
            is_csr = bool(csr) and len(shape) == 2 and entry["name"].startswith(csr)
            words = np.frombuffer(content, "<u4").astype(np.uint32)
            try:
                array = coding.decode(words, shape, self.header["bits"], entry["by_row"], is_csr)
            except (UserError, ValueError) as error:
                raise UserError(
                    f"{self.path} is damaged: {entry['name']}: {first_line(error)}"
                ) from error
            yield entry, array


def digest(content: bytes, size: int = 8) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def write_packed(target: Path, header: dict, contents: list[bytes]) -> None:
    """Write a file of this header, and these contents of its `files` and `tensors`."""
    raw = json.dumps(header, separators=(",", ":")).encode()
    deflated = zlib.compress(raw, 9)
    prefix = PREFIX.pack(MAGIC, VERSION, len(deflated), len(raw))
    checksum = bytes.fromhex(digest(prefix + deflated, 16))
    content = b"".join([prefix, checksum, deflated, *contents])
    write_file(target, lambda path: path.write_bytes(content))


def open_packed(file: str) -> Packed:
    """Read and check the header of a packed file. Raises UserError."""
    path = Path(file)
    try:
        with path.open("rb") as content:
            prefix = content.read(PREFIX.size)
            if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
                raise UserError(
                    f"{path} is not a packed model: write one with saving_prunebert.py pack"
                )
            _, version, length, _ = PREFIX.unpack(prefix)
            checksum = content.read(16).hex()
            deflated = content.read(length)
            start = content.tell()
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if version > VERSION:
        raise UserError(
            f"{path} has version {version} of the format, but this code reads version {VERSION}: "
            "update the code"
        )
    damaged = f"{path} is truncated or damaged"
    if digest(prefix + deflated, 16) != checksum:
        raise UserError(f"{damaged}: the checksum of its header does not match")
    try:
        packed = Packed(path, json.loads(zlib.decompress(deflated)), start)
        expected = start + packed.size("files") + packed.size("tensors")
        _check_header(packed)
    except Exception as error:  # the header was not written by `pack`, or for other libraries
        raise UserError(f"{path} has an invalid header: {first_line(error)}") from error
    if size != expected:
        raise UserError(f"{damaged}: it has {size:,} bytes, but its header says {expected:,}")
    return packed


def _check_header(packed: Packed) -> None:
    """Raises an exception unless names and shapes fit the configuration."""
    header = packed.header
    for entry in header["files"]:
        if not TEXT_FILES.fullmatch(entry["name"]):
            raise ValueError(f"{entry['name']!r} is neither a card nor a file of a tokenizer")
    with torch.device("meta"):  # without memory for the weights
        model = packed.model_class(packed.config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if header["base_model"]:
        embeddings = prefix_of(packed.model_class)
        shapes = {name: x for name, x in shapes.items() if not name.startswith(embeddings)}
    if {entry["name"]: entry["shape"] for entry in header["tensors"]} != shapes:
        raise ValueError("its tensors do not fit its configuration")
