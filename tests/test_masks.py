"""Masks in scope: right in anybody's loop, found once in a block, and never stale."""

import copy
import functools
import io
import pickle

import pytest
import tiny
import torch
import transformers
from tiny import INPUTS, LAYER
from torch.nn.utils import prune

from emmental import MaskedBertModel
from emmental.checkpoints.export import bertarized_config, bertarized_state_dict
from emmental.modules import find_masks, masked, masked_layers, masks
from emmental.modules.methods import METHODS
from emmental.training.optim import build_optimizer

scores_or_weights = pytest.mark.parametrize("method", ["topK", "magnitude"])
every_method = pytest.mark.parametrize("method", METHODS)


def make(method="topK", suffix="Model", **settings):
    return tiny.make(method, suffix, **({"threshold": 0.5} | settings))


def plain_output(model):
    """What the plain model with W * M in place of W computes now."""
    plain = transformers.BertModel(bertarized_config(model.config)).eval()
    plain.load_state_dict(bertarized_state_dict(copy.deepcopy(model).eval()))
    return plain.to(model.dtype)(**INPUTS).last_hidden_state


@pytest.fixture
def finds(monkeypatch):
    """How often masks of a model have been found."""
    calls, find = [], masks.find_masks
    note = lambda *args, **kwargs: calls.append(1) or find(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(masks, "find_masks", note)
    return calls


def run(model, **options):
    return model(**INPUTS, **options)[0]


def loss_of(model, **options):
    return run(model, **options)[..., 0].sum()


# --- blocks ---


@every_method
def test_a_block_finds_masks_once_and_keeps_the_masked_weights(method, finds):
    model = make(method)
    wanted = plain_output(model)
    with masked(model) as found, torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(model), wanted)
        layer = model.get_submodule(LAYER)
        assert layer.in_force.mask is found.by_layer[LAYER]
        assert torch.equal(layer.in_force.masked_weight, layer.weight * layer.in_force.mask)
    assert len(finds) == 1 and layer.in_force is None
    with torch.no_grad():
        torch.testing.assert_close(run(model), wanted)
    assert len(finds) == 2 and layer.in_force is None


def test_blocks_nest_and_end_with_an_error():
    model = make()
    outputs = {v: run(model, threshold=v) for v in (0.5, 0.2)}
    with masked(model, 0.5):
        with masked(model, 0.2), pytest.raises(ZeroDivisionError):
            assert torch.equal(run(model), outputs[0.2]) and model.config.threshold == 0.2
            raise ZeroDivisionError
        assert torch.equal(run(model), outputs[0.5]) and model.config.threshold == 0.5
        assert torch.equal(model(**INPUTS, threshold=0.5).last_hidden_state, outputs[0.5])
        with pytest.raises(ValueError, match="threshold=0.2 inside a block masked at 0.5"):
            model(**INPUTS, threshold=0.2)
    assert all(layer.in_force is None for layer in masked_layers(model).values())


@every_method
def test_a_block_in_training_gives_the_gradients_of_its_masks(method):
    model = make(method).train()
    with masked(model, generator=torch.Generator().manual_seed(3)) as found:
        for name, layer in masked_layers(model).items():
            assert layer.in_force.mask is found.by_layer[name]
        losses = [loss_of(model) for _ in range(2)]
    assert torch.equal(*losses)  # the same sample of l0
    sampled = [loss_of(model) for _ in range(2)]
    assert torch.equal(*sampled) == (method != "l0")
    losses[0].backward()  # outside: the graph holds the masks
    assert model.get_submodule(LAYER).weight.grad.abs().sum() > 0


# --- never stale ---


def in_place(model):
    with torch.no_grad():
        for layer in masked_layers(model).values():
            if layer.mask_scores is None:
                layer.weight.copy_(layer.weight.roll(1, 0))
            else:
                layer.mask_scores.neg_()


def behind_autograd(model):
    for name, parameter in model.named_parameters():
        parameter.data.copy_(-parameter.data if "scores" in name else parameter.data.roll(1, 0))


def moving_average(model):
    torch.manual_seed(9)
    for parameter in model.parameters():
        parameter.data.lerp_(torch.randn_like(parameter), 0.5)


def load_state(model, **kwargs):
    torch.manual_seed(8)
    values = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(values, **kwargs)


def two_steps(model, optimizer):
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_by(optimizer, **options):
    return lambda model: two_steps(model, functools.partial(optimizer, **options))


