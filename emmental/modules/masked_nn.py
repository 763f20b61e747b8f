"""Masked linear layers: y = (W * M) x + b, with a mask M from scores S or from W itself.

`masks.py` finds the masks of all layers at once, so that `torch.compile` compiles a forward once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .binarizer import compute_mask  # noqa: F401, published here
from .granularity import Weight, find_granularity
from .methods import find_method
from .numeric import NOT_IN_GRAPHS, apply_mask, check_values, is_traced
from .product import MaskedProduct

MASK_INITS = ("constant", "uniform", "kaiming")


@dataclass
class MaskInForce:
    """The mask that a layer uses inside a `masked` block, or for one forward.

    sampled: whether it is a random sample (l0 in training).
    lasting: whether it serves many forwards. In evaluation the layer then keeps `masked_weight`.
    """

    mask: Tensor
    threshold: float
    sampled: bool
    lasting: bool
    masked_weight: Tensor | None = None


class MaskedLinear(nn.Linear):
    """An `nn.Linear` with a mask over its weights.

    `mask_scores` (None for magnitude pruning) has the shape of `weight`, or of the granularity. It
    starts `constant` at `mask_scale`, `uniform` in +-`mask_scale`, or `kaiming`. The betas weigh
    the past in the running means of observed scores. With `scores_of`, a layer has no scores of its
    own but those of that layer. The last layer that shares them `is_gate`: in training, it alone
    is masked. Raises ValueError for an unknown name, and what does not fit.

    `layer(x, threshold=v)` finds its mask for the threshold v. `layer(x)` uses the mask of the
    `masked` block around the call, and raises RuntimeError outside a block.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mask_init: str = "constant",
        mask_scale: float = 0.0,
        pruning_method: str = "topK",
        granularity: str | Weight = "weight",
        importance_beta: float = 0.85,
        uncertainty_beta: float = 0.95,
        scores_of: "MaskedLinear | None" = None,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if mask_init not in MASK_INITS:
            raise ValueError(f"unknown mask_init {mask_init!r}: choose one of {MASK_INITS}")
        self.method, self.pruning_method = find_method(pruning_method), pruning_method
        self.granularity = find_granularity(granularity)
        self.is_gate = True
        self._group = [] if scores_of is None else scores_of._group  # empty if it shares nothing
        if scores_of is not None:
            self._group += [self] if self._group else [scores_of, self]
            self._group[-2].is_gate = False
        self.mask_init, self.mask_scale, self.mask_scores = mask_init, mask_scale, None
        self.importance_beta, self.uncertainty_beta = importance_beta, uncertainty_beta
        self.in_force: MaskInForce | None = None
        shape = self.granularity.shape(self.weight.shape)
        if self.method.scores and scores_of is None:
            # Also in a half-precision model: updates of scores are too small for its precision.
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            self.mask_scores = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            if self.method.has_uncertainty:
                self.register_buffer("mask_uncertainty", torch.empty_like(self.mask_scores.data))
            self.reset_scores()

    def reset_scores(self) -> None:
        """Initialize the scores according to `mask_init` and `mask_scale`."""
        if self.mask_scores is None:
            return
        if self.mask_init == "constant":
            nn.init.constant_(self.mask_scores, self.mask_scale)
        elif self.mask_init == "uniform":
            nn.init.uniform_(self.mask_scores, -self.mask_scale, self.mask_scale)
        else:
            nn.init.kaiming_uniform_(self.mask_scores, a=math.sqrt(5))
        if self.method.has_uncertainty:
            nn.init.zeros_(self.mask_uncertainty)

    @property
    def group(self) -> "list[MaskedLinear]":
        """The layers that share their scores. The first one holds them."""
        return self._group or [self]

    @property
    def scores(self) -> Tensor | None:
        """The scores that the mask follows from, of this layer or of another."""
        return self.group[0].mask_scores

    @property
    def source(self) -> Tensor:
        """What the mask follows from: mostly the scores; for magnitude pruning, the weights."""
        check_values(self.weight, self.scores)
        return self.method.source(self.group[0])

    @property
    def owner(self) -> int:
        """The identity of the scores: layers that share their scores have the same owner."""
        return id(self.group[0] if self.scores is None else self.scores)

    @property
    def weights_per_score(self) -> int:
        """How many weights one score stands for."""
        return self.weight.numel() // self.granularity.shape(self.weight.shape).numel()

    def expand(self, mask: Tensor) -> Tensor:
        """The mask of each weight, in a shape that broadcasts to that of the weights."""
        mask = mask if self.is_gate else mask > 0  # of l0, M acts once
        return self.granularity.expand(mask, self.weight.shape)

    def forward(self, input: Tensor, threshold: float | None = None) -> Tensor:
        current = self.in_force
        if threshold is not None:
            current = self._find_mask(threshold)
        elif current is None:
            raise RuntimeError("no mask: use `with masked(model, threshold):`, or threshold=...")
        if is_traced() and self.training:
            raise ValueError("a trace or export keeps its masks for good: call model.eval() first")
        if is_traced() or (current.lasting and not (self.training or torch.is_grad_enabled())):
            own = type(self.weight) is nn.Parameter  # torch.func.functional_call passes a tensor
            weight = current.masked_weight if own else None
            if weight is None:
                weight = apply_mask(self.weight.detach(), self.expand(current.mask))
            if own and not is_traced():
                current.masked_weight = weight
            return F.linear(input, weight, self.bias)
        if not self.is_gate:  # so that what is pruned has a gradient, and can return
            return F.linear(input, self.weight, self.bias)
        if torch.is_autocast_enabled(input.device.type):  # MaskedProduct casts W and b
            input = input.to(torch.get_autocast_dtype(input.device.type))
        tensors = input, self.weight, self.scores, current.mask, self.bias
        return MaskedProduct.apply(*tensors, self.method, self.granularity, current.sampled)

    @torch.compiler.disable(reason=NOT_IN_GRAPHS)  # they would be compiled for each threshold
    def _find_mask(self, threshold: float) -> MaskInForce:
        mask = self.method.masks([self.source], threshold, self.training)[0]
        return MaskInForce(mask, threshold, self.training, lasting=False)

    def _forget_masked_weight(self) -> None:
        if self.in_force:
            self.in_force.masked_weight = None

    def train(self, mode: bool = True) -> "MaskedLinear":
        self._forget_masked_weight()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget_masked_weight()
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"in_force": None}  # a copy is outside the block

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pruning_method={self.pruning_method}"
