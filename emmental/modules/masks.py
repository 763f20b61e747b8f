"""The masks of a whole model: found once, used by every forward of a block, and counted.

    with masked(model, threshold):  # one update, or an evaluation
        loss = model(**batch).loss
        loss.backward()

Outside a block, every forward of a masked model finds its own masks, which costs a selection.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .budget import keep_within_time
from .granularity import apply_each
from .lists import together
from .masked_nn import MaskedLinear, MaskInForce
from .methods import check_fraction
from .numeric import NOT_IN_GRAPHS
from .topk import count_ones, keep_largest_together

UNOBSERVED = 256  # forwards; more than the batches of an update
_LOCKS: weakref.WeakKeyDictionary[MaskedLinear, threading.RLock] = weakref.WeakKeyDictionary()


class MaskedLayers(dict[str, MaskedLinear]):
    """The masked layers of a model by name, in the order of its modules, found once for many calls.

    All functions of this file take this object in place of the model. config: the configuration of
    the model, also inside a wrapper, or None. layers: the layers. holders: the layers that hold
    scores; others share these. observed: the layers whose method observes gradients.
    """

    def __init__(self, model: nn.Module):
        modules = model.named_modules()
        super().__init__((n, module) for n, module in modules if isinstance(module, MaskedLinear))
        configs = (getattr(module, "config", None) for module in model.modules())
        self.config = next((config for config in configs if hasattr(config, "global_topk")), None)
        self.layers = list(self.values())
        self.holders = list({layer.owner: layer.group[0] for layer in self.layers}.values())
        self.observed = [layer for layer in self.holders if layer.method.observe]


def masked_layers(model: nn.Module | MaskedLayers) -> MaskedLayers:
    """The masked layers of a model by name, in the order of its modules."""
    return model if isinstance(model, MaskedLayers) else MaskedLayers(model)


@dataclass
class Masks:
    """The masks of a model by layer, in the shapes of their scores.

    sizes: how many weights one score of each layer stands for.
    cutoff: the lowest score that is kept, with `global_topk`.
    threshold: the threshold of the masks.
    ones: how many scores each mask keeps, if the method knows this number.
    by_time: whether the threshold is the fraction of the layers' time that remains.
    """

    by_layer: dict[str, Tensor]
    sizes: dict[str, int]
    cutoff: float | None = None
    threshold: float | None = None
    ones: list[int] | None = None
    by_time: bool = False


@dataclass
class Counts:
    """Remaining weights and all weights, by layer."""

    remaining: dict[str, int]
    total: dict[str, int]

    @property
    def overall(self) -> float:
        """The fraction in [0, 1] of all weights that remain."""
        return sum(self.remaining.values()) / sum(self.total.values())


def count(masks: Masks) -> Counts:
    """Count the weights that the masks keep (for l0: with M > 0)."""
    ones, sizes = masks.ones or count_ones(list(masks.by_layer.values())), masks.sizes
    remaining = {name: n * sizes[name] for name, n in zip(masks.by_layer, ones, strict=True)}
    return Counts(remaining, {n: mask.numel() * sizes[n] for n, mask in masks.by_layer.items()})


@torch.compiler.disable(reason=NOT_IN_GRAPHS)  # graphs would be compiled for each threshold
@torch.no_grad()
def find_masks(
    model: nn.Module | MaskedLayers,
    threshold: float | None = None,
    cutoff: float | None = None,
    generator: torch.Generator | None = None,
    *,
    sampled: bool = False,
    above: float | None = None,
) -> Masks:
    """Find the masks of all layers; with `config.global_topk`, rank all matrices together.

    threshold: by default `config.threshold`. With `global_topk`, the fraction of all weights that
        remains; the floor of a matrix may add more.
    cutoff: with `global_topk`, that of an earlier call, in place of a selection.
    sampled: whether masks are random (l0 in training). generator: of their noise, alike on ranks.
    above: if given, keep the weights with scores above this one instead.
    Raises ValueError for a model without masks, and for a threshold unknown or out of range.
    """
    layers = masked_layers(model)
    if not layers:
        raise ValueError("the model has no masked layers")
    if any(name.rpartition(".")[2] == "base_layer" for name in layers):
        raise ValueError(
            "an adapter (PEFT) over a masked layer could not be merged: convert the model with "
            "bertarize.py first, and add the adapter to the result"
        )
    method, config, ones, times = layers.layers[0].method, layers.config, None, None
    if sampled and method.scores == "observed":
        _check_observed(layers.holders[0])
    values = method.sources(layers.holders)
    if threshold is None:
        threshold = getattr(config, "threshold", None)
    if above is not None:
        found = method.masks_above(values, above)
    elif threshold is None and method.threshold_is:
        raise ValueError("the threshold is unknown: pass threshold=..., or set config.threshold")
    elif not getattr(config, "global_topk", False):
        found = method.masks(values, threshold, sampled, generator)
        ones = method.counts(values, threshold)
    elif not method.ranks_together:
        raise ValueError(f"{method.name} cannot rank matrices together: set global_topk to False")
    else:
        values = torch._foreach_abs(values) if method.absolute else values
        fraction, times = check_fraction(threshold), getattr(config, "structure_times", None)
        sizes = [sum(member.weights_per_score for member in x.group) for x in layers.holders]
        if times:
            kinds = [layer.granularity.structure for layer in layers.holders]
            found = keep_within_time(values, sizes, kinds, times, fraction)
        else:
            found, cutoff = keep_largest_together(values, sizes, fraction, cutoff)
    owners = [layer.owner for layer in layers.holders]
    by_owner = dict(zip(owners, found, strict=True))
    ones = ones and dict(zip(owners, ones, strict=True))
    return Masks(
        {name: by_owner[layer.owner] for name, layer in layers.items()},
        {name: layer.weights_per_score for name, layer in layers.items()},
        cutoff,
        1.0 if threshold is None else float(threshold),
        ones and [ones[layer.owner] for layer in layers.layers],
        by_time=bool(times),
    )


def _check_observed(layer: MaskedLinear) -> None:
    """Raises ValueError if many masks of training follow from scores that nothing observes."""
    layer.unobserved += 1
    if layer.unobserved > UNOBSERVED:
        raise ValueError(
            f"{layer.pruning_method}: nothing has observed the scores in the last {UNOBSERVED} "
            "forwards of training: call emmental.modules.observe_scores(model) after backward() "
            "and before optimizer.step()"
        )


@contextmanager
def masked(
    model: nn.Module | MaskedLayers,
    threshold: float | None = None,
    cutoff: float | None = None,
    generator: torch.Generator | None = None,
    *,
    lasting: bool = True,
) -> Iterator[Masks | None]:
    """Find the masks of `model` once (see `find_masks`), for all forwards in the block.

    In training mode the masks are samples. The threshold becomes `config.threshold`, which
    `save_pretrained` records. In evaluation without gradients, a `lasting` block keeps W * M too.
    New weights or scores do not change the masks of a block. For a dense model, the masks are None.
    """
    layers = masked_layers(model)
    if not layers:
        yield None
        return
    first, config = layers.layers[0], layers.config
    sampled, outer = first.training, first.in_force
    masks = find_masks(layers, threshold, cutoff, generator, sampled=sampled)
    found = [MaskInForce(m, masks.threshold, sampled, lasting) for m in masks.by_layer.values()]
    _expand(layers, found)
    if config:
        config.threshold = masks.threshold
    try:
        with in_force(layers.layers, found):
            yield masks
    finally:
        if config and outer:
            config.threshold = outer.threshold


def _expand(layers: MaskedLayers, masks: list[MaskInForce]) -> None:
    """On a GPU, find the masks of all weights once, for all forwards."""
    gates = [(layer, mask) for layer, mask in zip(layers.layers, masks) if layer.is_gate]
    if not together(layers.layers[0].weight) or torch.compiler.is_compiling():
        return
    kinds, shapes = zip(*((layer.granularity, layer.weight.shape) for layer, _ in gates))
    expanded = apply_each("expand", kinds, [mask.mask for _, mask in gates], shapes)
    for (layer, mask), full in zip(gates, expanded, strict=True):
        mask.expanded = full.expand(layer.weight.shape).contiguous()


@contextmanager
def in_force(layers: list[MaskedLinear], masks: list[MaskInForce | None]) -> Iterator[None]:
    """Let the layers use these masks inside the block."""
    with lock_of(layers[0]):
        before = [layer.in_force for layer in layers]
        for layer, mask in zip(layers, masks, strict=True):
            layer.in_force = mask
    try:
        yield
    finally:
        for layer, mask in zip(layers, before, strict=True):
            layer.in_force = mask


def lock_of(layer: MaskedLinear) -> threading.RLock:
    """The lock of the model whose first masked layer this is.

    Threads may share a model: in evaluation, their forwards run side by side in a block. Outside a
    block, each forward puts its own masks in force, and meanwhile holds the lock.
    """
    return _LOCKS.setdefault(layer, threading.RLock())
