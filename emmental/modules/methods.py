"""The pruning methods, one class each: the mask M that follows from scores S, and their gradient.

A masked layer computes y = (W * M) x + b. A mask has no derivative. All methods but `l0` therefore
use the straight-through estimator, which takes the mask for the scores (paper, section 4):

    dL/dS = dL/dM = dL/d(W * M) * W

So a score falls while its weight moves towards zero, and rises while its weight moves away.
To add a method, write a class and add an object of it to `METHODS`. The flags, the fields of
`config.json`, and what is saved and resumed follow from the class.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .granularity import apply_each
from .lists import by_stack
from .numeric import MeanSigmoid, check_fraction, check_values, logit, uniform_noise
from .topk import keep_above, keep_largest


@dataclass(frozen=True)
class Setting:
    """A number of a method: a flag, a field of `config.json`, and an attribute of the layers.

    above, below: bounds that the number must not reach.
    """

    name: str
    default: float
    help: str
    above: float = -math.inf
    below: float = math.inf


class Method:
    """What every pruning method defines.

    name, title: the word after `--pruning_method`; the name in reports.
    scores: "learned" by the optimizer, "observed" by `observe`, or None: weights are ranked.
    threshold_is: the fraction that "remains", a cut on the "sigmoid" of the scores (both in
        [0, 1]), a cut on the "score" itself, or None: the method has no threshold.
    penalty: the name, for `--regularization`, of the penalty that makes the model sparse, or None.
    absolute: whether the method ranks absolute values.
    ranks_together: whether `global_topk` can rank all matrices together.
    has_floor: whether every matrix keeps at least 0.5% of its weights.
    settings: the numbers of the method. state: names of further tensors of a layer, in the shape of
        its scores. These tensors begin at 0, and are saved and resumed like the scores.
    observe: None, or a method `observe(layers, grads)` that updates tensors of the layers in place,
        once per update. `grads` are the straight-through dL/dS, and may be overwritten. All ranks
        must get the same results.
    """

    name: str
    title: str
    scores: str | None = "learned"
    threshold_is: str | None = "remains"
    penalty: str | None = None
    absolute = has_floor = False
    ranks_together, observe = True, None
    settings: tuple[Setting, ...] = ()
    state: tuple[str, ...] = ()

    def sources(self, layers) -> list[Tensor]:
        """For layers that hold scores, what their masks follow from, in the shape of the scores.

        Raises ValueError where there are no values to compare: in a trace, and for sharded layers.
        """
        for layer in layers:
            check_values(layer.weight, layer.mask_scores)
        if self.scores:
            return [layer.mask_scores for layer in layers]
        return magnitudes(layers)

    def masks(
        self, sources: list[Tensor], threshold: float, sampled=False, generator=None
    ) -> list[Tensor]:
        """One mask for each matrix of scores (or weights), in its shape: booleans, or in [0, 1].

        sampled: whether masks may be random, as in training, with noise from `generator`.
        Raises ValueError for a fraction outside [0, 1].
        """
        raise NotImplementedError

    def masks_above(self, sources: list[Tensor], score: float) -> list[Tensor]:
        """The masks if all weights with scores up to `score` were pruned."""
        return keep_above(sources, score)

    def counts(self, sources: list[Tensor], threshold: float) -> list[int] | None:
        """How many scores `masks` keeps of each matrix, if the method knows without looking."""
        return None

    def scores_gradient(self, scores: Tensor, mask: Tensor, grad: Tensor, sampled: bool) -> Tensor:
        """dL/dS from `grad` = dL/dM, which may be overwritten. By default straight through.

        Works entry by entry: the tensors are a matrix, or the entries of several in a row.
        """
        return grad

    def penalty_of(self, scores: list[Tensor]) -> Tensor:
        """The penalty of each matrix, averaged over the matrices: a scalar in [0, 1]."""
        raise NotImplementedError

    def closing_score(self, threshold: float) -> float:
        """The score below which a weight is pruned, for methods with a penalty."""
        raise NotImplementedError

    def usual_lambda(self, remaining: float) -> float | None:
        """The final lambda that usually leaves this fraction of the weights, if it is known."""
        return None


class TopK(Method):
    """Movement pruning: M = 1 on the `int(v * n)` largest scores, exactly that many (eq. 2)."""

    name, title = "topK", "movement"

    def masks(self, sources, threshold, sampled=False, generator=None):
        return keep_largest(sources, self.counts(sources, threshold), self.absolute)

    def counts(self, sources, threshold):
        fraction = check_fraction(threshold)
        return [int(fraction * source.numel()) for source in sources]


class Magnitude(TopK):
    """Magnitude pruning: M = 1 on the `int(v * n)` largest |W| (Han et al. 2015)."""

    name, title = "magnitude", "magnitude"
    scores, absolute = None, True


class Sensitivity(TopK):
    """Ranks weights by a running mean of their importance I = |W * dL/d(W * M)|."""

    name, title, scores = "sensitivity", "sensitivity", "observed"
    settings = (
        Setting(
            "importance_beta", 0.85, "weight of the past in the running mean of |W dL/dW|", 0, 1
        ),
    )

    def observe(self, layers, grads):
        torch._foreach_abs_(grads)
        means = [layer.mask_scores for layer in layers]
        torch._foreach_lerp_(means, grads, 1 - layers[0].importance_beta)


class Platon(Sensitivity):
    """PLATON (Zhang et al. 2022): ranks weights by J * U, the running means of I and |I - J|."""

    name, title = "platon", "PLATON"
    state = ("mask_uncertainty",)
    settings = (
        *Sensitivity.settings,
        Setting("uncertainty_beta", 0.95, "weight of the past in the mean uncertainty", 0, 1),
    )

    def observe(self, layers, grads):
        super().observe(layers, grads)
        torch._foreach_sub_(grads, [layer.mask_scores for layer in layers])
        torch._foreach_abs_(grads)
        means = [layer.mask_uncertainty for layer in layers]
        torch._foreach_lerp_(means, grads, 1 - layers[0].uncertainty_beta)

    def sources(self, layers):
        means = [scores.detach() for scores in super().sources(layers)]
        return list(torch._foreach_mul(means, [layer.mask_uncertainty for layer in layers]))


class Threshold(Method):
    """Movement pruning with a cut on the scores: M = 1 where S > v. With `global_topk`, as topK."""

    name, title = "threshold", "movement"
    threshold_is, has_floor = "score", True

    def masks(self, sources, threshold, sampled=False, generator=None):
        return keep_above(sources, float(threshold))


class SoftMovement(Method):
    """Soft movement pruning: M = 1 where sigmoid(S) > v (section 4.2).

    The penalty is mean(sigmoid(S)). The straight-through gradient leaves out the sigmoid.
    """

    name, title = "sigmoied_threshold", "soft movement"
    threshold_is, penalty = "sigmoid", "l1"
    ranks_together, has_floor = False, True

    def masks(self, sources, threshold, sampled=False, generator=None):
        return keep_above(sources, self.closing_score(threshold))

    def penalty_of(self, scores):
        return MeanSigmoid.apply(0.0, *scores)

    def closing_score(self, threshold):
        return logit(check_fraction(threshold))

    def usual_lambda(self, remaining):
        return 140 * ((1 - remaining) / remaining) ** 0.65  # fits the paper's SQuAD runs


class L0(Method):
    """L0 regularization with the hard concrete distribution (Louizos et al. 2018).

    M = clamp(g (r - l) + l, 0, 1) with l = -0.1, r = 1.1. In evaluation g = sigmoid(S), in training
    g = sigmoid((log u - log(1 - u) + S) / b) with b = 2/3, u ~ U(1e-4, 1 - 1e-4). The gradient is
    exact. The penalty is mean(sigmoid(S - b log(-l / r))), the probability of M > 0 (eq. 12).
    """

    name, title = "l0", "l0"
    threshold_is, penalty, ranks_together = None, "l0", False
    LEFT, RIGHT, TEMPERATURE, MARGIN = -0.1, 1.1, 2 / 3, 1e-4
    WIDTH = RIGHT - LEFT

    def masks(self, sources, threshold=None, sampled=False, generator=None):
        sources = [source.detach() for source in sources]
        return by_stack(lambda scores: self._mask(scores, sampled, generator), sources)

    def _mask(self, scores: Tensor, sampled: bool, generator: torch.Generator | None) -> Tensor:
        if sampled:
            noise = uniform_noise(scores, generator, self.MARGIN).logit_()
            gate = noise.add_(scores).div_(self.TEMPERATURE).sigmoid_()
        else:
            gate = torch.sigmoid(scores)
        return gate.mul_(self.WIDTH).add_(self.LEFT).clamp_(0.0, 1.0)

    def masks_above(self, sources, score):
        return [source.detach() > score for source in sources]

    def scores_gradient(self, scores, mask, grad, sampled):
        # Where 0 < M < 1: g = (M - l) / (r - l) and dM/dS = g (1 - g) (r - l) / b. Elsewhere: 0.
        gate = (mask / self.WIDTH).sub_(self.LEFT / self.WIDTH)
        grad.mul_(self.WIDTH / (self.TEMPERATURE if sampled else 1.0))
        torch.ops.aten.sigmoid_backward(grad, gate, grad_input=gate)
        return torch.ops.aten.hardtanh_backward(gate, mask, 0.0, 1.0, grad_input=grad)

    def penalty_of(self, scores):
        shift = self.TEMPERATURE * math.log(-self.LEFT / self.RIGHT)
        return MeanSigmoid.apply(shift, *scores)

    def closing_score(self, threshold=None):
        return logit(-self.LEFT / self.WIDTH)  # M = 0 in evaluation

    def usual_lambda(self, remaining):
        return 15 * ((1 - remaining) / remaining) ** 1.1  # fits the paper's SQuAD runs


def magnitudes(layers) -> list[Tensor]:
    """What magnitude pruning ranks: the weights, or the root mean squares of larger structures."""
    members = [member for layer in layers for member in layer.group]
    weights = [member.weight.detach() for member in members]
    ranks = iter(apply_each("rank", [member.granularity for member in members], weights))
    groups = [[next(ranks) for _ in layer.group] for layer in layers]
    return [_root_mean_square(group) if len(group) > 1 else group[0] for group in groups]


def _root_mean_square(tensors: list[Tensor]) -> Tensor:
    stack = torch.stack(tensors)
    return torch.linalg.vector_norm(stack, dim=0).div_(len(stack) ** 0.5)


_ALL = TopK(), Threshold(), SoftMovement(), Magnitude(), L0(), Sensitivity(), Platon()
METHODS = {method.name: method for method in _ALL}


def find_method(name: str) -> Method:
    """The method of this name. Raises ValueError for an unknown name."""
    if name not in METHODS:
        raise ValueError(f"unknown pruning_method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def all_settings() -> dict[str, Setting]:
    """The settings of all methods by name."""
    return {setting.name: setting for m in METHODS.values() for setting in m.settings}


def score_suffixes() -> tuple[str, ...]:
    """The endings of the names of scores, and of methods' further tensors, in a state dict."""
    state = dict.fromkeys(name for method in METHODS.values() for name in method.state)
    return ".mask_scores", *(f".{name}" for name in state)
