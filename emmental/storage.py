"""The published path of packed files, which `emmental.packing` writes and reads."""

from .packing.format import Packed, open_packed
from .packing.pack import compare, load_packed, load_plain, pack, summary, unpack

__all__ = [
    "Packed",
    "compare",
    "load_packed",
    "load_plain",
    "open_packed",
    "pack",
    "summary",
    "unpack",
]
