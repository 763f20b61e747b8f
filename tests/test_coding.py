"""Coding of tensors: round trips, sizes, and damaged streams."""

import math

import numpy as np
import pytest

from emmental.packing import coding
from emmental.system.errors import UserError


def sparse(shape, density, seed=0, structured=False):
    """A matrix of about this density; `structured`: with empty and crowded rows and columns."""
    rng = np.random.default_rng(seed)
    odds = np.ones(shape)
    if structured:
        odds = np.outer(rng.gamma(0.5, 2.0, shape[0]), rng.gamma(0.5, 2.0, shape[1]))
    chance = np.minimum(1, density * odds)
    values = rng.standard_normal(shape).astype(np.float32)
    values[values == 0] = 1.0
    return np.where(rng.random(shape) < chance, values, np.float32(0))


def entropy(symbols):
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def flips(kept, size):
    return -sum(n * math.log2(n / size) for n in (kept, size - kept) if n)


LAST_ENTRY = np.zeros((7, 300), np.float32)
LAST_ENTRY[-1, -1] = 1
ALMOST_DENSE = sparse((20, 30), 1.1)
ALMOST_DENSE[0, 7] = 0
EMPTY_ROWS = sparse((50, 40), 0.3)
EMPTY_ROWS[np.arange(50) % 3 != 0] = 0
MATRICES = {
    "dense": np.random.default_rng(1).standard_normal((40, 30)).astype(np.float32),
    "sparse": sparse((60, 50), 0.1),
    "structured": sparse((200, 150), 0.05, structured=True),
    "empty": np.zeros((20, 30), np.float32),
    "one": np.eye(1, 12, 5, dtype=np.float32),
    "last entry": LAST_ENTRY,
    "almost dense": ALMOST_DENSE,
    "empty rows": EMPTY_ROWS,
    "equal": np.full((9, 9), -0.25, np.float32),
    "tiny and large": np.array([[1e-30, -1e-30, 0.0, 1000.0]], np.float32),
    "subnormal": np.array([[1e-40, 0.0], [-1e-42, 1.0]], np.float32),
    "vanishing": np.array([[1e-45, 0.0], [-3e-45, 0.0]], np.float32),
    "single": np.array([[3.0]], np.float32),
}


