"""The pruning methods, one class each: which mask M follows from the scores S, and which gradient goes back to S.

A masked layer computes y = (W * M) x + b. Masks are not differentiable; for all methods but `l0` the gradient goes
"straight through" to the scores, as if the mask were the scores themselves: dL/dS = dL/dM = dL/d(W * M) * W. A score
so falls when its weight moves towards zero (paper, section 4).

To add a method, add a class and its name to `METHODS`: flags, loading, counting and exporting ask the object.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .topk import keep_above, keep_largest


class Method:
    """What a pruning method is asked for; the subclasses say how it answers.

    name: how `--pruning_method` spells it. title: the paper's name for it.
    scores: "learned" by the optimiser, "observed" by `observe`, or None: the mask ranks norms of the weights.
    threshold: what the threshold is: the fraction that "remains", a cut on "sigmoid" of the scores (both in [0, 1]),
        a cut on the "score" itself, or None where there is none.
    penalty: name of the penalty that makes it sparse, or None where the threshold alone does.
    ranks_together: whether `global_topk` can rank all matrices together.
    has_floor: whether a matrix keeps 0.5% of its weights whatever the threshold.
    observe: None, or a method `observe(layer, grad)` that updates the scores of a layer in place. It is called once per
        update with dL/dS of the straight-through estimator, the same on every rank.
    """

    name: str
    title: str
    scores: str | None = "learned"
    threshold: str | None = "remains"
    penalty: str | None = None
    ranks_together = True
    has_floor = False
    observe: Callable | None = None

    @property
    def is_fraction(self) -> bool:
        """Whether thresholds must lie in [0, 1]."""
        return self.threshold in ("remains", "sigmoid")

    def masks(
        self, sources: list[Tensor], threshold: float, sampled: bool = False, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Masks of these scores (or norms), of their shapes: boolean, or floats in [0, 1].

        sampled: in training, where masks may be random; `generator` is the source of their noise. Raises ValueError
        for a threshold out of its range.
        """
        raise NotImplementedError

    def masks_above(self, sources: list[Tensor], score: float) -> list[Tensor]:
        """Masks that would remain if all weights with scores up to `score` were pruned."""
        return keep_above(sources, score)

    def scores_gradient(self, mask: Tensor, grad: Tensor, sampled: bool) -> Tensor:
        """dL/dS from dL/dM, of the same shape: straight through. `grad` may be overwritten."""
        return grad

    def penalty_of(self, scores: Tensor) -> Tensor:
        """The penalty on one matrix of scores, a scalar in [0, 1]."""
        raise NotImplementedError

    def closing_score(self, threshold: float) -> float:
        """The score at which a weight is pruned at this threshold, for methods with a penalty."""
        raise ValueError(f"{self.name} prunes at no fixed score")


class TopK(Method):
    """Movement pruning: M = 1 on the `int(v * n)` largest scores, exactly that many (paper, eq. 2)."""

    name, title = "topK", "movement"

    def masks(self, sources, threshold, sampled=False, generator=None):
        fraction = check_fraction(threshold)
        return keep_largest(sources, [int(fraction * source.numel()) for source in sources])


class Magnitude(TopK):
    """Magnitude pruning: M = 1 on the `int(v * n)` largest |W|; W gets dL/d(W * M) * M (Han et al. 2015)."""

    name, title = "magnitude", "magnitude"
    scores = None


class Threshold(Method):
    """Movement pruning with a cut on the scores: M = 1 where S > v. With `global_topk`, as topK."""

    name, title = "threshold", "movement"
    threshold = "score"
    has_floor = True

    def masks(self, sources, threshold, sampled=False, generator=None):
        return keep_above(sources, float(threshold))


class SoftMovement(Method):
    """Soft movement pruning: M = 1 where sigmoid(S) > v; the penalty is the mean of sigmoid(S) (paper, section 4.2).

    The gradient goes straight through, without the derivative of the sigmoid.
    """

    name, title = "sigmoied_threshold", "soft movement"
    threshold = "sigmoid"
    penalty = "l1"
    ranks_together = False
    has_floor = True

    def masks(self, sources, threshold, sampled=False, generator=None):
        return keep_above(sources, self.closing_score(threshold))

    def penalty_of(self, scores):
        return MeanSigmoid.apply(scores, 0.0)

    def closing_score(self, threshold):
        return logit(check_fraction(threshold))


