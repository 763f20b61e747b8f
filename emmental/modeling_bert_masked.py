"""The published place of the masked BERT, which `models/masked.py` makes."""

from .models.masked import (
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
