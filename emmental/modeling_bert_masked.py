"""The published place of the masked BERT, which `modeling_masked` makes."""

from .modeling_masked import (
    MaskedBertForMultipleChoice,
    MaskedBertForQuestionAnswering,
    MaskedBertForSequenceClassification,
    MaskedBertForTokenClassification,
    MaskedBertModel,
)

__all__ = [
    "MaskedBertForMultipleChoice",
    "MaskedBertForQuestionAnswering",
    "MaskedBertForSequenceClassification",
    "MaskedBertForTokenClassification",
    "MaskedBertModel",
]
