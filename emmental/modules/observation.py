"""Scores that are observed, not learned: they follow from the gradients of the updates."""

import torch
from torch import Tensor, nn

from .lists import together
from .masked_nn import MaskedLinear
from .masks import MaskedLayers, masked_layers


@torch.no_grad()
def observe_scores(
    model: nn.Module | MaskedLayers,
    scaler: torch.amp.GradScaler | None = None,
    skipped: bool = False,
) -> None:
    """Pass the gradients of scores to a method that observes them, such as `platon`.

    Call this function once per update, after `backward()` and before `optimizer.step()`. For other
    methods, nothing happens. Gradients of observed scores are dropped, so that no optimizer learns
    from them. scaler: the gradient scaler of the loss, if there is one. skipped: whether the scaler
    skips the update because of an infinite gradient; then nothing is observed.

    The gradients are divided by the square root of the number of weights of a score, so that scores
    of all sizes compare: like Fisher information, the squared gradient grows with this number.
    """
    observed = masked_layers(model).observed
    if not observed:
        return
    observed[0].unobserved = 0
    is_learned = observed[0].method.scores == "learned"
    scale = scaler.get_scale() if scaler and not is_learned else 1.0  # others are unscaled
    if not skipped:
        parts = [observed] if together(observed[0].weight) else [[layer] for layer in observed]
        for layers in parts:
            _observe(layers, scale)
    if not is_learned:
        for layer in observed:
            layer.mask_scores.grad = None


def _observe(layers: list[MaskedLinear], scale: float) -> None:
    sizes = [sum(member.weights_per_score for member in layer.group) for layer in layers]
    grads = [layer.mask_scores.grad for layer in layers]
    scaled = torch._foreach_div(grads, [scale * size**0.5 for size in sizes])
    layers[0].method.observe(layers, list(scaled))


def observed_norms(layers: MaskedLayers) -> list[Tensor]:
    """The norms of the gradients of observed scores, which are not clipped."""
    grads = [x.mask_scores.grad for x in layers.observed if x.method.scores == "observed"]
    return list(torch._foreach_norm(grads)) if grads else []
