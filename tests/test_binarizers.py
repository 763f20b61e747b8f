"""Binarizers against plain Python sorts and loops."""

import math

import numpy as np
import pytest
import torch

from emmental.modules import MagnitudeBinarizer, ThresholdBinarizer, TopKBinarizer, lists, selection
from emmental.modules.selection import SAMPLED_SIZE
from emmental.modules.topk import keep_largest

FRACTIONS = [0.0, 0.03, 0.1, 0.25, 0.5, 0.7, 0.999, 1.0]


def make_scores(kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(13, 17, generator=generator, dtype=torch.float64)
    scores = {
        "distinct": normal,
        "ties": (normal * 2).round() / 2,
        "constant": torch.zeros(13, 17),
        "transposed": normal.t(),
        "strided": torch.randn(26, 34, generator=generator, dtype=torch.float64)[::2, 1::2],
        "tiny": normal * 1e-12,
        "one": torch.tensor([[-0.3]]),
    }[kind]
    return scores.to(dtype)


def sorted_mask(values, count):
    """Ones on the first `count` entries of a stable descending sort of the row-major entries."""
    flat = values.reshape(-1).tolist()
    kept = set(sorted(range(len(flat)), key=lambda i: -flat[i])[:count])
    return torch.tensor([float(i in kept) for i in range(len(flat))]).reshape(values.shape)


KINDS = ["distinct", "ties", "constant", "transposed", "strided", "tiny", "one"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_topk_is_a_stable_sort(kind, fraction, dtype):
    scores = make_scores(kind, dtype)
    mask = TopKBinarizer.apply(scores, fraction)
    assert mask.dtype == dtype and mask.shape == scores.shape
    assert int(mask.sum(dtype=torch.float64)) == int(fraction * scores.numel())
    assert torch.equal(mask.float(), sorted_mask(scores, int(fraction * scores.numel())))
    assert torch.equal(mask, TopKBinarizer.apply(scores, fraction))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_magnitude_ranks_absolute_weights(kind, fraction):
    weight = make_scores(kind)
    mask = MagnitudeBinarizer.apply(weight, fraction)
    assert torch.equal(mask, sorted_mask(weight.abs(), int(fraction * weight.numel())))


def test_topk_takes_a_transposed_matrix_as_its_contiguous_copy():
    scores = make_scores("transposed")
    assert not scores.is_contiguous()
    wanted = TopKBinarizer.apply(scores.contiguous(), 0.4)
    assert torch.equal(TopKBinarizer.apply(scores, 0.4), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "constant", "transposed", "strided"])
def test_accelerators_select_as_the_cpu_does(kind, dtype, monkeypatch):
    values = [make_scores(kind, dtype), make_scores(kind, dtype) - 1]
    values.append(make_scores("distinct", dtype)[:5])
    counts, stacks, kth_largest = [60, 60, 7], [], selection.kth_largest
    note = lambda x, n: stacks.append(len(x)) or kth_largest(x, n)  # noqa: E731
    monkeypatch.setattr(selection, "kth_largest", note)
    with monkeypatch.context() as on_an_accelerator:
        on_an_accelerator.setattr(lists, "ONE_BY_ONE", set())
        for absolute in (False, True):
            masks = keep_largest(values, counts, absolute)
            for value, count, mask in zip(values, counts, masks, strict=True):
                ranked = value.float().abs() if absolute else value.float()
                assert torch.equal(mask.float(), sorted_mask(ranked, count))
    assert sorted(stacks) == [1, 1, 2, 2]  # one selection per size
    keep_largest(values, counts)
    assert len(stacks) == 4  # and none on the CPU


def large_scores(kind):
    """Matrices large enough to be sampled, among them such that mislead a sample."""
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(400, 300, generator=generator)
    flat = normal.reshape(-1)
    misleading = flat.clone()
    misleading[::61] -= 10.0  # the very entries that are sampled
    scores = {
        "distinct": normal,
        "small integers": (normal * 3).round(),
        "constant": torch.zeros(400, 300),
        "two values": (normal > 1.5).float(),
        "sorted": flat.sort().values,
        "reversed": flat.sort(descending=True).values,
        "misleading": misleading,
        "heavy tails": normal.sign() * torch.exp(4 * normal),
        "infinite": torch.where(normal > 2, torch.inf, normal),
        "transposed": normal.t(),
        "half": normal.half(),
    }[kind]
    assert scores.numel() >= SAMPLED_SIZE
    return scores


LARGE = """distinct,small integers,constant,two values,sorted,reversed,misleading,heavy tails,
infinite,transposed,half""".replace("\n", "").split(",")


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", LARGE)
def test_selection_from_a_sample_is_a_stable_sort(kind, absolute):
    scores = large_scores(kind)
    scores = scores.abs() if absolute else scores
    order = torch.argsort(scores.reshape(-1), descending=True, stable=True)
    for count in [1, 2, 600, 12_000, 60_000, 119_000, 119_999]:
        expected = torch.zeros(scores.numel(), dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(keep_largest([scores], [count])[0], expected.reshape(scores.shape))


def test_threads_change_no_mask():
    kinds = ("distinct", "small integers", "misleading", "transposed")
    scores = [large_scores(kind) for kind in kinds]
    counts = [12_000, 60_000, 600, 119_000]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = keep_largest(scores, counts)
        torch.set_num_threads(3)
        together = keep_largest(scores, counts)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_gpu_masks_equal_cpu_masks(kind, fraction):
    scores = make_scores(kind)
    found = TopKBinarizer.apply(scores.cuda(), fraction).cpu()
    assert torch.equal(found, TopKBinarizer.apply(scores, fraction))


@pytest.mark.parametrize("cutoff", [-0.5, 0.0, 0.3, 1.2])
def test_threshold_compares_scores(cutoff):
    scores = make_scores("ties")  # holds the cut-offs -0.5 and 0.0 themselves, which do not pass
    expected = [[float(s > cutoff) for s in row] for row in scores.tolist()]
    assert ThresholdBinarizer.apply(scores, cutoff, False).tolist() == expected


@pytest.mark.parametrize("cutoff", [0.05, 0.3, 0.5, 0.8])
def test_threshold_with_sigmoid(cutoff):
    scores = make_scores("distinct")
    expected = [[float(1 / (1 + math.exp(-s)) > cutoff) for s in row] for row in scores.tolist()]
    assert ThresholdBinarizer.apply(scores, cutoff, True).tolist() == expected


@pytest.mark.parametrize("sigmoid, cutoff", [(False, 100.0), (True, 1.0), (True, 0.9999)])
@pytest.mark.parametrize("shape", [(1, 1), (13, 17), (20, 30)])
def test_threshold_keeps_the_floor(sigmoid, cutoff, shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = ThresholdBinarizer.apply(scores, cutoff, sigmoid)
    assert torch.equal(mask, sorted_mask(scores, int(0.005 * scores.numel()) + 1))


def test_threshold_floor_of_tied_scores_is_exact():
    assert ThresholdBinarizer.apply(torch.zeros(20, 30), 0.0, False).sum() == 4


def test_threshold_zero_of_soft_movement_keeps_all():
    scores = torch.tensor([[-80.0, 0.0, 80.0]])
    assert ThresholdBinarizer.apply(scores, 0.0, True).tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("binarize, settings", [
    (TopKBinarizer.apply, [0.3]),
    (ThresholdBinarizer.apply, [0.2, False]),
    (ThresholdBinarizer.apply, [0.6, True]),
])  # fmt: skip
def test_gradients_go_straight_through(binarize, settings):
    scores = make_scores("distinct").requires_grad_()
    seed = torch.randn(13, 17, generator=torch.Generator().manual_seed(5))
    binarize(scores, *settings).backward(seed)
    assert torch.equal(scores.grad, seed)


def test_no_gradient_through_a_magnitude_mask():
    weight = make_scores("distinct").requires_grad_()
    mask = MagnitudeBinarizer.apply(weight, 0.3)
    assert not mask.requires_grad
    (weight * mask).sum().backward()
    assert torch.equal(weight.grad, mask)


@pytest.mark.parametrize("threshold", [-0.1, 1.0001, 15, float("nan")])
@pytest.mark.parametrize("binarize", [
    TopKBinarizer.apply,
    MagnitudeBinarizer.apply,
    lambda s, v: ThresholdBinarizer.apply(s, v, True),
])  # fmt: skip
def test_fractions_outside_0_1_are_refused(binarize, threshold):
    with pytest.raises(ValueError, match="fraction"):
        binarize(torch.zeros(4, 4), threshold)


def test_a_large_matrix_against_numpy():
    scores = torch.randn(300, 400, generator=torch.Generator().manual_seed(9))
    scores = scores.round(decimals=2)  # many ties
    expected = np.zeros(scores.numel(), bool)
    expected[np.argsort(-scores.numpy().reshape(-1), kind="stable")[:17_777]] = True
    mask = TopKBinarizer.apply(scores, 17_777 / scores.numel() + 1e-12)
    assert np.array_equal(mask.numpy().reshape(-1).astype(bool), expected)
