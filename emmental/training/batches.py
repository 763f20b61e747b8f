"""The examples of each update: a pure function of seed and step.

Examples of similar length share a batch, which saves padding. The random order of an epoch is cut
into pools; each pool is sorted by length and cut into batches; the batches are shuffled. The ranks
share each batch, so several processes see the same batches as one. Resuming replays nothing.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from .state import TrainingState
from .task import Batch, Task

POOL = 64  # batches in a pool


class BatchPlan:
    """The batches of a training run.

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
        """Updates of a number of epochs, which may be fractional."""
        return math.ceil(round(self.updates_per_epoch * epochs, 6))  # 100 * 1.1 is 110.00000000001

    def update(self, step: int) -> list[np.ndarray]:
        """The batches, as example indices, of the update after `step` completed ones."""
        epoch, place = divmod(step, self.updates_per_epoch)
        return self._epoch(epoch)[place * self.accumulation : (place + 1) * self.accumulation]

    def local(self, step: int, rank: int, world_size: int) -> list[tuple[list[int], float]]:
        """For each batch, a rank's examples and their share of the update's examples.

        A rank without examples in a small batch gets one with a share of 0.
        """
        batches = self.update(step)
        total = sum(map(len, batches))
        parts = []
        for batch in batches:
            examples = batch[rank::world_size].tolist()
            parts.append((examples or batch[:1].tolist(), len(examples) / total))
        return parts

    def _make_epoch(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        pool = np.arange(len(order)) // (POOL * self.batch_size)
        order = order[np.lexsort((self.lengths[order], pool))]
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        return [batches[i] for i in generator.permutation(len(batches))]


def training_batches(
    plan: BatchPlan, task: Task, state: TrainingState
) -> Iterator[tuple[Iterator[Batch], list[float]]]:
    """For each update to come, this rank's batches and their shares of the update's examples."""
    world, workers = state.world, state.settings.num_workers
    steps = range(state.step, state.settings.schedule.total_step)
    local = functools.partial(plan.local, rank=world.rank, world_size=world.size)
    examples = (part for step in steps for part, _ in local(step))
    batches = load_batches(task, task.train_set, examples, workers, world.device)
    for step in steps:
        shares = [share for _, share in local(step)]
        yield itertools.islice(batches, len(shares)), shares


def load_batches(
    task: Task,
    dataset: Dataset,
    examples: Iterable[list[int]],
    num_workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of the data set with these examples, as tensors on the device."""
    loader = DataLoader(
        dataset,
        batch_sampler=examples,
        collate_fn=task.collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader would draw from dropout's generator
    )
    for batch in loader:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def evaluation_batches(
    lengths: np.ndarray, batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """The batches of a rank in an evaluation: each example once, the longest first."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches[rank::world_size]
