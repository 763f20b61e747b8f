"""The two ways to compute a sparse BERT on a CPU: kernels of our own (kernels.cpp), and torch's CSR product.

A backend keeps the activations of one forward feature-major in a layout of its own:
- `Native`: [tiles][features][T], tiles of T tokens (see kernels.cpp). Built at first use with the C++ compiler of
  the machine ($CXX, c++, g++ or clang++) and kept in the cache folder.
- `Library`: [features][tokens]; nothing to build. The same results, to float32 rounding.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..errors import UserError
from .compaction import Affine

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
BUILD_SECONDS = 120
MOST_COLUMNS = 2**16  # of a sparse matrix: its column indices have 16 bits
LANES = 16


@dataclass
class Matrix:
    """An affine map as a backend computes it: `weight` (rows x columns) dense or CSR, `bias` (rows), float32 tensors.

    CSR has `starts` (int32, rows + 1), `indices` and `values`, and `weight` as torch's CSR tensor for `Library`.
    """

    rows: int
    columns: int
    bias: Tensor
    values: Tensor
    starts: Tensor | None = None
    indices: Tensor | None = None
    weight: Tensor | None = None

    @property
    def multiply_adds(self) -> int:
        """Per token."""
        return self.values.numel()


class _Matrix(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int64), ("columns", ctypes.c_int64)] + [
        (name, ctypes.c_void_p) for name in ("starts", "indices", "values", "bias")
    ]


def cache_folder() -> Path:
    """Where builds and measurements are kept. Raises OSError when there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emmental"
    except RuntimeError as error:
        raise OSError(f"there is no home folder ({error})") from error


# ------------------------------------------------------------------------------------------- the build


@functools.cache
def load_native() -> ctypes.CDLL:
    """The native kernels, built if this machine has not done so yet. Raises UserError."""
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None
    )
    if not compiler:
        raise UserError("there is no C++ compiler (c++, g++, clang++ or $CXX)")
    target = _run(
        [compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull]
    )  # names compiler and processor
    key = hashlib.blake2b(
        "\0".join([SOURCE.read_text(), *FLAGS, target]).encode(), digest_size=12
    ).hexdigest()
    name = f"kernels-{key}.so"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / name
        if not library.exists():
            _build(compiler, library)
        return _open(library)
    except OSError as error:  # no home, or one that cannot be written or executed
        try:
            with tempfile.TemporaryDirectory() as aside:
                _build(compiler, Path(aside) / name)
                return _open(Path(aside) / name)
        except OSError:
            raise UserError(f"the kernels cannot be loaded: {error}") from error


