"""Compact a whole model: its layers become as small as `algebra.py` finds them."""

import copy

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.families import COMPACT, HEADS, Family, class_of, family_of, layers_of, stock_type
from . import modeling as compact_bert
from .algebra import (
    Affine,
    Layer,
    activation_of,
    compact,
    compact_neurons,
    head_count,
    read_affine,
    read_layer,
)

MULTIPLE = 8  # compacted dense matrices have multiples of this size, which fast products need


@torch.no_grad()
def compact_model(model: PreTrainedModel) -> None:
    """Compact the layers of a stock or compact model in place, on any device.

    The result has smaller Linears and can be trained. All heads of a layer get the size of its
    largest remaining head, filled up with rows of zeros. In a BERT, attention without heads, or a
    feed-forward part without neurons, becomes a bias; another model keeps a few zeros. A part that
    gets no smaller is not changed.
    """
    family, activation = family_of(model.config), activation_of(model.config)
    least = 0 if stock_type(model.config.model_type) == "bert" else 1
    for block in layers_of(model) if activation else ():
        fetch = dict(block.named_parameters()).get
        if family.norms:
            layer = compact(read_layer(fetch, family, head_count(block, family)), activation)
            _shrink_attention(block, family, layer, least)
            first, second = layer.first, layer.second
        else:
            parts = (read_affine(fetch, family, name) for name in family.neurons)
            first, second = compact_neurons(*parts, activation)
        _shrink_neurons(block, family, first, second, least)


def _shrink_attention(block: nn.Module, family: Family, layer: Layer, least: int) -> None:
    *inputs, output = family.heads
    heads, size = max(least, len(layer.sizes)), max([least, *layer.sizes, *layer.sizes_v])
    size = _multiple(size, compact_bert.attention_of(block, family).attention_head_size)
    if heads * size < block.get_submodule(output).in_features:
        compact_bert.resize_attention(block, family, heads, size)
        rows, rows_v = _places(layer.sizes, size), _places(layer.sizes_v, size)
        if heads:
            parts = (layer.query, rows), (layer.key, rows), (layer.value, rows_v)
            for name, (affine, places) in zip(inputs, parts, strict=True):
                _fill(block.get_submodule(name), affine, rows=places)
        _fill(block.get_submodule(output), layer.output, columns=rows_v)


def _shrink_neurons(
    block: nn.Module, family: Family, first: Affine, second: Affine, least: int
) -> None:
    neurons, most = len(first.bias), block.get_submodule(family.neurons[1]).in_features
    total = _multiple(max(least, neurons), most)
    if total < most:
        compact_bert.resize_neurons(block, family, total)
        if total:
            _fill(block.get_submodule(family.neurons[0]), first, rows=slice(neurons))
        _fill(block.get_submodule(family.neurons[1]), second, columns=slice(neurons))


def compacted(model: PreTrainedModel) -> PreTrainedModel:
    """The `CompactBert*` model with the outputs of a plain BERT, or compact one, with a stock head.

    Unlike the result of `compact_model` it can be saved. `model` is not changed. Raises ValueError
    for another architecture.
    """
    kind = stock_type(model.config.model_type)
    compact_class = None
    for head in ("", *HEADS):
        if type(model) is class_of(model.config.model_type, head):
            compact_class = class_of(COMPACT + kind, head)
    if compact_class is None or getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"{type(model).__name__} ({kind}) has no compact form: give a plain BERT with the head "
            "of a task"
        )
    small = copy.deepcopy(model)
    compact_model(small)
    layers = layers_of(small)
    left = {
        "layer_heads": [layer.attention.self.num_attention_heads for layer in layers],
        "layer_head_sizes": [layer.attention.self.attention_head_size for layer in layers],
        "layer_neurons": [layer.output.dense.in_features for layer in layers],
    }
    of_class = ("model_type", "architectures", "transformers_version")
    values = {name: value for name, value in model.config.to_dict().items() if name not in of_class}
    config = compact_class.config_class.from_dict(values | left)
    result = compact_class.from_pretrained(
        None, config=config, state_dict=small.state_dict(), dtype=model.dtype
    )
    return result.to(model.device).train(model.training)


def _multiple(size: int, most: int) -> int:
    return min(most, -(-size // MULTIPLE) * MULTIPLE)


def _places(sizes: list[int], size: int) -> np.ndarray:
    """The rows of heads with these sizes when there is room for `size` rows per head."""
    places = [head * size + row for head, own in enumerate(sizes) for row in range(own)]
    return np.array(places, int)


def _fill(
    linear: nn.Module,
    affine: Affine,
    *,
    rows: np.ndarray | slice = slice(None),
    columns: np.ndarray | slice = slice(None),
) -> None:
    """Give a Linear or `Bias` the map `affine` at these rows or columns, and zeros elsewhere."""
    linear.bias.zero_()
    linear.bias[rows] = torch.from_numpy(affine.bias).to(linear.bias)
    if linear.in_features:
        weight = np.zeros(linear.weight.shape, np.float32)
        weight[rows, columns] = affine.weight.toarray()
        linear.weight.copy_(torch.from_numpy(weight))
