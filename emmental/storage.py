"""Packed files: a fine-pruned BERT close to the entropy of its weights, and back with one call.

A file holds the plain (bertarized) model: its configuration, its tokenizer, and each tensor as one stream of
`emmental.coding`. Nothing in it is ever executed. All integers are little-endian:

    offset  size  what
    0       8     b"PRUNBERT"
    8       4     version, 1
    12      4     H, length of the header in the file
    16      4     its length when inflated
    20      16    BLAKE2b of the 20 bytes before and of the header
    36      H     header: JSON, deflated
    36 + H  ...   the tokenizer's files (LZMA), then the tensors' streams (32-bit words), in the header's order

The header has `architecture`, `config`, `bits`, `base_model` (None, or {name, digest}), `files` ({name, bytes, size,
digest}) and `tensors` ({name, shape, kept, by_row, bytes, digest, position_entropy, value_entropy}, entropies in bits).
A digest is the BLAKE2b (8 bytes) of what is stored. Of a file with a base model the embeddings are left out: loading
takes them from there, and compares their digest.
"""

import hashlib
import json
import lzma
import math
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.sparse import csr_array
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

from . import coding
from .errors import UserError, first_line
from .export import bertarized_config, bertarized_state_dict
from .families import HEADS, MASKED, is_masked
from .files import write_file, write_folder
from .inference import sparse_model
from .loading import head_of, load_masked, load_model, load_tokenizer, read_config

MAGIC, VERSION = b"PRUNBERT", 1
PREFIX = struct.Struct("<8sIII16s")
TOKENIZER_FILES = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.(json|txt)|chat_template\.jinja"
)
EMBEDDINGS = "bert.embeddings."
ENCODER = "bert.encoder."


@dataclass
class Packed:
    """An opened packed file: its header, and where its streams begin."""

    path: Path
    header: dict
    start: int

    @property
    def config(self) -> BertConfig:
        return BertConfig.from_dict(self.header["config"])

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.header["architecture"])

    def streams(self, kind: str) -> Iterator[tuple[dict, bytes]]:
        """Entries of `files` or `tensors` with their bytes, checked. Raises UserError for damage."""
        with self.path.open("rb") as file:
            file.seek(
                self.start
                + (
                    sum(entry["bytes"] for entry in self.header["files"])
                    if kind == "tensors"
                    else 0
                )
            )
            for entry in self.header[kind]:
                content = file.read(entry["bytes"])
                if len(content) < entry["bytes"]:
                    raise UserError(f"{self.path} is truncated: it ends within {entry['name']}")
                if _digest(content) != entry["digest"]:
                    raise UserError(
                        f"{self.path} is damaged: the checksum of {entry['name']} does not match"
                    )
                yield entry, content

    def tensors(self, sparse: bool = False) -> Iterator[tuple[dict, object]]:
        """Entries of the tensors with their float32 array, or (indices, values) of `coding.decode_sparse`."""
        decode = coding.decode_sparse if sparse else coding.decode
        for entry, content in self.streams("tensors"):
            try:
                words = np.frombuffer(content, "<u4").astype(np.uint32)
                yield (
                    entry,
                    decode(words, tuple(entry["shape"]), self.header["bits"], entry["by_row"]),
                )
            except (UserError, ValueError) as error:
                raise UserError(
                    f"{self.path} is damaged: {entry['name']}: {first_line(error)}"
                ) from error


# --------------------------------------------------------------------------------------------- packing


