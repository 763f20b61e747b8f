"""Code tensors close to their entropy: the positions of the kept weights, and their values.

Positions. Fine-pruned masks have empty and crowded rows, columns and heads. Rows and columns are
therefore grouped into classes by how many weights they keep (in half-octaves), which divides a
matrix into blocks. A matrix that gains nothing from this has one block. Within a block every entry
is kept with the same probability, so the gaps between kept weights follow a geometric distribution,
and an arithmetic coder needs close to n * H(density) bits for them. A matrix without zeros has no
positions to store.

Values. At 2 to 8 bits they are quantised uniformly: value = (level - 2^(bits - 1) + 1/2) * step. No
level is zero, so a kept weight never becomes zero. There is one step per matrix or per row. At 16
and 32 bits, values are IEEE floats, coded byte by byte. Levels and bytes are coded with their own
frequencies, except for bytes that are noise, such as the last byte of a float32.

A stream consists of the number of words of the range coder (constriction), these words, and the
bytes that are noise. Decoding needs exactly the distributions of the encoding. Distributions are
therefore computed by additions, products and powers of two alone, which are the same on every
machine.
"""

import math
from dataclasses import dataclass

import numpy as np
from constriction import stream
from scipy.sparse import csr_array

from ..system.errors import UserError, first_line

BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
CHUNK = 2**22  # symbols decoded at a time, which bounds the memory
LEVELS_PER_OCTAVE = 4  # resolution of the stored frequencies
MAX_LEVEL = 30 * LEVELS_PER_OCTAVE
ROOTS = np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])  # 2 ** (n / 4)
# Distribution of the difference between two neighbouring frequency levels.
DIFFERENCES = np.ldexp(1.0, -np.minimum(np.abs(np.arange(-MAX_LEVEL, MAX_LEVEL + 1)) // 2, 20))
MAX_CLASSES = 64
WORTHWHILE = 0.005  # blocks take time to decode, so they must save this share of the position bits
NOISE = 7.95  # a plane of bytes with at least this entropy per byte is stored uncoded
SMALLEST_STEP = np.float32(2.0**-148)  # twice the smallest float32: half of it is not zero
STEP_CANDIDATES = np.linspace(0.1, 1.0, 46)  # as fractions of the step for the largest magnitude


@dataclass
class Coded:
    """A coded tensor: its stream, the number of kept entries, and the entropy in bits.

    position_entropy: for a mask whose entries are kept independently with the matrix's density.
    value_entropy: of the levels (or bytes) at their own frequencies.
    """

    words: np.ndarray
    kept: int
    position_entropy: float
    value_entropy: float


# ------------------------------------------------------------------------------------ symbols


class _Encoder:
    """A range coder that also stores numbers, frequencies and uncoded bytes."""

    def __init__(self):
        self.coder = stream.queue.RangeEncoder()
        self.noise = []

    def words(self) -> np.ndarray:
        coded = self.coder.get_compressed()
        noise = b"".join(self.noise)
        raw = np.frombuffer(noise + bytes(-len(noise) % 4), np.uint32)
        return np.concatenate([np.array([len(coded)], np.uint32), coded, raw])

    def number(self, value: int, bits: int) -> None:
        """Store an unsigned integer of `bits` bits."""
        for shift in range(0, bits, 16):
            size = 2 ** min(16, bits - shift)
            self.coder.encode((value >> shift) % size, stream.model.Uniform(size))

    def symbols(self, symbols: np.ndarray, probabilities: np.ndarray) -> None:
        if len(symbols):
            model = stream.model.Categorical(probabilities, perfect=False)
            self.coder.encode(symbols.astype(np.int32, copy=False), model)

    def alphabet(self, symbols: np.ndarray, size: int) -> None:
        """Store symbols below `size`, preceded by their frequencies."""
        if len(symbols):
            counts = np.bincount(symbols, minlength=size)
            levels = np.round(LEVELS_PER_OCTAVE * np.log2(np.maximum(counts, 1))) + 1
            levels = np.where(counts > 0, levels, 0).astype(np.int32)
            self.symbols(np.diff(levels, prepend=0) + MAX_LEVEL, DIFFERENCES)
            self.symbols(symbols, _frequencies(levels))

    def bytes(self, plane: np.ndarray) -> None:
        """Store bytes with their frequencies, or uncoded where coding saves nothing."""
        if not len(plane):
            return
        is_noise = _symbol_entropy(plane) > NOISE * len(plane)
        self.number(int(is_noise), 1)
        if is_noise:
            self.noise.append(plane.tobytes())
        else:
            self.alphabet(plane, 256)


class _Decoder:
    """The inverse of `_Encoder`. Raises ValueError, IndexError or AssertionError for damage."""

    def __init__(self, words: np.ndarray):
        length = int(words[0])
        self.coder = stream.queue.RangeDecoder(words[1 : 1 + length])
        self.noise = words[1 + length :].view(np.uint8)

    def number(self, bits: int) -> int:
        value = 0
        for shift in range(0, bits, 16):
            size = 2 ** min(16, bits - shift)
            value |= self.coder.decode(stream.model.Uniform(size)) << shift
        return value

    def symbols(self, count: int, probabilities: np.ndarray) -> np.ndarray:
        return self.coder.decode(stream.model.Categorical(probabilities, perfect=False), count)

    def alphabet(self, count: int, size: int) -> np.ndarray:
        if not count:
            return np.zeros(0, np.uint8)
        levels = np.cumsum(self.symbols(size, DIFFERENCES) - MAX_LEVEL)
        frequencies = _frequencies(levels)
        chunks = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
        return np.concatenate([self.symbols(n, frequencies).astype(np.uint8) for n in chunks])

    def bytes(self, count: int) -> np.ndarray:
        if not count or not self.number(1):
            return self.alphabet(count, 256)
        plane, self.noise = self.noise[:count], self.noise[count:]
        return plane


def _frequencies(levels: np.ndarray) -> np.ndarray:
    """Frequencies (not normalised) of levels in quarter octaves. Level 0 means: never occurs."""
    octaves, quarters = np.divmod(levels - 1, LEVELS_PER_OCTAVE)
    return np.where(levels > 0, np.ldexp(ROOTS[quarters], octaves), 0.0)


def _symbol_entropy(symbols: np.ndarray) -> float:
    """Bits of all symbols together at their own frequencies."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


# ------------------------------------------------------------------------------------ positions


def _mask_entropy(ones: np.ndarray | float, sizes: np.ndarray | float) -> float:
    """Bits of masks together, each with so many ones at independent places of so many entries."""
    bits = 0.0
    for count in (ones, sizes - ones):
        bits -= np.sum(count * np.log2(np.maximum(count, 1) / np.maximum(sizes, 1)))
    return float(bits)


def _gap_model(density: np.float32) -> tuple[np.ndarray, int]:
    """Distribution of the number of zeros before a kept weight, and the longest gap L it covers.

    The last symbol stands for L zeros that another gap follows.
    """
    chance = float(density)
    longest = int(min(max(4 / chance, 16), 4096))
    none = np.cumprod(np.full(longest, 1 - chance))  # P(the first 1, 2, ... L entries are zeros)
    return np.concatenate([[chance], chance * none[:-1], none[-1:]]), longest


def _encode_block(encoder: _Encoder, block: np.ndarray) -> None:
    """Store the positions of the ones in a boolean vector, or of the zeros if they are fewer."""
    inverted = 2 * np.count_nonzero(block) > block.size
    places = np.flatnonzero(~block if inverted else block)
    encoder.number(int(inverted), 1)
    encoder.number(len(places), 32)
    if not len(places):
        return
    density = np.float32(len(places) / block.size)
    encoder.number(int(density.view(np.uint32)), 32)
    distribution, longest = _gap_model(density)
    gaps = np.diff(places, prepend=-1) - 1
    skips, rest = np.divmod(gaps, longest)
    symbols = np.full(len(gaps) + int(skips.sum()), longest, np.int32)
    symbols[np.cumsum(skips + 1) - 1] = rest
    encoder.number(len(symbols) - len(places), 32)
    encoder.symbols(symbols, distribution)


def _decode_block(decoder: _Decoder, size: int) -> tuple[np.ndarray, bool]:
    """Ascending positions, and whether they are those of the zeros."""
    inverted = bool(decoder.number(1))
    count = decoder.number(32)
    if not count:
        return np.zeros(0, np.int64), inverted
    density = np.array(decoder.number(32), np.uint32).view(np.float32)[()]
    skips = decoder.number(32)
    if not 0 < density <= 1 or max(count, skips) > size:  # before gigabytes are allocated
        raise ValueError("more positions than entries")
    distribution, longest = _gap_model(density)
    symbols = decoder.symbols(count + skips, distribution)
    ends = symbols < longest
    symbols += ends
    places = np.cumsum(symbols, dtype=np.int64)[ends] - 1
    if places[-1] >= size:
        raise ValueError("positions outside the matrix")
    return places, inverted


def _members(classes: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(classes == c) for c in np.unique(classes)]


def _partition_cost(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """Bits that the positions take with these classes of rows and columns, classes included."""
    by_row = np.array([mask[members].sum(0) for members in _members(rows)], np.float64)
    ones = np.array([by_row[:, members].sum(1) for members in _members(columns)])
    sizes = np.outer(*(np.unique(c, return_counts=True)[1] for c in (columns, rows)))
    cost = _mask_entropy(ones, sizes) + 97.0 * sizes.size  # 97 bits: the numbers of a block
    for classes in (rows, columns):
        if classes.any():
            cost += _symbol_entropy(classes) + 4.0 * MAX_CLASSES
    return cost


def _encode_mask(encoder: _Encoder, mask: np.ndarray) -> None:
    rows = np.round(2 * np.log2(mask.sum(1) + 1)).astype(np.int32)
    columns = np.round(2 * np.log2(mask.sum(0) + 1)).astype(np.int32)
    one_row = np.zeros_like(rows)
    one_column = np.zeros_like(columns)
    choices = [(one_row, one_column), (rows, one_column), (one_row, columns), (rows, columns)]
    costs = [_partition_cost(mask, *choice) for choice in choices]
    best = int(np.argmin(costs))
    rows, columns = choices[best if costs[best] < (1 - WORTHWHILE) * costs[0] else 0]
    for classes in (rows, columns):
        encoder.number(int(classes.any()), 1)
        if classes.any():
            encoder.alphabet(classes, MAX_CLASSES)
    for row_members in _members(rows):
        for column_members in _members(columns):
            _encode_block(encoder, mask[np.ix_(row_members, column_members)].reshape(-1))


def _decode_mask(decoder: _Decoder, shape: tuple[int, int]) -> np.ndarray:
    """Indices of the kept entries in row-major order."""
    rows, columns = (
        decoder.alphabet(count, MAX_CLASSES) if decoder.number(1) else np.zeros(count, np.uint8)
        for count in shape
    )
    mask = np.empty(shape, bool)
    for row_members in _members(rows):
        for column_members in _members(columns):
            block_shape = len(row_members), len(column_members)
            places, inverted = _decode_block(decoder, math.prod(block_shape))
            if block_shape == shape and not inverted:
                return places
            block = np.full(block_shape, inverted)
            block.reshape(-1)[places] = not inverted
            mask[np.ix_(row_members, column_members)] = block
    return np.flatnonzero(mask)


# ------------------------------------------------------------------------------------ values


def _levels(values: np.ndarray, steps: np.ndarray | np.float32, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    return (np.clip(np.floor(values / steps), -half, half - 1) + half).astype(np.int32)


def _dequantise(levels: np.ndarray, bits: int) -> np.ndarray:
    """The float32 values of levels, in units of the step."""
    values = levels.astype(np.float32)
    values += np.float32(0.5 - 2 ** (bits - 1))
    return values


def _halves(values: np.ndarray) -> np.ndarray:
    """Values in half precision, where no value but zero becomes zero."""
    halves = values.astype(np.float16)
    smallest = np.copysign(np.float16(2.0**-24), halves)
    return np.where((halves == 0) & (values != 0), smallest, halves)


def _encode_levels(
    encoder: _Encoder, tensor: np.ndarray, values: np.ndarray, bits: int, by_row: bool
) -> float:
    """Store the steps and the levels of a matrix's non-zero values; return the levels' entropy.

    At 8 bits, the levels reach up to the largest magnitude (of the row, or of the whole). With
    fewer bits, the levels reach up to a fraction of this magnitude, the same fraction for all rows:
    the one with the least squared error.
    """
    if by_row:
        largest = np.abs(tensor).max(1)
        rows = np.nonzero(tensor)[0]
    else:
        largest = np.abs(tensor).max(initial=0.0).reshape(1)
        rows = np.zeros(len(values), np.intp)
    smallest = np.where(largest > 0, SMALLEST_STEP, np.float32(0))
    steps = np.maximum((largest / 2 ** (bits - 1)).astype(np.float32), smallest)
    if bits < 8 and len(values):
        stride = max(1, len(values) // 50_000)
        fraction = _best_fraction(values[::stride], steps[rows[::stride]], bits)
        steps = np.maximum(steps * fraction, smallest)
    if by_row:
        _encode_floats(encoder, steps)
    else:
        encoder.number(int(steps.view(np.uint32)[0]), 32)
    levels = _levels(values, steps[rows], bits)
    encoder.alphabet(levels, 2**bits)
    return _symbol_entropy(levels)


def _best_fraction(values: np.ndarray, steps: np.ndarray, bits: int) -> np.float32:
    values = values.astype(np.float64)

    def error(fraction: float) -> float:
        smaller = np.maximum(steps * np.float32(fraction), SMALLEST_STEP)
        restored = _dequantise(_levels(values, smaller, bits), bits) * smaller
        return float(np.square(values - restored).sum())

    return np.float32(min(STEP_CANDIDATES, key=error))


def _encode_floats(encoder: _Encoder, numbers: np.ndarray) -> float:
    """Store floats byte by byte, and return the entropy of the bytes."""
    planes = numbers.view(np.uint8).reshape(-1, numbers.itemsize).T
    for plane in planes:
        encoder.bytes(plane)
    return sum(map(_symbol_entropy, planes))


def _decode_floats(decoder: _Decoder, count: int, dtype: type) -> np.ndarray:
    raw = np.empty((count, np.dtype(dtype).itemsize), np.uint8)
    for plane in raw.T:
        plane[:] = decoder.bytes(count)
    return raw.view(dtype).reshape(-1).astype(np.float32, copy=False)


# ------------------------------------------------------------------------------------ tensors


def _precision(shape: tuple[int, ...], bits: int) -> int:
    """Bits at which a tensor is stored. Vectors (bias, LayerNorm) get at least 16."""
    return bits if len(shape) == 2 else max(bits, 16)


def encode(tensor: np.ndarray, bits: int, by_row: bool = False) -> Coded:
    """Code a float32 vector or matrix at one of `BITS`; with `by_row`, each row has its own step.

    Vectors get at least 16 bits. Raises UserError for values that are not finite or too large for
    the precision.
    """
    if not np.isfinite(tensor).all():
        raise UserError("it holds values that are not finite")
    bits = _precision(tensor.shape, bits)
    if bits == 16 and np.abs(tensor).max(initial=0.0) > np.finfo(np.float16).max:
        raise UserError("it holds values too large for half precision: use --bits 32")
    encoder = _Encoder()
    values = tensor.reshape(-1)
    position_entropy = 0.0
    if tensor.ndim == 2:
        mask = tensor != 0
        values = tensor[mask]
        position_entropy = _mask_entropy(len(values), mask.size)
        encoder.number(int(len(values) < mask.size), 1)
        if len(values) < mask.size:
            _encode_mask(encoder, mask)
    if bits == 32:
        value_entropy = _encode_floats(encoder, np.ascontiguousarray(values))
    elif bits == 16:
        value_entropy = _encode_floats(encoder, _halves(values))
    else:
        value_entropy = _encode_levels(encoder, tensor, values, bits, by_row)
    return Coded(encoder.words(), len(values), position_entropy, value_entropy)


def decode(
    words: np.ndarray, shape: tuple[int, ...], bits: int, by_row: bool = False, csr: bool = False
) -> np.ndarray | csr_array:
    """The float32 tensor that `encode` was given, at its precision; if `csr`, a sparse matrix.

    Raises UserError for a stream that does not fit the shape.
    """
    try:
        indices, values = _decode_parts(words, shape, _precision(shape, bits), by_row)
    except (ArithmeticError, AssertionError, LookupError, ValueError) as error:
        raise UserError(f"its stream does not decode ({first_line(error)})") from error
    if not np.isfinite(values).all():
        raise UserError("it holds values that are not finite")
    if indices is None:
        return csr_array(values.reshape(shape)) if csr else values.reshape(shape)
    if csr:
        return csr_array((values, np.divmod(indices, shape[1])), shape)
    tensor = np.zeros(math.prod(shape), np.float32)
    tensor[indices] = values
    return tensor.reshape(shape)


def _decode_parts(
    words: np.ndarray, shape: tuple[int, ...], bits: int, by_row: bool
) -> tuple[np.ndarray | None, np.ndarray]:
    """The indices of the kept entries in row-major order (None: all entries) and their values."""
    decoder = _Decoder(words)
    indices = None
    count = math.prod(shape)
    if len(shape) == 2 and decoder.number(1):
        indices = _decode_mask(decoder, shape)
        count = len(indices)
    if bits > 8:
        return indices, _decode_floats(decoder, count, np.float16 if bits == 16 else np.float32)
    if by_row:
        steps = _decode_floats(decoder, shape[0], np.float32)
    else:
        steps = np.array([decoder.number(32)], np.uint32).view(np.float32)
    values = _dequantise(decoder.alphabet(count, 2**bits), bits)
    if by_row and indices is not None:
        values *= np.repeat(steps, np.bincount(indices // shape[1], minlength=shape[0]))
    else:
        values.reshape(len(steps), -1)[...] *= steps[:, None]
    return indices, values
