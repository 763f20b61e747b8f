"""Lossless compaction: what no output depends on is taken out of a pruned BERT, without a change of its outputs.

In attention with softmax(Q K^T / sqrt(d)) V, and after it W_O:
- a row of W_V that no column of W_O reads is dropped; so is an empty one, whose value is its bias for every key: softmax
  sums to 1, and W_O times that bias goes to the bias of W_O;
- a row of W_K that is empty adds the same to the scores of all keys, which softmax does not see: it goes, with its row of
  W_Q; so does one whose row of W_Q is empty and without bias;
- a head none of whose values is left goes whole.
In the feed-forward part a neuron goes when its row of W_1 or its column of W_2 is empty; W_2 times the constant
activation of the former goes to the bias of W_2.

Exact wherever softmax sums to 1: not for a sequence that is nothing but padding, nor under dropout of attention.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

MULTIPLE = 8  # sizes of compacted dense matrices, as fast matrix units like them


@dataclass
class Affine:
    """x -> W x + b with W (outputs x inputs) in CSR, b (outputs), both float32."""

    weight: csr_array
    bias: np.ndarray

    def keep(self, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> "Affine":
        """The part with these rows and columns (boolean)."""
        weight, bias = self.weight, self.bias
        if rows is not None and not rows.all():
            weight, bias = weight[rows], bias[rows]
        if columns is not None and not columns.all():
            weight = weight[:, columns]
        return Affine(weight, bias)

    def fold(self, constant: np.ndarray, values: np.ndarray) -> "Affine":
        """With the inputs `constant` (boolean), whose values are these, moved to the bias."""
        moved = self.weight[:, constant].astype(np.float64) @ values[constant].astype(np.float64)
        return Affine(self.weight, (self.bias + moved).astype(np.float32))


@dataclass
class Layer:
    """The matrices of one layer of BERT. sizes, sizes_v: rows of each head in query and key, and in value."""

    query: Affine
    key: Affine
    value: Affine
    output: Affine
    first: Affine
    second: Affine
    sizes: list[int]
    sizes_v: list[int]

    def matrices(self) -> list[Affine]:
        return [self.query, self.key, self.value, self.output, self.first, self.second]


NAMES = {  # of Layer's fields, in a layer of BERT
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "output": "attention.output.dense", "first": "intermediate.dense", "second": "output.dense",
}  # fmt: skip


def read_layer(fetch: Callable[[str], Tensor | np.ndarray | csr_array], heads: int) -> Layer:
    """A layer with `heads` heads; `fetch` gives a parameter by its name within the layer."""
    parts = {}
    for field, name in NAMES.items():
        weight, bias = fetch(f"{name}.weight"), fetch(f"{name}.bias")
        weight = weight if isinstance(weight, csr_array) else csr_array(_array(weight))
        parts[field] = Affine(weight, _array(bias))
    sizes = [len(parts["query"].bias) // heads] * heads
    return Layer(**parts, sizes=sizes, sizes_v=list(sizes))


def _array(tensor: Tensor | np.ndarray) -> np.ndarray:
    return tensor.detach().float().cpu().numpy() if isinstance(tensor, Tensor) else tensor


def compact(layer: Layer, activation: str) -> Layer:
    """The layer without what its output does not depend on; `activation` is its `hidden_act`.

    A head that is left keeps a row of query and key at least. The layer itself is left as it is.
    """
    query, key, value, output = layer.query, layer.key, layer.value, layer.output
    constant = _empty_rows(value)
    output = output.fold(constant, value.bias)
    keep_v = _read(output) & ~constant
    sizes_v = _count(keep_v, layer.sizes_v)
    alive = np.array(sizes_v) > 0
    keep = ~_empty_rows(key) & (~_empty_rows(query) | (query.bias != 0))
    starts = np.cumsum([0, *layer.sizes[:-1]])
    keep[starts[np.array(_count(keep, layer.sizes)) == 0]] = True
    keep &= np.repeat(alive, layer.sizes)
    constant = _empty_rows(layer.first)
    values = ACT2FN[activation](torch.from_numpy(layer.first.bias)).numpy()
    second = layer.second.fold(constant, values)
    neurons = _read(second) & ~constant
    return Layer(
        query.keep(keep), key.keep(keep), value.keep(keep_v), output.keep(columns=keep_v),
        layer.first.keep(neurons), second.keep(columns=neurons),
        [size for size in _count(keep, layer.sizes) if size], [size for size in sizes_v if size],
    )  # fmt: skip


def _empty_rows(affine: Affine) -> np.ndarray:
    return np.diff(affine.weight.indptr) == 0


def _read(affine: Affine) -> np.ndarray:
    """Which inputs have an entry at all."""
    return np.bincount(affine.weight.indices, minlength=affine.weight.shape[1]) > 0


def _count(keep: np.ndarray, sizes: list[int]) -> list[int]:
    return [int(part.sum()) for part in np.split(keep, np.cumsum(sizes)[:-1])]


# ------------------------------------------------------------------------------- compacted dense models


@torch.no_grad()
def compact_model(model: PreTrainedModel, encoder: nn.Module) -> None:
    """Compact the stock layers of `encoder`, part of `model`, in place: smaller Linears, on any device, trainable.

    The heads of a layer must be alike there: they get the size of the largest that is left, with rows of
    zeros in the others. A layer that gets no smaller stays as it is.
    """
    for block in encoder.layer:
        attention = block.attention.self
        layer = compact(
            read_layer(block.get_parameter, attention.num_attention_heads), model.config.hidden_act
        )
        size = _multiple(max(layer.sizes + layer.sizes_v, default=1), attention.attention_head_size)
        heads = max(1, len(layer.sizes))
        if heads * size < attention.all_head_size:
            rows, rows_v = _places(layer.sizes, size), _places(layer.sizes_v, size)
            _replace(attention, "query", layer.query, rows=rows, total=heads * size)
            _replace(attention, "key", layer.key, rows=rows, total=heads * size)
            _replace(attention, "value", layer.value, rows=rows_v, total=heads * size)
            _replace(
                block.attention.output, "dense", layer.output, columns=rows_v, total=heads * size
            )
            attention.num_attention_heads, attention.attention_head_size = heads, size
            attention.all_head_size = heads * size
        neurons = len(layer.first.bias)
        total = _multiple(neurons, block.intermediate.dense.out_features)
        if total < block.intermediate.dense.out_features:
            _replace(block.intermediate, "dense", layer.first, rows=np.arange(neurons), total=total)
            _replace(block.output, "dense", layer.second, columns=np.arange(neurons), total=total)


def _multiple(size: int, most: int) -> int:
    return min(most, -(-max(1, size) // MULTIPLE) * MULTIPLE)


def _places(sizes: list[int], size: int) -> np.ndarray:
    """Where the rows of heads of these sizes lie when each has room for `size`."""
    return np.concatenate(
        [np.arange(own) + head * size for head, own in enumerate(sizes)] + [np.zeros(0, int)]
    ).astype(int)


def _replace(
    parent: nn.Module, name: str, affine: Affine, *, total: int, rows=None, columns=None
) -> None:
    """Put a smaller Linear in the place of one: `rows` or `columns` are the places of the affine map's own, of `total`."""
    old = getattr(parent, name)
    weight, bias = affine.weight.toarray(), affine.bias
    if rows is not None:
        weight, bias = _spread(weight, rows, total), _spread(bias, rows, total)
    else:
        weight = _spread(weight.T, columns, total).T
    linear = nn.Linear(*weight.shape[::-1], device="meta")
    for parameter, array in (("weight", weight), ("bias", bias)):
        theirs = getattr(old, parameter)
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(theirs)
        setattr(linear, parameter, nn.Parameter(tensor, requires_grad=theirs.requires_grad))
    setattr(parent, name, linear.train(old.training))


def _spread(array: np.ndarray, places: np.ndarray, total: int) -> np.ndarray:
    spread = np.zeros((total, *array.shape[1:]), np.float32)
    spread[places] = array
    return spread


def density(encoder: nn.Module) -> float:
    """The fraction of weights of its Linears that are not zero, in [0, 1]."""
    weights = [module.weight for module in encoder.modules() if isinstance(module, nn.Linear)]
    return sum(int(weight.count_nonzero()) for weight in weights) / max(
        1, sum(weight.numel() for weight in weights)
    )
