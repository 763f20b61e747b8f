"""MaskedLinear and the masks of many matrices against plain formulas and autograd of them."""

import types

import pytest
import tiny
import torch
from torch import nn

from emmental.modules import (
    MaskedLinear,
    compute_mask,
    find_masks,
    masked,
    masked_layers,
    swap_linears,
)
from emmental.modules.methods import METHODS
from emmental.modules.numeric import uniform_noise

BINARY = [name for name in METHODS if name != "l0"]
GLOBAL = [name for name, method in METHODS.items() if method.ranks_together]
V = 0.4


def make_layer(method, scale=2.0, bias=True, **kwargs):
    torch.manual_seed(11)
    kwargs |= {"mask_init": "uniform", "mask_scale": scale, "pruning_method": method}
    return tiny.observed(MaskedLinear(9, 7, bias, **kwargs))


def top(values, count):
    """Float masks of the first `count` entries of a stable descending sort over all matrices."""
    flat = torch.cat([v.detach().reshape(-1) for v in values]).tolist()
    kept = set(sorted(range(len(flat)), key=lambda i: -flat[i])[:count])
    mask = torch.tensor([float(i in kept) for i in range(len(flat))])
    parts = mask.split([v.numel() for v in values])
    return [part.reshape(v.shape) for part, v in zip(parts, values, strict=True)]


def ranked(layer):
    """What the masks of a layer rank: weights, scores, or PLATON's product."""
    if layer.mask_scores is None:
        return layer.weight.detach().abs()
    scores = layer.mask_scores.detach()
    return scores * layer.mask_uncertainty if hasattr(layer, "mask_uncertainty") else scores


