"""The rank of this process among those of its launcher, from the variables that torchrun sets."""

import os
from dataclasses import dataclass

NEEDED = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
OPTIONAL = "LOCAL_RANK", "LOCAL_WORLD_SIZE"  # LOCAL_RANK is else the flag, or 0


@dataclass(frozen=True)
class Launch:
    """Rank and number of processes, in all and on this node. problem: why there is only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    problem: str = ""


def read_launch(local_rank: int = -1) -> Launch:
    """Read the launcher's variables. Variables that are incomplete or wrong are ignored.

    local_rank: the flag of old launchers; -1 if it is not given. The variables win.
    """
    values = {name: os.environ.get(name, "").strip() for name in NEEDED + OPTIONAL}
    values = {name: value for name, value in values.items() if value}
    if not values and local_rank < 0:
        return Launch()
    if missing := [name for name in NEEDED if name not in values]:
        return Launch(problem=f"{', '.join(missing)} not set")
    del values["MASTER_ADDR"]
    for name, value in values.items():
        if not value.isdecimal():
            return Launch(problem=f"{name} is {value!r}")
    rank = int(values["RANK"])
    size = int(values["WORLD_SIZE"])
    local_rank = int(values.get("LOCAL_RANK", max(local_rank, 0)))
    local_size = int(values.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if rank >= size:
        return Launch(problem=f"RANK {rank} is not below WORLD_SIZE {size}")
    if not local_rank < local_size <= size:
        places = f"LOCAL_RANK {local_rank} and LOCAL_WORLD_SIZE {local_size}"
        return Launch(problem=f"{places} do not fit WORLD_SIZE {size}")
    return Launch(rank, size, local_rank, local_size)
