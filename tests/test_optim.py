"""The optimiser against the paper's update in float64."""

import math

import pytest
import torch
from tiny import make

from emmental.modules.methods import METHODS
from emmental.training.optim import build_optimizer, set_learning_rates

EPS = 1e-8


class Model(torch.nn.Module):
    """One parameter of each group."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6, 1))
        self.bias = torch.nn.Parameter(torch.randn(6))
        self.mask_scores = torch.nn.Parameter(torch.zeros(6))


def gradients(steps, scale, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(6, generator=generator) for _ in range(steps)]


def run(optimizer, model, grads):
    for grad in grads:
        for parameter in model.parameters():
            parameter.grad = grad.clone().view_as(parameter)
        optimizer.step()


def paper_adamw(start, grads, rate, eps):
    """lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps), written out in Python floats."""
    values = start.flatten().tolist()
    for i in range(len(values)):
        m = v = 0.0
        for t, grad in enumerate(grads, start=1):
            g = grad.tolist()[i]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            values[i] -= rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (math.sqrt(v) + eps)
    return torch.tensor(values).view_as(start)


@pytest.mark.parametrize("scale", [1e-9, 1e-8, 1e-6, 1.0])
def test_fifty_steps_are_the_papers(scale):
    model, grads = Model(), gradients(50, scale)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run(build_optimizer(model, 1e-3, 1e-2, 0.0, EPS), model, grads)
    for name, rate in [("mask_scores", 1e-2), ("weight", 1e-3), ("bias", 1e-3)]:
        moved = getattr(model, name).detach() - start[name]
        expected = paper_adamw(start[name].double(), grads, rate, EPS) - start[name]
        error = 1e-9 if name == "mask_scores" else 1e-6
        torch.testing.assert_close(moved, expected.float(), rtol=2e-4, atol=error)


def test_tiny_gradients_tell_it_from_plain_adamw():
    ours, torchs, grads = Model(), Model(), gradients(50, 1e-8)
    run(build_optimizer(ours, 1e-3, 1e-2, 0.0, EPS), ours, grads)
    run(torch.optim.AdamW(torchs.parameters(), lr=1e-2, eps=EPS, weight_decay=0.0), torchs, grads)
    difference = (ours.mask_scores - torchs.mask_scores).norm() / torchs.mask_scores.norm()
    assert difference > 0.1


def test_decay_is_decoupled_and_of_weights_only():
    model = Model()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run(build_optimizer(model, 1e-3, 1e-2, 0.1, EPS), model, [torch.zeros(6)])
    assert torch.equal(model.bias, start["bias"])
    assert torch.equal(model.mask_scores, start["mask_scores"])
    torch.testing.assert_close(model.weight.detach(), start["weight"] * (1 - 1e-3 * 0.1))


def test_groups_of_a_masked_bert():
    model = make("topK", "ForSequenceClassification")
    optimizer = build_optimizer(model, 3e-5, 1e-2, 0.01, EPS)
    groups = {group["name"]: group for group in optimizer.param_groups}
    names = {parameter: name for name, parameter in model.named_parameters()}
    members = {kind: {names[p] for p in group["params"]} for kind, group in groups.items()}

    trainable = {name for name in names.values() if not name.startswith("bert.embeddings.")}
    scores = {name for name in trainable if name.endswith(".mask_scores")}
    no_decay = {name for name in trainable if name.endswith(".bias") or "LayerNorm" in name}
    assert len(scores) == 12
    others = trainable - scores - no_decay
    assert members == {"scores": scores, "no_decay": no_decay, "weights": others}
    assert {kind: (g["lr"], g["weight_decay"]) for kind, g in groups.items()} == {
        "scores": (1e-2, 0.0),
        "weights": (3e-5, 0.01),
        "no_decay": (3e-5, 0.0),
    }
    set_learning_rates(optimizer, 0.5)
    set_learning_rates(optimizer, 0.25)  # of the peak, not of the last one
    assert [g["lr"] for g in groups.values()] == [0.25 * 1e-2, 0.25 * 3e-5, 0.25 * 3e-5]


@pytest.mark.parametrize("method", METHODS)
def test_learned_scores_alone_have_a_group(method):
    optimizer = build_optimizer(make(method), 3e-5, 1e-2, 0.01, EPS)
    names = {group["name"] for group in optimizer.param_groups}
    assert names == {"weights", "no_decay", *["scores"] * (METHODS[method].scores == "learned")}


@pytest.mark.parametrize("scale", [1e-8, 1.0])
def test_saved_and_loaded_it_continues_bit_identically(scale, tmp_path):
    grads = gradients(20, scale)
    straight, resumed = Model(), Model()
    run(build_optimizer(straight, 1e-3, 1e-2, 0.1, EPS), straight, grads)

    optimizer = build_optimizer(resumed, 1e-3, 1e-2, 0.1, EPS)
    run(optimizer, resumed, grads[:7])
    state = {"model": resumed.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = Model()
    again.load_state_dict(saved["model"])
    optimizer = build_optimizer(again, 1e-3, 1e-2, 0.1, EPS)
    optimizer.load_state_dict(saved["optimizer"])
    run(optimizer, again, grads[7:])
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, getattr(again, name)), name


def test_a_step_that_the_gradient_scaler_skips_is_not_counted():
    model, grads = Model(), gradients(10, 1e-8)
    optimizer = build_optimizer(model, 1e-3, 1e-2, 0.0, EPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for number in range(11):
        for parameter in model.parameters():
            grad = grads[number - (number > 3)] * scaler.get_scale()
            grad = torch.full_like(grad, torch.inf) if number == 3 else grad
            parameter.grad = grad.view_as(parameter)
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    expected = paper_adamw(torch.zeros(6, dtype=torch.float64), grads, 1e-2, EPS)
    torch.testing.assert_close(model.mask_scores.detach(), expected.float(), rtol=2e-4, atol=1e-9)
