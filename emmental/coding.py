"""Sparse matrices close to their entropy: where the kept weights are, and what they are.

Positions. A mask is a field of independent coin flips whose probability is that of the block an entry lies in.
Blocks are made by sorting rows and columns into classes by how many weights they keep (half-octaves), as
fine-pruned masks have empty and crowded rows, columns and heads; a matrix for which that does not pay has one
block. Within a block the gaps between kept weights are geometric, and an arithmetic coder spends on them what
the coin flips are worth: n * H(density) bits. A matrix without a zero has no positions.

Values. Of 2 to 8 bits: uniform steps around zero, value = (level - 2^(bits - 1) + 1/2) * step, so that no level
is zero and a kept weight stays kept, whatever it rounds to. One step per matrix, or per row: at 8 bits
that of the largest absolute value, below the one with the least squared error. Of 16 or 32 bits: IEEE
floats, byte by byte (a value that half precision would round to zero becomes its smallest number). Levels
and bytes are coded with their own frequencies, but for bytes that are noise, as the last of a float32 are.

A stream is the number of the range coder's words, those words (constriction; side information included), and the
bytes that are noise, as they are.
A stream decodes only with the very distributions it was coded with, so these are made of additions, products
and powers of two alone, which are the same on every machine.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import constriction
import numpy as np

from .errors import UserError

Categorical = constriction.stream.model.Categorical
Uniform = constriction.stream.model.Uniform
RangeEncoder, RangeDecoder = (
    constriction.stream.queue.RangeEncoder,
    constriction.stream.queue.RangeDecoder,
)

BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
CHUNK = 2**22  # symbols decoded at a time
LEVELS_PER_OCTAVE = 4  # of a frequency in the side information
MAX_LEVEL = 30 * LEVELS_PER_OCTAVE
ROOTS = np.array(
    [1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429]
)  # 2 ** (0, 1/4, 1/2, 3/4)
DIFFERENCES = np.ldexp(
    1.0, -np.minimum(np.abs(np.arange(-MAX_LEVEL, MAX_LEVEL + 1)) // 2, 20)
)  # of two such levels
MAX_CLASSES = 64
WORTHWHILE = 0.005  # what blocks must save of the positions, as they take time to decode
NOISE = 7.95  # bits of a byte from which on it is stored as it is
STEP_CANDIDATES = np.linspace(0.1, 1.0, 46)


@dataclass
class Coded:
    """A coded tensor: its stream, its kept entries, and the entropy of what is stored, in bits.

    position_entropy: of a mask of independent coin flips at the matrix's density. value_entropy: of the
    levels (or bytes) at their own frequencies.
    """

    words: np.ndarray
    kept: int
    position_entropy: float
    value_entropy: float


# ------------------------------------------------------------------------------------ coder of symbols


class _Encoder:
    """The range coder, with the numbers that it needs beside the symbols."""

    def __init__(self):
        self.coder, self.noise = RangeEncoder(), []

    def words(self) -> np.ndarray:
        coded = self.coder.get_compressed()
        noise = b"".join(self.noise)
        raw = np.frombuffer(noise + bytes(-len(noise) % 4), np.uint32)
        return np.concatenate([np.array([len(coded)], np.uint32), coded, raw])

    def number(self, value: int, bits: int) -> None:
        """An unsigned number of a known width."""
        for shift in range(0, bits, 16):
            width = min(16, bits - shift)
            self.coder.encode(
                np.array([(value >> shift) & (2**width - 1)], np.int32), Uniform(2**width)
            )

    def symbols(self, symbols: np.ndarray, probabilities: np.ndarray) -> None:
        """Independent symbols of one distribution."""
        if len(symbols):
            self.coder.encode(
                symbols.astype(np.int32, copy=False), Categorical(probabilities, perfect=False)
            )

    def alphabet(self, symbols: np.ndarray, size: int) -> None:
        """Symbols below `size`, at least one, with their frequencies before them."""
        self.symbols(symbols, self.histogram(np.bincount(symbols, minlength=size)))

    def bytes(self, plane: np.ndarray) -> None:
        """Bytes with their frequencies, or as they are where that would save nothing."""
        is_noise = _symbol_entropy(plane) > NOISE * len(plane)
        self.number(int(is_noise), 1)
        if is_noise:
            self.noise.append(plane.tobytes())
        else:
            self.alphabet(plane, 256)

    def histogram(self, counts: np.ndarray) -> np.ndarray:
        """The frequencies of an alphabet, in quarter octaves; returns the distribution that the decoder will see."""
        levels = np.where(
            counts > 0, np.round(LEVELS_PER_OCTAVE * np.log2(np.maximum(counts, 1))) + 1, 0
        ).astype(np.int32)
        self.symbols(np.diff(levels, prepend=0) + MAX_LEVEL, DIFFERENCES)
        return _distribution(levels)


class _Decoder:
    def __init__(self, words: np.ndarray):
        if not len(words) or words[0] >= len(words):
            raise UserError("the stream is shorter than it says")
        self.coder = RangeDecoder(words[1 : 1 + int(words[0])])
        self.noise, self.taken = words[1 + int(words[0]) :].view(np.uint8), 0

    def number(self, bits: int) -> int:
        value = 0
        for shift in range(0, bits, 16):
            width = min(16, bits - shift)
            value |= int(self._decode(Uniform(2**width), 1)[0]) << shift
        return value

    def symbols(self, count: int, probabilities: np.ndarray) -> np.ndarray:
        if not count:
            return np.zeros(0, np.int32)
        return self._decode(Categorical(probabilities, perfect=False), count)

    def bytes(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """What `_Encoder.bytes` was given, a chunk at a time, each with its place."""
        if not self.number(1):
            yield from self.alphabet(count, 256)
            return
        if self.taken + count > len(self.noise):
            raise UserError("the stream is shorter than it says")
        yield 0, self.noise[self.taken : self.taken + count]
        self.taken += count

    def alphabet(self, count: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """What `_Encoder.alphabet` was given, a chunk at a time, each with its place."""
        distribution = self.histogram(size)
        for start in range(0, count, CHUNK):
            yield start, self.symbols(min(CHUNK, count - start), distribution)

    def histogram(self, size: int) -> np.ndarray:
        levels = np.cumsum(self.symbols(size, DIFFERENCES) - MAX_LEVEL)
        if levels.min() < 0 or levels.max() > MAX_LEVEL or not levels.any():
            raise UserError("the stream holds an impossible frequency")
        return _distribution(levels)

    def _decode(self, model, count: int) -> np.ndarray:
        try:
            return self.coder.decode(model, count)
        except AssertionError as error:  # so constriction says that no symbol has this code
            raise UserError("the stream does not decode") from error


def _distribution(levels: np.ndarray) -> np.ndarray:
    """Frequencies, which need no normalisation, of levels in quarter octaves; level 0 is never."""
    octaves, quarters = np.divmod(levels - 1, LEVELS_PER_OCTAVE)
    return np.where(levels > 0, np.ldexp(ROOTS[quarters], octaves), 0.0)


# ------------------------------------------------------------------------------------------- positions


def _gap_model(density: np.float32) -> tuple[np.ndarray, int]:
    """Distribution of the zeros before a kept weight, up to a longest gap L; the last symbol means L zeros and no end."""
    chance = float(density)
    longest = int(min(max(4 / chance, 16), 4096))
    none = np.cumprod(np.full(longest, 1 - chance))  # of the first 1, 2, ... L entries
    return np.concatenate([[chance], chance * none[:-1], none[-1:]]), longest


def _encode_block(encoder: _Encoder, block: np.ndarray) -> None:
    """Positions of the kept entries of a vector of booleans, or of the others where those are fewer."""
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
    """Positions, ascending, and whether they are those of the zeros."""
    inverted, count = bool(decoder.number(1)), decoder.number(32)
    places = np.zeros(0, np.int64)
    if count:
        density = np.array(decoder.number(32), np.uint32).view(np.float32)[()]
        skips = decoder.number(32)
        if not 0 < density <= 1:
            raise UserError("the stream holds an impossible density")
        distribution, longest = _gap_model(density)
        if count > size or skips > size // longest:
            raise UserError("the stream holds more positions than the matrix has entries")
        symbols = decoder.symbols(count + skips, distribution)
        ends = symbols < longest
        symbols += ends
        places = np.cumsum(symbols, dtype=np.int64)[ends] - 1
        if len(places) != count or places[-1] >= size:
            raise UserError("the stream holds positions outside the matrix")
    return places, inverted


def _classes(counts: np.ndarray) -> np.ndarray:
    """Class of each row or column by how much it keeps: half-octaves, 0 for none."""
    return np.round(2 * np.log2(counts + 1)).astype(np.int32)


def _members(classes: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(classes == c) for c in np.unique(classes)]


def _partition_cost(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """Bits of the positions when rows and columns are classed so, side information included."""
    row_of, column_of = (np.unique(classes, return_inverse=True)[1] for classes in (rows, columns))
    row_blocks, column_blocks = (
        np.eye(index.max() + 1, dtype=np.float32)[index] for index in (row_of, column_of)
    )
    kept = np.rint(row_blocks.T @ mask.astype(np.float32) @ column_blocks)
    sizes = np.outer(np.bincount(row_of), np.bincount(column_of))
    flips = entropy_bits(kept, sizes).sum()
    labels = sum(
        _symbol_entropy(classes) + 4.0 * MAX_CLASSES for classes in (rows, columns) if classes.any()
    )
    return float(flips + labels + 97.0 * kept.size)  # the numbers of each block


def entropy_bits(kept, sizes):
    """Bits of `sizes` independent coin flips of which `kept` are heads, at their own frequency."""
    kept, sizes = np.asarray(kept, np.float64), np.asarray(sizes, np.float64)
    bits = np.zeros(np.broadcast(kept, sizes).shape)
    for part in (kept, sizes - kept):
        bits -= part * np.log2(np.maximum(part, 1) / np.maximum(sizes, 1))
    return bits


def _symbol_entropy(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def _encode_classes(encoder: _Encoder, classes: np.ndarray) -> None:
    encoder.number(int(classes.any()), 1)
    if classes.any():
        encoder.alphabet(classes, MAX_CLASSES)


def _decode_classes(decoder: _Decoder, count: int) -> np.ndarray:
    if not decoder.number(1):
        return np.zeros(count, np.int32)
    return decoder.symbols(count, decoder.histogram(MAX_CLASSES))


def _encode_mask(encoder: _Encoder, mask: np.ndarray) -> None:
    rows, columns = _classes(mask.sum(1)), _classes(mask.sum(0))
    nothing = np.zeros_like(rows), np.zeros_like(columns)
    choices = [nothing, (rows, nothing[1]), (nothing[0], columns), (rows, columns)]
    costs = [_partition_cost(mask, *choice) for choice in choices]
    best = int(np.argmin(costs))
    rows, columns = choices[best if costs[best] < (1 - WORTHWHILE) * costs[0] else 0]
    _encode_classes(encoder, rows)
    _encode_classes(encoder, columns)
    for row_members in _members(rows):
        block_rows = mask[row_members]
        for column_members in _members(columns):
            block = (
                block_rows
                if len(column_members) == mask.shape[1]
                else block_rows[:, column_members]
            )
            _encode_block(encoder, block.reshape(-1))


def _decode_mask(decoder: _Decoder, shape: tuple[int, int]) -> np.ndarray:
    """Indices of the kept entries in row-major order."""
    rows, columns = _decode_classes(decoder, shape[0]), _decode_classes(decoder, shape[1])
    mask = np.empty(shape, bool)
    for row_members in _members(rows):
        for column_members in _members(columns):
            size = len(row_members) * len(column_members)
            places, inverted = _decode_block(decoder, size)
            if size == mask.size and not inverted:
                return places
            block = np.full(size, inverted)
            block[places] = not inverted
            mask[np.ix_(row_members, column_members)] = block.reshape(
                len(row_members), len(column_members)
            )
    return np.flatnonzero(mask)


# ---------------------------------------------------------------------------------------------- values


def _steps(values: np.ndarray, largest: np.ndarray, places: np.ndarray, bits: int) -> np.ndarray:
    """The step of each group of values: `largest` holds their largest magnitudes, `places` the group of each value.

    At 8 bits the levels reach as far as the largest; below, as far as makes the squared error least, the
    same fraction of it in all groups.
    """
    smallest = np.where(
        largest > 0, np.float32(2.0**-148), np.float32(0)
    )  # half of it is a number still
    steps = np.maximum((largest / 2 ** (bits - 1)).astype(np.float32), smallest)
    if bits >= 8 or not len(values):
        return steps
    stride = max(1, len(values) // 50_000)
    sample, sampled = values[::stride].astype(np.float64), steps[places[::stride]]

    def error(fraction: float) -> float:
        tried = sampled * np.float32(fraction)
        return float(
            np.square(sample - _dequantise(_levels(sample, tried, bits), tried, bits)).sum()
        )

    return np.maximum(steps * np.float32(min(STEP_CANDIDATES, key=error)), smallest)


def _groups(tensor: np.ndarray, by_row: bool) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitude of each group of entries (rows, or all in one), and the group of each entry but the zeros."""
    if by_row:
        return np.abs(tensor).max(1), np.nonzero(tensor)[0]
    return np.abs(tensor).max(initial=0.0, keepdims=True).reshape(1), np.zeros(
        np.count_nonzero(tensor), np.intp
    )


