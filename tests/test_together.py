"""The way of a GPU, many matrices in one operation, taken on a CPU: the same as one by one."""

import contextlib
import importlib

import pytest
import tiny
import torch
from tiny import IDS

from emmental.losses import regularization
from emmental.modules import count, find_masks, masked, masked_layers, observe_scores
from emmental.modules.granularity import GRANULARITIES
from emmental.modules.lists import ONE_BY_ONE
from emmental.modules.methods import METHODS
from emmental.modules.numeric import uniform_noise
from emmental.modules.selection import SAMPLED_SIZE, kth_largest, largest_in_rows, select_largest
from emmental.modules.topk import keep_above, keep_largest, keep_largest_together

THRESHOLDS = {"threshold": 0.2, "sigmoied_threshold": 0.55}


@contextlib.contextmanager
def as_on_a_gpu():
    ONE_BY_ONE.clear()
    try:
        yield
    finally:
        ONE_BY_ONE.add("cpu")


def make(method, granularity="weight", **settings):
    """A masked BERT in training, with dropout."""
    settings |= {"granularity": granularity, "block_rows": 8, "block_columns": 16}
    settings |= dict.fromkeys(tiny.NO_DROPOUT, 0.1)
    return tiny.make(method, tiny.QA, seed=2, **settings).train()


def update(model, threshold, autocast, eyes=None):
    """Masks, outputs and gradients of an update in two batches, and the scores it observes."""
    layers = masked_layers(model)
    torch.manual_seed(3)  # of dropout
    with masked(layers, threshold, generator=torch.Generator().manual_seed(5)) as masks:
        for ids in IDS[:2], IDS[1:]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(ids).start_logits.float().square().mean()
            loss.backward()
        if penalty := layers.layers[0].method.penalty:
            regularization(layers, penalty).mul(3.0).backward()
        if eyes is not None:
            eyes.append([layer.in_force.masked_weight for layer in layers.layers])
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    observe_scores(layers, torch.amp.GradScaler("cpu", enabled=False), skipped=False)
    state = {n: value for n, value in model.state_dict().items() if "mask_" in n}
    return masks.by_layer, count(masks), loss.detach(), grads, state


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
def test_an_update_is_the_same(method, granularity, autocast, monkeypatch):
    if method == "l0":  # whose noise differs: each way draws its own
        noise = torch.rand(100_000, generator=torch.Generator().manual_seed(2)) * 0.9998 + 1e-4
        fixed = lambda scores, *_: noise[: scores[0].numel()].expand(scores.shape).clone()  # noqa: E731
        monkeypatch.setattr("emmental.modules.methods.uniform_noise", fixed)
    threshold = THRESHOLDS.get(method, 0.3)
    one_by_one = update(make(method, granularity), threshold, autocast)
    with as_on_a_gpu():
        together = update(make(method, granularity), threshold, autocast)
    assert one_by_one[0].keys() == together[0].keys() and one_by_one[3].keys() == together[3].keys()
    for name, mask in one_by_one[0].items():
        torch.testing.assert_close(together[0][name], mask, rtol=1e-6, atol=1e-7, msg=name)
    assert together[1] == one_by_one[1]
    torch.testing.assert_close(together[2], one_by_one[2], rtol=1e-6, atol=0)
    for name, grad in one_by_one[3].items():
        torch.testing.assert_close(together[3][name], grad, rtol=1e-5, atol=1e-7, msg=name)
    for name, value in one_by_one[4].items():
        torch.testing.assert_close(together[4][name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("method", ["topK", "threshold", "magnitude", "platon"])
def test_masks_ranked_together_are_the_same(method):
    model = make(method, global_topk=True)
    found = []
    for way in contextlib.nullcontext(), as_on_a_gpu():
        with way:
            first = find_masks(model, 0.02)
            found.append([*first.by_layer.values()])
            assert count(first).overall == pytest.approx(0.02, abs=0.01)
            found[-1] += find_masks(model, 0.5, cutoff=first.cutoff).by_layer.values()
    assert all(torch.equal(*masks) for masks in zip(*found, strict=True))


def test_only_evaluation_keeps_products():
    model, eyes = make("topK"), []
    with as_on_a_gpu():
        update(model, 0.3, False, eyes)
        assert eyes[0] == [None] * 12
        with torch.no_grad(), masked(model.eval(), 0.3):
            wanted = model(IDS).start_logits
            assert torch.equal(model(IDS).start_logits, wanted)
            layers = masked_layers(model).layers
            assert all(layer.in_force.masked_weight is not None for layer in layers)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_makes_products_again(reentrant):
    found = []
    for way in contextlib.nullcontext(), as_on_a_gpu():
        model = make("topK")
        model.bert.embeddings.requires_grad_(True)  # as a reentrant checkpoint needs
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with way:
            found.append(update(model, 0.3, True)[3])
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("values", ["distinct", "tied", "equal"])
@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.4, 0.9, 1.0])
def test_rows_are_selected_like_vectors(values, fraction):
    torch.manual_seed(0)
    rows = {
        "distinct": torch.randn(3, 1000),
        "tied": torch.randn(3, 1000).mul(2).round(),
        "equal": torch.zeros(3, 1000),
    }[values]
    count = int(fraction * 1000)
    found = largest_in_rows(rows, count)
    for row, mask in zip(rows, found, strict=True):
        assert torch.equal(mask, select_largest(row, count)) and mask.sum() == count


