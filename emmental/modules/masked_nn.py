"""Masked linear layers: y = (W * M) x + b, with M from scores S of the shape of W or from W itself.

Two ways lead to a mask. `layer(x, threshold=v)` computes it on the spot, as in the published
interface. Training and evaluation instead call `update_masks(model, v)` once per update: it finds the
cut-offs of all matrices in one place and stores the masks, one byte per weight (four for l0), and a
layer's forward is then a product. That makes masking cheap, gives `global_topk` the same path, and
leaves nothing in the forward that `torch.compile` would specialise on.

Only this file and the binarizers know that scores have the shape of the weights.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from .binarizer import above_threshold, check_fraction, keep_floor, keep_largest, kth_largest, logit

PRUNING_METHODS = ("topK", "threshold", "sigmoied_threshold", "magnitude", "l0")
MASK_INITS = ("constant", "uniform", "kaiming")

# The hard concrete distribution of Louizos et al. 2018, with the paper's constants.
L0_LEFT, L0_RIGHT, L0_TEMPERATURE = -0.1, 1.1, 2 / 3
L0_NOISE_MARGIN = 1e-4


def has_scores(pruning_method: str) -> bool:
    """Whether the method learns scores. Raises ValueError for an unknown method."""
    if pruning_method not in PRUNING_METHODS:
        raise ValueError(f"unknown pruning_method {pruning_method!r}: choose one of {', '.join(PRUNING_METHODS)}")
    return pruning_method != "magnitude"


def hard_concrete(scores: Tensor, training: bool, generator: torch.Generator | None = None) -> Tensor:
    """Mask of L0 regularisation, in [0, 1]: sampled in training, its noise-free form in evaluation."""
    if training:
        noise = torch.empty_like(scores).uniform_(L0_NOISE_MARGIN, 1 - L0_NOISE_MARGIN, generator=generator)
        gate = torch.sigmoid((noise.logit() + scores) / L0_TEMPERATURE)
    else:
        gate = torch.sigmoid(scores)
    return (gate * (L0_RIGHT - L0_LEFT) + L0_LEFT).clamp(0.0, 1.0)


def _hard_concrete_grad(mask: Tensor, sampled: bool) -> Tensor:
    """dM/dS of `hard_concrete`, from the mask alone: inside (0, 1) it determines the gate."""
    gate = (mask - L0_LEFT) / (L0_RIGHT - L0_LEFT)
    slope = (L0_RIGHT - L0_LEFT) / (L0_TEMPERATURE if sampled else 1.0)
    return gate * (1 - gate) * slope * ((mask > 0) & (mask < 1))


@torch.no_grad()
def compute_mask(
    weight: Tensor,
    mask_scores: Tensor | None,
    pruning_method: str,
    threshold: float,
    training: bool = False,
) -> Tensor:
    """The mask of one matrix: boolean, or float in [0, 1] for l0; the shape of `weight`.

    `threshold` is a fraction in [0, 1] (the remaining weights for topK and magnitude, a cut on
    sigmoid(S) for sigmoied_threshold), a cut on S for threshold, and unused by l0. Raises ValueError
    for an unknown method or a fraction outside [0, 1].
    """
    ranking = mask_scores if has_scores(pruning_method) else weight.abs()
    return _compute_masks([ranking], pruning_method, threshold, training)[0]


def _compute_masks(
    rankings: list[Tensor],
    pruning_method: str,
    threshold: float,
    training: bool,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    if pruning_method == "l0":
        return [hard_concrete(scores.detach(), training, generator) for scores in rankings]
    if pruning_method == "threshold":
        return above_threshold(rankings, float(threshold))
    if pruning_method == "sigmoied_threshold":
        return above_threshold(rankings, logit(check_fraction(threshold)))
    fraction = check_fraction(threshold)
    return keep_largest(rankings, [int(fraction * ranking.numel()) for ranking in rankings])


def _compute_global_masks(
    rankings: list[Tensor], fraction: float, cutoff: float | None
) -> tuple[list[Tensor], float]:
    """Masks over all matrices ranked together, each with the floor of the threshold masks."""
    fraction = check_fraction(fraction)
    if cutoff is not None:
        return above_threshold(rankings, cutoff, inclusive=True), cutoff
    everything = torch.cat([ranking.detach().reshape(-1) for ranking in rankings])
    count = int(fraction * everything.numel())
    cutoffs = kth_largest([everything], [count])
    parts = keep_largest([everything], [count], cutoffs)[0].split([ranking.numel() for ranking in rankings])
    masks = [part.reshape(ranking.shape) for part, ranking in zip(parts, rankings, strict=True)]
    return keep_floor(rankings, masks), cutoffs[0].item()


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor * mask, in the dtype of `tensor`."""
    return tensor * (mask if mask.dtype == torch.bool else mask.to(tensor.dtype))


