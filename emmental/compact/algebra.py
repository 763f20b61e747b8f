"""Lossless compaction: remove from a pruned layer what none of its outputs depends on.

Attention computes softmax(Q K^T / sqrt(d)) V, then W_O:
- A row of W_V goes if its column of W_O is empty. An empty row of W_V goes as well: its value is
  its bias for every key, and softmax sums to 1, so W_O times this bias moves to the bias of W_O.
- An empty row of W_K adds the same to the scores of all keys, which softmax ignores: it goes with
  its row of W_Q. So does a row whose row of W_Q is empty and has no bias.
- A head without values goes as a whole. In families where the scale of the scores depends on the
  number of a head's rows, or positions have rows too, only whole heads go.
In the feed-forward part, a neuron goes if its row of W_1 or its column of W_2 is empty. If the row
is empty, W_2 times the neuron's constant activation moves to the bias of W_2.

Compaction is exact wherever softmax sums to 1: not for a sequence of nothing but padding, and not
under dropout of attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..models.families import Family, family_of


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


Fetch = Callable[[str], Tensor | csr_array | None]  # a parameter by its name within a layer


def read_layer(fetch: Fetch, family: Family, heads: int) -> Layer:
    """A layer with `heads` heads. fetch: returns None for what a compact layer lacks."""
    parts = {}
    for field, name in zip(("query", "key", "value", "output"), family.heads, strict=True):
        parts[field] = read_affine(fetch, family, name)
    first, second = (read_affine(fetch, family, name) for name in family.neurons)
    sizes = [len(parts["query"].bias) // heads] * heads if heads else []
    return Layer(**parts, first=first, second=second, sizes=sizes, sizes_v=sizes)


def activation_of(config: PreTrainedConfig) -> str | None:
    """The activation of the feed-forward part; None if the family does not say what that is."""
    family = family_of(config)
    return getattr(config, family.activation, None) if family.neurons else None


def read_affine(fetch: Fetch, family: Family, name: str) -> Affine:
    weight, bias = fetch(f"{name}.weight"), fetch(f"{name}.bias")
    if weight is None:
        hidden = len(fetch(f"{family.neurons[-1]}.bias"))
        weight = torch.zeros((0, hidden) if bias is None else (hidden, 0))
    bias = torch.zeros(0) if bias is None else bias
    weight = weight if isinstance(weight, csr_array) else csr_array(_array(weight))
    return Affine(weight, _array(bias))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def compact(layer: Layer, activation: str) -> Layer:
    """A layer with the same output, without the parts that its output does not depend on.

    activation: between `first` and `second`. A remaining head keeps at least one row of query and
    key. The given layer is not changed.
    """
    query, key, value, output = layer.query, layer.key, layer.value, layer.output
    constant = _empty_rows(value)
    output = output.fold(constant, value.bias)
    keep_v = _used_inputs(output) & ~constant
    sizes_v = _count(keep_v, layer.sizes_v)
    keep = ~_empty_rows(key) & (~_empty_rows(query) | (query.bias != 0))
    first_rows = np.cumsum([0, *layer.sizes])[:-1]
    keep[first_rows[np.array(_count(keep, layer.sizes)) == 0]] = True
    keep &= np.repeat(np.array(sizes_v) > 0, np.array(layer.sizes, int))
    first, second = compact_neurons(layer.first, layer.second, activation)
    return Layer(
        query=query.keep(keep),
        key=key.keep(keep),
        value=value.keep(keep_v),
        output=output.keep(columns=keep_v),
        first=first,
        second=second,
        sizes=[size for size in _count(keep, layer.sizes) if size],
        sizes_v=[size for size in sizes_v if size],
    )


def compact_heads(value: Affine, output: Affine, heads: int) -> tuple[np.ndarray, Affine]:
    """Which heads remain, as a boolean mask, and the output projection, if only whole heads go."""
    unused = _empty_rows(value) | ~_used_inputs(output)
    remaining = ~unused.reshape(heads, -1).all(1)
    gone = np.repeat(~remaining, len(unused) // max(1, heads))
    return remaining, output.fold(gone, value.bias).keep(columns=~gone)


def compact_neurons(first: Affine, second: Affine, activation: str) -> tuple[Affine, Affine]:
    """A feed-forward part with the same output, without the neurons that it does not depend on."""
    constant = _empty_rows(first)
    values = ACT2FN[activation](torch.from_numpy(first.bias)).numpy()
    second = second.fold(constant, values)
    neurons = _used_inputs(second) & ~constant
    return first.keep(neurons), second.keep(columns=neurons)


def _empty_rows(affine: Affine) -> np.ndarray:
    return np.diff(affine.weight.indptr) == 0


def _used_inputs(affine: Affine) -> np.ndarray:
    """The inputs whose column is not empty."""
    return np.bincount(affine.weight.indices, minlength=affine.weight.shape[1]) > 0


def _count(keep: np.ndarray, sizes: list[int]) -> list[int]:
    return [int(keep[start:stop].sum()) for start, stop in pairwise(np.cumsum([0, *sizes]))]


def density(encoder: nn.Module) -> float:
    """The fraction of non-zero weights in the Linears of an encoder, in [0, 1]."""
    weights = [module.weight for module in encoder.modules() if isinstance(module, nn.Linear)]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    return kept / max(1, sum(weight.numel() for weight in weights))
