"""Masked linear layers: y = (W * M) x + b, with the mask M from scores S or from W itself.

`layer(x, threshold=v)` computes its mask on the spot, as in the published interface. Training and evaluation instead
find the masks of all layers in one place, `masks.py`, and put them in force for a block; a layer's forward is then a
product. That makes masking cheap, gives `global_topk` the same path, and leaves nothing in the forward on which
`torch.compile` would specialise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .granularity import GRANULARITIES, Weight
from .methods import Method, find_method

MASK_INITS = ("constant", "uniform", "kaiming")


@torch.no_grad()
def compute_mask(
    weight: Tensor, mask_scores: Tensor | None, pruning_method: str, threshold: float, training: bool = False
) -> Tensor:
    """The mask of one matrix with a score per weight: boolean, or float in [0, 1] for l0; the shape of `weight`.

    `threshold` is a fraction in [0, 1] (the remaining weights for topK and magnitude, a cut on sigmoid(S) for
    sigmoied_threshold), a cut on S for threshold, and unused by l0. Raises ValueError for an unknown method or a
    fraction outside [0, 1].
    """
    method = find_method(pruning_method)
    source = mask_scores if method.scores else Weight().rank(weight)
    return method.masks([source], threshold, training)[0]


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor * mask, in the dtype of `tensor`."""
    factor = _factor(mask, tensor.dtype)
    return tensor * factor if factor is mask else factor.mul_(tensor)


