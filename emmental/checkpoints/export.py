"""Turn a masked model into a plain one."""

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..models.families import remade, stock_class, stock_type
from ..models.masked import mask_fields
from ..modules.lists import apply_masks
from ..modules.masks import Masks, find_masks, masked_layers
from ..modules.methods import score_suffixes


def bertarize(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model with the outputs of a masked one, with any head, on the same device.

    A plain model is returned as it is.
    """
    if not masked_layers(model):
        return model
    config, state = bertarized_config(model.config), bertarized_state_dict(model)
    return remade(model, stock_class(type(model)), config, state)


def bertarized_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the plain model."""
    masked_only = (*mask_fields(), "model_type", "architectures", "transformers_version")
    values = {name: value for name, value in config.to_dict().items() if name not in masked_only}
    return CONFIG_MAPPING[stock_type(config.model_type)].from_dict(values)


@torch.no_grad()
def bertarized_state_dict(model: nn.Module, masks: Masks | None = None) -> dict[str, Tensor]:
    """State dict of the plain model: W * M in place of W, and no scores.

    masks: by default those of evaluation at `config.threshold` (for l0 they are fractional). Raises
    ValueError for a model without masked layers or threshold.
    """
    masks = masks or find_masks(model)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(score_suffixes())}
    for name, layer in masked_layers(model).items():
        mask = layer.expand(masks.by_layer[name])
        state[f"{name}.weight"] = apply_masks([layer.weight], [mask])[0]
    return state
