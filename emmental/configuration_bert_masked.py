"""The published place of `MaskedBertConfig`, which `modeling_masked` makes."""

from .modeling_masked import MaskedBertConfig

__all__ = ["MaskedBertConfig"]
