"""Movement pruning: fine-pruning of BERT with masks over its encoder's linear layers."""

from .configuration_bert_compact import CompactBertConfig
from .configuration_bert_masked import MaskedBertConfig
from .modeling_bert_compact import (
    CompactBertForMultipleChoice,
    CompactBertForQuestionAnswering,
    CompactBertForSequenceClassification,
    CompactBertForTokenClassification,
    CompactBertModel,
)
from .modeling_bert_masked import (
    MaskedBertForMultipleChoice,
    MaskedBertForQuestionAnswering,
    MaskedBertForSequenceClassification,
    MaskedBertForTokenClassification,
    MaskedBertModel,
)
from .modules import MagnitudeBinarizer, MaskedLinear, ThresholdBinarizer, TopKBinarizer

__all__ = [
    "CompactBertConfig",
    "CompactBertForMultipleChoice",
    "CompactBertForQuestionAnswering",
    "CompactBertForSequenceClassification",
    "CompactBertForTokenClassification",
    "CompactBertModel",
    "MagnitudeBinarizer",
    "MaskedBertConfig",
    "MaskedBertForMultipleChoice",
    "MaskedBertForQuestionAnswering",
    "MaskedBertForSequenceClassification",
    "MaskedBertForTokenClassification",
    "MaskedBertModel",
    "MaskedLinear",
    "ThresholdBinarizer",
    "TopKBinarizer",
]
