"""Count the remaining weights of a masked model, and turn it into a plain model."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .configuration_bert_masked import MASK_FIELDS
from .families import COMPACT, SCORES, encoder_of, stock_type
from .modules.masks import Masks, count, find_masks, masked_layers
from .modules.numeric import apply_mask
from .modules.topk import floor_count


@dataclass
class MatrixCount:
    """Remaining weights of a matrix. floored: only the floor of 0.5% kept it from vanishing."""

    name: str
    remaining: int
    total: int
    floored: bool
    percent: float


@dataclass
class RemainingWeights:
    """Remaining weights of a masked model.

    settings: its pruning_method, threshold and global_topk. matrices: its masked matrices.
    encoder_others: the number of parameters of the encoder without a mask (bias, LayerNorm).
    """

    settings: dict[str, float | str | bool]
    matrices: list[MatrixCount]
    encoder_others: int

    @property
    def remaining(self) -> int:
        return sum(m.remaining for m in self.matrices)

    @property
    def total(self) -> int:
        return sum(m.total for m in self.matrices)

    @property
    def linear_percent(self) -> float:
        """Of the masked weights alone."""
        return 100 * self.remaining / self.total

    @property
    def published_percent(self) -> float:
        """The paper's convention: bias and LayerNorm count as remaining (10.1 for topK at 0.1)."""
        return 100 * (self.remaining + self.encoder_others) / (self.total + self.encoder_others)

    def as_dict(self) -> dict:
        return self.settings | {
            "remaining_percent_published": self.published_percent,
            "remaining_percent_linear": self.linear_percent,
            "remaining": self.remaining,
            "total": self.total,
            "encoder_bias_and_layernorm": self.encoder_others,
            "matrices": [asdict(m) for m in self.matrices],
        }


def remaining_weights(model: nn.Module, masks: Masks | None = None) -> RemainingWeights:
    """Count the weights that the masks keep (for l0: with M > 0).

    masks: by default those of evaluation at `config.threshold`. Raises ValueError for a model
    without masked layers or threshold.
    """
    masks = masks or find_masks(model)
    counts, matrices = count(masks), []
    for name, layer in masked_layers(model).items():
        kept, total = counts.remaining[name], counts.total[name]
        floor = floor_count(masks.by_layer[name].numel()) * masks.sizes[name]
        floored = kept == floor and (model.config.global_topk or layer.method.has_floor)
        matrices.append(MatrixCount(name, kept, total, floored, 100 * kept / total))
    parameters = encoder_of(model).named_parameters()
    encoder = sum(p.numel() for name, p in parameters if not name.endswith(".mask_scores"))
    settings = {x: getattr(model.config, x) for x in ("pruning_method", "threshold", "global_topk")}
    return RemainingWeights(settings, matrices, encoder - sum(m.total for m in matrices))


def mask_report(model: nn.Module) -> dict[str, float | str | bool]:
    """What the results of an evaluation say about the masks."""
    counts = remaining_weights(model)
    percents = {
        "remaining_percent": counts.published_percent,
        "remaining_percent_linear": counts.linear_percent,
    }
    return percents | counts.settings


@torch.no_grad()
def plain_percents(model: nn.Module) -> tuple[float, float]:
    """Percentages of the weights of a plain or compact model that are left, i.e. not zero.

    The first is of the encoder's Linears, the second of the whole encoder, each before pruning.
    """
    encoder = whole = encoder_of(model)
    if model.config.model_type.startswith(COMPACT):
        with torch.device("meta"):
            whole = type(encoder)(model.config)
    own, every = (
        [module.weight for module in part.modules() if isinstance(module, nn.Linear)]
        for part in (encoder, whole)
    )
    kept = sum(int(weight.count_nonzero()) for weight in own)
    zeros = sum(weight.numel() for weight in own) - kept
    left, total = (sum(p.numel() for p in part.parameters()) for part in (encoder, whole))
    return 100 * kept / sum(weight.numel() for weight in every), 100 * (left - zeros) / total


@torch.no_grad()
def bertarized_state_dict(model: nn.Module, masks: Masks | None = None) -> dict[str, Tensor]:
    """State dict of the plain model: W * M in place of W, and no scores.

    masks: by default those of evaluation at `config.threshold` (for l0 they are fractional). Raises
    ValueError for a model without masked layers or threshold.
    """
    masks = masks or find_masks(model)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(SCORES)}
    for name, layer in masked_layers(model).items():
        mask = layer.granularity.expand(masks.by_layer[name], layer.weight.shape)
        state[f"{name}.weight"] = apply_mask(layer.weight, mask)
    return state


def bertarized_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the plain model."""
    masked_only = (*MASK_FIELDS, "model_type", "architectures", "transformers_version")
    values = {name: value for name, value in config.to_dict().items() if name not in masked_only}
    return CONFIG_MAPPING[stock_type(config.model_type)].from_dict(values)
