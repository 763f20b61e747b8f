"""The masks of a whole model: found in one place, in force for a block, and counted.

    with masked(model, threshold):          # the passes of one update, or an evaluation
        loss = model(**batch).loss
        loss.backward()

Inside the block every layer uses the mask found at its beginning. Outside of one, each forward of a masked model finds
its own masks, so that no mask is ever stale, at the cost of a selection per forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .masked_nn import MaskedLinear, MaskInForce
from .methods import check_fraction
from .topk import count_ones, keep_largest_together


@dataclass
class Masks:
    """Masks of a model by the names of its layers, in the shapes of their scores.

    weights: how many weights a score of each layer stands for. cutoff: the score at which they end with `global_topk`,
    else None.
    """

    by_layer: dict[str, Tensor]
    weights: dict[str, int]
    cutoff: float | None = None


@dataclass
class Counts:
    """Remaining weights and all weights of each matrix."""

    remaining: dict[str, int]
    total: dict[str, int]

    @property
    def fractions(self) -> dict[str, float]:
        """The fraction in [0, 1] that remains of each matrix."""
        return {name: self.remaining[name] / total for name, total in self.total.items()}

    @property
    def overall(self) -> float:
        """The fraction in [0, 1] that remains of all matrices together."""
        return sum(self.remaining.values()) / sum(self.total.values())


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers of a model by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def count(masks: Masks) -> Counts:
    """Count the weights that the masks keep (for l0: whose gate is not closed)."""
    ones = count_ones(list(masks.by_layer.values()))
    weights = masks.weights
    remaining = {name: one * weights[name] for name, one in zip(masks.by_layer, ones, strict=True)}
    return Counts(remaining, {name: mask.numel() * weights[name] for name, mask in masks.by_layer.items()})


@torch.no_grad()
def find_masks(
    model: nn.Module,
    threshold: float | None = None,
    cutoff: float | None = None,
    generator: torch.Generator | None = None,
    *,
    sampled: bool = False,
    global_topk: bool | None = None,
) -> Masks:
    """The masks of all `MaskedLinear` layers of `model`.

    threshold: see `compute_mask`, by default the model's `config.threshold`; with `global_topk` the fraction in [0, 1]
        of all masked weights that remain, whatever the method.
    cutoff: with `global_topk`, a cut-off found earlier, used instead of selecting a new one (masks then keep about,
        not exactly, the fraction).
    generator: source of the noise of sampled masks; every rank must hold the same one.
    sampled: whether masks may be random, as l0's are in training.
    global_topk: whether all matrices are ranked together, by default as the model's configuration says.

    Raises ValueError for a model without masked layers, an unknown threshold or one out of range, and for a method that
    cannot rank all matrices together.
    """
    groups = _by_source(masked_layers(model))
    method = groups[0][0][1].method
    threshold = _threshold(model, threshold)
    sources = [group[0][1].source for group in groups]
    if global_topk is None:
        global_topk = getattr(getattr(model, "config", None), "global_topk", False)
    if global_topk:
        if not method.ranks_together:
            raise ValueError(f"global_topk cannot rank all matrices together for pruning_method {method.name}")
        sizes = [sum(layer.weight.numel() for _, layer in g) // s.numel() for g, s in zip(groups, sources, strict=True)]
        found, cutoff = keep_largest_together(sources, sizes, check_fraction(threshold), cutoff)
    else:
        found, cutoff = method.masks(sources, threshold, sampled, generator), None
    return _spread(model, groups, found, cutoff)


@torch.no_grad()
def masks_above(model: nn.Module, score: float) -> Masks:
    """The masks that would remain if all weights with scores up to `score` were pruned."""
    groups = _by_source(masked_layers(model))
    sources = [group[0][1].source for group in groups]
    return _spread(model, groups, groups[0][0][1].method.masks_above(sources, score))


def _by_source(layers: dict[str, MaskedLinear]) -> list[list[tuple[str, MaskedLinear]]]:
    """The layers, those that share their scores together. Raises ValueError when there are none."""
    groups: dict[int, list[tuple[str, MaskedLinear]]] = {}
    for name, layer in layers.items():
        owner = layer if layer.mask_scores is None else layer.mask_scores
        groups.setdefault(id(owner), []).append((name, layer))
    if not groups:
        raise ValueError("the model has no masked layers")
    return list(groups.values())


def _spread(model: nn.Module, groups: list, found: list[Tensor], cutoff: float | None = None) -> Masks:
    by_layer = {name: mask for group, mask in zip(groups, found, strict=True) for name, _ in group}
    layers = masked_layers(model)
    weights = {name: layer.weight.numel() // by_layer[name].numel() for name, layer in layers.items()}
    return Masks({name: by_layer[name] for name in layers}, weights, cutoff)


def _threshold(model: nn.Module, threshold: float | None) -> float:
    if threshold is None:
        threshold = getattr(getattr(model, "config", None), "threshold", None)
    if threshold is None:
        if any(layer.method.threshold for layer in masked_layers(model).values()):
            raise ValueError("the model knows no threshold yet: pass threshold=..., or set config.threshold")
        threshold = 1.0
    return float(threshold)


@contextmanager
def masked(
    model: nn.Module,
    threshold: float | None = None,
    cutoff: float | None = None,
    generator: torch.Generator | None = None,
    *,
    global_topk: bool | None = None,
) -> Iterator[Masks | None]:
    """Find the masks of `model` once, and use them in every forward inside the block. A dense model is left as it is.

    The arguments are those of `find_masks`; masks are sampled when the model is in training mode. A threshold given
    here becomes `config.threshold`, which `save_pretrained` records. Without gradients, and in evaluation mode, W * M is
    kept as well until the block ends. Scores and weights that change inside the block leave its masks as they are.
    """
    if not masked_layers(model):
        yield None
        return
    with _in_force(model, threshold, cutoff, generator, global_topk, lasting=True) as masks:
        yield masks


@contextmanager
def masked_forward(model: nn.Module, threshold: float | None = None) -> Iterator[None]:
    """What a forward of a masked model runs in: the masks of the block around it, or else its own.

    Raises ValueError for a threshold that is not the block's.
    """
    layers = masked_layers(model).values()
    block = next(iter(layers)).in_force
    if block:
        if threshold is not None and float(threshold) != block.threshold:
            raise ValueError(f"threshold={threshold} inside a block that is masked at {block.threshold}: leave it out")
        yield
        return
    with _in_force(model, threshold, lasting=False):
        # Gradient checkpointing runs the layers again in the backward, which needs the masks of this forward.
        recomputes = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        for layer in layers:
            layer.recomputed = layer.in_force if recomputes else None
        yield


@contextmanager
def _in_force(
    model: nn.Module, threshold=None, cutoff=None, generator=None, global_topk=None, *, lasting: bool
) -> Iterator[Masks]:
    layers = masked_layers(model)
    threshold = _threshold(model, threshold)
    sampled = model.training
    masks = find_masks(model, threshold, cutoff, generator, sampled=sampled, global_topk=global_topk)
    if hasattr(getattr(model, "config", None), "threshold"):
        model.config.threshold = threshold
    before = {name: layer.in_force for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.in_force = MaskInForce(masks.by_layer[name], threshold, sampled, lasting)
    try:
        yield masks
    finally:
        for name, layer in layers.items():
            layer.in_force = before[name]
