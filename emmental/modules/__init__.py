from .binarizer import MagnitudeBinarizer, ThresholdBinarizer, TopKBinarizer
from .masked_nn import MaskedLinear, compute_mask, masked_layers, swap_linears, update_masks

__all__ = [
    "MagnitudeBinarizer",
    "MaskedLinear",
    "ThresholdBinarizer",
    "TopKBinarizer",
    "compute_mask",
    "masked_layers",
    "swap_linears",
    "update_masks",
]
