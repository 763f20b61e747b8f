"""Inference that is faster because the model is pruned."""

from ..compact.surgery import compacted
from .sparse import sparse_model, sparsify

__all__ = ["compacted", "sparse_model", "sparsify"]
