"""Which examples make up which update: a pure function of seed and step.

Examples of similar length share a batch, so that little is padded: an epoch's random order is cut into
pools, each pool is sorted by length and cut into batches, and the batches are shuffled. A batch is
global: the ranks share it out, so that several processes see what one would. Resuming needs no
replay: the update after step s is the same whoever asks.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

POOL = 64  # batches whose examples are sorted by length together


class BatchPlan:
    """Batches of a training run.

    lengths: tokens of each example. batch_size: examples of a batch over all ranks. accumulation:
    batches of an update; the last update of an epoch may have fewer, and its last batch be smaller.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, accumulation: int, seed: int):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.updates_per_epoch = math.ceil(math.ceil(len(self.lengths) / batch_size) / accumulation)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def total_updates(self, epochs: float) -> int:
        """Updates of so many epochs, which may be fractional."""
        return math.ceil(
            round(self.updates_per_epoch * epochs, 6)
        )  # 100 * 1.1 is 110.00000000000001

    def update(self, step: int) -> list[np.ndarray]:
        """The batches, arrays of example indices, of the update after `step` completed ones."""
        epoch, place = divmod(step, self.updates_per_epoch)
        return self._epoch(epoch)[place * self.accumulation : (place + 1) * self.accumulation]

    def _make_epoch(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        pools = np.split(order, range(POOL * self.batch_size, len(order), POOL * self.batch_size))
        order = np.concatenate(
            [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        )
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        for batch in batches:
            batch.flags.writeable = False  # they are cached
        return [batches[i] for i in generator.permutation(len(batches))]


class LocalBatches:
    """A rank's share of the batches of updates `start` to `stop`, as a sampler of a DataLoader.

    A rank that gets nothing of a small batch is given one example of it, which `share` weighs with 0.
    """

    def __init__(self, plan: BatchPlan, start: int, stop: int, rank: int, world_size: int):
        self.plan, self.start, self.stop = plan, start, stop
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            for batch in self.plan.update(step):
                local = batch[self.rank :: self.world_size]
                yield (local if len(local) else batch[:1]).tolist()

    def shares(self, step: int) -> list[float]:
        """For each batch of an update, the part of the update's examples that this rank holds."""
        batches = self.plan.update(step)
        total = sum(len(batch) for batch in batches)
        return [len(batch[self.rank :: self.world_size]) / total for batch in batches]


class UpdateBatches:
    """The batches of one update after the other, as a loader over `local` yields them."""

    def __init__(self, local: LocalBatches, loader: Iterable[dict[str, Tensor]]):
        self.local, self.loader = local, iter(loader)

    def take(self, step: int) -> tuple[Iterator[dict[str, Tensor]], list[float]]:
        """The batches of the update after `step` completed ones, and their shares."""
        shares = self.local.shares(step)
        return itertools.islice(self.loader, len(shares)), shares


def evaluation_batches(
    lengths: np.ndarray, batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """A rank's share of an evaluation: each example once, longest first, similar lengths together."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches = np.split(order, range(batch_size, len(order), batch_size)) if len(order) else []
    return [batch.tolist() for batch in batches[rank::world_size]]