def pack(
    checkpoint: str,
    file: str,
    bits: int = 8,
    base_model: str | None = None,
    *,
    pruning_method: str | None = None,
    threshold: float | None = None,
    global_topk: bool | None = None,
) -> Packed:
    """Write the masked or plain BERT in the folder `checkpoint` to `file`, whole or not at all.

    bits: precision of the matrices, one of `coding.BITS`; vectors have 16 bits at least. base_model: name or
    folder of the model whose embeddings this one has, to leave them out. The others are those of `load_masked`.
    Raises UserError for what cannot be packed.
    """  # fmt: skip
    if bits not in coding.BITS:
        raise UserError(f"--bits {bits}: choose one of {', '.join(map(str, coding.BITS))}")
    target = Path(file)
    if target.is_dir():
        raise UserError(f"{target} is a folder: give the name of the file to write")
    architecture, config, state = load_plain(checkpoint, pruning_method, threshold, global_topk)
    tokenizer = load_tokenizer(checkpoint)
    base = None
    if base_model:
        base = {"name": base_model, "digest": _embeddings_digest(base_embeddings(base_model))}
        if _embeddings_digest(state) != base["digest"]:
            raise UserError(
                f"the embeddings of {checkpoint} are not those of {base_model}: pack without --base_model, "
                "or give the model that it was fine-pruned from"
            )
        state = {name: tensor for name, tensor in state.items() if not name.startswith(EMBEDDINGS)}
    files, contents = [], []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(
            path for path in Path(folder).iterdir() if TOKENIZER_FILES.fullmatch(path.name)
        ):
            raw = path.read_bytes()
            contents.append(lzma.compress(raw, preset=9))
            files.append(
                {
                    "name": path.name,
                    "bytes": len(contents[-1]),
                    "size": len(raw),
                    "digest": _digest(contents[-1]),
                }
            )
    tensors = []
    for name, tensor in state.items():
        by_row = name.startswith(EMBEDDINGS) and tensor.dim() == 2
        try:
            coded = coding.encode(tensor.float().numpy(), bits, by_row)
        except UserError as error:
            raise UserError(f"{name} of {checkpoint} cannot be packed: {error}") from error
        contents.append(coded.words.astype("<u4").tobytes())
        tensors.append({
            "name": name, "shape": list(tensor.shape), "kept": coded.kept, "by_row": by_row,
            "bytes": len(contents[-1]), "digest": _digest(contents[-1]),
            "position_entropy": round(coded.position_entropy), "value_entropy": round(coded.value_entropy),
        })  # fmt: skip
    header = {"architecture": architecture, "config": config.to_diff_dict(), "bits": bits, "base_model": base,
              "files": files, "tensors": tensors}  # fmt: skip
    _write(target, header, contents)
    return open_packed(file)


def load_plain(
    checkpoint: str,
    pruning_method: str | None = None,
    threshold: float | None = None,
    global_topk: bool | None = None,
) -> tuple[str, BertConfig, dict[str, Tensor]]:
    """Class name, configuration and state dict of the plain BERT that a checkpoint is, or is once bertarized."""
    values = read_config(checkpoint)
    if values["model_type"].removeprefix(MASKED) != "bert":
        raise UserError(
            f"{checkpoint} is of type {values['model_type']}: packed files hold BERT only"
        )
    if is_masked(values["model_type"]):
        model = load_masked(checkpoint, pruning_method, threshold, global_topk)
        config, state = bertarized_config(model.config), bertarized_state_dict(model)
    else:
        model = load_model(checkpoint, head_of(checkpoint, values), masked=False, trained=True)
        config, state = model.config, model.state_dict()
    return (
        type(model).__name__.removeprefix("Masked"),
        config,
        {name: t.detach() for name, t in state.items()},
    )


def base_embeddings(name_or_path: str) -> dict[str, Tensor]:
    """The embeddings of a BERT of any kind, by their names in a model with a head. Raises UserError."""
    read_config(name_or_path)
    try:
        model = BertModel.from_pretrained(
            name_or_path, dtype=torch.float32, add_pooling_layer=False
        )
    except Exception as error:  # broken files raise the errors of three libraries
        raise UserError(
            f"cannot load the base model {name_or_path}: {first_line(error)}"
        ) from error
    return {f"{EMBEDDINGS}{name}": tensor for name, tensor in model.embeddings.state_dict().items()}


def _embeddings_digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(name for name in state if name.startswith(EMBEDDINGS)):
        digest.update(name.encode())
        digest.update(state[name].detach().float().contiguous().numpy())
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _write(target: Path, header: dict, contents: list[bytes]) -> None:
    raw = json.dumps(header, separators=(",", ":")).encode()
    deflated = zlib.compress(raw, 9)
    prefix = PREFIX.pack(MAGIC, VERSION, len(deflated), len(raw), bytes(16))[:20]
    digest = hashlib.blake2b(prefix + deflated, digest_size=16).digest()
    write_file(
        target, lambda path: path.write_bytes(b"".join([prefix, digest, deflated, *contents]))
    )