def expected_mask(layer, method, v):
    values = ranked(layer)
    if method == "sigmoied_threshold":
        return 1.0 * (1 / (1 + torch.exp(-values)) > v)
    return (
        1.0 * (values > v) if method == "threshold" else top([values], int(v * values.numel()))[0]
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", BINARY)
def test_forward_and_gradients(method, bias):
    layer = make_layer(method, bias=bias)
    x, seed = torch.randn(3, 5, 9, requires_grad=True), torch.randn(3, 5, 7)
    mask = expected_mask(layer, method, V)
    # dL/d(W*M) by autograd of the dense layer.
    effective = (layer.weight * mask).detach().requires_grad_()
    dense_x = x.detach().clone().requires_grad_()
    dense = dense_x @ effective.t() + (layer.bias.detach() if bias else 0)

    out = layer(x, threshold=V)
    torch.testing.assert_close(out, dense)
    out.backward(seed)
    dense.backward(seed)
    torch.testing.assert_close(x.grad, dense_x.grad)
    torch.testing.assert_close(layer.weight.grad, effective.grad * mask)
    if method == "magnitude":
        assert layer.mask_scores is None and "mask_scores" not in layer.state_dict()
    else:
        torch.testing.assert_close(layer.mask_scores.grad, effective.grad * layer.weight.detach())
    if bias:
        torch.testing.assert_close(layer.bias.grad, seed.sum((0, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_the_masks_of_a_block_equal_masks_on_the_spot(method):
    layer, x = make_layer(method).eval(), torch.randn(4, 9)
    with masked(layer, V):
        assert torch.equal(layer(x), layer(x, threshold=V))
        assert torch.equal(layer(x), layer(x, V))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer(x, V))
    for _ in range(2):  # a layer alone has no mask outside of the block
        with pytest.raises(RuntimeError, match="with masked.model, threshold"):
            layer.train()(x)


def copies(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def hard_concrete(scores, noise=None):
    if noise is None:
        gate = torch.sigmoid(scores)
    else:
        gate = torch.sigmoid((torch.log(noise) - torch.log(1 - noise) + scores) / (2 / 3))
    return torch.clamp(gate * (1.1 - -0.1) + -0.1, 0, 1)


@pytest.mark.parametrize("training", [True, False])
def test_l0_is_autograd_of_the_formula(training):
    layer = make_layer("l0", scale=3.0).train(training)
    x, seed = torch.randn(4, 9), torch.randn(4, 7)
    noise = uniform_noise(layer.mask_scores, torch.Generator().manual_seed(6)) if training else None
    weight, scores = copies(layer.weight, layer.mask_scores)
    mask = hard_concrete(scores, noise)
    plain = nn.functional.linear(x, weight * mask, layer.bias.detach())
    plain.backward(seed)

    assert all(0 < (mask == end).sum() < 63 for end in (0, 1))  # both ends of the clamp are met
    with masked(layer, 1.0, generator=torch.Generator().manual_seed(6)):
        torch.testing.assert_close(layer.in_force.mask, mask.detach())
        out = layer(x)
        torch.testing.assert_close(out, plain)
        out.backward(seed)
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.mask_scores.grad, scores.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(301, 333), (2, 3, 5), (1,)])
def test_l0_noise_is_uniform(shape):
    generator = torch.Generator().manual_seed(1)
    first, second = (uniform_noise(torch.zeros(shape), generator) for _ in range(2))
    assert first.shape == shape and first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert torch.equal(first, uniform_noise(torch.zeros(shape), torch.Generator().manual_seed(1)))
    if first.numel() > 1000:
        both = torch.stack([first, second]).reshape(2, -1).double()
        n = both.numel()
        assert 1e-4 <= both.min() < 1.5e-4 and 1 - 1.5e-4 < both.max() <= 1 - 1e-4
        place = torch.arange(1, n + 1, dtype=torch.float64) / n
        distance = ((both.reshape(-1).sort().values - 1e-4) / (1 - 2e-4) - place).abs().max()
        assert distance < 1.95 / n**0.5  # Kolmogorov-Smirnov, one in a thousand
        neighbours = torch.stack([both[0, :-1], both[0, 1:]])
        for pair in both, neighbours:  # from draw to draw, and to its neighbour
            assert torch.corrcoef(pair)[0, 1].abs() < 4 / (n / 2) ** 0.5


def test_l0_gradient_is_that_of_the_mask_in_force():
    layer, x = make_layer("l0", scale=3.0).eval(), torch.randn(4, 9)
    scores = layer.mask_scores.detach().clone().requires_grad_()
    nn.functional.linear(x, layer.weight.detach() * hard_concrete(scores)).sum().backward()
    with masked(layer, 1.0):  # without noise, and used so in training inside the block
        layer.train()(x).sum().backward()
    torch.testing.assert_close(layer.mask_scores.grad, scores.grad, rtol=1e-4, atol=1e-6)


def test_l0_samples_anew_in_training_only():
    layer, x = make_layer("l0"), torch.randn(4, 9)
    assert not torch.equal(layer(x, threshold=V), layer(x, threshold=V))
    layer.eval()
    assert torch.equal(layer(x, threshold=V), layer(x, threshold=V))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_of_a_layer_in_another_precision(method, dtype):
    layer = make_layer(method, dtype=dtype).eval()
    if layer.mask_scores is not None:
        assert layer.mask_scores.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    x = torch.randn(4, 9, dtype=dtype)
    mask = find_masks(layer, V).by_layer[""].to(dtype)
    if method != "platon":  # whose scores are two tensors
        assert mask.equal(compute_mask(layer.weight, layer.mask_scores, method, V).to(dtype))
    out = layer(x, threshold=V)
    assert out.dtype == dtype
    torch.testing.assert_close(out, nn.functional.linear(x, layer.weight * mask, layer.bias))
    out.sum().backward()
    assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_autocast_is_that_of_the_plain_formula(method):
    layer = make_layer(method).eval()
    layer_mask = find_masks(layer, V).by_layer[""]
    x, seed = torch.randn(3, 5, 9, requires_grad=True), torch.randn(3, 5, 7)
    plain_x, weight, bias = copies(x, layer.weight, layer.bias)
    scores = None if layer.mask_scores is None else copies(layer.mask_scores)[0]
    mask = hard_concrete(scores) if method == "l0" else layer_mask.float()
    effective = weight * mask
    effective.retain_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = layer(x, threshold=V), nn.functional.linear(plain_x, effective, bias)
    assert out.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(out, plain)
    out.float().backward(seed)
    plain.float().backward(seed)
    assert torch.equal(x.grad, plain_x.grad) and torch.equal(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)
    assert layer.weight.grad.dtype == torch.float32
    if scores is not None:
        assert layer.mask_scores.grad.dtype == torch.float32
        expected = scores.grad if method == "l0" else effective.grad * layer.weight.detach()
        torch.testing.assert_close(layer.mask_scores.grad, expected)


@pytest.mark.parametrize("method", METHODS)
def test_one_masked_copy_of_the_weights_is_kept_for_the_backward(method):
    layer = make_layer(method)
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with masked(layer, V), keep, torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(4, 9, requires_grad=True))
        own = {layer.weight.data_ptr(), layer.in_force.mask.data_ptr()}
        own |= {layer.mask_scores.data_ptr()} if layer.method.scores else set()
    kept = {t.data_ptr(): t for t in kept if t.numel() == layer.weight.numel()}
    (copy,) = [t for pointer, t in kept.items() if pointer not in own]
    assert copy.dtype == torch.bfloat16 and own <= kept.keys()


def test_inputs_of_another_dtype_are_refused():
    with pytest.raises(RuntimeError, match="dtype"):
        make_layer("topK")(torch.zeros(2, 9, dtype=torch.float64), threshold=V)


def test_mask_init():
    def scores(**kwargs):
        torch.manual_seed(0)
        return MaskedLinear(400, 50, **kwargs).mask_scores.detach()

    assert torch.equal(scores(), torch.zeros(50, 400))
    assert torch.equal(scores(mask_init="constant", mask_scale=2.5), torch.full((50, 400), 2.5))
    for init, bound in ("uniform", 0.3), ("kaiming", 1 / 400**0.5):  # a = sqrt(5): 1/sqrt(fan in)
        values = scores(mask_init=init, mask_scale=0.3)
        assert values.abs().max() <= bound and values.abs().max() > 0.999 * bound
        assert abs(values.mean()) < 0.02 * bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("wrong", [{"mask_init": "normal"}, {"pruning_method": "topk"}])
def test_unknown_names_are_refused(wrong):
    name = next(iter(wrong.values()))
    with pytest.raises(ValueError, match=name):
        MaskedLinear(3, 3, **wrong)
    with pytest.raises(ValueError, match="choose one of"):
        tiny.make(**wrong)
    if "pruning_method" in wrong:
        with pytest.raises(ValueError, match=name):
            compute_mask(torch.zeros(3, 3), torch.zeros(3, 3), name, 0.5)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"threshold", "l0"}))
