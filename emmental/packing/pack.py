"""Write, load, unpack and describe packed files, and compare one with its checkpoint."""

import lzma
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoints.card import CARD_FILE, derived_card, read_card
from ..checkpoints.embeddings import base_embeddings, digest_of
from ..checkpoints.loading import load_plain
from ..checkpoints.tokenizer import tokenizer_to_copy
from ..inference import sparse_model, sparsify
from ..models.families import family_of, prefix_of
from ..system.errors import UserError
from ..system.files import write_folder
from . import coding
from .format import TEXT_FILES, Packed, digest, open_packed, write_packed


def pack(
    checkpoint: str, file: str, bits: int = 8, base_model: str | None = None, **masks
) -> Packed:
    """Write the masked or plain model in the folder `checkpoint` to `file`.

    bits: precision of the matrices, one of `coding.BITS`; vectors have at least 16 bits.
    base_model: leave the embeddings out, because they are those of this model (name or folder).
    masks: arguments of `load_masked`.
    Raises UserError for a model that cannot be packed, TrainingError for a file that cannot be
    written. An error leaves no partial file.
    """
    if bits not in coding.BITS:
        raise UserError(f"--bits {bits}: choose one of {', '.join(map(str, coding.BITS))}")
    target = Path(file)
    if target.is_dir():
        raise UserError(f"{target} is a folder: give the name of the file to write")
    model = load_plain(checkpoint, **masks)
    files = _encode_files(checkpoint, model)
    state = model.state_dict()
    embeddings = {n: tensor for n, tensor in state.items() if n.startswith(prefix_of(type(model)))}
    base = None
    if base_model:
        base = {"name": base_model, "digest": digest_of(base_embeddings(base_model))}
        if digest_of(embeddings) != base["digest"]:
            raise UserError(
                f"the embeddings of {checkpoint} are not those of {base_model}: pack without "
                "--base_model, or give the model that it was fine-pruned from"
            )
        state = {name: tensor for name, tensor in state.items() if name not in embeddings}
    tensors = []
    for name, tensor in state.items():
        by_row = tensor.dim() == 2 and name in embeddings
        coded = _encode(checkpoint, name, tensor, bits, by_row)
        content = coded.words.astype("<u4").tobytes()
        entry = {
            "name": name,
            "shape": list(tensor.shape),
            "kept": coded.kept,
            "by_row": by_row,
            "bytes": len(content),
            "digest": digest(content),
            "position_entropy": round(coded.position_entropy),
            "value_entropy": round(coded.value_entropy),
        }
        tensors.append((entry, content))
    header = {
        "architecture": type(model).__name__,
        "config": model.config.to_diff_dict(),
        "bits": bits,
        "base_model": base,
        "files": [entry for entry, _ in files],
        "tensors": [entry for entry, _ in tensors],
    }
    write_packed(target, header, [content for _, content in files + tensors])
    return open_packed(file)


def _encode_files(checkpoint: str, model: PreTrainedModel) -> list[tuple[dict, bytes]]:
    """The entries of a checkpoint's tokenizer and card, and their contents."""
    tokenizer = tokenizer_to_copy(checkpoint, model)
    card = read_card(Path(checkpoint))
    files = []
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer:
            tokenizer.save_pretrained(folder)
        if card:
            Path(folder, CARD_FILE).write_text(card, encoding="utf-8")
        for path in sorted(Path(folder).iterdir()):
            if TEXT_FILES.fullmatch(path.name):
                raw = path.read_bytes()
                content = lzma.compress(raw, preset=9)
                entry = {"name": path.name, "bytes": len(content), "size": len(raw)}
                files.append((entry | {"digest": digest(content)}, content))
    return files


def _encode(checkpoint: str, name: str, tensor: Tensor, bits: int, by_row: bool) -> coding.Coded:
    try:
        return coding.encode(tensor.float().numpy(), bits, by_row)
    except UserError as error:
        raise UserError(f"{checkpoint} cannot be packed: {name}: {error}") from error


def load_packed(file: str, base_model: str | None = None, sparse: bool = False) -> PreTrainedModel:
    """The stock or compact model of a packed file, in evaluation mode.

    base_model: where to find the embeddings that the file leaves out, if not under the recorded
    name. sparse: return what `emmental.inference.sparsify` would make of the model, for a CPU, but
    never make sparse matrices dense. Raises UserError.
    """
    packed = open_packed(file)
    model_class = packed.model_class
    config = packed.config
    state = _fetch_embeddings(packed, base_model)
    in_csr = prefix_of(model_class, "layers") if sparse and family_of(config).norms else None
    for entry, array in packed.tensors(in_csr):
        is_csr = isinstance(array, csr_array)
        state[entry["name"]] = array if is_csr else torch.from_numpy(array)
    if in_csr:
        return sparse_model(model_class, config, state)
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return sparsify(model.eval()) if sparse else model.eval()


