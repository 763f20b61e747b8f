"""Run commands of masked_run_squad.py on two processes: a torchrun that imports torch only once.

`python tests/two_ranks.py FILE`: FILE holds the words of each command, as JSON. Exit status 1, and
no process left, if one of them fails.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist

import masked_run_squad


def run(rank: int, port: int, commands: list[list[str]]) -> None:
    """One process: all commands in the same process group, which each would make anew."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()}
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None
    for words in commands:
        masked_run_squad.main(words)


def main() -> int:
    commands = json.loads(Path(sys.argv[1]).read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = set()
    for rank in range(2):
        child = os.fork()
        if not child:
            status = 1
            try:
                run(rank, port, commands)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        children.add(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
