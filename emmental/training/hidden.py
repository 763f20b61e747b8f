"""Hidden-state distillation: the layers of the student follow those of its teacher.

The loss is that of TinyBERT (Jiao et al. 2020, equation 8) on every layer but the embeddings, which
are frozen; here it is the mean over the layers, in TinyBERT the sum. A teacher of another width
needs one projection for all layers. The projection is trained with the student and kept in
checkpoints, but is no part of the saved model.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.families import layers_of

PROJECTION = "hidden_projection"


def hidden_distillation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    attention_mask: Tensor,
    projection: nn.Module | None = None,
) -> Tensor:
    """Mean squared error between hidden states, averaged over tokens, examples and layers.

    student, teacher: the outputs (batch, length, width) of their layers. Layer i of L goes with
    layer ceil(i * K / L) of the teacher's K. Each example has the same weight, whatever its length,
    and padding has none.
    """
    tokens = attention_mask.reshape(student[0].shape[:2]).float()
    weights = tokens / tokens.sum(dim=1, keepdim=True) / len(tokens)
    losses = []
    for number, states in enumerate(student, 1):
        targets = teacher[math.ceil(number * len(teacher) / len(student)) - 1].float()
        states = projection(states.float()) if projection else states.float()
        losses.append(((states - targets).square().mean(dim=-1) * weights).sum())
    return torch.stack(losses).mean()


def add_projection(model: PreTrainedModel, teacher: PreTrainedModel, seed: int) -> None:
    """Give the model a projection to the teacher's width, if the widths differ."""
    widths = [config.hidden_size for config in (model.config, teacher.config)]
    if widths[0] != widths[1]:
        torch.manual_seed(seed)  # the same on all ranks
        model.register_module(PROJECTION, nn.Linear(*widths, bias=False))
        model._keys_to_ignore_on_save.add(f"{PROJECTION}.weight")


def projection_of(model: nn.Module) -> nn.Linear | None:
    """The projection of the model, if it has one."""
    return getattr(model, PROJECTION, None)


@contextmanager
def hidden_states(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """The outputs of the layers in a forward inside the block, if they are `wanted`."""
    states = []

    def collect(layer: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(collect) for layer in layers_of(model) if wanted]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
