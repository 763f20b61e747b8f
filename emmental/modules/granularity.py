"""What one score stands for. The paper's granularity is the weight; blocks, rows or heads are others."""

from torch import Size, Tensor


class Weight:
    """One score per weight, as in the paper.

    Another granularity is a class with the same methods. Scores, masks and their gradients then have
    the shape of `shape`; only `expand` and `reduce` know how they lie over the weights. Every score
    of a matrix must stand for the same number of weights.
    """

    name = "weight"

    def shape(self, weight_shape: Size) -> Size:
        """Shape of the scores of a matrix of this shape. Raises ValueError where they do not fit it."""
        return weight_shape

    def expand(self, mask: Tensor, weight_shape: Size) -> Tensor:
        """A mask (or scores) in the shape of the weights."""
        return mask

    def reduce(self, gradient: Tensor) -> Tensor:
        """A gradient in the shape of the weights, summed over the weights of each score."""
        return gradient

    def rank(self, weight: Tensor) -> Tensor:
        """What magnitude pruning ranks by absolute value: a norm of the weights of each score."""
        return weight


GRANULARITIES = {granularity.name: granularity for granularity in (Weight(),)}
