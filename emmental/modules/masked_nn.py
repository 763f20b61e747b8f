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
from .lists import is_traced, together
from .methods import find_method, magnitudes
from .numeric import NOT_IN_GRAPHS
from .product import MaskedWeights, multiply

MASK_INITS = ("constant", "uniform", "kaiming", "magnitude")


@dataclass
class MaskInForce:
    """The mask that a layer uses inside a `masked` block, or for one forward.

    sampled: whether the mask is a random sample (l0 in training).
    lasting: whether many forwards use the mask. In evaluation the layer then keeps `masked_weight`.
    expanded: on a GPU, the mask of all weights, found once like the mask.
    masked_weight: W * M for a forward of the encoder layer, or for the evaluation of a block.
    """

    mask: Tensor
    threshold: float
    sampled: bool
    lasting: bool
    expanded: Tensor | None = None
    masked_weight: Tensor | None = None

    def keeps(self, layer: nn.Module) -> bool:
        """Whether W * M of the layer serves all forwards of the block: in evaluation."""
        grad = layer.training or torch.is_grad_enabled() or is_traced()
        own = type(layer.weight) is nn.Parameter  # torch.func.functional_call passes a tensor
        return self.lasting and own and not grad


class MaskedLinear(nn.Linear):
    """An `nn.Linear` with a mask over its weights.

    `mask_scores` (None for magnitude pruning) has the shape of `weight`, or of the granularity. The
    scores start `constant` at `mask_scale`, `uniform` in +-`mask_scale`, `kaiming`, or at the
    `magnitude` of the weights: `mask_scale` * |W| / root mean square of W, as in HYDRA (Sehwag et
    al. 2020), shifted to a mean of 0 for methods that compare scores with a value. With
    `scores_of`, a layer shares the scores of that layer. Of the layers that share scores, only the
    last is masked (`is_gate`), which is enough. `settings` are those of the method. Raises
    ValueError for unknown names and settings.

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
        scores_of: "MaskedLinear | None" = None,
        device=None,
        dtype=None,
        **settings: float,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if mask_init not in MASK_INITS:
            raise ValueError(f"unknown mask_init {mask_init!r}: choose one of {MASK_INITS}")
        self.method, self.pruning_method = find_method(pruning_method), pruning_method
        self.granularity = find_granularity(granularity)
        self.is_gate = True
        self._group = [] if scores_of is None else scores_of._group  # empty if it shares no scores
        if scores_of is not None:
            self._group += [self] if self._group else [scores_of, self]
            self._group[-2].is_gate = False
        self.mask_init, self.mask_scale, self.mask_scores = mask_init, mask_scale, None
        for setting in self.method.settings:
            setattr(self, setting.name, settings.pop(setting.name, setting.default))
        if settings:
            raise ValueError(f"{pruning_method} has no setting {', '.join(settings)}: leave it out")
        self.in_force: MaskInForce | None = None
        self.unobserved = 0  # masks found in training since scores were observed
        shape = self.granularity.shape(self.weight.shape)
        if self.method.scores and scores_of is None:
            # Also in a half-precision model: updates of scores are too small for its precision.
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            self.mask_scores = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            for name in self.method.state:
                self.register_buffer(name, torch.empty_like(self.mask_scores.data))
            self.reset_scores()

    def reset_scores(self) -> None:
        """Initialize the scores according to `mask_init` and `mask_scale`."""
        if self.mask_scores is None:
            return
        if self.mask_init == "constant":
            nn.init.constant_(self.mask_scores, self.mask_scale)
        elif self.mask_init == "uniform":
            nn.init.uniform_(self.mask_scores, -self.mask_scale, self.mask_scale)
        elif self.mask_init == "kaiming":
            nn.init.kaiming_uniform_(self.mask_scores, a=math.sqrt(5))
        else:
            self._start_from_magnitudes()
        for name in self.method.state:
            nn.init.zeros_(self.get_buffer(name))

    @torch.no_grad()
    def _start_from_magnitudes(self) -> None:
        ranks = magnitudes([self])[0].abs().to(self.mask_scores.dtype)
        scores = ranks * (self.mask_scale / ranks.square().mean().sqrt())
        if self.method.threshold_is != "remains":  # 0 is the usual start of these scores
            scores -= scores.mean()
        self.mask_scores.copy_(scores)

    @property
    def group(self) -> "list[MaskedLinear]":
        """The layers that share their scores. The first one holds them."""
        return self._group or [self]

    @property
    def scores(self) -> Tensor | None:
        """The scores that the mask follows from: those of this layer or of another."""
        return self.group[0].mask_scores

    @property
    def source(self) -> Tensor:
        """What the mask follows from: mostly the scores; for magnitude pruning, the weights."""
        return self.method.sources([self.group[0]])[0]

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
        mask = mask if self.is_gate else mask > 0  # a fractional M (l0) acts once
        return self.granularity.expand(mask, self.weight.shape)

    def forward(self, input: Tensor, threshold: float | None = None) -> Tensor:
        if threshold is None and self.in_force is None:
            raise RuntimeError("no mask: use `with masked(model, threshold):`, or threshold=...")
        if not self.is_gate:  # so that pruned weights have a gradient, and can return
            weight = self.weight
        elif threshold is None:
            weight = self._weight_in_force(self.in_force)
        else:
            weight = masked_weights([self], [self._find_mask(threshold)])[0]
        return F.linear(input, weight, self.bias)

    def _weight_in_force(self, current: MaskInForce) -> Tensor:
        keeps, weight = current.keeps(self), current.masked_weight
        if weight is not None and weight.dtype == _computing_dtype(self.weight):
            if keeps or together(weight):  # made for this block, or for this forward
                return weight
        weight = masked_weights([self], [current])[0]
        if keeps:
            current.masked_weight = weight
        return weight

    @torch.compiler.disable(reason=NOT_IN_GRAPHS)  # graphs would be compiled for each threshold
    def _find_mask(self, threshold: float) -> MaskInForce:
        mask = self.method.masks([self.source], threshold, self.training)[0]
        return MaskInForce(mask, threshold, self.training, lasting=False)

    def _forget_masked_weight(self) -> None:
        if self.in_force:
            self.in_force.masked_weight = None

    def train(self, mode: bool = True) -> "MaskedLinear":
        self._forget_masked_weight()
        return super().train(mode)

    def _apply(self, function, recurse: bool = True) -> "MaskedLinear":
        """Scores keep their precision in `half()` and `to(dtype)`: others would change ranks."""
        scores = [x for x in (self.mask_scores, *self.buffers(recurse=False)) if x is not None]
        scores += [x.grad for x in scores]

        def apply(tensor: Tensor) -> Tensor:
            result = function(tensor)
            if any(tensor is x for x in scores) and result.itemsize < tensor.itemsize:
                return tensor.to(result.device)
            return result

        return super()._apply(apply, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget_masked_weight()
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"in_force": None}  # a copy is outside the block

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pruning_method={self.pruning_method}"


def masked_weights(layers: list[MaskedLinear], masks: list[MaskInForce]) -> list[Tensor]:
    """W * M of the layers, in the dtype of the computation: autocast's, if it is on."""
    if is_traced() and layers[0].training:
        raise ValueError("a trace or export keeps its masks for good: call model.eval() first")
    method, sampled = layers[0].method, masks[0].sampled
    granularities = tuple(layer.granularity for layer in layers)
    weights, scores = [layer.weight for layer in layers], [layer.scores for layer in layers]
    found, expanded = [mask.mask for mask in masks], [mask.expanded for mask in masks]
    dtype = _computing_dtype(weights[0])
    if is_traced() or not torch.is_grad_enabled():
        weights = [weight.detach() for weight in weights]
        return multiply(granularities, weights, found, expanded, dtype)
    tensors = *weights, *found, *scores, *expanded
    return MaskedWeights.apply(method, granularities, sampled, dtype, *tensors)


def _computing_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    autocast = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype


def make_masked_weights(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook of an encoder layer: W * M of its matrices in one operation, on a GPU."""
    module.products = []  # made for this forward alone
    layers = [x for x in module.modules() if isinstance(x, MaskedLinear) and x.is_gate]
    masks = [layer.in_force for layer in layers]
    if not all(masks) or not together(layers[0].weight) or masks[0].keeps(layers[0]):
        return
    if module.training and getattr(module, "gradient_checkpointing", False):
        return  # hooks run outside the checkpoint: each matrix is multiplied in its run and rerun
    for mask, weight in zip(masks, masked_weights(layers, masks), strict=True):
        mask.masked_weight = weight
    module.products = masks


def drop_masked_weights(module: nn.Module, args: tuple, output) -> None:
    """A forward hook of an encoder layer: drops what was made for this forward."""
    for mask in module.products:
        mask.masked_weight = None
    module.products = []