@pytest.mark.parametrize("values", ["random", "sorted", "equal"])
@pytest.mark.parametrize("count", [1, 17, 20_000, 190_000, 2 * SAMPLED_SIZE - 1])
def test_the_kth_of_one_long_row_is_exact(values, count):
    torch.manual_seed(0)
    row = torch.randn(2 * SAMPLED_SIZE)
    row = {"random": row, "sorted": row.sort().values, "equal": torch.zeros_like(row)}[values]
    assert kth_largest(row[None], count).item() == row.sort(descending=True).values[count - 1]


def test_functions_of_lists_agree():
    torch.manual_seed(0)
    values = [torch.randn(shape).mul(3).round() for shape in ((20, 30), (30, 20), (7, 11))]
    counts, found = [100, 100, 3], []
    for way in contextlib.nullcontext(), as_on_a_gpu():
        with way:
            found.append(keep_largest(values, counts) + keep_largest(values, counts, absolute=True))
            found[-1] += keep_above(values, 8.0) + keep_above(values, -1.0)
            masks, cutoff = keep_largest_together(values, [4, 4, 9], 0.2)
            found[-1] += [*masks, torch.tensor(cutoff)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_noise_of_a_gpu_is_in_its_range():
    with as_on_a_gpu():
        noise = uniform_noise(torch.zeros(2, 50_000), torch.Generator().manual_seed(1))
    assert 1e-4 <= noise.min() < 2e-4 and 1 - 2e-4 < noise.max() <= 1 - 1e-4
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)


LARGEST = {"weight": {"l0": 60, None: 50}, "hybrid": {"l0": 80, None: 70}}


@pytest.mark.parametrize("granularity", LARGEST)
def test_an_update_starts_few_operations(granularity, capsys):
    launches = importlib.import_module("launches")
    found = launches.main(["--layers", "2", "--granularity", granularity])
    stock = found.pop("dense").total()
    assert found.keys() == METHODS.keys()
    for method, operations in found.items():
        most = LARGEST[granularity].get(method, LARGEST[granularity][None])
        assert operations.total() - stock <= most, (method, operations)
    waits = [line.split("|")[-2].strip() for line in capsys.readouterr().out.splitlines()[-8:]]
    assert set(waits) == {"2"}  # the stock model's own, and the guard's
    assert ONE_BY_ONE == {"cpu"}
