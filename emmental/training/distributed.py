"""One process or many: device, rank, and the few exchanges that training and evaluation need."""

import ctypes
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import UserError
from ..hardware import processor_name


@dataclass(frozen=True)
class World:
    """This process among all: its device, its rank and how many there are."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def main_first(self):
        """Rank 0 runs the block (and fills the caches) before the others do.

        When it fails there, every other rank raises UserError with the message of rank 0.
        """
        if self.size > 1 and not self.is_main:
            outcome = [None]
            dist.broadcast_object_list(outcome, src=0)
            if outcome[0]:
                raise UserError(outcome[0])
        try:
            yield
        except Exception as error:
            if self.size > 1 and self.is_main:
                dist.broadcast_object_list([str(error) or type(error).__name__], src=0)
            raise
        if self.size > 1 and self.is_main:
            dist.broadcast_object_list([None], src=0)

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks, on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather(self, value) -> list:
        """`value` of every rank, in order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def join_world(no_cuda: bool, local_rank: int, fp16: bool) -> World:
    """Find the device and, under torchrun, join the other processes (nccl on GPUs, gloo on CPUs).

    local_rank: as old launchers pass it; torchrun's environment wins. Raises UserError for fp16 without a GPU, and for
    more processes on a node than it has GPUs.
    """
    use_cuda = torch.cuda.is_available() and not no_cuda
    if fp16 and not use_cuda:
        raise UserError("--fp16 needs a GPU: use --bf16 on a CPU, or full precision")
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", max(local_rank, 0)))
    if use_cuda:
        processes, gpus = (
            max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank + 1),
            torch.cuda.device_count(),
        )
        if processes > gpus:
            raise UserError(
                f"{processes} processes on this node, which has {gpus} GPUs: start no more than one for each"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if not use_cuda:
        keep_freed_memory()
    if size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(hours=2))
    return World(device, int(os.environ.get("RANK", 0)), size)


def keep_freed_memory() -> None:
    """Have the C library keep the memory that tensors give back, for the rest of the process.

    glibc returns every large block to the kernel, which hands it out again page by page, zeroed: training on
    a CPU allocates all gradients anew at each step. One heap serves all threads, as each would keep its own.
    Other libraries are left as they are.
    """
    arena_max, mmap_max, trim_threshold = (
        -8,
        -4,
        -1,
    )  # the names that <malloc.h> gives these numbers
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def describe_hardware(world: World) -> str:
    """What the processes of a run compute on, in a few words."""
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    return f"{world.size} x {torch.get_num_threads()} threads of {processor_name()}"


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