class _MaskedWeight(torch.autograd.Function):
    """W * M, keeping W and M only: dL/dW = g * M; dL/dS = g * W, times dM/dS where it exists (l0)."""

    @staticmethod
    def forward(ctx, weight: Tensor, scores: Tensor | None, mask: Tensor, sampled: bool) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.sampled = sampled
        return apply_mask(weight, mask)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, mask = ctx.saved_tensors
        grad_weight = apply_mask(grad, mask) if ctx.needs_input_grad[0] else None
        grad_scores = None
        if ctx.needs_input_grad[1]:
            grad_scores = grad * weight
            if mask.dtype != torch.bool:
                grad_scores = grad_scores * _hard_concrete_grad(mask, ctx.sampled)
        return grad_weight, grad_scores, None, None


class MaskedLinear(nn.Linear):
    """An `nn.Linear` with a mask over its weights.

    Beside `weight` (out_features x in_features) and `bias` it holds `mask_scores` of the shape of
    `weight` (None for magnitude pruning), initialised by `mask_init`: `constant` at `mask_scale`,
    `uniform` in +-`mask_scale`, or `kaiming`. Raises ValueError for an unknown `pruning_method` or
    `mask_init`.

    `layer(x, threshold=v)` computes its mask for the threshold v; `layer(x)` uses the mask that
    `update_masks` stored in `layer.mask`, and raises RuntimeError when there is none yet.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mask_init: str = "constant",
        mask_scale: float = 0.0,
        pruning_method: str = "topK",
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if mask_init not in MASK_INITS:
            raise ValueError(f"unknown mask_init {mask_init!r}: choose one of {', '.join(MASK_INITS)}")
        self.pruning_method = pruning_method
        self.mask_init = mask_init
        self.mask_scale = mask_scale
        # Scores stay float32 in a half-precision model: their updates would vanish there.
        scores = torch.empty_like(self.weight, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        self.mask_scores = nn.Parameter(scores) if has_scores(pruning_method) else None
        self.register_buffer("mask", None, persistent=False)
        self.mask_source = None  # what the stored mask was computed from, None if that may have changed
        self.mask_sampled = False  # whether the stored mask is a sample (l0 in training)
        self.reset_scores()

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask_init: str, mask_scale: float, pruning_method: str) -> "MaskedLinear":
        """A masked layer that shares the weight and bias of `linear`."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            mask_init,
            mask_scale,
            pruning_method,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def reset_scores(self) -> None:
        """Initialise the scores as `mask_init` and `mask_scale` say."""
        if self.mask_scores is None:
            return
        if self.mask_init == "constant":
            nn.init.constant_(self.mask_scores, self.mask_scale)
        elif self.mask_init == "uniform":
            nn.init.uniform_(self.mask_scores, -self.mask_scale, self.mask_scale)
        else:
            nn.init.kaiming_uniform_(self.mask_scores, a=math.sqrt(5))

    @property
    def ranking(self) -> Tensor:
        """What the mask ranks: the scores, or the absolute weights for magnitude pruning."""
        return self.mask_scores if self.mask_scores is not None else self.weight.abs()

    def forward(self, input: Tensor, threshold: float | None = None) -> Tensor:
        if threshold is not None:
            mask = compute_mask(self.weight, self.mask_scores, self.pruning_method, threshold, self.training)
            sampled = self.training
        elif self.mask is None:
            raise RuntimeError("this layer has no mask yet: call it with threshold=..., or update_masks(model, threshold)")
        else:
            mask, sampled = self.mask, self.mask_sampled
        weight = _MaskedWeight.apply(self.weight, self.mask_scores, mask, sampled)
        return F.linear(input, weight, self.bias)

    def train(self, mode: bool = True) -> "MaskedLinear":
        if mode:
            self.mask_source = None  # whatever happens in training, evaluation finds its masks anew
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pruning_method={self.pruning_method}"


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers of a model by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def swap_linears(
    module: nn.Module,
    mask_init: str,
    mask_scale: float,
    pruning_method: str,
    where: Callable[[str], bool] = lambda name: True,
) -> None:
    """Replace, in place, every `nn.Linear` below `module` whose dotted name passes `where`.

    The masked layers share weights and biases with those they replace: state-dict keys stay, and
    `<linear>.mask_scores` joins them.
    """
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and where(name):
            parent, _, attribute = name.rpartition(".")
            masked = MaskedLinear.from_linear(child, mask_init, mask_scale, pruning_method)
            setattr(module.get_submodule(parent), attribute, masked)