def check_error(tensor, back, bits, by_row):
    """Every entry is restored by the nearest level, and the levels are as fine as they say."""
    back = back.astype(np.float64)
    bits = bits if tensor.ndim == 2 else max(bits, 16)
    if bits == 32:
        assert np.array_equal(back, tensor)
    elif bits == 16:
        exact = tensor.astype(np.float16).astype(np.float32)
        assert np.array_equal(back[exact != 0], exact[exact != 0])
        assert np.abs(back - tensor)[exact == 0].max(initial=0) <= 2.0**-24
        bound = np.maximum(np.abs(tensor) * 2.0**-11, (tensor != 0) * 2.0**-24)
        assert (np.abs(back - tensor) <= bound).all()
    else:
        groups = zip(tensor, back, strict=True) if by_row else [(tensor, back)]
        for original, restored in groups:
            magnitudes = np.abs(original).astype(np.float64)
            largest = magnitudes.max()
            step = largest / 2 ** (bits - 1)  # at most: the levels reach no further than `largest`
            error = np.abs(restored - original)
            half = step / 2 * 1.0001 + 3e-45
            assert error[magnitudes < 0.1 * largest].max(initial=0) <= half
            assert error.max() <= (half if bits == 8 else 0.9 * largest + step + 3e-45)
            kept = original != 0
            distances = np.abs(np.unique(restored[kept])[:, None] - original[kept])
            nearest = distances.min(0, initial=np.inf)
            assert (error[kept] <= nearest * (1 + 1e-4) + 2.0**-147).all()
            assert (error[~kept] == 0).all()


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("bits", coding.BITS)
@pytest.mark.parametrize("name", MATRICES)
def test_masks_come_back_exactly_and_weights_within_the_bound(name, bits, by_row):
    matrix = MATRICES[name]
    coded = coding.encode(matrix, bits, by_row)
    back = coding.decode(coded.words, matrix.shape, bits, by_row)
    assert back.dtype == np.float32 and back.shape == matrix.shape
    assert np.array_equal(back != 0, matrix != 0)
    assert coded.kept == np.count_nonzero(matrix)
    assert np.array_equal(np.sign(back), np.sign(matrix))
    check_error(matrix, back, bits, by_row)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_the_step_is_better_than_that_of_the_largest_value(bits):
    matrix = sparse((300, 200), 0.3, seed=2)
    back = coding.decode(coding.encode(matrix, bits).words, matrix.shape, bits)
    kept = matrix[matrix != 0].astype(np.float64)
    step = np.abs(kept).max() / 2 ** (bits - 1)
    naive = (np.clip(np.floor(kept / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5) * step
    ours = np.square(back[matrix != 0] - kept).mean()
    assert ours <= np.square(naive - kept).mean() * (0.75 if bits <= 6 else 1.0)
    assert len(np.unique(back[matrix != 0])) <= 2**bits


@pytest.mark.parametrize("density", [0.01, 0.06, 0.3, 0.8])
@pytest.mark.parametrize("bits", [4, 8])
def test_streams_are_close_to_the_entropy(density, bits):
    matrix = sparse((700, 800), density, seed=3)
    coded = coding.encode(matrix, bits)
    back = coding.decode(coded.words, matrix.shape, bits)
    positions = flips(np.count_nonzero(matrix), matrix.size)
    values = entropy(back[back != 0])
    assert coded.position_entropy == pytest.approx(positions, rel=1e-9)
    assert coded.value_entropy == pytest.approx(values, rel=1e-9)
    # The frequencies take up to 150 bytes, which is little for a matrix of BERT's size.
    assert 32 * len(coded.words) <= 1.005 * (positions + values) + 8 * 150


def test_structure_is_used():
    matrix = sparse((768, 768), 0.06, seed=4, structured=True)
    coded = coding.encode(np.sign(matrix), 8)  # two values: positions and one bit of sign
    spent = 32 * len(coded.words) - coded.kept
    assert spent < 0.8 * coded.position_entropy


def test_positions_of_a_dense_matrix_are_free():
    matrix = MATRICES["dense"]
    assert coding.encode(matrix, 32).position_entropy == 0
    nearly = matrix.copy()
    nearly[3, 4] = 0
    more = len(coding.encode(nearly, 32).words) - len(coding.encode(matrix, 32).words)
    assert 0 <= more <= 6


@pytest.mark.parametrize("bits", coding.BITS)
@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_vectors_have_16_bits_at_least(bits, size):
    vector = np.random.default_rng(5).standard_normal(size).astype(np.float32)
    vector[::5] = 0
    back = coding.decode(coding.encode(vector, bits).words, vector.shape, bits)
    expected = vector if bits == 32 else vector.astype(np.float16).astype(np.float32)
    assert np.array_equal(back, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value):
    with pytest.raises(UserError, match="not finite"):
        coding.encode(np.array([[1.0, value]], np.float32), 8)


def test_what_half_precision_cannot_hold_is_refused():
    with pytest.raises(UserError, match="--bits 32"):
        coding.encode(np.array([1e5], np.float32), 8)
    assert coding.encode(np.array([1e5], np.float32), 32).kept == 1


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_indices_are_those_of_a_csr(bits, by_row):
    matrix = MATRICES["structured"]
    words = coding.encode(matrix, bits, by_row).words
    csr = coding.decode(words, matrix.shape, bits, by_row, csr=True)
    rows, columns = np.nonzero(matrix)
    assert np.array_equal(csr.indptr, np.searchsorted(rows, np.arange(len(matrix) + 1)))
    assert np.array_equal(csr.indices, columns)
    assert np.array_equal(csr.data, coding.decode(words, matrix.shape, bits, by_row)[matrix != 0])


def test_garbage_ends_in_an_error_or_in_a_tensor():
    """Streams that pass their checksum, as somebody might forge them."""
    rng = np.random.default_rng(6)
    outcomes = set()
    for _ in range(200):
        words = rng.integers(0, 2**32, rng.integers(0, 50), dtype=np.uint32)
        bits, by_row = int(rng.choice(coding.BITS)), bool(rng.integers(2))
        try:
            back = coding.decode(words, (30, 40), bits, by_row)
            outcomes.add(back.shape)
        except (UserError, ValueError, AssertionError) as error:
            outcomes.add(type(error).__name__)
    assert outcomes <= {(30, 40), "UserError"}, outcomes
