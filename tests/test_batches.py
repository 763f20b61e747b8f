"""Batches: every example once, the same whoever asks, little padding."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emmental.training.batches import BatchPlan, evaluation_batches, training_batches
from emmental.training.distributed import World
from emmental.training.task import Task

# Examples, batch, accumulation.
SIZES = [(1, 4, 2), (7, 4, 2), (8, 4, 2), (103, 4, 3), (1000, 8, 4), (1601, 8, 1)]


def make_lengths(count, seed=0):
    return np.random.default_rng(seed).integers(10, 385, count)


@pytest.mark.parametrize("count, batch_size, accumulation", SIZES)
def test_each_example_once_per_epoch(count, batch_size, accumulation):
    plan = BatchPlan(make_lengths(count), batch_size, accumulation, seed=1)
    batches_per_epoch = -(-count // batch_size)
    assert plan.updates_per_epoch == -(-batches_per_epoch // accumulation)
    orders = []
    for epoch in range(3):
        start = epoch * plan.updates_per_epoch
        updates = [plan.update(start + i) for i in range(plan.updates_per_epoch)]
        order = np.concatenate([batch for update in updates for batch in update]).tolist()
        assert sorted(order) == list(range(count))
        assert all(len(update) == accumulation for update in updates[:-1])
        assert len(updates[-1]) == (batches_per_epoch - 1) % accumulation + 1
        sizes = sorted(len(batch) for update in updates for batch in update)
        whole, rest = divmod(count, batch_size)
        assert sizes == [rest] * (rest > 0) + [batch_size] * whole
        orders.append(order)
    if count >= 100:
        assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count, batch_size, accumulation", SIZES)
def test_ranks_share_out_the_global_batches(count, batch_size, accumulation, world_size):
    plan = BatchPlan(make_lengths(count), batch_size, accumulation, seed=1)
    stop = min(2 * plan.updates_per_epoch, 60)
    for step in range(stop):
        ranks = [plan.local(step, rank, world_size) for rank in range(world_size)]
        batches = plan.update(step)
        total = sum(map(len, batches))
        assert sum(share for rank in ranks for _, share in rank) == pytest.approx(1.0)
        for batch, parts in zip(batches, zip(*ranks, strict=True), strict=True):
            held = [examples for examples, share in parts if share > 0]
            assert sorted(sum(held, [])) == sorted(batch.tolist())
            for examples, share in parts:
                assert examples  # no rank is idle: DistributedDataParallel would wait for it
                assert share in (0, len(examples) / total)


def test_update_depends_on_seed_and_step_alone():
    lengths = make_lengths(500)
    plan = BatchPlan(lengths, 4, 2, seed=5)
    wanted = [2 * plan.updates_per_epoch + 3, 0, 70, 5 * plan.updates_per_epoch, 0]
    answers = [[batch.tolist() for batch in plan.update(step)] for step in wanted]
    for step, answer in zip(wanted, answers, strict=True):
        np.random.seed(step)
        assert [batch.tolist() for batch in BatchPlan(lengths, 4, 2, seed=5).update(step)] == answer
    assert [batch.tolist() for batch in BatchPlan(lengths, 4, 2, seed=6).update(0)] != answers[1]


class Numbers(Task):
    """A task whose batches are numbers of examples."""

    train_set = range(50)

    def collate(self, features):
        return {"numbers": torch.tensor(features)}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resuming_continues_the_order(num_workers):
    plan = BatchPlan(make_lengths(50), 4, 2, seed=5)

    def updates(start, stop):
        schedule = SimpleNamespace(total_step=stop)
        settings = SimpleNamespace(schedule=schedule, num_workers=num_workers)
        world = World(torch.device("cpu"), 1, 2)
        state = SimpleNamespace(settings=settings, step=start, world=world)
        return [
            ([batch["numbers"].tolist() for batch in batches], shares)
            for batches, shares in training_batches(plan, Numbers(), state)
        ]

    assert updates(0, 9) + updates(9, 20) == updates(0, 20)
    assert updates(3, 4) == [tuple(map(list, zip(*plan.local(3, 1, 2), strict=True)))]


TOTALS = [(10, 3.0, 30), (10, 0.5, 5), (10, 0.25, 3), (10, 2.01, 21), (10, 0.3, 3)]
TOTALS += [(7, 1.0, 7), (100, 1.1, 110)]


@pytest.mark.parametrize("updates, epochs, total", TOTALS)
def test_fractional_epochs(updates, epochs, total):
    plan = BatchPlan(make_lengths(4 * updates), 2, 2, seed=0)
    assert plan.updates_per_epoch == updates
    assert plan.total_updates(epochs) == total


def padded(batches, lengths):
    return sum(len(batch) * lengths[batch].max() for batch in batches)


def test_similar_lengths_share_a_batch():
    lengths = make_lengths(2000)
    plan = BatchPlan(lengths, 8, 1, seed=0)
    grouped = padded([plan.update(step)[0] for step in range(plan.updates_per_epoch)], lengths)
    shuffled = np.random.default_rng(0).permutation(2000).reshape(-1, 8)
    assert grouped < 1.05 * lengths.sum()
    assert grouped < 0.65 * padded(shuffled, lengths)
    assert grouped < 0.55 * 2000 * 384  # the goal of the design, on uniform lengths


def test_batches_of_an_epoch_are_not_in_order_of_length():
    lengths = make_lengths(2000)
    plan = BatchPlan(lengths, 8, 1, seed=0)
    means = [lengths[plan.update(step)[0]].mean() for step in range(plan.updates_per_epoch)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
def test_evaluation_covers_each_example_once(count, world_size):
    lengths = make_lengths(count)
    ranks = [evaluation_batches(lengths, 8, rank, world_size) for rank in range(world_size)]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(sum(batches, [])) == list(range(count))
    assert all(0 < len(batch) <= 8 for batch in batches)
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    if count == 100:
        assert sum(len(b) * max(lengths[i] for i in b) for b in batches) < 1.1 * lengths.sum()
