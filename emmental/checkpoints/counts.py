"""Count the remaining weights of a model."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..models.families import COMPACT, encoder_of, family_of, layers_of, stock_class
from ..modules.masks import Masks, count, find_masks, masked_layers
from ..modules.methods import METHODS
from ..modules.topk import floor_count


@dataclass
class MatrixCount:
    """Remaining weights of a matrix. floored: whether only the floor (0.5%, or a score) is left."""

    name: str
    remaining: int
    total: int
    floored: bool
    percent: float


@dataclass
class RemainingWeights:
    """Remaining weights of a masked model.

    settings: pruning_method, threshold, global_topk and granularity. matrices: the masked matrices.
    encoder_others: the number of parameters of the encoder without a mask (bias, LayerNorm).
    """

    settings: dict[str, float | str | bool]
    matrices: list[MatrixCount]
    encoder_others: int

    @property
    def remaining(self) -> int:
        return sum(matrix.remaining for matrix in self.matrices)

    @property
    def total(self) -> int:
        return sum(matrix.total for matrix in self.matrices)

    @property
    def linear_percent(self) -> float:
        """The percentage of the masked weights alone."""
        return 100 * self.remaining / self.total

    @property
    def published_percent(self) -> float:
        """The paper's convention: bias and LayerNorm count as remaining (10.1 for topK at 0.1)."""
        return 100 * (self.remaining + self.encoder_others) / (self.total + self.encoder_others)

    @property
    def conditions(self) -> str:
        """Behind the name of the method: " at threshold 0.1, granularity weight"."""
        method, threshold, global_topk, granularity = self.settings.values()
        ranked = ", all matrices ranked together" if global_topk else ""
        at = f" at threshold {threshold:g}{ranked}" if METHODS[method].threshold_is else ""
        return f"{at}, granularity {granularity}"

    def as_dict(self) -> dict:
        return self.settings | {
            "remaining_percent_published": self.published_percent,
            "remaining_percent_linear": self.linear_percent,
            "remaining": self.remaining,
            "total": self.total,
            "encoder_bias_and_layernorm": self.encoder_others,
            "matrices": [asdict(matrix) for matrix in self.matrices],
        }


def remaining_weights(model: nn.Module, masks: Masks | None = None) -> RemainingWeights:
    """Count the weights that the masks keep (for l0: with M > 0).

    masks: by default those of evaluation at `config.threshold`. Raises ValueError for a model
    without masked layers or threshold.
    """
    masks = masks or find_masks(model)
    counts = count(masks)
    matrices = []
    for name, layer in masked_layers(model).items():
        remaining = counts.remaining[name]
        total = counts.total[name]
        floor = floor_count(masks.by_layer[name].numel()) * masks.sizes[name]
        floored = remaining == floor and (model.config.global_topk or layer.method.has_floor)
        matrices.append(MatrixCount(name, remaining, total, floored, 100 * remaining / total))
    parameters = encoder_of(model).named_parameters()
    encoder = sum(p.numel() for name, p in parameters if not name.endswith(".mask_scores"))
    names = ("pruning_method", "threshold", "global_topk", "granularity")
    settings = {name: getattr(model.config, name) for name in names}
    return RemainingWeights(settings, matrices, encoder - sum(m.total for m in matrices))


def mask_report(model: nn.Module, masks: Masks | None = None) -> dict[str, float | str | bool]:
    """What the results of an evaluation say about the masks; see `remaining_weights`."""
    counts = remaining_weights(model, masks)
    percents = {
        "remaining_percent": counts.published_percent,
        "remaining_percent_linear": counts.linear_percent,
    }
    settings = counts.settings
    if settings["granularity"] == "weight":  # older results, as published, do not say it
        del settings["granularity"]
    return percents | settings


@dataclass
class LayerCount:
    """Remaining weights, heads and neurons of a layer.

    A head or neuron remains if an input reaches the output of its layer through it.
    """

    remaining: int
    total: int
    heads: int
    all_heads: int
    neurons: int
    all_neurons: int


@torch.no_grad()
def count_layers(model: nn.Module, masks: Masks | None = None) -> list[LayerCount]:
    """Count what remains of each layer; see `remaining_weights`.

    The list is empty if the model's family does not say where heads and neurons are.
    """
    family = family_of(model.config)
    if not (family.heads and family.neurons):
        return []
    masks = masks or find_masks(model)
    counts = count(masks)
    names = {id(linear): name for name, linear in masked_layers(model).items()}

    def used(linear: nn.Module, dim: int) -> Tensor:
        """Which rows (dim 1) or columns (dim 0) have weights."""
        mask = linear.expand(masks.by_layer[names[id(linear)]])
        return (mask != 0).expand(linear.weight.shape).any(dim)

    layers = []
    for layer in layers_of(model):
        matrices = [names[id(linear)] for linear in masked_layers(layer).values()]
        value, output = (layer.get_submodule(name) for name in family.heads[-2:])
        first, second = (layer.get_submodule(name) for name in family.neurons)
        values = used(value, 1) & used(output, 0)
        heads = values.reshape(model.config.num_attention_heads, -1).any(1)
        neurons = used(first, 1) & used(second, 0)
        remaining = sum(counts.remaining[name] for name in matrices)
        total = sum(counts.total[name] for name in matrices)
        sizes = int(heads.sum()), len(heads), int(neurons.sum()), len(neurons)
        layers.append(LayerCount(remaining, total, *sizes))
    return layers


@torch.no_grad()
def plain_percents(model: nn.Module) -> tuple[float, float]:
    """How much of a plain or compact model is not zero, in percent of the weights before pruning.

    The first number is for the encoder's Linears, the second for the whole encoder.
    """
    encoder = whole = encoder_of(model)
    if model.config.model_type.startswith(COMPACT):
        with torch.device("meta"):
            whole = encoder_of(stock_class(type(model))(model.config))
    linear_total = sum(weight.numel() for weight in _linear_weights(whole))
    total = sum(parameter.numel() for parameter in whole.parameters())
    linear_left = sum(int(weight.count_nonzero()) for weight in _linear_weights(encoder))
    zeros = sum(weight.numel() for weight in _linear_weights(encoder)) - linear_left
    left = sum(parameter.numel() for parameter in encoder.parameters()) - zeros
    return 100 * linear_left / linear_total, 100 * left / total


def _linear_weights(encoder: nn.Module) -> list[Tensor]:
    return [module.weight for module in encoder.modules() if isinstance(module, nn.Linear)]
