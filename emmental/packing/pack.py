"""Packed files: write one, load it, unpack it, compare it."""

import lzma
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..checkpoints.card import CARD_FILE, derived_card, read_card
from ..checkpoints.embeddings import base_embeddings, digest_of, prefix_of
from ..checkpoints.export import bertarize
from ..checkpoints.loading import head_of, load_masked, load_model, read_config
from ..checkpoints.tokenizer import tokenizer_to_copy
from ..inference import sparse_model, sparsify
from ..models.families import family_of, is_masked
from ..system.errors import UserError
from ..system.files import write_folder
from . import coding
from .format import TEXT_FILES, Packed, digest, open_packed, write_packed


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
    """Write the masked or plain model in the folder `checkpoint` to `file`.

    bits: precision of the matrices, one of `coding.BITS`; vectors have at least 16 bits.
    base_model: leave the embeddings out, because they are those of this model (name or folder).
    pruning_method, threshold, global_topk: as in `load_masked`.
    Raises UserError for a model that cannot be packed, TrainingError for a file that cannot be
    written. An error leaves no partial file.
    """
    if bits not in coding.BITS:
        raise UserError(f"--bits {bits}: choose one of {', '.join(map(str, coding.BITS))}")
    target = Path(file)
    if target.is_dir():
        raise UserError(f"{target} is a folder: give the name of the file to write")
    model_class, config, state = load_plain(checkpoint, pruning_method, threshold, global_topk)
    prefix = prefix_of(model_class)
    files = _encode_files(tokenizer_to_copy(checkpoint), Path(checkpoint))
    base = None
    if base_model:
        base = {"name": base_model, "digest": digest_of(base_embeddings(base_model))}
        own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        if digest_of(own) != base["digest"]:
            raise UserError(
                f"the embeddings of {checkpoint} are not those of {base_model}: pack without "
                "--base_model, or give the model that it was fine-pruned from"
            )
        state = {name: tensor for name, tensor in state.items() if name not in own}
    try:
        tensors = [
            _encode_tensor(name, tensor, bits, by_row=tensor.dim() == 2 and name.startswith(prefix))
            for name, tensor in state.items()
        ]
    except UserError as error:
        raise UserError(f"{checkpoint} cannot be packed: {error}") from error
    header = {
        "architecture": model_class.__name__,
        "config": config.to_diff_dict(),
        "bits": bits,
        "base_model": base,
        "files": [entry for entry, _ in files],
        "tensors": [entry for entry, _ in tensors],
    }
    write_packed(target, header, [content for _, content in files + tensors])
    return open_packed(file)


def load_plain(
    checkpoint: str,
    pruning_method: str | None = None,
    threshold: float | None = None,
    global_topk: bool | None = None,
) -> tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, Tensor]]:
    """Class, configuration and state dict of a plain model, or of a masked one bertarized.

    The last three arguments are as in `load_masked`. Raises UserError.
    """
    values = read_config(checkpoint)
    if is_masked(values["model_type"]):
        model = bertarize(load_masked(checkpoint, pruning_method, threshold, global_topk))
    else:
        model = load_model(checkpoint, head_of(checkpoint, values), masked=False, trained=True)
    return type(model), model.config, model.state_dict()