@pytest.mark.parametrize("threshold", [-0.01, 1.5, 15])
def test_fractions_are_checked(method, threshold):
    layer = make_layer(method)
    with pytest.raises(ValueError, match="fraction"):
        layer(torch.zeros(2, 9), threshold=threshold)
    with pytest.raises(ValueError, match="fraction"):
        find_masks(layer, threshold)


def test_swap_linears_shares_weights_and_obeys_the_filter():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh()), nn.Linear(6, 2)
    )
    before = dict(model.named_parameters())
    swap_linears(model, where=lambda name: name != "2", mask_init="constant", mask_scale=0.5)
    assert list(masked_layers(model)) == ["0", "1.0"]
    assert type(model[2]) is nn.Linear
    after = dict(model.named_parameters())
    assert after.keys() - before.keys() == {"0.mask_scores", "1.0.mask_scores"}
    assert all(after[name] is parameter for name, parameter in before.items())


# --- all matrices at once ---


def make_stack(method, ties=False, shapes=((8, 6), (6, 8), (8, 6), (20, 20))):
    """Matrices of unlike scale, so that a global ranking differs from a local one."""
    torch.manual_seed(4)
    model = nn.ModuleList(MaskedLinear(i, o, True, "uniform", 1.0, method) for o, i in shapes)
    for number, layer in enumerate(tiny.observed(model)):
        for tensor in ranking(layer):
            tensor.mul_(number + 1)
            if ties:
                tensor.mul_(2).round_().div_(2)
    return model


