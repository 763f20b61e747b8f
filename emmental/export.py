"""From masks to figures and to a plain BERT: remaining-weight report and bertarized state dict."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig

from .configuration_bert_masked import MASK_FIELDS, MaskedBertConfig
from .modules.binarizer import floor_count
from .modules.masked_nn import apply_mask, masked_layers


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
def remaining_weights(model: nn.Module) -> RemainingWeights:
    """Count the weights that the stored masks keep (for l0: whose gate is not closed).

    `update_masks` must have run. Raises ValueError when a layer has no mask.
    """
    layers = masked_layers(model)
    if any(layer.mask is None for layer in layers.values()):
        raise ValueError("the model has no masks yet: call update_masks first")
    global_topk = getattr(model.config, "global_topk", False)

    def thresholded(layer: nn.Module) -> bool:
        return global_topk or layer.pruning_method in ("threshold", "sigmoied_threshold")

    kept = torch.stack([layer.mask.count_nonzero() for layer in layers.values()]).tolist()
    matrices = [
        MatrixCount(name, count, layer.weight.numel(), thresholded(layer) and count == floor_count(layer.weight.numel()))
        for (name, layer), count in zip(layers.items(), kept, strict=True)
    ]
    encoder = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "encoder." in name and not name.endswith(".mask_scores")
    )
    return RemainingWeights(matrices, encoder - sum(m.total for m in matrices))


def mask_report(model: nn.Module) -> dict[str, float | str | bool]:
    """What an evaluation says of a masked model's masks, which are computed if they are not: figures and settings."""
    model.update_masks()
    counts = remaining_weights(model)
    settings = {name: getattr(model.config, name) for name in ("pruning_method", "threshold", "global_topk")}
    percents = {"remaining_percent": counts.published_percent, "remaining_percent_linear": counts.linear_percent}
    return percents | settings


@torch.no_grad()
def bertarized_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the plain model: each masked weight is W * M, and the scores are gone.

    `update_masks` must have run in evaluation mode (masks of l0 are fractional there, and are baked so).
    Raises ValueError otherwise.
    """
    state = {key: value for key, value in model.state_dict().items() if not key.endswith(".mask_scores")}
    for name, layer in masked_layers(model).items():
        if layer.mask is None:
            raise ValueError("the model has no masks yet: call update_masks first")
        if layer.mask_sampled:
            raise ValueError("these masks of l0 are samples: call model.eval() and update_masks first")
        state[f"{name}.weight"] = apply_mask(layer.weight, layer.mask)
    return state


def bertarized_config(config: MaskedBertConfig) -> BertConfig:
    """The configuration of the plain BERT: nothing of the masks is left in it."""
    values = config.to_dict()
    for field in (*MASK_FIELDS, "model_type", "architectures", "transformers_version"):
        values.pop(field, None)
    return BertConfig.from_dict(values)