def _levels(values: np.ndarray, steps: np.ndarray | np.float32, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.floor(np.nan_to_num(values / steps, nan=0.0, posinf=half, neginf=-half))
    return (np.clip(levels, -half, half - 1) + half).astype(np.int32)


def _dequantise(levels: np.ndarray, steps: np.ndarray | np.float32, bits: int) -> np.ndarray:
    return (levels.astype(np.float32) + np.float32(0.5 - 2 ** (bits - 1))) * steps


def _encode_values(
    encoder: _Encoder, values: np.ndarray, bits: int, steps: np.ndarray | None
) -> float:
    """Returns their entropy."""
    if bits <= 8:
        levels = _levels(values, steps, bits)
        if len(levels):
            encoder.alphabet(levels, 2**bits)
        return _symbol_entropy(levels)
    if bits == 32:
        return _encode_floats(encoder, values)
    halves = values.astype(np.float16)
    smallest = np.copysign(np.float16(2.0**-24), halves)
    return _encode_floats(encoder, np.where((halves == 0) & (values != 0), smallest, halves))


def _decode_values(decoder: _Decoder, count: int, bits: int) -> np.ndarray:
    """Values; of up to 8 bits, in units of their step."""
    if bits > 8:
        return _decode_floats(decoder, count, np.float16 if bits == 16 else np.float32)
    values = np.empty(count, np.float32)
    for start, levels in decoder.alphabet(count, 2**bits) if count else ():
        values[start : start + len(levels)] = _dequantise(levels, np.float32(1), bits)
    return values


def _encode_floats(encoder: _Encoder, numbers: np.ndarray) -> float:
    planes = numbers.view(np.uint8).reshape(-1, numbers.itemsize).T
    for plane in planes if len(numbers) else ():
        encoder.bytes(plane)
    return sum(map(_symbol_entropy, planes))


def _decode_floats(decoder: _Decoder, count: int, kind: type) -> np.ndarray:
    raw = np.empty((count, np.dtype(kind).itemsize), np.uint8)
    for plane in raw.T if count else ():
        for start, symbols in decoder.bytes(count):
            plane[start : start + len(symbols)] = symbols
    return raw.view(kind).reshape(-1).astype(np.float32, copy=False)


# --------------------------------------------------------------------------------------------- tensors


def encode(tensor: np.ndarray, bits: int, by_row: bool = False) -> Coded:
    """Code a float32 vector or matrix. `by_row`: a step for each row, not one for all.

    Vectors are never quantised below 16 bits. Raises UserError for values that are not finite, or too
    large for the precision.
    """
    if not np.isfinite(tensor).all():
        raise UserError("it holds values that are not finite")
    bits = precision(tensor.shape, bits)
    if bits == 16 and np.abs(tensor).max(initial=0.0) > np.finfo(np.float16).max:
        raise UserError("it holds values too large for half precision: use --bits 32")
    encoder, position_entropy, flat = (
        _Encoder(),
        0.0,
        np.ascontiguousarray(tensor, np.float32).reshape(-1),
    )
    kept = flat.size
    if tensor.ndim == 2:
        mask = tensor != 0
        kept = int(np.count_nonzero(mask))
        encoder.number(int(kept < flat.size), 1)
        if kept < flat.size:
            _encode_mask(encoder, mask)
            position_entropy = float(entropy_bits(kept, flat.size))
            indices = np.flatnonzero(mask)
            flat = flat[indices]
    steps = None
    if bits <= 8:
        largest, places = _groups(tensor, by_row)
        steps = _steps(flat, largest, places, bits)
        if by_row:
            _encode_floats(encoder, steps)
        else:
            encoder.number(int(steps.view(np.uint32)[0]), 32)
        steps = steps[places]
    value_entropy = _encode_values(encoder, flat, bits, steps)
    return Coded(encoder.words(), kept, position_entropy, value_entropy)


def error_bound(tensor: np.ndarray, bits: int, by_row: bool = False) -> np.ndarray:
    """How far each entry may come back from what it was; 0 for a zero of a matrix."""
    bits = precision(tensor.shape, bits)
    magnitudes = np.abs(tensor).astype(np.float64)
    if bits == 32:
        return np.zeros(tensor.shape)
    if bits == 16:
        return np.maximum(magnitudes * 2.0**-11, (magnitudes > 0) * 2.0**-24)
    nonzero, half = magnitudes > 0, 2 ** (bits - 1)
    largest, places = _groups(tensor, by_row)
    steps = _steps(tensor[nonzero], largest, places, bits).astype(np.float64)[places]
    bound = np.zeros(tensor.shape)
    bound[nonzero] = (
        np.maximum(steps / 2, magnitudes[nonzero] - (half - 0.5) * steps) * (1 + 1e-4) + 2.0**-147
    )
    return bound


def precision(shape: tuple[int, ...], bits: int) -> int:
    """Bits at which a tensor of this shape is stored: vectors (bias, LayerNorm) have 16 at least."""
    return bits if len(shape) == 2 else max(bits, 16)


def decode_sparse(words: np.ndarray, shape: tuple[int, ...], bits: int, by_row: bool = False):
    """Indices of the kept entries in row-major order (None: all of them) and their values.

    Raises UserError for a stream that does not fit the shape.
    """
    decoder, bits = _Decoder(words), precision(shape, bits)
    size, indices = math.prod(shape), None
    if len(shape) == 2 and decoder.number(1):
        indices = _decode_mask(decoder, shape)
    count = size if indices is None else len(indices)
    step = None
    if bits <= 8 and by_row:
        step = _decode_floats(decoder, shape[0], np.float32)
    elif bits <= 8:
        step = np.array([decoder.number(32)], np.uint32).view(np.float32)[0]
    values = _decode_values(decoder, count, bits)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # a spoilt step; what it makes is looked at below
        if bits <= 8 and by_row:
            if indices is None:
                values.reshape(shape)[...] *= step[:, None]
            else:
                ends = np.searchsorted(indices, np.arange(1, shape[0] + 1) * shape[1])
                values *= np.repeat(step, np.diff(ends, prepend=0))
        elif bits <= 8:
            values *= step
    if not np.isfinite(values).all():
        raise UserError("it holds values that are not finite")
    return indices, values


def decode(
    words: np.ndarray, shape: tuple[int, ...], bits: int, by_row: bool = False
) -> np.ndarray:
    """The float32 tensor that `encode` was given, at its precision."""
    indices, values = decode_sparse(words, shape, bits, by_row)
    if indices is None:
        return values.reshape(shape)
    tensor = np.zeros(math.prod(shape), np.float32)
    tensor[indices] = values
    return tensor.reshape(shape)
