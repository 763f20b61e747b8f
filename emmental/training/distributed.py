"""One process or many: device, rank, and what the processes exchange."""

import ctypes
import logging
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..system.errors import UserError, first_line, handled_signals
from ..system.hardware import processor_name
from ..system.launcher import read_launch

logger = logging.getLogger(__name__)

KILLED = signal.SIG_DFL, signal.SIGTERM  # at once: torch waits for hours, and Python's handlers too


@dataclass(frozen=True)
class World:
    """This process among all: its device, its rank, and the number of processes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def main_first(self):
        """Rank 0 runs the block, and fills the caches, before the other ranks do."""
        if not self.is_main:
            with handled_signals(*KILLED):
                self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """The `value` of every rank, in order, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def join_world(no_cuda: bool, local_rank: int, fp16: bool) -> World:
    """Find the device and, under torchrun, join the other processes (nccl on GPUs, gloo on CPUs).

    local_rank: from old launchers; torchrun's environment wins. Raises UserError for fp16 without a
    GPU, and for more processes on a node than it has GPUs.
    """
    launch = read_launch(local_rank)
    if launch.problem:
        logger.warning(
            f"the launcher's variables are ignored, and this process runs alone: {launch.problem}"
        )
    if torch.cuda.is_available() and not no_cuda:
        gpus = torch.cuda.device_count()
        if launch.local_size > gpus:
            raise UserError(
                f"{launch.local_size} processes on a node with {gpus} GPUs: start one per GPU"
            )
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    elif fp16:
        raise UserError("--fp16 needs a GPU: use --bf16 on a CPU, or full precision")
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if launch.size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            with handled_signals(*KILLED):
                dist.init_process_group(backend, timeout=timedelta(hours=2))
        except (ValueError, RuntimeError) as error:  # a wrong port, one in use, ...
            raise UserError(
                "cannot join the other processes at MASTER_ADDR and MASTER_PORT: "
                f"{first_line(error)}"
            ) from error
    return World(device, launch.rank, launch.size)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the rest of the process.

    glibc returns every large block to the kernel, which zeroes it page by page when it is used
    again: slow in training on a CPU, which allocates all gradients at each step. With one heap, all
    threads share the kept memory. Other C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:  # with the constants of <malloc.h>
        mallopt(-8, 1)  # M_ARENA_MAX
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


def describe_hardware(world: World) -> str:
    """What the processes of a run compute on, in a few words."""
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    return f"{world.size} x {torch.get_num_threads()} threads of {processor_name()}"