def ranking(layer):
    """Weights, scores and the state beside them, to change in place."""
    return [x.data for x in (layer.weight, layer.mask_scores, *layer.buffers()) if x is not None]


def together(model):
    """The model with a configuration that ranks all of its matrices together."""
    model.config = types.SimpleNamespace(global_topk=True)
    return model


@pytest.mark.parametrize("method", BINARY)
@pytest.mark.parametrize("ties", [False, True])
def test_local_masks_of_many_matrices(method, ties):
    model = make_stack(method, ties)
    masks = find_masks(model, V)
    assert masks.cutoff is None
    for layer, mask in zip(model, masks.by_layer.values(), strict=True):
        assert torch.equal(mask.float(), expected_mask(layer, method, V))


def expected_global(model, count):
    masks = top([ranked(layer) for layer in model], count)
    for number, layer in enumerate(model):
        floor = int(0.005 * layer.weight.numel()) + 1
        if masks[number].sum() < floor:
            masks[number] = top([ranked(layer)], floor)[0]
    return masks


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("method", GLOBAL)
def test_global_masks_rank_everything_together(method, fraction, ties):
    model = make_stack(method, ties)
    total = sum(layer.weight.numel() for layer in model)
    expected = expected_global(model, int(fraction * total))
    masks = find_masks(together(model), fraction)
    for mask, wanted in zip(masks.by_layer.values(), expected, strict=True):
        assert torch.equal(mask.float(), wanted)


@pytest.mark.parametrize("method", GLOBAL)
def test_global_floor_saves_every_matrix(method):
    model = make_stack(method)
    for tensor in ranking(model[0]):
        tensor.mul_(1e-3)
    first, *others = find_masks(together(model), 0.05).by_layer.values()
    assert first.sum() == 1 and torch.equal(first.float(), top([ranked(model[0])], 1)[0])
    assert sum(int(mask.sum()) for mask in others) >= int(0.05 * 544)


@pytest.mark.parametrize("method", GLOBAL)
def test_global_cutoff_is_reused(method):
    model = make_stack(method)
    cutoff = find_masks(together(model), 0.3).cutoff
    flat = sorted(torch.cat([ranked(layer).reshape(-1) for layer in model]).tolist(), reverse=True)
    assert cutoff == flat[int(0.3 * len(flat)) - 1]
    for layer in model:
        for tensor in ranking(layer):
            tensor.add_(0.1 * torch.randn_like(tensor))
    masks = find_masks(together(model), 0.2, cutoff)
    assert masks.cutoff == cutoff
    for layer, mask in zip(model, masks.by_layer.values(), strict=True):
        above = (ranked(layer) >= cutoff).float()
        floor = int(0.005 * above.numel()) + 1
        above = above if above.sum() >= floor else top([ranked(layer)], floor)[0]
        assert torch.equal(mask.float(), above)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(GLOBAL)))
def test_global_is_refused(method):
    with pytest.raises(ValueError, match=method):
        find_masks(together(make_stack(method)), 0.5)


@pytest.mark.parametrize("cutoff", [None, 0.1])
def test_global_fractions_are_checked(cutoff):
    with pytest.raises(ValueError, match="fraction"):
        find_masks(together(make_stack("threshold")), 1.5, cutoff)


def test_a_model_without_masks():
    with pytest.raises(ValueError, match="no masked layers"):
        find_masks(nn.Linear(2, 2), 0.5)
    with masked(nn.Linear(2, 2), 0.5) as masks:  # the same loop serves a dense model
        assert masks is None


def test_l0_masks_of_two_ranks_agree():
    found = []
    for seed, model in enumerate([make_stack("l0"), make_stack("l0")]):
        torch.manual_seed(seed)  # dropout's generator differs between ranks
        generator = torch.Generator().manual_seed(42)
        found.append(find_masks(model, 1.0, generator=generator, sampled=True).by_layer)
    ours, theirs = found
    assert all(torch.equal(mask, theirs[name]) for name, mask in ours.items())
    assert not torch.equal(ours["0"], find_masks(model, 1.0).by_layer["0"])