def _factor(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in a floating dtype. On a CPU torch widens bytes ten times as fast as booleans."""
    return (mask.view(torch.int8) if mask.dtype == torch.bool else mask).to(dtype)


class _MaskedProduct(torch.autograd.Function):
    """x (W * M)^T + b. With G = dL/d(W * M):  dL/dW = G * M;  dL/dM = G * W, from which the method makes dL/dS.

    It keeps x, W and M, and computes W * M again in the backward: kept, the masked weights of all layers would be a
    second model. What lasts is allocated before what is thrown away, so that the latter leaves no holes in the memory
    of a CPU.
    """

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, scores: Tensor | None, mask: Tensor, bias: Tensor | None,
        method: Method, granularity: Weight, sampled: bool,
    ):  # fmt: skip
        rows = input.reshape(-1, input.shape[-1])
        output = rows.new_empty(len(rows), len(weight))
        masked = apply_mask(weight, granularity.expand(mask, weight.shape))
        if torch.is_autocast_enabled(input.device.type):
            masked, bias = masked.to(input.dtype), bias if bias is None else bias.to(input.dtype)
        if bias is None:
            torch.mm(rows, masked.t(), out=output)
        else:
            torch.addmm(bias, rows, masked.t(), out=output)
        return output.view(*input.shape[:-1], len(weight))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, mask, _, ctx.method, ctx.granularity, ctx.sampled = inputs
        ctx.save_for_backward(input, weight, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        input, weight, mask = ctx.saved_tensors
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_scores = grad_bias = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight = (rows.t() @ input.reshape(-1, input.shape[-1])).to(weight.dtype)  # G, for now
            if ctx.needs_input_grad[2]:
                grad_mask = ctx.granularity.reduce(grad_weight * weight)
                grad_scores = ctx.method.scores_gradient(mask, grad_mask, ctx.sampled)
        expanded = ctx.granularity.expand(mask, weight.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_weight.mul_(_factor(expanded, weight.dtype))
        if ctx.needs_input_grad[4]:
            grad_bias = rows.sum(0)
        if ctx.needs_input_grad[0]:
            grad_input = rows.new_empty(len(rows), input.shape[-1])
            torch.mm(rows, apply_mask(weight, expanded).to(rows.dtype), out=grad_input)
            grad_input = grad_input.view(input.shape)
        return grad_input, grad_weight if ctx.needs_input_grad[1] else None, grad_scores, None, grad_bias, None, None, None


@dataclass
class MaskInForce:
    """The mask of a layer while a block, or one forward of the model, lasts.

    sampled: whether the mask is a sample (of training). lasting: whether it serves many forwards, so that W * M is
    worth keeping while nothing is trained.
    """

    mask: Tensor
    threshold: float
    sampled: bool = False
    lasting: bool = False
    masked_weight: Tensor | None = None


class MaskedLinear(nn.Linear):
    """An `nn.Linear` with a mask over its weights.

    Beside `weight` (out_features x in_features) and `bias` it holds `mask_scores`, in the shape that the granularity
    gives them (that of `weight`; None for magnitude pruning), initialised by `mask_init`: `constant` at `mask_scale`,
    `uniform` in +-`mask_scale`, or `kaiming`. Raises ValueError for an unknown `pruning_method` or `mask_init`.

    `layer(x, threshold=v)` computes its mask for the threshold v. `layer(x)` uses the mask of the `masked` block that it
    is called in, and raises RuntimeError outside of one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mask_init: str = "constant",
        mask_scale: float = 0.0,
        pruning_method: str = "topK",
        granularity: str = "weight",
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if mask_init not in MASK_INITS:
            raise ValueError(f"unknown mask_init {mask_init!r}: choose one of {', '.join(MASK_INITS)}")
        self.method = find_method(pruning_method)
        self.granularity = GRANULARITIES[granularity]
        self.mask_init = mask_init
        self.mask_scale = mask_scale
        self.mask_scores = None
        if self.method.scores:
            # Scores stay float32 in a half-precision model: their updates would vanish there.
            kind = {"device": device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
            self.mask_scores = nn.Parameter(torch.empty(self.granularity.shape(self.weight.shape), **kind))
        self.in_force: MaskInForce | None = None
        self.recomputed: MaskInForce | None = None  # the last forward's, for gradient checkpointing
        self.reset_scores()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> "MaskedLinear":
        """A masked layer that shares the weight and bias of `linear`. `options` are those of the class."""
        kind = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **options, **kind)
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
    def source(self) -> Tensor:
        """What the mask follows from: the scores, or norms of the weights for magnitude pruning."""
        return self.mask_scores if self.mask_scores is not None else self.granularity.rank(self.weight.detach())

    @property
    def mask(self) -> Tensor | None:
        """The mask in force, in the shape of the scores; None outside a `masked` block."""
        return self.in_force.mask if self.in_force else None

    def forward(self, input: Tensor, threshold: float | None = None) -> Tensor:
        if threshold is not None:
            mask, sampled = self.method.masks([self.source], threshold, self.training)[0], self.training
        else:
            current = self.in_force or (self.recomputed if self.training else None)
            if current is None:
                raise RuntimeError("this layer has no mask: call it in a block, with masked(model, threshold): ..., "
                                   "or with threshold=...")  # fmt: skip
            if current.lasting and not (self.training or torch.is_grad_enabled()):
                return F.linear(input, self._kept_product(current), self.bias)
            mask, sampled = current.mask, current.sampled
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))  # the product casts the rest
        return _MaskedProduct.apply(
            input, self.weight, self.mask_scores, mask, self.bias, self.method, self.granularity, sampled
        )

    def _kept_product(self, current: MaskInForce) -> Tensor:
        if current.masked_weight is None:
            mask = self.granularity.expand(current.mask, self.weight.shape)
            current.masked_weight = apply_mask(self.weight.detach(), mask)
        return current.masked_weight

    def __getstate__(self) -> dict:
        return self.__dict__ | {"in_force": None, "recomputed": None}  # a copy is in no block

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pruning_method={self.method.name}"


def swap_linears(module: nn.Module, where: Callable[[str], bool] = lambda name: True, **options) -> None:
    """Replace, in place, every `nn.Linear` below `module` whose dotted name passes `where` by a `MaskedLinear`.

    The masked layers share weights and biases with those they replace: state-dict keys stay, and
    `<linear>.mask_scores` joins them. `options` are those of `MaskedLinear`.
    """
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and where(name):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, MaskedLinear.from_linear(child, **options))
