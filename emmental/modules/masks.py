"""The masks of a whole model: found in one place, in force for a block, and counted.

    with masked(model, threshold):          # the passes of one update, or an evaluation
        loss = model(**batch).loss
        loss.backward()

Inside, every layer uses the mask found at the beginning. Outside, each forward of a masked model
finds its own masks, so that none is ever stale, at the cost of a selection.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .masked_nn import MaskedLinear, MaskInForce
from .methods import check_fraction
from .topk import count_ones, keep_largest_together

LOCK = threading.RLock()  # held while masks of a model are put in force, by one thread at a time


@dataclass
class Masks:
    """Masks of a model by layer, in the shapes of their scores; how many weights a score of each
    stands for; and the score at which masks end with `global_topk`.
    """

    by_layer: dict[str, Tensor]
    sizes: dict[str, int]
    cutoff: float | None = None


@dataclass
class Counts:
    """Remaining weights and all weights, by layer."""

    remaining: dict[str, int]
    total: dict[str, int]

    @property
    def overall(self) -> float:
        """The fraction in [0, 1] that remains of all matrices together."""
        return sum(self.remaining.values()) / sum(self.total.values())


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers of a model by name, in the order of its modules."""
    return {n: module for n, module in model.named_modules() if isinstance(module, MaskedLinear)}


def count(masks: Masks) -> Counts:
    """Count the weights that the masks keep (for l0: whose gate is not closed)."""
    ones, sizes = count_ones(list(masks.by_layer.values())), masks.sizes
    remaining = {name: n * sizes[name] for name, n in zip(masks.by_layer, ones, strict=True)}
    return Counts(remaining, {n: mask.numel() * sizes[n] for n, mask in masks.by_layer.items()})


@torch.no_grad()
def find_masks(
    model: nn.Module,
    threshold: float | None = None,
    cutoff: float | None = None,
    generator: torch.Generator | None = None,
    *,
    sampled: bool = False,
) -> Masks:
    """The masks of all masked layers; `config.global_topk` ranks all matrices together.

    threshold: see `compute_mask`, by default `config.threshold`; with `global_topk` the fraction in
        [0, 1] of all weights that remain, whatever the method.
    cutoff: with `global_topk`, one found earlier, used instead of a new selection.
    generator: of the noise of masks that are `sampled`, as l0's are in training; alike on all ranks.

    Raises ValueError for a model without masked layers, an unknown threshold or one out of range,
    and for a method that cannot rank all matrices together.
    """
    method, sources = _sources(model)
    threshold = resolve_threshold(model, threshold)
    if not getattr(_config(model), "global_topk", False):
        found = method.masks(list(sources.values()), threshold, sampled, generator)
        return _by_layer(model, sources, found)
    if not method.ranks_together:
        raise ValueError(f"global_topk cannot rank all matrices together for {method.name}")
    sizes = Counter()
    for layer in masked_layers(model).values():
        sizes[layer.owner] += layer.weight.numel() // sources[layer.owner].numel()
    values = [value.abs() if method.absolute else value for value in sources.values()]
    ranked = keep_largest_together(values, list(sizes.values()), check_fraction(threshold), cutoff)
    return _by_layer(model, sources, *ranked)


@torch.no_grad()
def masks_above(model: nn.Module, score: float) -> Masks:
    """The masks if all weights with scores up to `score` were pruned."""
    method, sources = _sources(model)
    return _by_layer(model, sources, method.masks_above(list(sources.values()), score))


def _sources(model: nn.Module):
    """The method, and what the masks follow from, by owner: layers may share their scores."""
    layers = list(masked_layers(model).values())
    if not layers:
        raise ValueError("the model has no masked layers")
    return layers[0].method, {layer.owner: layer.source for layer in layers}


def _by_layer(model: nn.Module, sources: dict, found: list[Tensor], cutoff=None) -> Masks:
    masks, layers = dict(zip(sources, found, strict=True)), masked_layers(model)
    by_layer = {name: masks[layer.owner] for name, layer in layers.items()}
    sizes = {n: layer.weight.numel() // by_layer[n].numel() for n, layer in layers.items()}
    return Masks(by_layer, sizes, cutoff)


def _config(model: nn.Module):
    """The configuration of a masked model, also below a wrapper; None where there is none."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((config for config in configs if hasattr(config, "global_topk")), None)


def resolve_threshold(model: nn.Module, threshold: float | None) -> float:
    """`threshold`, or the configuration's. Raises ValueError when there is none."""
    if threshold is None:
        threshold = getattr(_config(model), "threshold", None)
    if threshold is None and any(x.method.threshold for x in masked_layers(model).values()):
        raise ValueError("the threshold is unknown: pass threshold=..., or set config.threshold")
    return 1.0 if threshold is None else float(threshold)


@contextmanager
def masked(
    model: nn.Module,
    threshold: float | None = None,
    cutoff: float | None = None,
    generator: torch.Generator | None = None,
    *,
    lasting: bool = True,
) -> Iterator[Masks | None]:
    """Find the masks of `model` once (see `find_masks`), for every forward inside the block.

    Masks are sampled in training mode. The threshold becomes `config.threshold`, which
    `save_pretrained` records. In evaluation, without gradients, a `lasting` block keeps W * M, too.
    What changes inside the block leaves its masks as they are. A dense model is left as it is.
    """
    layers = masked_layers(model)
    if not layers:
        yield None
        return
    threshold, sampled = resolve_threshold(model, threshold), model.training
    masks = find_masks(model, threshold, cutoff, generator, sampled=sampled)
    found = [MaskInForce(mask, threshold, sampled, lasting) for mask in masks.by_layer.values()]
    config, outer = _config(model), next(iter(layers.values())).in_force
    if config:
        config.threshold = threshold
    try:
        with in_force(list(layers.values()), found):
            yield masks
    finally:
        if config and outer:
            config.threshold = outer.threshold


@contextmanager
def in_force(layers: list[MaskedLinear], masks: list[MaskInForce | None]) -> Iterator[None]:
    """Have the layers use these masks inside the block."""
    with LOCK:
        before = [layer.in_force for layer in layers]
        for layer, mask in zip(layers, masks, strict=True):
            layer.in_force = mask
    try:
        yield
    finally:
        for layer, mask in zip(layers, before, strict=True):
            layer.in_force = mask
