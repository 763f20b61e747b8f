"""The `config.json` of a checkpoint: read, and refused in one line if no model here computes it."""

import logging
from dataclasses import fields
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from ..models.families import COMPACT, FAMILIES, HEADS, MASKED, class_of, is_masked, stock_type
from ..system.errors import UserError, first_line

logger = logging.getLogger(__name__)

# What happens to the settings of a config.json, unless they are 0, false or null.
# Settings that make another task: refused, as `quantization_config` is.
DECODER = ("is_decoder", "is_encoder_decoder", "add_cross_attention", "is_causal", "causal_mask")
# Settings of what is returned beside the outputs of the head, or how it is computed: dropped.
DROPPED = (
    "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "attn_implementation",
    "_attn_implementation", "experts_implementation", "_experts_implementation",
    "distributed_config", "_auto_class",
)  # fmt: skip
# Settings that no model here computes, and their values that change nothing: refused with any other
# value, or dropped in training. (Other encoders, such as nn_pruning's, have them. The code of
# `auto_map` is never run.)
FOREIGN = {
    "position_embedding_type": ("absolute",),
    "layer_norm_type": ("layer_norm",),
    "layer_norm_patch": (),
    "normalization_type": ("layer_norm",),
    "gelu_patch": (),
    "pruned_heads": (),
    "per_layer_config": (),
    "auto_map": (),
}
# All other settings are kept: the model computes them, or they are only a record.


def read_config(checkpoint: str, cache_dir: str | None = None) -> dict:
    """The `config.json` of a checkpoint of a known family. Raises UserError."""
    try:
        config = dict(PreTrainedConfig.get_config_dict(checkpoint, cache_dir=cache_dir)[0])
        if not config:
            raise ValueError("there is no config.json")
    except Exception as error:  # errors of the hub, JSON and transformers
        advice = "it needs a valid config.json"
        if not Path(checkpoint).exists():
            advice = (
                "there is no such folder, and the hub gives no model of this name; without a "
                "network, run `hf download NAME` first where there is one"
            )
        raise UserError(
            f"no usable checkpoint at {checkpoint!r} ({first_line(error)}): {advice}"
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
    if config.get("quantization_config"):
        raise UserError(
            f"{checkpoint} holds quantized weights (quantization_config in its config.json): give "
            "the checkpoint that they were made from"
        )
    return config


def concrete_type(asked: str, checkpoint: str, cache_dir: str | None = None) -> str:
    """The model type for a checkpoint: `masked` and `dense` take its family.

    Raises UserError for a checkpoint of another family than the one that is asked for.
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


def head_of(checkpoint: str, config: dict, base: bool = False) -> str:
    """Which of `HEADS` a checkpoint was saved with; if `base`, also "", that of a base model.

    Raises UserError for any other.
    """
    head = saved_head(config)
    base_name = getattr(class_of(config["model_type"]), "__name__", None) if base else None
    if not head and base_name not in _classes(config):
        classes = ", ".join(_classes(config)) or "no architectures"
        others = "a masked-LM head" if base else "a base model or a masked-LM head"
        raise UserError(
            f"{checkpoint} has no head of a task ({classes} in its config.json): give a model "
            f"fine-tuned for one of {', '.join(HEADS)}, not {others}"
        )
    return head or ""


def _classes(config: dict) -> list[str]:
    return [str(name) for name in config.get("architectures") or ()]


def computed_settings(checkpoint: str, config: dict, trained: bool) -> dict:
    """A configuration without the settings that its model does not compute. Raises UserError."""
    model_type, config = config["model_type"], dict(config)
    family = stock_type(model_type)
    computed = {field.name for field in fields(CONFIG_MAPPING[family])}
    computed |= {"embedding_size"} if family == "deberta-v2" else set()
    computed |= {"auto_map"} if model_type.startswith(COMPACT) else set()
    for name, neutral in (FOREIGN | {"embedding_size": (config.get("hidden_size"),)}).items():
        if (name, family) == ("position_embedding_type", "modernbert"):
            neutral += ("sans_pos",)  # ModernBERT's positions are rotations
        value = config.get(name)
        if value and value not in neutral and name not in computed:
            setting = f"{checkpoint}/config.json has {name} {value!r}"
            refuse_or_warn(f"{setting}, which a {family} does not compute", trained)
            del config[name]
    for name in DROPPED:
        if value := config.pop(name, None):
            setting = f"{checkpoint}/config.json has {name} {value!r}"
            logger.warning("%s, which is dropped: results do not depend on it", setting)
    for name in computed & config.keys():
        if name.endswith(("_act", "activation")) and config[name] not in (None, *ACT2FN):
            setting = f"{checkpoint}/config.json has {name} {config[name]!r}"
            raise UserError(f"{setting}: give one of {', '.join(ACT2FN)}")
    return config


def bare_config(model_type: str, recorded: dict) -> PreTrainedConfig:
    """A configuration for what needs no model: only the settings that are always kept."""
    without = {*DROPPED, *FOREIGN, "model_type"}
    settings = {name: value for name, value in recorded.items() if name not in without}
    return CONFIG_MAPPING[model_type].from_dict(settings)


def refuse_or_warn(problem: str, trained: bool) -> None:
    """Refuse a checkpoint that the model cannot compute whole; before a training, only warn."""
    if trained:
        raise UserError(f"{problem}: results would be wrong; give a checkpoint without it")
    logger.warning("%s: training goes on without it", problem)
