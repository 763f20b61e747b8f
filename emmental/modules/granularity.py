"""What one score stands for: a weight, as in the paper, a block of weights, a head or a neuron.

A pruned neuron has zeros in its row of the first matrix and in its column of the second. The neuron
still has a bias, but the column of zeros lets nothing of this bias through. A pruned head likewise
has its bias as its value, and zeros in its columns of the attention output. So biases need no mask.
The columns alone decide what a head or neuron adds. Training therefore masks the columns and leaves
the rows as they are. A score then has the gradient of a gate on its head or neuron, also when the
gate is closed.
"""

from collections.abc import Sequence

import torch
from torch import Size, Tensor

from .lists import is_traced, together


class Weight:
    """One score per weight, as in the paper.

    Another granularity is a class with the same methods and an object in `GRANULARITIES`. All
    scores of a matrix must stand for the same number of weights.
    """

    name = "weight"
    shared: tuple[str, ...] = ()  # of "heads", "neurons": those with one score for all matrices

    def sized(self, rows: int, columns: int) -> "Weight":
        """This granularity with blocks of another size, if it has blocks."""
        return self

    def shape(self, weight_shape: Size) -> Size:
        """The shape of the scores. Raises ValueError when they do not fit this matrix."""
        return weight_shape

    def expand(self, mask: Tensor, weight_shape: Size) -> Tensor:
        """A mask in the shape of the weights, or in one that broadcasts to it."""
        return mask

    def reduce(self, gradient: Tensor) -> Tensor:
        """A gradient in the shape of the weights, summed over the weights of each score."""
        return gradient

    def rank(self, weight: Tensor) -> Tensor:
        """What magnitude pruning ranks: the root mean square of the weights of each score."""
        return weight


class Block(Weight):
    """One score per block of `rows` x `columns` weights."""

    name = "block"

    def __init__(self, rows: int = 32, columns: int = 32):
        if min(rows, columns) < 1:
            raise ValueError(f"blocks have at least 1 x 1 weights, not {rows} x {columns}")
        self.rows, self.columns = rows, columns

    def sized(self, rows, columns):
        return type(self)(rows, columns)

    def shape(self, weight_shape):
        rows, columns = weight_shape
        if rows % self.rows or columns % self.columns:
            blocks = f"blocks of {self.rows} x {self.columns}"
            raise ValueError(f"{blocks} do not divide a matrix of {rows} x {columns} weights")
        return Size((rows // self.rows, columns // self.columns))

    def expand(self, mask, weight_shape):
        rows = mask[:, :, None].expand(-1, -1, self.columns).reshape(len(mask), 1, -1)
        return rows.expand(-1, self.rows, -1).reshape(weight_shape)  # copies whole rows: fast

    def reduce(self, gradient):
        rows, columns = self.shape(gradient.shape)
        return gradient.reshape(rows, self.rows, -1).sum(1).view(rows, columns, -1).sum(2)

    def rank(self, weight):
        squares = self.reduce(weight.float().square())
        return (squares * (squares.numel() / weight.numel())).sqrt()


class Rows(Weight):
    """One score per group of rows: for the `count` heads or neurons that a matrix computes."""

    def __init__(self, count: int, structure: str = ""):
        self.count, self.structure = count, structure  # "heads" or "neurons"

    def shape(self, weight_shape):
        return Size([self.count])

    def expand(self, mask, weight_shape):
        return mask[:, None].expand(-1, weight_shape[0] // self.count).reshape(-1, 1)

    def reduce(self, gradient):
        return gradient.reshape(self.count, -1).sum(1)

    rank = Block.rank


class Columns(Rows):
    """One score per group of columns: for the `count` heads or neurons that a matrix reads."""

    def expand(self, mask, weight_shape):
        return mask[:, None].expand(-1, weight_shape[1] // self.count).reshape(-1)

    def reduce(self, gradient):
        return gradient.reshape(len(gradient), self.count, -1).sum((0, 2))


class Structure(Weight):
    """One score per head, and one per neuron: for its weights in all matrices of its layer."""

    name, shared = "structure", ("heads", "neurons")


class Hybrid(Block):
    """Blocks in attention, neurons in the feed-forward part (Lagunas et al. 2021)."""

    name, shared = "hybrid", ("neurons",)


GRANULARITIES = {g.name: g for g in (Weight(), Block(), Structure(), Hybrid())}


def find_granularity(name: str | Weight) -> Weight:
    """The granularity of this name, or the object itself. Raises ValueError for an unknown name."""
    if isinstance(name, str) and name not in GRANULARITIES:
        known = ", ".join(GRANULARITIES)
        raise ValueError(f"unknown granularity {name!r}: choose one of {known}")
    return GRANULARITIES[name] if isinstance(name, str) else name


def apply_each(
    function: str, granularities: Sequence[Weight], tensors: Sequence[Tensor], *arguments: Sequence
) -> list[Tensor]:
    """`function` ("expand", "reduce" or "rank") of each granularity, with its tensor and arguments.

    On a GPU, tensors of the same shape, granularity and arguments are stacked and go together.
    """
    calls = list(zip(granularities, tensors, *arguments, strict=True))
    if not together(tensors[0]) or is_traced() or torch.compiler.is_compiling():
        return [getattr(granularity, function)(*given) for granularity, *given in calls]
    alike: dict[tuple, list[int]] = {}
    for place, (granularity, tensor, *rest) in enumerate(calls):
        alike.setdefault((granularity, tensor.shape, *rest), []).append(place)
    results = list(tensors)  # right for a score per weight
    for (granularity, _, *rest), places in alike.items():
        if type(granularity) is not Weight:
            stack = torch.stack([tensors[place] for place in places])
            act = getattr(granularity, function)
            rows = torch.vmap(lambda tensor: act(tensor, *rest))(stack)
            for place, row in zip(places, rows, strict=True):
                results[place] = row
    return results
