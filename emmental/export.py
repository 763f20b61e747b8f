"""From masks to figures and to a plain model: remaining-weight report and bertarized state dict."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .configuration_bert_masked import MASK_FIELDS
from .families import MASKED, encoder_of
from .modules.masked_nn import apply_mask
from .modules.masks import Masks, count, find_masks, masked_layers
from .modules.topk import floor_count


@dataclass
class MatrixCount:
    """Remaining weights of one matrix; `floored` when only the floor of 0.5% keeps it from vanishing."""

    name: str
    remaining: int
    total: int
    floored: bool

    @property
    def percent(self) -> float:
        return 100 * self.remaining / self.total


@dataclass
class RemainingWeights:
    """Remaining weights of a masked model.

    matrices: a row per masked matrix. encoder_others: parameters of the encoder that are never masked
    (bias, LayerNorm).
    """

    matrices: list[MatrixCount]
    encoder_others: int

    @property
    def linear_percent(self) -> float:
        """Remaining percentage of the masked Linear weights alone."""
        return 100 * sum(m.remaining for m in self.matrices) / sum(m.total for m in self.matrices)

    @property
    def published_percent(self) -> float:
        """The paper's convention: bias and LayerNorm of the encoder count, as remaining (10.1 for a topK of 0.1)."""
        remaining = sum(m.remaining for m in self.matrices) + self.encoder_others
        return 100 * remaining / (sum(m.total for m in self.matrices) + self.encoder_others)

    def as_dict(self) -> dict:
        return {
            "remaining_percent_published": self.published_percent,
            "remaining_percent_linear": self.linear_percent,
            "remaining": sum(m.remaining for m in self.matrices),
            "total": sum(m.total for m in self.matrices),
            "encoder_bias_and_layernorm": self.encoder_others,
            "matrices": [asdict(m) | {"percent": m.percent} for m in self.matrices],
        }


@torch.no_grad()
def remaining_weights(model: nn.Module, masks: Masks | None = None) -> RemainingWeights:
    """Count the weights that the masks keep (for l0: whose gate is not closed).

    masks: by default those of evaluation at `config.threshold`. Raises ValueError when the model has no masked layers,
    or no threshold.
    """
    masks = masks or find_masks(model)
    counts, layers = count(masks), masked_layers(model)

    def floored(name: str) -> bool:
        scores, weights = masks.by_layer[name].numel(), masks.sizes[name]
        has_floor = model.config.global_topk or layers[name].method.has_floor
        return has_floor and counts.remaining[name] == floor_count(scores) * weights

    matrices = [
        MatrixCount(name, counts.remaining[name], counts.total[name], floored(name))
        for name in layers
    ]
    parameters = encoder_of(model).named_parameters()
    encoder = sum(
        parameter.numel() for name, parameter in parameters if not name.endswith(".mask_scores")
    )
    return RemainingWeights(matrices, encoder - sum(m.total for m in matrices))


def mask_report(model: nn.Module) -> dict[str, float | str | bool]:
    """What an evaluation says of a masked model's masks: figures and settings."""
    counts = remaining_weights(model)
    settings = {
        name: getattr(model.config, name) for name in ("pruning_method", "threshold", "global_topk")
    }
    percents = {
        "remaining_percent": counts.published_percent,
        "remaining_percent_linear": counts.linear_percent,
    }
    return percents | settings


@torch.no_grad()
def bertarized_state_dict(model: nn.Module, masks: Masks | None = None) -> dict[str, Tensor]:
    """State dict of the plain model: each masked weight is W * M, and the scores are gone.

    masks: by default those of evaluation at `config.threshold` (for l0 they are fractional, and are baked so). Raises
    ValueError when the model has no masked layers, or no threshold.
    """
    masks = masks or find_masks(model)
    state = {
        key: value for key, value in model.state_dict().items() if not key.endswith(".mask_scores")
    }
    for name, layer in masked_layers(model).items():
        mask = layer.granularity.expand(masks.by_layer[name], layer.weight.shape)
        state[f"{name}.weight"] = apply_mask(layer.weight, mask)
    return state


def bertarized_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the plain model: nothing of the masks is in it."""
    values = config.to_dict()
    for field in (*MASK_FIELDS, "model_type", "architectures", "transformers_version"):
        values.pop(field, None)
    return CONFIG_MAPPING[config.model_type.removeprefix(MASKED)].from_dict(values)