def _source(layer: MaskedLinear, threshold: float, global_topk: bool) -> tuple | None:
    tensor = layer.mask_scores if layer.mask_scores is not None else layer.weight
    if tensor.is_inference():
        return None
    return (float(threshold), global_topk, tensor.data_ptr(), tensor.device, tensor._version)


def _note_fused_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Raise the version counters of what a fused optimiser changed: torch 2.13 leaves them as they were."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_note_fused_step)


def masks_are_current(model: nn.Module, threshold: float, global_topk: bool = False) -> bool:
    """Whether the stored masks are known to be those of `threshold` and of the scores as they are now.

    Masks of training never are. Changes of the scores show in PyTorch's version counters; only writes
    through `.data` escape them.
    """
    return all(
        layer.mask_source is not None and layer.mask_source == _source(layer, threshold, global_topk)
        for layer in masked_layers(model).values()
    )


def update_masks(
    model: nn.Module,
    threshold: float,
    global_topk: bool = False,
    cutoff: float | None = None,
    generator: torch.Generator | None = None,
) -> float | None:
    """Compute and store the masks of all `MaskedLinear` layers of `model`.

    threshold: see `compute_mask`; with `global_topk` the fraction in [0, 1] of all masked weights that
        remain, whatever the method (topK, threshold or magnitude).
    cutoff: with `global_topk`, a cut-off found earlier, used instead of selecting a new one (masks
        then keep about, not exactly, the fraction).
    generator: source of the noise of l0 in training; every rank must hold the same one.

    Returns the global cut-off, or None without `global_topk`. Raises ValueError for a model without
    masked layers or for a method that cannot be ranked globally.
    """
    layers = list(masked_layers(model).values())
    if not layers:
        raise ValueError("the model has no masked layers")
    method, training = layers[0].pruning_method, layers[0].training
    lasting = not training and cutoff is None
    with torch.inference_mode(False), torch.no_grad():  # masks made in inference mode could not be trained with
        rankings = [layer.ranking for layer in layers]
        if global_topk:
            if method in ("l0", "sigmoied_threshold"):
                raise ValueError(f"global_topk ranks topK, threshold and magnitude masks, not {method}")
            masks, cutoff = _compute_global_masks(rankings, threshold, cutoff)
        else:
            masks, cutoff = _compute_masks(rankings, method, threshold, training, generator), None
    for layer, mask in zip(layers, masks, strict=True):
        layer.mask = mask
        layer.mask_sampled = training and method == "l0"
        layer.mask_source = _source(layer, threshold, global_topk) if lasting else None
    return cutoff
