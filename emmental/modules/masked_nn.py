"""Masked linear layers: y = (W * M) x + b, with the mask M from scores S or from W itself.

`layer(x, threshold=v)` computes its mask on the spot, as in the published interface. Training and
evaluation find the masks of all layers in one place, `masks.py`, and put them in force for a block:
a layer's forward is then a product, on which `torch.compile` has nothing to specialise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .binarizer import compute_mask  # noqa: F401, published here
from .granularity import GRANULARITIES
from .methods import find_method
from .numeric import apply_mask
from .product import MaskedProduct

MASK_INITS = ("constant", "uniform", "kaiming")


@dataclass
class MaskInForce:
    """The mask of a layer while a block, or one forward, lasts. sampled: whether it is a sample.
    lasting: whether it serves many forwards, so that W * M is kept while nothing is trained.
    """

    mask: Tensor
    threshold: float
    sampled: bool
    lasting: bool
    masked_weight: Tensor | None = None


class MaskedLinear(nn.Linear):
    """An `nn.Linear` with a mask over its weights, from `mask_scores` (None for magnitude pruning).

    The scores have the shape of `weight`, or the granularity's, and start `constant` at `mask_scale`,
    `uniform` in +-`mask_scale`, or `kaiming`. Raises ValueError for an unknown name.

    `layer(x, threshold=v)` computes its mask for the threshold v. `layer(x)` uses the mask of the
    `masked` block that it is called in, and raises RuntimeError outside of one.
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
            raise ValueError(f"unknown mask_init {mask_init!r}: choose one of {MASK_INITS}")
        self.method, self.pruning_method = find_method(pruning_method), pruning_method
        self.granularity = GRANULARITIES[granularity]
        self.mask_init, self.mask_scale, self.mask_scores = mask_init, mask_scale, None
        if self.method.scores:
            # Scores stay float32 in a half-precision model: their updates would vanish there.
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            shape = self.granularity.shape(self.weight.shape)
            self.mask_scores = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.in_force: MaskInForce | None = None
        self.reset_scores()

    def reset_scores(self) -> None:
        """Initialise the scores as `mask_init` and `mask_scale` say."""
        scores, scale = self.mask_scores, self.mask_scale
        if scores is not None and self.mask_init == "constant":
            nn.init.constant_(scores, scale)
        elif scores is not None and self.mask_init == "uniform":
            nn.init.uniform_(scores, -scale, scale)
        elif scores is not None:
            nn.init.kaiming_uniform_(scores, a=math.sqrt(5))

    @property
    def source(self) -> Tensor:
        """What the mask follows from: the scores, or norms of the weights."""
        scores = self.mask_scores
        return self.granularity.rank(self.weight.detach()) if scores is None else scores

    @property
    def owner(self) -> int:
        """The identity of the scores, which layers may share."""
        return id(self if self.mask_scores is None else self.mask_scores)

    @property
    def mask(self) -> Tensor | None:
        """The mask in force, in the shape of the scores; None outside a `masked` block."""
        return self.in_force.mask if self.in_force else None

    def forward(self, input: Tensor, threshold: float | None = None) -> Tensor:
        current = self.in_force
        if threshold is not None:
            mask = self.method.masks([self.source], threshold, self.training)[0]
            current = MaskInForce(mask, threshold, self.training, lasting=False)
        elif current is None:
            raise RuntimeError(
                "no mask: use `with masked(model, threshold): ...`, or threshold=..."
            )
        if current.lasting and not (self.training or torch.is_grad_enabled()):
            weight = current.masked_weight if type(self.weight) is nn.Parameter else None
            if weight is None:
                expanded = self.granularity.expand(current.mask, self.weight.shape)
                weight = apply_mask(self.weight.detach(), expanded)
            if type(self.weight) is nn.Parameter and not torch.compiler.is_exporting():
                current.masked_weight = weight
            return F.linear(input, weight, self.bias)
        if torch.is_autocast_enabled(input.device.type):  # the product casts the rest
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return MaskedProduct.apply(
            input, self.weight, self.mask_scores, current.mask, self.bias,
            self.method, self.granularity, current.sampled,
        )  # fmt: skip

    def train(self, mode: bool = True) -> "MaskedLinear":
        self._forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()
        return super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        """Drop W * M where the weights change."""
        if self.in_force:
            self.in_force.masked_weight = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"in_force": None}  # a copy is in no block

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pruning_method={self.pruning_method}"


def swap_linears(
    module: nn.Module, where: Callable[[str], bool] = lambda name: True, **options
) -> None:
    """Replace, in place, every `nn.Linear` below `module` whose dotted name passes `where`.

    The masked layers share weights and biases with those they replace: state-dict keys stay, and
    `<linear>.mask_scores` joins them. `options` are those of `MaskedLinear`.
    """
    for name, old in list(module.named_modules()):
        if type(old) is nn.Linear and where(name):
            options |= {"device": old.weight.device, "dtype": old.weight.dtype}
            new = MaskedLinear(old.in_features, old.out_features, old.bias is not None, **options)
            new.weight, new.bias = old.weight, old.bias
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, new.train(old.training))
