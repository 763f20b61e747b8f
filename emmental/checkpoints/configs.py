"""The `config.json` of a checkpoint: read, and refused in one line if no model here computes it."""

import logging
from dataclasses import fields

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..models.families import FAMILIES, HEADS, MASKED, is_masked, stock_type
from ..system.errors import UserError, first_line

logger = logging.getLogger(__name__)

DECODER = ("is_decoder", "is_encoder_decoder", "add_cross_attention")
# Settings of other encoders, such as nn_pruning's, and the values at which they change nothing
# (as 0, false and null do). The settings that a family's configuration has are computed.
FOREIGN = {
    "position_embedding_type": "absolute",
    "layer_norm_type": "layer_norm",
    "layer_norm_patch": False,
    "normalization_type": "layer_norm",
    "gelu_patch": False,
    "pruned_heads": {},
}


def read_config(checkpoint: str, cache_dir: str | None = None) -> dict:
    """The `config.json` of a checkpoint of a known family. Raises UserError."""
    try:
        config = dict(PreTrainedConfig.get_config_dict(checkpoint, cache_dir=cache_dir)[0])
        if not config:
            raise ValueError("there is no config.json")
    except Exception as error:  # of the hub, of JSON, of transformers
        raise UserError(
            f"no usable checkpoint at {checkpoint!r} ({first_line(error)}): give a folder with a "
            "valid config.json, or the name of a model on the hub"
        ) from error
    if "hidden_size" in config and all(name.startswith("Bert") for name in _classes(config)):
        config.setdefault("model_type", "bert")  # the first BERT checkpoints do not say it
    model_type = str(config.get("model_type"))
    if stock_type(model_type) not in FAMILIES:
        raise UserError(
            f"{checkpoint} is of type {model_type!r} in its config.json; these scripts take "
            f"{', '.join(FAMILIES)}"
        )
    for name in DECODER:
        if config.get(name):
            raise UserError(
                f"{checkpoint} is a decoder ({name} in its config.json): give an encoder, or set "
                f"{name} to false if it is one"
            )
    return config


def concrete_type(asked: str, checkpoint: str, cache_dir: str | None = None) -> str:
    """The model type for a checkpoint: `masked` and `dense` take its family.

    Raises UserError if it is not of the family that is asked for.
    """
    recorded = read_config(checkpoint, cache_dir)["model_type"]
    family = stock_type(recorded)
    masked = (MASKED + family, "masked")
    plain = (family, "dense")
    fitting = masked if is_masked(asked) else plain
    if asked in fitting:
        return fitting[0]
    model_type, of_any_family = masked if is_masked(recorded) else fitting
    raise UserError(
        f"{checkpoint} is of type {model_type}, not {asked}: give that type, or {of_any_family}, "
        "which takes every family"
    )


def saved_head(config: dict) -> str | None:
    """Which of `HEADS` a checkpoint was saved with; None if it does not say."""
    names = _classes(config)
    return next((h for h in HEADS if any(name.endswith(f"For{h}") for name in names)), None)


def head_of(checkpoint: str, config: dict) -> str:
    """Which of `HEADS` a checkpoint was saved with. Raises UserError if it does not say."""
    head = saved_head(config)
    if not head:
        classes = ", ".join(_classes(config)) or "no architectures"
        raise UserError(
            f"{checkpoint} has no head of a task ({classes} in its config.json): give a model "
            f"fine-tuned for one of {', '.join(HEADS)}, not a base model or a masked-LM head"
        )
    return head


def _classes(config: dict) -> list[str]:
    return [str(name) for name in config.get("architectures") or ()]


def without_foreign(checkpoint: str, config: dict, trained: bool) -> dict:
    """A configuration without the settings that no model of its family computes."""
    family = stock_type(config["model_type"])
    computed = {field.name for field in fields(CONFIG_MAPPING[family])}
    config = dict(config)
    for name, neutral in (FOREIGN | {"embedding_size": config.get("hidden_size")}).items():
        value = config.get(name)
        if name not in computed and value and value != neutral:
            setting = f"{checkpoint}/config.json has {name} {value!r}"
            refuse_or_warn(f"{setting}, which a {family} does not compute", trained)
            del config[name]
    return config


def refuse_or_warn(problem: str, trained: bool) -> None:
    """Refuse what the model cannot compute of a checkpoint or, before a training, warn of it."""
    if trained:
        raise UserError(f"{problem}: its results would be wrong; give a checkpoint without it")
    logger.warning("%s: training goes on without it", problem)