# --------------------------------------------------------------------------------------------- loading


def open_packed(file: str) -> Packed:
    """Read and check the header of a packed file. Raises UserError."""
    path = Path(file)
    try:
        with path.open("rb") as content:
            prefix = content.read(PREFIX.size)
            if prefix[:8] != MAGIC or len(prefix) < PREFIX.size:
                raise UserError(f"{path} is no packed model: saving_prunebert.py pack writes them")
            _, version, length, _, digest = PREFIX.unpack(prefix)
            if version > VERSION:
                raise UserError(
                    f"{path} has version {version} of the format, and this code knows {VERSION}: update it"
                )
            deflated = content.read(length)
            if len(deflated) < length:
                raise UserError(f"{path} is truncated: it ends within its header")
            total = os.fstat(content.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if hashlib.blake2b(prefix[:20] + deflated, digest_size=16).digest() != digest:
        raise UserError(f"{path} is damaged: the checksum of its header does not match")
    try:
        header = json.loads(zlib.decompress(deflated))
        start = PREFIX.size + length
        expected = start + sum(
            entry["bytes"] for kind in ("files", "tensors") for entry in header[kind]
        )
        packed = Packed(path, header, start)
        _check_header(packed)
    except UserError:
        raise
    except Exception as error:  # a header that passes its checksum was not written by `pack`
        raise UserError(f"{path} has a header that makes no sense ({first_line(error)})") from error
    if total != expected:
        what = "truncated" if total < expected else "damaged"
        raise UserError(
            f"{path} is {what}: it has {total:,} bytes, and its header speaks of {expected:,}"
        )
    return packed


def _check_header(packed: Packed) -> None:
    """Names and shapes must be those of the model, which costs no memory to build without storage."""
    header = packed.header
    if header["architecture"] not in {f"BertFor{head}" for head in HEADS}:
        raise UserError(
            f"{packed.path} holds a {header['architecture']!r}: none of the heads {', '.join(HEADS)}"
        )
    for entry in header["files"]:
        if not TOKENIZER_FILES.fullmatch(entry["name"]):
            raise ValueError(f"{entry['name']!r}, which is no file of a tokenizer")
    with torch.device("meta"):
        model = packed.model_class(packed.config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if header["base_model"]:
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(EMBEDDINGS)}
    found = {entry["name"]: entry["shape"] for entry in header["tensors"]}
    if found != wanted:
        odd = sorted(
            name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
        )
        raise ValueError(f"its tensors are not those of its configuration: {', '.join(odd[:3])}")


def load_packed(file: str, base_model: str | None = None, sparse: bool = False) -> PreTrainedModel:
    """The `BertFor*` model of a packed file, in evaluation mode.

    base_model: where to take the embeddings from, when the file leaves them out and its own record of the name
    no longer holds. sparse: the model that `emmental.inference.sparsify` would make of it, for a CPU; its sparse
    matrices are never made dense. Raises UserError.
    """
    packed = open_packed(file)
    if sparse:
        state = {
            entry["name"]: _sparse_tensor(entry, parts)
            for entry, parts in packed.tensors(sparse=True)
        }
        state |= _fetch_embeddings(packed, base_model)
        return sparse_model(packed.model_class, packed.config, state)
    state = {entry["name"]: torch.from_numpy(array) for entry, array in packed.tensors()}
    state |= _fetch_embeddings(packed, base_model)
    return assemble(packed, state)


def _sparse_tensor(entry: dict, parts: tuple[np.ndarray | None, np.ndarray]) -> csr_array | Tensor:
    """A matrix of the encoder in CSR, any other tensor as it is."""
    indices, values = parts
    shape = tuple(entry["shape"])
    encoder = entry["name"].startswith(ENCODER) and len(shape) == 2
    if indices is None:
        dense = values.reshape(shape)
        return csr_array(dense) if encoder else torch.from_numpy(dense)
    if encoder:
        rows, columns = np.divmod(indices, shape[1])
        return csr_array((values, (rows, columns)), shape)
    dense = np.zeros(math.prod(shape), np.float32)
    dense[indices] = values
    return torch.from_numpy(dense.reshape(shape))


def _fetch_embeddings(packed: Packed, base_model: str | None) -> dict[str, Tensor]:
    base = packed.header["base_model"]
    if not base:
        return {}
    name = base_model or base["name"]
    embeddings = base_embeddings(name)
    if _embeddings_digest(embeddings) != base["digest"]:
        raise UserError(
            f"the embeddings of {name} are not those that {packed.path} was packed without: give another base model"
        )
    return embeddings


def assemble(packed: Packed, state: dict[str, Tensor]) -> PreTrainedModel:
    """The model of a packed file with these tensors, which are not copied."""
    model = packed.model_class.from_pretrained(
        None, config=packed.config, state_dict=state, dtype=torch.float32
    )
    return model.eval()


def unpack(file: str, folder: str, base_model: str | None = None) -> PreTrainedModel:
    """Write model and tokenizer of a packed file into an empty `folder`, for `from_pretrained`."""
    packed, target = open_packed(file), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: choose another folder")
    model = load_packed(file, base_model)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        for entry, content in packed.streams("files"):
            (folder / entry["name"]).write_bytes(_tokenizer_file(packed, entry, content))

    write_folder(target, fill)
    return model


def _tokenizer_file(packed: Packed, entry: dict, content: bytes) -> bytes:
    try:
        return lzma.decompress(content)
    except lzma.LZMAError as error:
        raise UserError(f"{packed.path} is damaged: {entry['name']}: {error}") from error


# ------------------------------------------------------------------------------------ looking into it


def summary(packed: Packed) -> dict:
    """Rows by tensor, and totals in bytes of encoder and head, embeddings, and everything.

    dense: float32. entropy: of what is stored.
    """
    rows = []
    totals = {
        part: dict.fromkeys(("dense", "packed", "entropy"), 0)
        for part in ("encoder and head", "embeddings")
    }
    for entry, array in packed.tensors():
        embedding = entry["name"].startswith(EMBEDDINGS)
        entropy = (entry["position_entropy"] + entry["value_entropy"]) / 8
        rows.append({
            "name": entry["name"], "shape": entry["shape"], "remaining": entry["kept"] / array.size,
            "bits_per_weight": 8 * entry["bytes"] / max(1, entry["kept"]), "bytes": entry["bytes"], "entropy": round(entropy),
        })  # fmt: skip
        total = totals["embeddings" if embedding else "encoder and head"]
        total["dense"] += 4 * array.size
        total["packed"] += entry["bytes"]
        total["entropy"] += round(entropy)
    files = sum(entry["bytes"] for entry in packed.header["files"])
    totals["tokenizer"] = {"packed": files}
    totals["file"] = {"packed": packed.path.stat().st_size}
    return {"rows": rows, "totals": totals}


def compare(file: str, checkpoint: str, base_model: str | None = None, **masks) -> list[str]:
    """What differs between a packed file and the checkpoint it was made of: nothing, or a line for each tensor."""
    packed = open_packed(file)
    architecture, _, state = load_plain(checkpoint, **masks)
    if architecture != packed.header["architecture"]:
        raise UserError(
            f"{file} holds a {packed.header['architecture']}, and {checkpoint} is a {architecture}"
        )
    problems = []
    model = load_packed(file, base_model)
    by_row = {entry["name"]: entry["by_row"] for entry in packed.header["tensors"]}
    for name, ours in model.state_dict().items():
        theirs, ours = state[name].float().numpy(), ours.numpy()
        if ours.shape != theirs.shape:
            problems.append(f"{name} has the shape {ours.shape}, not {theirs.shape}")
        elif ours.ndim == 2 and not np.array_equal(ours != 0, theirs != 0):
            problems.append(
                f"{name} has another mask: {np.count_nonzero((ours != 0) != (theirs != 0)):,} entries differ"
            )
        else:
            bits, rows = (packed.header["bits"], by_row[name]) if name in by_row else (32, False)
            excess = np.abs(ours.astype(np.float64) - theirs) - coding.error_bound(
                theirs, bits, rows
            )
            if excess.max(initial=0.0) > 0:
                problems.append(
                    f"{name} lies outside the bound of {bits} bits, by up to {excess.max():.3g}"
                )
    return problems
