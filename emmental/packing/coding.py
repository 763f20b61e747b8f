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
bytes that are noise. It decodes only with exactly the distributions that it was coded with. These
are therefore computed by additions, products and powers of two alone, which are the same on every
machine.
"""

import math
from dataclasses import dataclass

import constriction
import numpy as np

from ..system.errors import UserError, first_line

Categorical = constriction.stream.model.Categorical
Uniform = constriction.stream.model.Uniform
RangeEncoder = constriction.stream.queue.RangeEncoder
RangeDecoder = constriction.stream.queue.RangeDecoder

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
        self.coder, self.noise = RangeEncoder(), []

    def words(self) -> np.ndarray:
        coded = self.coder.get_compressed()
        noise = b"".join(self.noise)
        raw = np.frombuffer(noise + bytes(-len(noise) % 4), np.uint32)
        return np.concatenate([np.array([len(coded)], np.uint32), coded, raw])

    def number(self, value: int, bits: int) -> None:
        """Store an unsigned integer of `bits` bits."""
        for shift in range(0, bits, 16):
            size = 2 ** min(16, bits - shift)
            self.coder.encode(np.array([(value >> shift) % size], np.int32), Uniform(size))

    def symbols(self, symbols: np.ndarray, probabilities: np.ndarray) -> None:
        if len(symbols):
            model = Categorical(probabilities, perfect=False)
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
        self.coder = RangeDecoder(words[1 : 1 + length])
        self.noise = words[1 + length :].view(np.uint8)

    def number(self, bits: int) -> int:
        value = 0
        for shift in range(0, bits, 16):
            size = 2 ** min(16, bits - shift)
            value |= int(self.coder.decode(Uniform(size), 1)[0]) << shift
        return value

    def symbols(self, count: int, probabilities: np.ndarray) -> np.ndarray:
        return self.coder.decode(Categorical(probabilities, perfect=False), count)

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


def entropy_bits(kept: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Entropy of masks with `kept` of `sizes` entries, each entry kept independently, in bits."""
    kept, sizes = np.asarray(kept, np.float64), np.asarray(sizes, np.float64)
    bits = np.zeros(np.broadcast(kept, sizes).shape)
    for part in (kept, sizes - kept):
        bits -= part * np.log2(np.maximum(part, 1) / np.maximum(sizes, 1))
    return bits


def _gap_model(density: np.float32) -> tuple[np.ndarray, int]:
    """Distribution of the number of zeros before a kept weight, and the longest gap L it covers.

    The last symbol stands for L zeros that another gap follows.
    """
    chance = float(density)
    longest = int(min(max(4 / chance, 16), 4096))
    none = np.cumprod(np.full(longest, 1 - chance))  # P(the first 1, 2, ... L entries are zeros)
    return np.concatenate([[chance], chance * none[:-1], none[-1:]]), longest


def _encode_block(encoder: _Encoder, block: np.ndarray) -> None:
    """Store the positions of the kept entries of a boolean vector, or of the zeros if fewer."""
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
    inverted, count = bool(decoder.number(1)), decoder.number(32)
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
    row_of, column_of = (np.unique(classes, return_inverse=True)[1] for classes in (rows, columns))
    row_blocks, column_blocks = (
        np.eye(index.max() + 1, dtype=np.float32)[index] for index in (row_of, column_of)
    )
    kept = np.rint(row_blocks.T @ mask.astype(np.float32) @ column_blocks)
    sizes = np.outer(np.bincount(row_of), np.bincount(column_of))
    cost = entropy_bits(kept, sizes).sum() + 97.0 * kept.size  # 97 bits: the numbers of a block
    for classes in (rows, columns):
        if classes.any():
            cost += _symbol_entropy(classes) + 4.0 * MAX_CLASSES
    return float(cost)


def _encode_mask(encoder: _Encoder, mask: np.ndarray) -> None:
    rows, columns = (np.round(2 * np.log2(mask.sum(axis) + 1)).astype(np.int32) for axis in (1, 0))
    no_rows, no_columns = np.zeros_like(rows), np.zeros_like(columns)
    whole = no_rows, no_columns
    choices = [whole, (rows, no_columns), (no_rows, columns), (rows, columns)]
    costs = [_partition_cost(mask, *choice) for choice in choices]
    best = int(np.argmin(costs))
    rows, columns = choices[best] if costs[best] < (1 - WORTHWHILE) * costs[0] else whole
    for classes in (rows, columns):
        encoder.number(int(classes.any()), 1)
        if classes.any():
            encoder.alphabet(classes, MAX_CLASSES)
    for row_members in _members(rows):
        block_rows = mask[row_members]
        for column_members in _members(columns):
            all_columns = len(column_members) == mask.shape[1]
            block = block_rows if all_columns else block_rows[:, column_members]
            _encode_block(encoder, block.reshape(-1))


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


