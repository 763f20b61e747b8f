"""Two backends for a sparse model on a CPU: our own kernels (kernels.cpp), and torch's CSR product.

A backend keeps the activations of one forward feature-major, in its own layout:
- `Native`: [tiles][features][T], tiles of T tokens. kernels.cpp is compiled at first use with the
  C++ compiler of the machine ($CXX, c++, g++ or clang++) and kept in the cache folder.
- `Library`: [features][tokens]. Nothing is compiled; results are the same up to float32 rounding.
"""

import math
import threading
import warnings
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..compact.algebra import Affine
from .build import CMatrix, load_native

MOST_COLUMNS = 2**16  # column indices have 16 bits
LANES = 16


@dataclass
class Matrix:
    """A map x -> W x + b, prepared for a backend: W (rows x columns), `bias` (rows), float32.

    values: the entries of W; all of them, or those of CSR with `starts` (int32, rows + 1) and
    `indices`. weight: W as a tensor of torch, dense or CSR, for `Library`.
    """

    rows: int
    columns: int
    bias: Tensor
    values: Tensor
    starts: Tensor | None = None
    indices: Tensor | None = None
    weight: Tensor | None = None


_memory = threading.local()


def _buffer(name: str, *shape: int) -> Tensor:
    """Memory that a thread keeps under this name between calls.

    Fresh memory pages would cost as much time as a sparse product.
    """
    size = math.prod(shape)
    memory = getattr(_memory, name, None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = torch.empty(size)
        setattr(_memory, name, memory)
    return memory[:size].view(shape)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Native:
    """One forward of `batch` sequences of `length` tokens with the native kernels."""

    name = "native"

    def __init__(self, batch: int, length: int):
        self.batch, self.length = batch, length
        self.tokens = batch * length
        tiles = {width: math.ceil(self.tokens / width) for width in (LANES, 2 * LANES)}
        # Tiles of 32 tokens are a fifth faster, unless they are half empty.
        self.width = 2 * LANES if 2 * tiles[2 * LANES] <= 1.2 * tiles[LANES] else LANES
        self.tiles = tiles[self.width]
        self.library = load_native()
        self.threads = torch.get_num_threads()

    @staticmethod
    def prepare(affine: Affine, sparse: bool) -> Matrix:
        """The matrix of `affine`, in CSR if `sparse`."""
        weight = affine.weight
        bias = torch.from_numpy(np.array(affine.bias))
        if not sparse:
            return Matrix(*weight.shape, bias, torch.from_numpy(weight.toarray()))
        if weight.shape[1] > MOST_COLUMNS:
            raise ValueError(
                f"a sparse matrix has at most {MOST_COLUMNS:,} columns, not {weight.shape[1]:,}"
            )
        starts = torch.from_numpy(weight.indptr.astype(np.int32))
        # Unsigned 16 bits in a signed tensor, because torch cannot pickle unsigned ones.
        indices = torch.from_numpy(weight.indices.astype(np.uint16).view(np.int16))
        values = torch.from_numpy(np.array(weight.data))
        return Matrix(*weight.shape, bias, values, starts, indices)

    def enter(self, hidden: Tensor) -> Tensor:
        """Convert [batch, length, features] to the layout of this backend."""
        padding = self.tiles * self.width - self.tokens
        rows = F.pad(hidden.reshape(self.tokens, -1), (0, 0, 0, padding))
        tiles = rows.view(self.tiles, self.width, -1).transpose(1, 2)
        return _buffer("states", *tiles.shape).copy_(tiles)

    def leave(self, x: Tensor) -> Tensor:
        """Convert back to [batch, length, features]."""
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
        """activation(W x + b + residual), in the buffer `into`; x and residual are in others."""
        y = _buffer(into, self.tiles, matrix.rows, self.width)
        parts = (matrix.starts, matrix.indices, matrix.values, matrix.bias)
        raw = CMatrix(matrix.rows, matrix.columns, *map(_pointer, parts))
        fused = activation == "gelu"
        tensors = map(_pointer, (x, residual, y))
        self.library.product(raw, *tensors, self.tiles, self.width, fused, self.threads)
        return ACT2FN[activation](y) if activation and not fused else y

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """LayerNorm over the features, in place."""
        tensors = map(_pointer, (x, weight, bias))
        features = x.shape[1]
        self.library.layer_norm(*tensors, epsilon, features, self.tiles, self.width, self.threads)
        return x

    def attention(
        self, qkv: Tensor, sizes: Tensor, sizes_v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """The outputs of all heads. sizes, sizes_v: int32 [heads]. mask: bool [batch, length]."""
        out = _buffer("context", self.tiles, int(sizes_v.sum()), self.width)
        self.library.attention(
            qkv.data_ptr(),
            out.data_ptr(),
            len(sizes),
            sizes.data_ptr(),
            sizes_v.data_ptr(),
            self.batch,
            self.length,
            _pointer(mask),
            scale,
            self.width,
            self.threads,
        )
        return out


class Library:
    """One forward of `batch` sequences of `length` tokens with torch's own products.

    The methods are those of `Native`.
    """

    name = "library"

    def __init__(self, batch: int, length: int):
        self.batch, self.length = batch, length

    @staticmethod
    def prepare(affine: Affine, sparse: bool) -> Matrix:
        matrix = Native.prepare(affine, sparse)
        matrix.weight = matrix.values
        if sparse:  # 32-bit indices: MKL would convert others at every product
            matrix.indices = torch.from_numpy(affine.weight.indices.astype(np.int32))
            parts = matrix.starts, matrix.indices, matrix.values
            shape = matrix.rows, matrix.columns
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                matrix.weight = torch.sparse_csr_tensor(*parts, shape, check_invariants=False)
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
        y = matrix.bias[:, None].expand(-1, x.shape[1])
        if matrix.columns:
            y = torch.addmm(matrix.bias[:, None], matrix.weight, x)
        if residual is not None:
            y = y + residual
        return ACT2FN[activation](y) if activation else y

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        return F.layer_norm(x.t(), weight.shape, weight, bias, epsilon).t().contiguous()

    def attention(
        self, qkv: Tensor, sizes: Tensor, sizes_v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        q, k, v = qkv.split([int(sizes.sum()), int(sizes.sum()), int(sizes_v.sum())])
        if mask is not None:
            mask = mask[:, None, None, :]
        outputs = []
        row = row_v = 0
        # Neighbouring heads of the same sizes are computed together.
        for (size, size_v), group in groupby(zip(sizes.tolist(), sizes_v.tolist(), strict=True)):
            heads = len(list(group))
            end = row + heads * size
            end_v = row_v + heads * size_v
            parts = (
                part.view(heads, -1, self.batch, self.length).permute(2, 0, 3, 1)
                for part in (q[row:end], k[row:end], v[row_v:end_v])
            )
            out = F.scaled_dot_product_attention(*parts, mask, scale=scale)
            outputs.append(out.permute(1, 3, 0, 2).reshape(heads * size_v, -1))
            row, row_v = end, end_v
        return torch.cat(outputs)


BACKENDS = {backend.name: backend for backend in (Native, Library)}
