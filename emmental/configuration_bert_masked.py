"""The published place of `MaskedBertConfig`, which `models/masked.py` makes."""

from .models.masked import MaskedBertConfig

__all__ = ["MaskedBertConfig"]
