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

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from .binarizer import above_threshold, check_fraction, floor_count, keep_floor, keep_largest, logit

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
        gate = uniform_noise(scores, generator).logit_().add_(scores).div_(L0_TEMPERATURE).sigmoid_()
    else:
        gate = torch.sigmoid(scores)
    return gate.mul_(L0_RIGHT - L0_LEFT).add_(L0_LEFT).clamp_(0.0, 1.0)


def uniform_noise(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise u ~ U(1e-4, 1 - 1e-4) of the shape of `scores`.

    On a CPU torch's generator only seeds NumPy's SFC64, which is three times as fast as torch's own.
    """
    if scores.device.type != "cpu":
        return torch.empty_like(scores).uniform_(L0_NOISE_MARGIN, 1 - L0_NOISE_MARGIN, generator=generator)
    seed = torch.randint(2**63 - 1, (), generator=generator).item()
    words = np.random.SFC64(seed).random_raw((scores.numel() + 1) // 2).view(np.int32)[: scores.numel()]
    noise = torch.from_numpy(words).to(scores.dtype).reshape(scores.shape)
    return noise.mul_(2.0**-32 * (1 - 2 * L0_NOISE_MARGIN)).add_(0.5)


def _hard_concrete_grad(mask: Tensor, grad: Tensor, sampled: bool) -> Tensor:
    """dL/dS = dL/dM * dM/dS of `hard_concrete`, from the mask alone: inside (0, 1) it determines the gate g.

    g = (M - l) / (r - l) and dM/dS = g (1 - g) (r - l) / b. `grad` is overwritten.
    """
    width = L0_RIGHT - L0_LEFT
    gate = (mask / width).sub_(L0_LEFT / width)
    grad.mul_(width / (L0_TEMPERATURE if sampled else 1.0))
    torch.ops.aten.sigmoid_backward(grad, gate, grad_input=gate)
    return torch.ops.aten.hardtanh_backward(gate, mask, 0.0, 1.0, grad_input=grad)  # 0 where the clamp holds


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
    source = mask_scores if has_scores(pruning_method) else weight
    return _compute_masks([source], pruning_method, threshold, training)[0]


def _compute_masks(
    sources: list[Tensor],
    pruning_method: str,
    threshold: float,
    training: bool,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    if pruning_method == "l0":
        return [hard_concrete(scores.detach(), training, generator) for scores in sources]
    if pruning_method == "threshold":
        return above_threshold(sources, float(threshold))
    if pruning_method == "sigmoied_threshold":
        return above_threshold(sources, logit(check_fraction(threshold)))
    fraction = check_fraction(threshold)
    counts = [int(fraction * source.numel()) for source in sources]
    return keep_largest(sources, counts, absolute=pruning_method == "magnitude")


def _compute_global_masks(
    rankings: list[Tensor], fraction: float, cutoff: float | None
) -> tuple[list[Tensor], float]:
    """Masks over all matrices ranked together, each with the floor of the threshold masks."""
    fraction = check_fraction(fraction)
    if cutoff is not None:
        return above_threshold(rankings, cutoff, inclusive=True), cutoff
    everything = torch.cat([ranking.detach().reshape(-1) for ranking in rankings])
    kept = keep_largest([everything], [int(fraction * everything.numel())])[0]
    cutoff = everything.masked_fill_(~kept, torch.inf).min().item()  # the smallest of those that are kept
    parts = kept.split([ranking.numel() for ranking in rankings])
    masks = [part.reshape(ranking.shape) for part, ranking in zip(parts, rankings, strict=True)]
    return keep_floor(rankings, masks), cutoff


def closing_score(pruning_method: str, final_threshold: float) -> float:
    """The score at which a weight is pruned in the end, for the methods that a penalty makes sparse.

    Raises ValueError for the others.
    """
    if pruning_method == "sigmoied_threshold":
        return logit(check_fraction(final_threshold))
    if pruning_method == "l0":  # where the noise-free gate closes
        return logit(-L0_LEFT / (L0_RIGHT - L0_LEFT))
    raise ValueError(f"{pruning_method} prunes at no fixed score: choose sigmoied_threshold or l0")


@torch.no_grad()
def fraction_above(model: nn.Module, score: float) -> float:
    """The fraction of weights that would remain if those with scores up to `score` were pruned, in [0, 1].

    With the floor of the threshold masks, which l0 has not.
    """
    layers = list(masked_layers(model).values())
    counts = torch.stack([(layer.mask_scores > score).count_nonzero() for layer in layers]).tolist()
    sizes = [layer.weight.numel() for layer in layers]
    if layers[0].pruning_method != "l0":
        counts = [max(count, floor_count(size)) for count, size in zip(counts, sizes, strict=True)]
    return sum(counts) / sum(sizes)


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor * mask, in the dtype of `tensor`."""
    factor = _factor(mask, tensor.dtype)
    return tensor * factor if factor is mask else factor.mul_(tensor)


def _factor(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in a floating dtype. On a CPU torch widens bytes ten times as fast as booleans."""
    return (mask.view(torch.int8) if mask.dtype == torch.bool else mask).to(dtype)


class _MaskedProduct(torch.autograd.Function):
    """x (W * M)^T + b. With G = dL/d(W * M):  dL/dW = G * M;  dL/dS = G * W, times dM/dS where it exists (l0).

    It keeps x, W and M, and computes W * M again in the backward: kept, the masked weights of all
    layers would be a second model. What lasts is allocated before what is thrown away, so that the
    latter leaves no holes in the memory of a CPU.
    """

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, scores: Tensor | None, mask: Tensor, bias: Tensor | None, sampled: bool):
        ctx.save_for_backward(input, weight, mask)
        ctx.sampled = sampled
        rows = input.reshape(-1, input.shape[-1])
        output = rows.new_empty(len(rows), len(weight))
        masked = apply_mask(weight, mask)
        if torch.is_autocast_enabled(input.device.type):
            masked, bias = masked.to(input.dtype), bias if bias is None else bias.to(input.dtype)
        if bias is None:
            torch.mm(rows, masked.t(), out=output)
        else:
            torch.addmm(bias, rows, masked.t(), out=output)
        return output.view(*input.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        input, weight, mask = ctx.saved_tensors
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_scores = grad_bias = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight = (rows.t() @ input.reshape(-1, input.shape[-1])).to(weight.dtype)  # G, for now
            if ctx.needs_input_grad[2]:
                grad_scores = grad_weight * weight
                if mask.dtype != torch.bool:
                    grad_scores = _hard_concrete_grad(mask, grad_scores, ctx.sampled)
            grad_weight = grad_weight.mul_(_factor(mask, weight.dtype)) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[4]:
            grad_bias = rows.sum(0)
        if ctx.needs_input_grad[0]:
            grad_input = rows.new_empty(len(rows), input.shape[-1])
            torch.mm(rows, apply_mask(weight, mask).to(rows.dtype), out=grad_input)
            grad_input = grad_input.view(input.shape)
        return grad_input, grad_weight, grad_scores, None, grad_bias, None


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
        self.register_buffer("masked_weight", None, persistent=False)  # W * M, while nothing is trained
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
            if self.masked_weight is not None and not torch.is_grad_enabled():
                return F.linear(input, self.masked_weight, self.bias)
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))  # the product casts the rest
        return _MaskedProduct.apply(input, self.weight, self.mask_scores, mask, self.bias, sampled)

    def train(self, mode: bool = True) -> "MaskedLinear":
        if mode:
            self.mask_source = self.masked_weight = None  # whatever happens in training, evaluation finds them anew
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
    tensors = [tensor for tensor in (layer.weight, layer.mask_scores) if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return (float(threshold), global_topk, *((t.data_ptr(), t.device, t._version) for t in tensors))


def _note_fused_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Raise the version counters of what a fused optimiser changed: torch 2.13 leaves them as they were."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_note_fused_step)


def masks_are_current(model: nn.Module, threshold: float, global_topk: bool = False) -> bool:
    """Whether the stored masks are known to be those of `threshold` and of scores and weights as they are now.

    Masks of training never are. Changes show in PyTorch's version counters; only writes through `.data`
    escape them.
    """
    return all(
        layer.mask_source is not None and layer.mask_source == _source(layer, threshold, global_topk)
        for layer in masked_layers(model).values()
    )


@torch.no_grad()
def keep_masked_weights(model: nn.Module) -> None:
    """Store W * M in every layer whose masks are current, for forwards without gradients.

    They are then those of a dense layer. The copies go when the layer is put into training mode, or gets new masks.
    """
    for layer in masked_layers(model).values():
        if layer.masked_weight is None and layer.mask_source is not None:
            layer.masked_weight = apply_mask(layer.weight, layer.mask)


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
        if global_topk:
            if method in ("l0", "sigmoied_threshold"):
                raise ValueError(f"global_topk ranks topK, threshold and magnitude masks, not {method}")
            masks, cutoff = _compute_global_masks([layer.ranking for layer in layers], threshold, cutoff)
        else:
            sources = [layer.weight if layer.mask_scores is None else layer.mask_scores for layer in layers]
            masks, cutoff = _compute_masks(sources, method, threshold, training, generator), None
    for layer, mask in zip(layers, masks, strict=True):
        layer.mask, layer.masked_weight = mask, None
        layer.mask_sampled = training and method == "l0"
        layer.mask_source = _source(layer, threshold, global_topk) if lasting else None
    return cutoff
