"""Movement pruning: fine-pruning of encoders with masks over their linear layers.

The masked classes of all families are here under their names: `MaskedBertForQuestionAnswering`,
`MaskedRobertaForSequenceClassification`, and so on.
"""

from .compact.configuration import CompactBertConfig
from .compact.modeling import (
    CompactBertForMultipleChoice,
    CompactBertForQuestionAnswering,
    CompactBertForSequenceClassification,
    CompactBertForTokenClassification,
    CompactBertModel,
)
from .models.masked import CLASSES
from .modules import MagnitudeBinarizer, MaskedLinear, ThresholdBinarizer, TopKBinarizer

__all__ = [
    "CompactBertConfig",
    "CompactBertForMultipleChoice",
    "CompactBertForQuestionAnswering",
    "CompactBertForSequenceClassification",
    "CompactBertForTokenClassification",
    "CompactBertModel",
    "MagnitudeBinarizer",
    "MaskedLinear",
    "ThresholdBinarizer",
    "TopKBinarizer",
    *CLASSES,
]
globals().update(CLASSES)