class L0(Method):
    """L0 regularisation by the hard concrete distribution (Louizos et al. 2018), with l = -0.1, r = 1.1, b = 2/3.

    g = sigmoid((log u - log(1 - u) + S) / b) with u ~ U(1e-4, 1 - 1e-4) in training, g = sigmoid(S) in evaluation;
    M = clamp(g (r - l) + l, 0, 1). The penalty is the mean of sigmoid(S - b log(-l / r)), the probability that a
    gate is open (eq. 12). The gradient is exact.
    """

    name, title = "l0", "l0"
    threshold = None
    penalty = "l0"
    ranks_together = False
    LEFT, RIGHT, TEMPERATURE = -0.1, 1.1, 2 / 3

    def masks(self, sources, threshold=None, sampled=False, generator=None):
        return [self._gate(source.detach(), sampled, generator) for source in sources]

    def _gate(self, scores: Tensor, sampled: bool, generator: torch.Generator | None) -> Tensor:
        if sampled:
            gate = uniform_noise(scores, generator).logit_().add_(scores).div_(self.TEMPERATURE).sigmoid_()
        else:
            gate = torch.sigmoid(scores)
        return gate.mul_(self.RIGHT - self.LEFT).add_(self.LEFT).clamp_(0.0, 1.0)

    def masks_above(self, sources, score):
        return [source.detach() > score for source in sources]

    def scores_gradient(self, mask, grad, sampled):
        # Inside (0, 1) the mask determines the gate g = (M - l) / (r - l), and dM/dS = g (1 - g) (r - l) / b.
        width = self.RIGHT - self.LEFT
        gate = (mask / width).sub_(self.LEFT / width)
        grad.mul_(width / (self.TEMPERATURE if sampled else 1.0))
        torch.ops.aten.sigmoid_backward(grad, gate, grad_input=gate)
        return torch.ops.aten.hardtanh_backward(gate, mask, 0.0, 1.0, grad_input=grad)  # 0 where the clamp holds

    def penalty_of(self, scores):
        return MeanSigmoid.apply(scores, self.TEMPERATURE * math.log(-self.LEFT / self.RIGHT))

    def closing_score(self, threshold=None):
        return logit(-self.LEFT / (self.RIGHT - self.LEFT))  # where the gate of evaluation closes


METHODS: dict[str, Method] = {m.name: m for m in (TopK(), Threshold(), SoftMovement(), Magnitude(), L0())}


def find_method(name: str) -> Method:
    """The method of this name. Raises ValueError for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"unknown pruning_method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def uniform_noise(scores: Tensor, generator: torch.Generator | None = None, margin: float = 1e-4) -> Tensor:
    """Noise u ~ U(margin, 1 - margin) of the shape of `scores`.

    On a CPU torch's generator only seeds NumPy's SFC64, which is three times as fast as torch's own.
    """
    if scores.device.type != "cpu":
        return torch.empty_like(scores).uniform_(margin, 1 - margin, generator=generator)
    seed = torch.randint(2**63 - 1, (), generator=generator).item()
    words = np.random.SFC64(seed).random_raw((scores.numel() + 1) // 2).view(np.int32)[: scores.numel()]
    noise = torch.from_numpy(words).to(scores.dtype).reshape(scores.shape)
    return noise.mul_(2.0**-32 * (1 - 2 * margin)).add_(0.5)


class MeanSigmoid(torch.autograd.Function):
    """mean(sigmoid(S - shift)), keeping S alone: the sigmoids of all matrices would be a second set of scores."""

    @staticmethod
    def forward(ctx, scores: Tensor, shift: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.shift = shift
        return MeanSigmoid._sigmoid(scores, shift).mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (scores,) = ctx.saved_tensors
        probability = MeanSigmoid._sigmoid(scores, ctx.shift)
        return torch.ops.aten.sigmoid_backward(grad / scores.numel(), probability, grad_input=probability), None

    @staticmethod
    def _sigmoid(scores: Tensor, shift: float) -> Tensor:
        return (scores - shift).sigmoid_() if shift else scores.sigmoid()


def logit(fraction: float) -> float:
    """Inverse of the sigmoid; -inf at 0 and +inf at 1."""
    if fraction <= 0.0:
        return -math.inf
    if fraction >= 1.0:
        return math.inf
    return math.log(fraction) - math.log1p(-fraction)


def check_fraction(threshold: float) -> float:
    """`threshold` as a float. Raises ValueError outside [0, 1]."""
    threshold = float(threshold)
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"the threshold is a fraction of weights and must lie in [0, 1], got {threshold}")
    return threshold
