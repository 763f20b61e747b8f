"""This process among those of its launcher, as torchrun's environment describes them."""

import os
from dataclasses import dataclass

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OPTIONAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")  # LOCAL_RANK may be a flag, or 0: one on each node


@dataclass(frozen=True)
class Launch:
    """Rank and number of processes, in all and on this node; problem: why there is only this one.

    problem is empty if the launcher's variables are complete, or if there are none.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    problem: str = ""


def read_launch(local_rank: int = -1) -> Launch:
    """What the environment says. A set of variables that is incomplete or wrong is ignored.

    local_rank: the flag of old launchers; -1 if it is not given. The environment wins.
    """
    values = {name: os.environ[name].strip() for name in NEEDED + OPTIONAL if name in os.environ}
    if not values and local_rank < 0:
        return Launch()
    numbers = {name: int(value) for name, value in values.items() if value.isdecimal()}
    missing = [name for name in NEEDED if not values.get(name)]
    wrong = [f"{', '.join(missing)} not set"] if missing else []
    for name, value in values.items():
        if value and name not in numbers and name != "MASTER_ADDR":
            wrong.append(f"{name} is {value!r}")
    if wrong:
        return Launch(problem="; ".join(wrong))
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    local_rank = numbers.get("LOCAL_RANK", max(local_rank, 0))
    local_size = numbers.get("LOCAL_WORLD_SIZE", local_rank + 1)
    if rank >= size:
        return Launch(problem=f"RANK {rank} is not below WORLD_SIZE {size}")
    if not local_rank < local_size <= size:
        return Launch(
            problem=f"LOCAL_RANK {local_rank} and LOCAL_WORLD_SIZE {local_size} do not fit "
            f"WORLD_SIZE {size}"
        )
    return Launch(rank, size, local_rank, local_size)
