from .binarizer import MagnitudeBinarizer, ThresholdBinarizer, TopKBinarizer
from .masked_nn import MaskedLinear, compute_mask
from .masks import count, find_masks, masked, masked_layers
from .observation import observe_scores
from .swap import swap_linears

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
    "observe_scores",
    "swap_linears",
]