def _build(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as aside:
        fresh = Path(aside) / library.name
        _run([compiler, *FLAGS, str(SOURCE), "-o", str(fresh)])
        os.replace(fresh, library)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_SECONDS, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        reason = next(
            (line for line in done.stderr.splitlines() if "error" in line),
            f"status {done.returncode}",
        )
        raise UserError(f"{command[0]} failed: {reason}")
    return done.stderr


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, long, integer, double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    library.product.argtypes = [
        ctypes.POINTER(_Matrix),
        pointer,
        pointer,
        pointer,
        long,
        long,
        integer,
        integer,
    ]
    library.layer_norm.argtypes = [pointer, pointer, pointer, double, long, long, long, integer]
    library.attention.argtypes = [
        pointer,
        pointer,
        long,
        pointer,
        pointer,
        long,
        long,
        pointer,
        double,
        long,
        integer,
    ]
    for function in (library.product, library.layer_norm, library.attention):
        function.restype = None
    return library


# ------------------------------------------------------------------------------------------- backends


_memory = threading.local()


def _buffer(name: str, *shape: int) -> Tensor:
    """Memory that a thread keeps under this name from call to call: fresh pages cost as much as a sparse product."""
    size = math.prod(shape)
    memory = getattr(_memory, name, None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = torch.empty(size)
        setattr(_memory, name, memory)
    return memory[:size].view(shape)


class Native:
    """One forward of `batch` sequences of `length` tokens with the native kernels."""

    name = "native"

    def __init__(self, batch: int, length: int):
        self.batch, self.length, self.tokens = batch, length, batch * length
        # Tiles of 32 tokens are a fifth faster, unless they are half empty.
        self.width = min(
            (2 * LANES, LANES),
            key=lambda width: self._tiles(width) * width * (1.2 if width == LANES else 1),
        )
        self.tiles = self._tiles(self.width)
        self.library, self.threads = load_native(), torch.get_num_threads()

    def _tiles(self, width: int) -> int:
        return -(-self.tokens // width)

    @staticmethod
    def prepare(affine: Affine, sparse: bool) -> Matrix:
        weight = affine.weight
        bias = torch.from_numpy(np.array(affine.bias))
        if not sparse:
            return Matrix(*weight.shape, bias, torch.from_numpy(weight.toarray()))
        if weight.shape[1] > MOST_COLUMNS:
            raise ValueError(
                f"a sparse matrix has {MOST_COLUMNS:,} columns at most, not {weight.shape[1]:,}"
            )
        # Unsigned 16 bits in a signed tensor, as torch cannot pickle the unsigned ones.
        parts = (weight.indptr.astype(np.int32), weight.indices.astype(np.uint16).view(np.int16))
        starts, indices = map(torch.from_numpy, parts)
        return Matrix(*weight.shape, bias, torch.from_numpy(np.array(weight.data)), starts, indices)

    def enter(self, hidden: Tensor) -> Tensor:
        """[batch, length, features] to the layout of this backend."""
        rows = F.pad(
            hidden.reshape(self.tokens, -1), (0, 0, 0, self.tiles * self.width - self.tokens)
        )
        tiles = rows.view(self.tiles, self.width, -1).transpose(1, 2)
        return _buffer("states", *tiles.shape).copy_(tiles)

    def leave(self, x: Tensor) -> Tensor:
        """The way back."""
        rows = x.transpose(1, 2).reshape(self.tiles * self.width, -1)
        return rows[: self.tokens].reshape(self.batch, self.length, -1)

    def product(
        self,
        matrix: Matrix,
        x: Tensor,
        into: str,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """activation(W x + b + residual), in the memory named `into`, which neither x nor residual may be in."""
        y = _buffer(into, self.tiles, matrix.rows, self.width)
        parts = (matrix.starts, matrix.indices, matrix.values, matrix.bias)
        raw = _Matrix(
            matrix.rows,
            matrix.columns,
            *(part.data_ptr() if part is not None else None for part in parts),
        )
        fused = activation == "gelu"
        self.library.product(raw, x.data_ptr(), residual.data_ptr() if residual is not None else None, y.data_ptr(),
                             self.tiles, self.width, fused, self.threads)  # fmt: skip
        return ACT2FN[activation](y) if activation and not fused else y

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """LayerNorm over the features, in place."""
        self.library.layer_norm(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), epsilon,
                                x.shape[1], self.tiles, self.width, self.threads)  # fmt: skip
        return x

    def attention(
        self, qkv: Tensor, sizes: Tensor, sizes_v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """The heads' outputs, head by head; sizes, sizes_v: int32 (heads). mask: bool [batch, length] or None."""
        out = _buffer("context", self.tiles, int(sizes_v.sum()), self.width)
        self.library.attention(qkv.data_ptr(), out.data_ptr(), len(sizes), sizes.data_ptr(), sizes_v.data_ptr(), self.batch,
                               self.length, mask.data_ptr() if mask is not None else None, scale, self.width, self.threads)  # fmt: skip
        return out


class Library:
    """One forward of `batch` sequences of `length` tokens with torch's own products."""

    name = "library"

    def __init__(self, batch: int, length: int):
        self.batch, self.length = batch, length

    @staticmethod
    def prepare(affine: Affine, sparse: bool) -> Matrix:
        matrix = Native.prepare(affine, sparse)
        if not sparse:
            matrix.weight = matrix.values
        else:  # 32-bit indices: with others MKL would convert at every product
            matrix.indices = torch.from_numpy(affine.weight.indices.astype(np.int32))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                matrix.weight = torch.sparse_csr_tensor(
                    matrix.starts,
                    matrix.indices,
                    matrix.values,
                    (matrix.rows, matrix.columns),
                    check_invariants=True,
                )
        return matrix

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(self.batch * self.length, -1).t().contiguous()

    def leave(self, x: Tensor) -> Tensor:
        return x.t().reshape(self.batch, self.length, -1)

    def product(
        self,
        matrix: Matrix,
        x: Tensor,
        into: str,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        bias = matrix.bias[:, None]
        y = (
            bias.expand(-1, x.shape[1])
            if matrix.columns == 0
            else torch.addmm(bias, matrix.weight, x)
        )
        y = y if residual is None else y + residual
        return ACT2FN[activation](y) if activation else y

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        return F.layer_norm(x.t(), weight.shape, weight, bias, epsilon).t().contiguous()

    def attention(
        self, qkv: Tensor, sizes: Tensor, sizes_v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        q, k, v = qkv.split([int(sizes.sum()), int(sizes.sum()), int(sizes_v.sum())])
        mask = None if mask is None else mask[:, None, None, :]
        outputs, row, row_v = [], 0, 0
        for (size, size_v), group in groupby(zip(sizes.tolist(), sizes_v.tolist(), strict=True)):
            heads = len(list(group))
            parts = (
                q[row : row + heads * size],
                k[row : row + heads * size],
                v[row_v : row_v + heads * size_v],
            )
            q_, k_, v_ = (
                part.view(heads, -1, self.batch, self.length).permute(2, 0, 3, 1) for part in parts
            )
            out = F.scaled_dot_product_attention(
                q_, k_, v_, mask, scale=scale
            )  # [batch, heads, length, size_v]
            outputs.append(out.permute(1, 3, 0, 2).reshape(heads * size_v, -1))
            row, row_v = row + heads * size, row_v + heads * size_v
        return torch.cat(outputs)


BACKENDS = {backend.name: backend for backend in (Native, Library)}
