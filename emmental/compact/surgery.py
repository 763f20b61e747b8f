"""Compact a whole model: its layers become as small as `algebra.py` finds them."""

import copy

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.families import (
    COMPACT,
    FAMILIES,
    HEADS,
    Family,
    class_of,
    family_of,
    layers_of,
    remade,
    stock_type,
)
from .algebra import (
    Affine,
    Layer,
    activation_of,
    compact,
    compact_heads,
    compact_neurons,
    read_affine,
    read_layer,
)
from .classes import auto_map
from .configuration import CompactSettings
from .modeling import SIZES, attention_of, resize_attention, resize_neurons, sizes_of

MULTIPLE = 8  # compacted dense matrices have multiples of this size, which fast products need


@torch.no_grad()
def compact_model(model: PreTrainedModel) -> list[np.ndarray]:
    """Compact the layers of a stock or compact model in place, on any device.

    The result has smaller Linears and can be trained. All heads of a layer get the size of its
    largest remaining head, filled up with rows of zeros. Attention without heads, or a feed-forward
    part without neurons, becomes a bias. A part that gets no smaller is not changed. Returns the
    indices of the remaining heads of each layer, where only whole heads go.
    """
    family, activation = family_of(model.config), activation_of(model.config)
    given = getattr(model.config, "layer_head_indices", None)
    remaining = []
    for number, block in enumerate(layers_of(model) if activation else ()):
        fetch = dict(block.named_parameters()).get
        if family.head_rows:
            layer = compact(read_layer(fetch, family, sizes_of(block, family.parts)[0]), activation)
            _shrink_rows(block, family, layer)
        else:
            indices = given[number] if given else range(sizes_of(block, family.parts)[0])
            remaining.append(_drop_heads(block, family, np.array(indices, int)))
        parts = [read_affine(fetch, family, name) for name in family.neurons]
        _shrink_neurons(block, family, *compact_neurons(*parts, activation))
    return remaining


def _shrink_rows(block: nn.Module, family: Family, layer: Layer) -> None:
    """Give the attention of a layer the rows and heads of `layer`."""
    *inputs, output = family.heads
    heads, size = len(layer.sizes), max([0, *layer.sizes, *layer.sizes_v])
    size = _multiple(size, attention_of(block, family.parts).attention_head_size)
    if heads * size < block.get_submodule(output).in_features:
        resize_attention(block, family.parts, heads, size)
        rows, rows_v = _places(layer.sizes, size), _places(layer.sizes_v, size)
        if heads:
            parts = (layer.query, rows), (layer.key, rows), (layer.value, rows_v)
            for name, (affine, places) in zip(inputs, parts, strict=True):
                _fill(block.get_submodule(name), affine, rows=places)
        _fill(block.get_submodule(output), layer.output, columns=rows_v)


def _drop_heads(block: nn.Module, family: Family, indices: np.ndarray) -> np.ndarray:
    """Drop the heads that no output depends on. Returns the `indices` of the others."""
    if not len(indices):
        return indices
    *inputs, value, output = family.heads
    modules = dict(block.named_modules())
    names = [name for name in (*inputs, value) if name in modules]
    before = {name: read_affine(dict(block.named_parameters()).get, family, name) for name in names}
    projection = read_affine(dict(block.named_parameters()).get, family, output)
    remaining, projection = compact_heads(before[value], projection, len(indices))
    if not remaining.all():
        size = attention_of(block, family.parts).attention_head_size
        shared = indices[remaining].tolist() if family.bias_per_head else None
        resize_attention(block, family.parts, int(remaining.sum()), size, shared)
        rows = np.repeat(remaining, size)
        for name in names if remaining.any() else ():
            _fill(block.get_submodule(name), before[name].keep(rows))
        _fill(block.get_submodule(output), projection)
    return indices[remaining]


def _shrink_neurons(block: nn.Module, family: Family, first: Affine, second: Affine) -> None:
    neurons, most = len(first.bias), block.get_submodule(family.neurons[1]).in_features
    total = _multiple(neurons, most)
    if total < most:
        resize_neurons(block, family.parts, total)
        if total:
            _fill(block.get_submodule(family.neurons[0]), first, rows=slice(neurons))
        _fill(block.get_submodule(family.neurons[1]), second, columns=slice(neurons))


def compacted(model: PreTrainedModel) -> PreTrainedModel:
    """The compact model with the outputs of a plain or compact encoder with a stock head.

    Unlike the result of `compact_model`, this model can be saved. `model` is not changed. Raises
    ValueError for another architecture.
    """
    family_name = stock_type(model.config.model_type)
    compact_class = None
    for head in ("", *HEADS):
        if type(model) is class_of(model.config.model_type, head):
            compact_class = class_of(COMPACT + family_name, head)
    if compact_class is None or getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"{type(model).__name__} ({family_name}) has no compact form: give a plain encoder "
            "with heads and neurons, and the head of a task"
        )
    small = copy.deepcopy(model)
    remaining = compact_model(small)
    family = family_of(model.config)
    found = [sizes_of(layer, family.parts) for layer in layers_of(small)]
    sizes = {name: [numbers[place] for numbers in found] for place, name in enumerate(SIZES)}
    if family.bias_per_head:
        sizes["layer_head_indices"] = [indices.tolist() for indices in remaining]
    return remade(model, compact_class, compact_config(model.config, **sizes), small.state_dict())


def compact_config(config: PreTrainedConfig, **sizes: list) -> CompactSettings:
    """The compact form of a stock or compact configuration, with these sizes of the layers."""
    family_name = stock_type(config.model_type)
    config_class = class_of(COMPACT + family_name).config_class
    of_class = ("model_type", "architectures", "transformers_version")
    values = {name: value for name, value in config.to_dict().items() if name not in of_class}
    places = {"layer_parts": FAMILIES[family_name].parts, "auto_map": auto_map(config_class)}
    return config_class.from_dict(values | places | sizes)


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
