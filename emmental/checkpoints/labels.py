"""The names of a head's outputs, and their order."""

import logging
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.outputs import Outputs
from ..system.errors import UserError
from .configs import read_config

logger = logging.getLogger(__name__)


def label_settings(labels: int | Sequence[str] | None) -> dict:
    """The settings for outputs with these labels: their number or names; no names: a regression.

    None: no settings, so that the configuration stays as it is.
    """
    if labels is None:
        return {}
    names = [f"LABEL_{n}" for n in range(labels)] if isinstance(labels, int) else list(labels)
    problem_type = None if names else "regression"
    columns = dict(enumerate(names or ["LABEL_0"]))
    return {
        "num_labels": len(columns),
        "id2label": columns,
        "label2id": {name: column for column, name in columns.items()},
        "problem_type": problem_type,
    }


def checkpoint_labels(checkpoint: str, cache_dir: str | None = None) -> tuple[str, ...]:
    """Names of the outputs of a checkpoint's head, by default LABEL_0, ... Raises UserError."""
    config = read_config(checkpoint, cache_dir)
    known = {name: config[name] for name in ("id2label", "num_labels") if config.get(name)}
    try:
        names = PreTrainedConfig(**known).id2label
        return tuple(str(names[column]) for column in sorted(names))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint}/config.json: its id2label must name the outputs 0, 1, ..."
        ) from error


def are_anonymous(labels: Sequence[str]) -> bool:
    """Whether these are the names that transformers makes up."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in labels)


@torch.no_grad()
def align_labels(
    checkpoint: str,
    model: PreTrainedModel,
    names: Sequence[str],
    wanted: Sequence[str],
    trained: bool,
) -> None:
    """Put the outputs of a checkpoint's head, which have these `names`, in the order of `wanted`.

    A head with other names starts fresh or, if it has to be `trained`, is refused.
    """
    _, head = head_linear(model)
    outputs = Outputs({name: column for column, name in enumerate(names)})
    order = [outputs.find(name) for name in wanted]
    if set(order) == set(range(len(names))):
        head.weight.copy_(head.weight[order].clone())
        head.bias.copy_(head.bias[order].clone())
    elif are_anonymous(names):
        message = "the labels of %s have no names; they are read as %s"
        logger.warning(message, checkpoint, ", ".join(wanted))
    elif trained:
        raise UserError(
            f"{checkpoint} has the labels {', '.join(names)}, but those of the task are "
            f"{', '.join(wanted)}: give a model of this task"
        )
    else:
        message = "the head of %s has other labels (%s): it starts fresh"
        logger.warning(message, checkpoint, ", ".join(names))
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)


def head_linear(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The last `nn.Linear` of a model's head, and its name."""
    base = f"{model.base_model_prefix}."  # in some classes, these modules come last
    linears = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)]
    return [item for item in linears if not item[0].startswith(base)][-1]
