"""What one score stands for: in the paper, one weight."""

from torch import Size, Tensor


class Weight:
    """One score per weight, as in the paper.

    Another granularity, such as blocks, rows or heads, is a class with the same methods. All scores
    of a matrix must stand for the same number of weights.
    """

    name = "weight"

    def shape(self, weight_shape: Size) -> Size:
        """The shape of the scores. Raises ValueError when they do not fit this matrix."""
        return weight_shape

    def expand(self, mask: Tensor, weight_shape: Size) -> Tensor:
        """A mask in the shape of the weights."""
        return mask

    def reduce(self, gradient: Tensor) -> Tensor:
        """A gradient in the shape of the weights, summed over the weights of each score."""
        return gradient

    def rank(self, weight: Tensor) -> Tensor:
        """What magnitude pruning ranks by absolute value: a norm of the weights of each score."""
        return weight


GRANULARITIES = {granularity.name: granularity for granularity in (Weight(),)}