def _fetch_embeddings(packed: Packed, base_model: str | None) -> dict[str, Tensor]:
    base = packed.header["base_model"]
    if not base:
        return {}
    name = base_model or base["name"]
    embeddings = base_embeddings(name)
    if digest_of(embeddings) != base["digest"]:
        raise UserError(
            f"{packed.path} was packed without its embeddings, which are not those of {name}: "
            "give another base model"
        )
    return embeddings


def unpack(file: str, folder: str, base_model: str | None = None) -> PreTrainedModel:
    """Write the model of a packed file, and its tokenizer if it has one, to a new `folder`.

    Returns the model. Raises UserError, or TrainingError for a folder that cannot be written.
    """
    packed = open_packed(file)
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists: choose another folder")
    model = load_packed(file, base_model)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        for entry, content in packed.streams("files"):
            (folder / entry["name"]).write_bytes(lzma.decompress(content))
        bits = packed.header["bits"]
        origin = f"Unpacked from `{packed.path.name}`, with weights of {bits} bits."
        card = derived_card(read_card(folder), target.name, model, origin)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")

    write_folder(target, fill)
    return model


def summary(packed: Packed) -> dict:
    """A row for each tensor, and totals in bytes: for encoder and head, embeddings, and the file.

    `dense` is float32, `entropy` that of the stored values and of masks whose entries are
    independent: a mask of similar rows can take less. The tokenizer and the file have neither.
    """
    rows = []
    parts = ("encoder and head", "embeddings")
    totals = {part: {"dense": 0, "packed": 0, "entropy": 0} for part in parts}
    embeddings = prefix_of(packed.model_class)
    for entry, array in packed.tensors():
        row = {
            "name": entry["name"],
            "shape": entry["shape"],
            "remaining": entry["kept"] / array.size,
            "bits_per_weight": 8 * entry["bytes"] / max(1, entry["kept"]),
            "bytes": entry["bytes"],
            "entropy": round((entry["position_entropy"] + entry["value_entropy"]) / 8),
        }
        rows.append(row)
        total = totals[parts[entry["name"].startswith(embeddings)]]
        total["dense"] += 4 * array.size
        total["packed"] += entry["bytes"]
        total["entropy"] += row["entropy"]
    totals["tokenizer"] = {"packed": packed.size("files")}
    totals["file"] = {"packed": packed.path.stat().st_size}
    return {"rows": rows, "totals": totals}


def compare(file: str, checkpoint: str, base_model: str | None = None, **masks) -> list[str]:
    """One line for each tensor in which a packed file differs from its checkpoint.

    A weight may differ by as much as it does when the checkpoint is coded anew. `masks` are
    arguments of `load_masked`. Raises UserError for models with different heads or sizes.
    """
    packed = open_packed(file)
    model = load_plain(checkpoint, **masks)
    if type(model) is not packed.model_class:
        name = packed.model_class.__name__
        raise UserError(f"{file} holds {name}, but {checkpoint} is {type(model).__name__}")
    stored = load_packed(file, base_model).state_dict()
    exact = model.state_dict()
    if {n: x.shape for n, x in stored.items()} != {n: x.shape for n, x in exact.items()}:
        raise UserError(f"{file} and {checkpoint} are models of different sizes")
    bits = packed.header["bits"]
    by_row = {entry["name"]: entry["by_row"] for entry in packed.header["tensors"]}
    problems = []
    for name, tensor in exact.items():
        wanted = tensor.float().numpy()
        coded = wanted
        if name in by_row:  # others are embeddings of a base model
            words = _encode(checkpoint, name, tensor, bits, by_row[name]).words
            coded = coding.decode(words, wanted.shape, bits, by_row[name])
        restored = stored[name].numpy()
        if wanted.ndim == 2 and ((restored != 0) != (wanted != 0)).any():
            problems.append(f"{name} has another mask")
        elif (np.abs(restored - wanted) > np.abs(coded - wanted)).any():
            problems.append(f"{name} exceeds the error bound of {bits} bits")
    return problems
