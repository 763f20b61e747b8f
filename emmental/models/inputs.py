"""The inputs of an encoder, as the model itself says: their names, and how many tokens it takes."""

import functools
import inspect

from transformers import PreTrainedModel

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def input_names(model: PreTrainedModel) -> list[str]:
    """The names of `MODEL_INPUTS` that make a difference to the forward of a model.

    DistilBERT, MPNet and ModernBERT take no token types; RoBERTa and DeBERTa do not tell two apart.
    """
    accepted = _parameters(type(model).forward)
    names = [name for name in MODEL_INPUTS if name in accepted]
    has_types = getattr(model.config, "type_vocab_size", 2) > 1
    return names if has_types else [name for name in names if name != "token_type_ids"]


@functools.cache
def _parameters(function) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def longest_input(model: PreTrainedModel) -> int | None:
    """The most tokens that a model takes; None for any number (DeBERTa with relative positions)."""
    if not getattr(model.config, "position_biased_input", True):
        return None
    padding = padding_of_positions(model)
    return model.config.max_position_embeddings - (0 if padding is None else padding + 1)


def padding_of_positions(model: PreTrainedModel) -> int | None:
    """The id of padding, if positions begin after it: RoBERTa has 514 rows for 512 tokens."""
    positions = getattr(model.base_model.embeddings, "position_embeddings", None)
    return getattr(positions, "padding_idx", None)