def _encode_files(
    tokenizer: PreTrainedTokenizerFast | None, checkpoint: Path
) -> list[tuple[dict, bytes]]:
    files = []
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer:
            tokenizer.save_pretrained(folder)
        if card := read_card(checkpoint):
            (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
        for path in sorted(Path(folder).iterdir()):
            if TEXT_FILES.fullmatch(path.name):
                raw = path.read_bytes()
                content = lzma.compress(raw, preset=9)
                entry = {"name": path.name, "bytes": len(content), "size": len(raw)}
                files.append((entry | {"digest": digest(content)}, content))
    return files


def _encode_tensor(name: str, tensor: Tensor, bits: int, by_row: bool) -> tuple[dict, bytes]:
    try:
        coded = coding.encode(tensor.float().numpy(), bits, by_row)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
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
    return entry, content


def load_packed(file: str, base_model: str | None = None, sparse: bool = False) -> PreTrainedModel:
    """The stock or compact model of a packed file, in evaluation mode.

    base_model: where to find the embeddings that the file leaves out, if not under the recorded
    name. sparse: return the model as `emmental.inference.sparsify` would, for a CPU, without ever
    making matrices dense that its kernels take. Raises UserError.
    """
    packed = open_packed(file)
    family, model_class = family_of(packed.config), packed.model_class
    state = _fetch_embeddings(packed, base_model)
    if sparse and family.norms:
        layers = prefix_of(model_class, "layers")
        for entry, parts in packed.tensors(coding.decode_sparse):
            in_layers = entry["name"].startswith(layers)
            state[entry["name"]] = _tensor(entry, *parts, sparse=in_layers)
        return sparse_model(model_class, packed.config, state)
    state |= {entry["name"]: torch.from_numpy(array) for entry, array in packed.tensors()}
    model = model_class.from_pretrained(
        None, config=packed.config, state_dict=state, dtype=torch.float32
    ).eval()
    return sparsify(model) if sparse else model


def _tensor(entry: dict, indices: np.ndarray | None, values: np.ndarray, sparse: bool):
    """A matrix as csr_array if `sparse`, any other tensor as a torch tensor."""
    shape = tuple(entry["shape"])
    is_sparse = sparse and len(shape) == 2
    if is_sparse and indices is not None:
        return csr_array((values, np.divmod(indices, shape[1])), shape)
    dense = values
    if indices is not None:
        dense = np.zeros(math.prod(shape), np.float32)
        dense[indices] = values
    dense = dense.reshape(shape)
    return csr_array(dense) if is_sparse else torch.from_numpy(dense)


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
    packed, target = open_packed(file), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists: choose another folder")
    model = load_packed(file, base_model)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        for entry, content in packed.streams("files"):
            (folder / entry["name"]).write_bytes(lzma.decompress(content))
        origin = (
            f"Unpacked from `{packed.path.name}`, with weights of {packed.header['bits']} bits."
        )
        card = derived_card(read_card(folder), target.name, model, origin)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")

    write_folder(target, fill)
    return model


def summary(packed: Packed) -> dict:
    """A row for each tensor, and totals in bytes: for encoder and head, embeddings, and the file.

    `dense` is float32, `entropy` that of the stored masks and values. The tokenizer and the file
    have no `dense` and `entropy`.
    """
    rows = []
    parts, prefix = ("encoder and head", "embeddings"), packed.embeddings
    totals = {part: {"dense": 0, "packed": 0, "entropy": 0} for part in parts}
    for entry, array in packed.tensors():
        entropy = round((entry["position_entropy"] + entry["value_entropy"]) / 8)
        rows.append(
            {
                "name": entry["name"],
                "shape": entry["shape"],
                "remaining": entry["kept"] / array.size,
                "bits_per_weight": 8 * entry["bytes"] / max(1, entry["kept"]),
                "bytes": entry["bytes"],
                "entropy": entropy,
            }
        )
        total = totals[parts[entry["name"].startswith(prefix)]]
        total["dense"] += 4 * array.size
        total["packed"] += entry["bytes"]
        total["entropy"] += entropy
    totals["tokenizer"] = {"packed": packed.size("files")}
    totals["file"] = {"packed": packed.path.stat().st_size}
    return {"rows": rows, "totals": totals}


def compare(file: str, checkpoint: str, base_model: str | None = None, **masks) -> list[str]:
    """One line for each tensor in which a packed file differs from its checkpoint.

    Weights may differ by `coding.error_bound`. `masks` are arguments of `load_plain`. Raises
    UserError for models with different heads or sizes.
    """
    packed = open_packed(file)
    model_class, _, exact = load_plain(checkpoint, **masks)
    if model_class is not packed.model_class:
        name = packed.model_class.__name__
        raise UserError(f"{file} holds {name}, but {checkpoint} is {model_class.__name__}")
    state = load_packed(file, base_model).state_dict()
    shapes = [{name: x.shape for name, x in tensors.items()} for tensors in (state, exact)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{file} and {checkpoint} are models of different sizes")
    by_row = {entry["name"]: entry["by_row"] for entry in packed.header["tensors"]}
    problems = []
    for name, tensor in state.items():
        found, wanted = tensor.numpy(), exact[name].float().numpy()
        bits = packed.header["bits"] if name in by_row else 32  # embeddings of the base: exact
        bound = coding.error_bound(wanted, bits, by_row.get(name, False))
        if found.ndim == 2 and ((found != 0) != (wanted != 0)).any():
            problems.append(f"{name} has another mask")
        elif not (np.abs(found.astype(np.float64) - wanted) <= bound).all():
            problems.append(f"{name} exceeds the error bound of {bits} bits")
    return problems
