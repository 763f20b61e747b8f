"""Encoders without the heads and neurons that pruning emptied: stock classes, smaller Linears.

The configuration says what remains of each layer. The state dict has the keys of the stock class;
of a part without heads, or without neurons, it has only the last bias. A compact model trains, and
goes through any tool, as its stock class does. `configuration.py` describes the folder.
"""

import re

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import initialization

from . import configuration
from .configuration import CompactSettings

SIZES = ("layer_heads", "layer_head_sizes", "layer_neurons")  # in the configuration


class Headless:
    """Attention without heads, mixed into the stock class of a layer's attention.

    The output projection is a `Bias`. `projection` names it where it is a part of this module.
    """

    num_attention_heads = n_heads = attention_head_size = all_head_size = 0
    projection: str | None = None

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        output = hidden_states
        if self.projection:
            output = self.get_submodule(self.projection)(hidden_states)
        if hasattr(self, "LayerNorm"):  # ALBERT's attention ends with the residual
            output = self.LayerNorm(hidden_states + self.output_dropout(output))
        return output, hidden_states.new_zeros(batch, 0, length, length)


class Bias(nn.Module):
    """An `nn.Linear` without inputs: its bias, for every token."""

    in_features = 0

    def __init__(self, features: int, **options):
        super().__init__()
        self.out_features = features
        self.bias = nn.Parameter(torch.zeros(features, **options))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.bias.expand(*hidden_states.shape[:-1], -1)


class NoOutputs(nn.Module):
    """An `nn.Linear` without outputs."""

    out_features = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[..., :0]


def attention_of(layer: nn.Module, parts: dict) -> nn.Module:
    """The part of a layer that has the heads."""
    return layer.get_submodule(parts["heads"][0].rpartition(".")[0])


def sizes_of(layer: nn.Module, parts: dict) -> tuple[int, int, int]:
    """The heads of a layer, the rows of each head, and the neurons."""
    size = attention_of(layer, parts).attention_head_size
    total, neurons = (layer.get_submodule(parts[x][-1]).in_features for x in ("heads", "neurons"))
    return total // max(1, size), size, neurons


def resize_attention(
    layer: nn.Module, parts: dict, heads: int, size: int, indices: list[int] | None = None
) -> None:
    """Give a layer so many heads of `size` rows, with new weights that are not initialised.

    indices: of the heads, in the stock layer, for a bias that all layers share.
    """
    *inputs, output = parts["heads"]
    attention, projection = attention_of(layer, parts), layer.get_submodule(output)
    whole = getattr(attention, "num_attention_heads", None) or attention.n_heads
    if heads == whole and size == attention.attention_head_size:
        return
    hidden, total = projection.out_features, heads * size
    layer.set_submodule(output, _resized(projection, total, hidden))
    if not total:
        place = parts["heads"][0].rpartition(".")[0]
        layer.set_submodule(place, _headless(attention, output.removeprefix(f"{place}.")))
        return
    for name in inputs:
        if name in dict(layer.named_modules()):
            layer.set_submodule(name, _resized(layer.get_submodule(name), hidden, total))
    sizes = {"num_attention_heads": heads, "n_heads": heads, "all_head_size": total}
    for name, number in (sizes | {"attention_head_size": size}).items():
        if hasattr(attention, name):  # the scale of the scores stays that of the whole head
            setattr(attention, name, number)
    if indices is not None:
        if not hasattr(attention, "head_indices"):
            attention.register_forward_pre_hook(_select_bias)
        attention.head_indices = indices


def resize_neurons(layer: nn.Module, parts: dict, neurons: int) -> None:
    """Give a layer so many neurons, with new weights that are not initialised."""
    first, second = parts["neurons"]
    old, projection = layer.get_submodule(first), layer.get_submodule(second)
    if neurons == projection.in_features:
        return
    layer.set_submodule(second, _resized(projection, neurons, projection.out_features))
    new = _resized(old, old.in_features, neurons) if neurons else NoOutputs().train(old.training)
    layer.set_submodule(first, new)


def _resized(old: nn.Linear, inputs: int, outputs: int) -> nn.Module:
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = skip_init(nn.Linear, inputs, outputs, **like) if inputs else Bias(outputs, **like)
    return new.requires_grad_(old.weight.requires_grad).train(old.training)


def _headless(attention: nn.Module, projection: str) -> nn.Module:
    """Attention without heads, of the same class. projection: a name within `attention`, if any."""
    stock = type(attention)
    name = f"Headless{stock.__name__}"
    if name not in globals():
        globals()[name] = type(name, (Headless, stock), {"__module__": __name__})
    new = object.__new__(globals()[name])
    nn.Module.__init__(new)
    kept = dict(attention.named_children())
    for child in ("LayerNorm", "output_dropout", projection):
        if child in kept:
            new.add_module(child, kept[child])
    new.projection = projection if projection in kept else None
    return new.train(attention.training)


def _select_bias(attention: nn.Module, args: tuple) -> tuple:
    hidden_states, mask, bias, *others = args
    bias = None if bias is None else bias[:, attention.head_indices]
    return hidden_states, mask, bias, *others


class Compact:
    """What the compact base models and heads of all families share."""

    def __init__(self, config: CompactSettings, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        layers, parts = layers_of(self, config.layer_parts), config.layer_parts
        for place, name in enumerate(SIZES):
            _check_sizes(config, name, [sizes_of(layer, parts)[place] for layer in layers])
        sizes = zip(*(getattr(config, name) for name in SIZES), strict=True)
        indices = config.layer_head_indices or [None] * len(layers)
        for layer, (heads, size, neurons), places in zip(layers, sizes, indices, strict=True):
            resize_attention(layer, parts, heads, size, places)
            resize_neurons(layer, parts, neurons)
            layer.apply(self._init_weights)

    def _init_weights(self, module):
        # from_pretrained calls this for the parameters that the checkpoint lacks
        if isinstance(module, Bias):
            initialization.zeros_(module.bias)
        super()._init_weights(module)


def _check_sizes(config: CompactSettings, name: str, whole: list[int]) -> None:
    """Set the numbers that the configuration leaves out. Raises ValueError for impossible ones."""
    sizes = getattr(config, name)
    if sizes is None:
        setattr(config, name, whole)
    elif len(sizes) != len(whole) or not all(0 <= n <= most for n, most in zip(sizes, whole)):
        raise ValueError(
            f"{name} must give a number from 0 to {max(whole)} for each of the {len(whole)} "
            f"layers, not {sizes}"
        )


def layers_of(model: nn.Module, parts: dict) -> list[nn.Module]:
    """The layers of a model; a star in `parts` stands for every module of a list."""
    pattern = parts["layers"].replace(".", r"\.").replace("*", r"\d+") + r"\.\d+"
    return [x for name, x in model.base_model.named_modules() if re.fullmatch(pattern, name)]


def __getattr__(name: str) -> type:
    """`CompactBertModel`, the compact class of `BertModel`, and so on: made when it is used."""
    stock = getattr(transformers, name.removeprefix("Compact"), None)
    if not name.startswith("Compact") or stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stem, _, head = name.partition("For")
    attributes = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with fewer heads and neurons.",
        "config_class": getattr(configuration, f"{stem.removesuffix('Model')}Config"),
        "_auto_class": f"AutoModelFor{head}" if head else "AutoModel",
    }
    globals()[name] = type(name, (Compact, stock), attributes)
    return globals()[name]
