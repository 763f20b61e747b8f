"""The `config.json` of a checkpoint: read, and refused in one line if no model here computes it."""

import logging
from dataclasses import fields

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..models.families import FAMILIES, HEADS, MASKED, is_masked, stock_type
from ..system.errors import UserError, first_line

logger = logging.getLogger(__name__)

DECODER = ("is_decoder", "is_encoder_decoder", "add_cross_attention")
# Settings of other encoders, such as nn_pruning's, and the values at which they change nothing. The
# settings that a family's configuration has are computed.
NEUTRAL = {
    "position_embedding_type": "absolute",
    "layer_norm_type": "layer_norm",
    "layer_norm_patch": False,
    "normalization_type": "layer_norm",
    "gelu_patch": False,
    "pruned_heads": {},
}


def read_config(source: str, cache_dir: str | None = None) -> dict:
    """The `config.json` of a checkpoint of a known family. Raises UserError."""
    try:
        config = dict(PreTrainedConfig.get_config_dict(source, cache_dir=cache_dir)[0])
        if not config:
            raise ValueError("there is no config.json")
    except Exception as error:  # of the hub, of JSON, of transformers
        raise UserError(
            f"no usable checkpoint at {source!r} ({first_line(error)}): give a folder with a valid "
            "config.json, or the name of a model on the hub"
        ) from error
    if "hidden_size" in config and all(name.startswith("Bert") for name in _classes(config)):
        config.setdefault("model_type", "bert")  # the first BERT checkpoints do not say it
    model_type = str(config.get("model_type"))
    if stock_type(model_type) not in FAMILIES:
        raise UserError(
            f"{source} is of type {model_type!r} in its config.json; these scripts take "
            f"{', '.join(FAMILIES)}"
        )
    decoder = [name for name in DECODER if config.get(name)]
    if decoder:
        raise UserError(
            f"{source} is a decoder ({decoder[0]} in its config.json): give an encoder, or set "
            f"{decoder[0]} to false if it is one"
        )
    return config


def concrete_type(asked: str, source: str, cache_dir: str | None = None) -> str:
    """The model type for a checkpoint: `masked` and `dense` take its family.

    Raises UserError if it is not of the family that is asked for.
    """
    recorded = read_config(source, cache_dir)["model_type"]
    family = stock_type(recorded)
    if is_masked(asked):
        fitting = MASKED + family, "masked"
    else:
        fitting = family, "dense"
    if asked not in fitting:
        own, any_family = (recorded, "masked") if is_masked(recorded) else fitting
        raise UserError(
            f"{source} is of type {own}, not {asked}: give that type, or {any_family}, which takes "
            "every family"
        )
    return fitting[0]


def head_of(source: str, config: dict) -> str:
    """Which of `HEADS` a checkpoint was saved with. Raises UserError if it does not say."""
    head = saved_head(config)
    if head:
        return head
    raise UserError(
        f"{source} has no head of a task ({', '.join(_classes(config)) or 'no architectures'} in "
        f"its config.json): give a model fine-tuned for one of {', '.join(HEADS)}, not a base "
        "model or a masked-LM head"
    )


def saved_head(config: dict) -> str | None:
    """Which of `HEADS` a checkpoint was saved with; None if it does not say."""
    names = _classes(config)
    return next((h for h in HEADS if any(name.endswith(f"For{h}") for name in names)), None)


def _classes(config: dict) -> list[str]:
    return [str(name) for name in config.get("architectures") or ()]


def refuse_or_warn(problem: str, trained: bool) -> None:
    """Refuse what the model cannot compute of a checkpoint or, before a training, warn of it."""
    if trained:
        raise UserError(f"{problem}: its results would be wrong; give a checkpoint without it")
    logger.warning("%s: training goes on without it", problem)


def without_foreign(source: str, values: dict, trained: bool) -> dict:
    """The values of a `config.json` without those that no model of its family computes."""
    family = stock_type(values["model_type"])
    computed = {field.name for field in fields(CONFIG_MAPPING[family])}
    plain = NEUTRAL | {"embedding_size": values.get("hidden_size")}
    kept = {}
    for name, value in values.items():
        if name in computed or name not in plain or not value or value == plain[name]:
            kept[name] = value
        else:
            said = f"{source}/config.json has {name} {value!r}"
            refuse_or_warn(f"{said}, which a {family} does not compute", trained)
    return kept
