"""Movement pruning: fine-pruning of encoders with masks over their linear layers.

The masked and compact classes of all families are here under their names:
`MaskedBertForQuestionAnswering`, `CompactRobertaForSequenceClassification`, and so on.
"""

from .compact.classes import CLASSES as COMPACT_CLASSES
from .models.masked import CLASSES as MASKED_CLASSES
from .modules import MagnitudeBinarizer, MaskedLinear, ThresholdBinarizer, TopKBinarizer

__all__ = [
    "MagnitudeBinarizer",
    "MaskedLinear",
    "ThresholdBinarizer",
    "TopKBinarizer",
    *COMPACT_CLASSES,
    *MASKED_CLASSES,
]
globals().update(COMPACT_CLASSES | MASKED_CLASSES)