def _steps(tensor: np.ndarray, bits: int, by_row: bool) -> tuple[np.ndarray, np.ndarray]:
    """The step of each group of entries (a row, or the whole), and the group of each non-zero.

    At 8 bits the levels reach up to the largest magnitude of the group. With fewer bits they reach
    up to a fraction of it: the fraction with the least squared error, the same for all groups.
    """
    magnitudes, values = np.abs(tensor), tensor[tensor != 0]
    if by_row:
        largest, groups = magnitudes.max(1), np.nonzero(tensor)[0]
    else:
        largest, groups = magnitudes.max(initial=0.0).reshape(1), np.zeros(len(values), np.intp)
    # The smallest step is twice the smallest float32, so that half a step is not zero.
    smallest = np.where(largest > 0, np.float32(2.0**-148), np.float32(0))
    steps = np.maximum((largest / 2 ** (bits - 1)).astype(np.float32), smallest)
    if bits >= 8 or not len(values):
        return steps, groups
    stride = max(1, len(values) // 50_000)
    sample, sampled = values[::stride].astype(np.float64), steps[groups[::stride]]

    def error(fraction: float) -> float:
        tried = sampled * np.float32(fraction)
        restored = _dequantise(_levels(sample, tried, bits), bits) * tried
        return float(np.square(sample - restored).sum())

    fraction = np.float32(min(STEP_CANDIDATES, key=error))
    return np.maximum(steps * fraction, smallest), groups


def _levels(values: np.ndarray, steps: np.ndarray | np.float32, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.floor(np.nan_to_num(values / steps, nan=0.0, posinf=half, neginf=-half))
    return (np.clip(levels, -half, half - 1) + half).astype(np.int32)


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


def precision(shape: tuple[int, ...], bits: int) -> int:
    """Bits at which a tensor is stored. Vectors (bias, LayerNorm) get at least 16."""
    return bits if len(shape) == 2 else max(bits, 16)


def encode(tensor: np.ndarray, bits: int, by_row: bool = False) -> Coded:
    """Code a float32 vector or matrix at one of `BITS`; with `by_row`, each row has its own step.

    Vectors get at least 16 bits. Raises UserError for values that are not finite or too large for
    the precision.
    """
    if not np.isfinite(tensor).all():
        raise UserError("it holds values that are not finite")
    bits = precision(tensor.shape, bits)
    if bits == 16 and np.abs(tensor).max(initial=0.0) > np.finfo(np.float16).max:
        raise UserError("it holds values too large for half precision: use --bits 32")
    encoder, position_entropy = _Encoder(), 0.0
    values = np.ascontiguousarray(tensor, np.float32).reshape(-1)
    kept = values.size
    if tensor.ndim == 2:
        mask = tensor != 0
        kept = int(np.count_nonzero(mask))
        encoder.number(int(kept < mask.size), 1)
        if kept < mask.size:
            _encode_mask(encoder, mask)
            position_entropy = float(entropy_bits(kept, mask.size))
            values = values[np.flatnonzero(mask)]
    if bits > 8:
        value_entropy = _encode_floats(encoder, values if bits == 32 else _halves(values))
    else:
        steps, groups = _steps(tensor, bits, by_row)
        if by_row:
            _encode_floats(encoder, steps)
        else:
            encoder.number(int(steps.view(np.uint32)[0]), 32)
        levels = _levels(values, steps[groups], bits)
        encoder.alphabet(levels, 2**bits)
        value_entropy = _symbol_entropy(levels)
    return Coded(encoder.words(), kept, position_entropy, value_entropy)


def error_bound(tensor: np.ndarray, bits: int, by_row: bool = False) -> np.ndarray:
    """The largest difference that `encode` may make to each entry: 0 for the zeros of a matrix."""
    bits = precision(tensor.shape, bits)
    magnitudes = np.abs(tensor).astype(np.float64)
    if bits == 32:
        return np.zeros(tensor.shape)
    if bits == 16:
        return np.maximum(magnitudes * 2.0**-11, (magnitudes > 0) * 2.0**-24)
    kept, half = magnitudes > 0, 2 ** (bits - 1)
    steps, groups = _steps(tensor, bits, by_row)
    steps = steps.astype(np.float64)[groups]
    clipped = magnitudes[kept] - (half - 0.5) * steps
    bound = np.zeros(tensor.shape)
    bound[kept] = np.maximum(steps / 2, clipped) * (1 + 1e-4) + 2.0**-147  # and rounding
    return bound


def decode_sparse(
    words: np.ndarray, shape: tuple[int, ...], bits: int, by_row: bool = False
) -> tuple[np.ndarray | None, np.ndarray]:
    """The indices of the kept entries in row-major order (None: all entries) and their values.

    Raises UserError for a stream that does not fit the shape.
    """
    try:
        indices, values = _decode_parts(words, shape, precision(shape, bits), by_row)
    except (ArithmeticError, AssertionError, LookupError, ValueError) as error:
        raise UserError(f"its stream does not decode ({first_line(error)})") from error
    if not np.isfinite(values).all():
        raise UserError("it holds values that are not finite")
    return indices, values


def _decode_parts(
    words: np.ndarray, shape: tuple[int, ...], bits: int, by_row: bool
) -> tuple[np.ndarray | None, np.ndarray]:
    decoder, indices, count = _Decoder(words), None, math.prod(shape)
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
    if not by_row:
        values *= steps
    elif indices is None:
        values.reshape(shape)[...] *= steps[:, None]
    else:
        ends = np.searchsorted(indices, np.arange(1, shape[0] + 1) * shape[1])
        values *= np.repeat(steps, np.diff(ends, prepend=0))
    return indices, values


def decode(
    words: np.ndarray, shape: tuple[int, ...], bits: int, by_row: bool = False
) -> np.ndarray:
    """The float32 tensor that `encode` was given, at its precision. Raises UserError."""
    indices, values = decode_sparse(words, shape, bits, by_row)
    if indices is None:
        return values.reshape(shape)
    tensor = np.zeros(math.prod(shape), np.float32)
    tensor[indices] = values
    return tensor.reshape(shape)
