"""Penalties and distillation against formulas written out."""

import math

import pytest
import torch
from torch import nn

from emmental.losses import distillation_loss, regression_distillation_loss, regularization
from emmental.modules import MaskedLinear


def make_model(method="sigmoied_threshold"):
    torch.manual_seed(2)
    shapes = [(3, 5), (20, 4), (1, 1)]
    layers = [MaskedLinear(i, o, True, "uniform", 3.0, method) for i, o in shapes]
    return nn.Sequential(*layers, nn.Linear(4, 4))


@pytest.mark.parametrize("mode", ["l0", "l1"])
def test_regularization_value_and_gradient(mode):
    model = make_model("l0" if mode == "l0" else "sigmoied_threshold")
    shift = (2 / 3) * math.log(0.1 / 1.1) if mode == "l0" else 0.0
    means, slopes = [], []
    for layer in list(model)[:3]:
        gates = [1 / (1 + math.exp(-(s - shift))) for s in layer.mask_scores.reshape(-1).tolist()]
        means.append(sum(gates) / len(gates))
        slopes.append([g * (1 - g) / len(gates) / 3 for g in gates])

    penalty = regularization(model, mode)
    penalty.backward()
    assert penalty.item() == pytest.approx(sum(means) / 3, rel=1e-6)
    for layer, slope in zip(model, slopes, strict=False):
        torch.testing.assert_close(layer.mask_scores.grad.reshape(-1), torch.tensor(slope))
        assert layer.weight.grad is None
    assert model[3].weight.grad is None


@pytest.mark.parametrize("mode", ["l2", "", "null", "L1", None])
def test_unknown_regularization_is_refused(mode):
    with pytest.raises(ValueError, match="l0, l1"):
        regularization(make_model(), mode)


def test_regularization_needs_scores():
    for model in make_model("magnitude"), nn.Linear(2, 2):
        with pytest.raises(ValueError, match="scores"):
            regularization(model, "l1")


def softmax(row, temperature):
    exps = [math.exp((x - max(row)) / temperature) for x in row]
    return [e / sum(exps) for e in exps]


def plain_kl(student, teacher, temperature):
    """T^2 * mean over the batch of sum p log(p / q), in Python floats."""
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return temperature**2 * sum(rows) / len(rows)


def make_logits(count, shape=(3, 6)):
    torch.manual_seed(8)
    return [tuple(2 * torch.randn(shape) for _ in range(count)) for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_distillation_value(temperature, count):
    student, teacher = make_logits(count)
    pairs = zip(student, teacher, strict=True)
    expected = sum(plain_kl(s, t, temperature) for s, t in pairs) / count
    found = distillation_loss(student, teacher, temperature).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_distillation_gradient_is_the_difference_of_probabilities():
    (student,), (teacher,) = make_logits(1)
    student.requires_grad_()
    distillation_loss((student,), (teacher,), 2.0).backward()
    difference = torch.softmax(student.detach() / 2, -1) - torch.softmax(teacher / 2, -1)
    torch.testing.assert_close(student.grad, 2.0 * difference / 3)  # T^2 * (1/T) / batch


def test_distillation_of_identical_logits_is_zero():
    (logits, other), _ = make_logits(2)
    logits.requires_grad_()
    loss = distillation_loss((logits, other), (logits.detach().clone(), other.clone()), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    assert logits.grad.abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_logits_stay_finite(dtype):
    low = -1e4 if dtype == torch.float16 else -1e9
    (student,), (teacher,) = make_logits(1)
    expected = plain_kl(student[:, :4].to(dtype).float(), teacher[:, :4].to(dtype).float(), 2.0)
    student, teacher = student.to(dtype), teacher.to(dtype)
    student[:, 4:] = teacher[:, 4:] = low
    student.requires_grad_()
    loss = distillation_loss((student,), (teacher,), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(student.grad).all() and (student.grad[:, 4:] == 0).all()


def test_regression_distillation_is_the_mean_squared_error():
    student, teacher = make_logits(2, (5, 1))
    pairs = zip(student, teacher, strict=True)
    squares = [(s[i, 0].item() - t[i, 0].item()) ** 2 for s, t in pairs for i in range(5)]
    found = regression_distillation_loss(student, teacher).item()
    assert found == pytest.approx(sum(squares) / 10, rel=1e-6)


@pytest.mark.parametrize(
    "loss", [lambda s, t: distillation_loss(s, t, 2.0), regression_distillation_loss]
)
@pytest.mark.parametrize(
    "shapes", [([(2, 3)], [(2, 4)]), ([(2, 3)], [(2, 3), (2, 3)]), ([], []), ([(2, 1)], [(2, 3)])]
)
def test_logits_that_do_not_match_are_refused(loss, shapes):
    student, teacher = (tuple(torch.zeros(shape) for shape in side) for side in shapes)
    with pytest.raises(ValueError, match="do not match"):
        loss(student, teacher)