CHANGES = {
    "in place": in_place,
    "through .data": behind_autograd,
    "moving average": moving_average,
    "load_state_dict": load_state,
    "load_state_dict, assign": functools.partial(load_state, assign=True),
    "double": lambda model: model.double(),
    "SGD": trained_by(torch.optim.SGD, lr=0.5),
    "fused AdamW": trained_by(torch.optim.AdamW, lr=0.1, fused=True),
    "foreach AdamW": trained_by(torch.optim.AdamW, lr=0.1, foreach=True),
    "build_optimizer": lambda model: two_steps(
        model, lambda _: build_optimizer(model, 1e-2, 1e-1, 0.0, 1e-8)
    ),
}


@scores_or_weights
@pytest.mark.parametrize("training", [False, True], ids=["changed in eval", "changed in train"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_forward_uses_stale_masks(method, change, training):
    model = make(method)
    before = run(model)
    with masked(model), torch.no_grad():
        model(**INPUTS)
    change(model.train(training))
    for mode in (True, False):
        after = model.train(mode)(**INPUTS).last_hidden_state
        torch.testing.assert_close(after, plain_output(model))
        assert not torch.allclose(after, before.to(after.dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_follow_the_device():
    model = make()
    wanted = run(model)
    got = model.cuda()(**{k: v.cuda() for k, v in INPUTS.items()}).last_hidden_state
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_a_stock_loop_moves_the_masks():
    model = make().train()  # the threshold is the configuration's
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    first = find_masks(model).by_layer[LAYER]
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(run(model), plain_output(model))
    last = find_masks(model).by_layer[LAYER]
    assert first.sum() == last.sum() and not torch.equal(first, last)


def test_a_stock_loop_with_thresholds_in_its_calls(tmp_path):
    model = make(threshold=None).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    first = find_masks(model, 0.4).by_layer[LAYER]
    for threshold in (0.8, 0.6, 0.4):
        loss_of(model, threshold=threshold).backward()
        optimizer.step()
        optimizer.zero_grad()
    last = find_masks(model).by_layer[LAYER]  # at the threshold of the last call
    assert first.sum() == last.sum() and not torch.equal(first, last)
    wanted = run(model.eval())
    torch.testing.assert_close(wanted, plain_output(model))
    model.save_pretrained(tmp_path)
    again = MaskedBertModel.from_pretrained(tmp_path).eval()
    assert again.config.threshold == 0.4
    assert torch.equal(again(**INPUTS).last_hidden_state, wanted)


@scores_or_weights
def test_weights_swapped_with_their_moving_average(method):
    model = make(method)
    torch.manual_seed(9)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    averages = {name: torch.randn_like(value) for name, value in weights.items()}
    outputs = []
    for values in (weights, averages, weights):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(values[name])
        with masked(model), torch.no_grad():
            outputs.append(run(model))
        torch.testing.assert_close(outputs[-1], plain_output(model))
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1])


@scores_or_weights
def test_pruning_of_torch(method):
    model, same = make(method), make(method)
    with masked(model), torch.no_grad():
        before = run(model)
    layer, plain = model.get_submodule(LAYER), same.get_submodule(LAYER)
    prune.l1_unstructured(layer, "weight", 0.9)
    for change in (lambda: None, lambda: layer.weight_orig.data.mul_(2)):
        change()
        plain.weight.data.copy_(layer.weight_orig * layer.weight_mask)
        wanted = run(same)
        assert not torch.allclose(wanted, before)
        torch.testing.assert_close(run(model), wanted)
        with masked(model), torch.no_grad():
            torch.testing.assert_close(run(model), wanted)
    prune.remove(layer, "weight")
    torch.testing.assert_close(run(model), wanted)


def test_averaged_models():
    model = make()
    averaged = torch.optim.swa_utils.AveragedModel(model)  # before any forward
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        with masked(model):
            model(**INPUTS)
        averaged.update_parameters(model)
    assert not torch.equal(
        averaged.module.get_submodule(LAYER).mask_scores, model.get_submodule(LAYER).mask_scores
    )
    torch.testing.assert_close(averaged(**INPUTS).last_hidden_state, plain_output(averaged.module))


@every_method
def test_copies_stand_alone_and_are_in_no_block(method):
    model = make(method)
    wanted, stream = run(model), io.BytesIO()
    with masked(model, 0.5), torch.no_grad():
        model(**INPUTS)
        torch.save(model, stream)
        stream.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        copies.append(torch.load(stream, weights_only=False))
    saved = {"weight", "bias", "mask_scores", *METHODS[method].state}
    assert {key.rpartition(".")[2] for key in model.state_dict()} <= saved
    behind_autograd(model)
    for other in copies:
        assert torch.equal(run(other), wanted)
        in_place(other)
        torch.testing.assert_close(run(other), plain_output(other))
