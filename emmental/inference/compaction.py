"""Lossless compaction: remove from a pruned BERT what none of its outputs depends on.

Attention computes softmax(Q K^T / sqrt(d)) V, then W_O:
- A row of W_V goes if its column of W_O is empty. An empty row of W_V goes as well: its value is
  its bias for every key, and softmax sums to 1, so W_O times this bias moves to the bias of W_O.
- An empty row of W_K adds the same to the scores of all keys, which softmax ignores: it goes with
  its row of W_Q. So does a row whose row of W_Q is empty and has no bias.
- A head without values goes as a whole.
In the feed-forward part, a neuron goes if its row of W_1 or its column of W_2 is empty. If the row
is empty, W_2 times the neuron's constant activation moves to the bias of W_2.

This is exact wherever softmax sums to 1: not for a sequence of nothing but padding, and not under
dropout of attention.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

MULTIPLE = 8  # compacted dense matrices have multiples of this size, which fast products need


@dataclass
class Affine:
    """The map x -> W x + b with W (outputs x inputs) in CSR and b (outputs), both float32."""

    weight: csr_array
    bias: np.ndarray

    def keep(self, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> "Affine":
        """The part with these rows and columns (boolean masks)."""
        weight, bias = self.weight, self.bias
        if rows is not None and not rows.all():
            weight, bias = weight[rows], bias[rows]
        if columns is not None and not columns.all():
            weight = weight[:, columns]
        return Affine(weight, bias)

    def fold(self, constant: np.ndarray, values: np.ndarray) -> "Affine":
        """Move to the bias what the inputs `constant` (a boolean mask) contribute by `values`."""
        moved = self.weight[:, constant].astype(np.float64) @ values[constant].astype(np.float64)
        return Affine(self.weight, (self.bias + moved).astype(np.float32))


@dataclass
class Layer:
    """The matrices of a BERT layer. sizes: rows per head of query and key. sizes_v: of value."""

    query: Affine
    key: Affine
    value: Affine
    output: Affine
    first: Affine
    second: Affine
    sizes: list[int]
    sizes_v: list[int]


NAMES = {  # the fields of Layer: their names in a layer of BERT
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "first": "intermediate.dense",
    "second": "output.dense",
}


def read_layer(fetch: Callable[[str], Tensor | csr_array], heads: int) -> Layer:
    """A layer with `heads` heads; `fetch` returns a parameter by its name within the layer."""
    parts = {}
    for field, name in NAMES.items():
        weight, bias = fetch(f"{name}.weight"), fetch(f"{name}.bias")
        weight = weight if isinstance(weight, csr_array) else csr_array(_array(weight))
        parts[field] = Affine(weight, _array(bias))
    sizes = [len(parts["query"].bias) // heads] * heads
    return Layer(**parts, sizes=sizes, sizes_v=sizes)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def compact(layer: Layer, activation: str) -> Layer:
    """A layer with the same output, without what it does not need; `activation` is `hidden_act`.

    A remaining head keeps at least one row of query and key. The given layer is not changed.
    """
    query, key, value, output = layer.query, layer.key, layer.value, layer.output
    constant = _empty_rows(value)
    output = output.fold(constant, value.bias)
    keep_v = _used_inputs(output) & ~constant
    sizes_v = _count(keep_v, layer.sizes_v)
    keep = ~_empty_rows(key) & (~_empty_rows(query) | (query.bias != 0))
    first_rows = np.cumsum([0, *layer.sizes[:-1]])
    keep[first_rows[np.array(_count(keep, layer.sizes)) == 0]] = True
    keep &= np.repeat(np.array(sizes_v) > 0, layer.sizes)
    constant = _empty_rows(layer.first)
    values = ACT2FN[activation](torch.from_numpy(layer.first.bias)).numpy()
    second = layer.second.fold(constant, values)
    neurons = _used_inputs(second) & ~constant
    return Layer(
        query=query.keep(keep),
        key=key.keep(keep),
        value=value.keep(keep_v),
        output=output.keep(columns=keep_v),
        first=layer.first.keep(neurons),
        second=second.keep(columns=neurons),
        sizes=[size for size in _count(keep, layer.sizes) if size],
        sizes_v=[size for size in sizes_v if size],
    )


def _empty_rows(affine: Affine) -> np.ndarray:
    return np.diff(affine.weight.indptr) == 0


def _used_inputs(affine: Affine) -> np.ndarray:
    """The inputs whose column is not empty."""
    return np.bincount(affine.weight.indices, minlength=affine.weight.shape[1]) > 0


def _count(keep: np.ndarray, sizes: list[int]) -> list[int]:
    return [int(part.sum()) for part in np.split(keep, np.cumsum(sizes)[:-1])]


# ------------------------------------------------------------------------------------ dense models


@torch.no_grad()
def compact_model(model: PreTrainedModel, encoder: nn.Module) -> None:
    """Compact the stock layers of `encoder`, a part of `model`, in place, on any device.

    The result has smaller Linears and can be trained. All heads of a layer get the size of its
    largest remaining head, filled up with rows of zeros. A layer that gets no smaller is not
    changed.
    """
    for block in encoder.layer:
        attention, context = block.attention.self, block.attention.output
        layer = compact(
            read_layer(block.get_parameter, attention.num_attention_heads), model.config.hidden_act
        )
        size = _multiple(max(layer.sizes + layer.sizes_v, default=1), attention.attention_head_size)
        heads = max(1, len(layer.sizes))
        total = heads * size
        if total < attention.all_head_size:
            rows, rows_v = _places(layer.sizes, size), _places(layer.sizes_v, size)
            attention.query = _linear(attention.query, layer.query, total, rows=rows)
            attention.key = _linear(attention.key, layer.key, total, rows=rows)
            attention.value = _linear(attention.value, layer.value, total, rows=rows_v)
            context.dense = _linear(context.dense, layer.output, total, columns=rows_v)
            attention.num_attention_heads, attention.attention_head_size = heads, size
            attention.all_head_size = total
        first, second = block.intermediate, block.output
        neurons = np.arange(len(layer.first.bias))
        total = _multiple(len(neurons), first.dense.out_features)
        if total < first.dense.out_features:
            first.dense = _linear(first.dense, layer.first, total, rows=neurons)
            second.dense = _linear(second.dense, layer.second, total, columns=neurons)


def _multiple(size: int, most: int) -> int:
    return min(most, -(-max(1, size) // MULTIPLE) * MULTIPLE)


def _places(sizes: list[int], size: int) -> np.ndarray:
    """The rows of heads with these sizes when there is room for `size` rows per head."""
    places = [head * size + row for head, own in enumerate(sizes) for row in range(own)]
    return np.array(places, int)


def _linear(
    old: nn.Linear,
    affine: Affine,
    total: int,
    *,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> nn.Linear:
    """A Linear like `old` for `affine`, whose rows (or columns) are put at these of `total`."""
    weight, bias = affine.weight.toarray(), affine.bias
    if rows is not None:
        weight, bias = _spread(weight, rows, total), _spread(bias, rows, total)
    if columns is not None:
        weight = _spread(weight.T, columns, total).T
    linear = nn.Linear(*weight.shape[::-1], device="meta")
    for name, array in (("weight", weight), ("bias", bias)):
        theirs = getattr(old, name)
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(theirs)
        setattr(linear, name, nn.Parameter(tensor, requires_grad=theirs.requires_grad))
    return linear.train(old.training)


def _spread(array: np.ndarray, places: np.ndarray, total: int) -> np.ndarray:
    spread = np.zeros((total, *array.shape[1:]), np.float32)
    spread[places] = array
    return spread


def density(encoder: nn.Module) -> float:
    """The fraction of non-zero weights in the Linears of an encoder, in [0, 1]."""
    weights = [module.weight for module in encoder.modules() if isinstance(module, nn.Linear)]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    return kept / max(1, sum(weight.numel() for weight in weights))
