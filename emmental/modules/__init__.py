from .binarizer import MagnitudeBinarizer, ThresholdBinarizer, TopKBinarizer
from .masked_nn import MaskedLinear, compute_mask, swap_linears
from .masks import count, find_masks, masked, masked_layers

__all__ = [
    "MagnitudeBinarizer",
    "MaskedLinear",
    "ThresholdBinarizer",
    "TopKBinarizer",
    "compute_mask",
    "count",
    "find_masks",
    "masked",
    "masked_layers",
    "swap_linears",
]
