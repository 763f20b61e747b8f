"""Run commands of a script on two processes: a torchrun that imports torch only once.

`python tests/two_ranks.py FILE`: FILE holds the words of each command, as JSON: a script, such as
masked_run_ner (by default masked_run_squad), and its flags. Exit status 1, and no process left, if
one of them fails.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist


def run(rank: int, store: Path, commands: list[list[str]]) -> None:
    """One process: all commands in the same process group, which each would make anew.

    store: a new file where the processes meet, as a port may be taken meanwhile.
    """
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    variables |= {"MASTER_ADDR": "unused", "MASTER_PORT": "1"}
    os.environ |= {name: str(value) for name, value in variables.items()}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None
    for words in commands:
        script = "masked_run_squad" if words[0].startswith("--") else words.pop(0)
        importlib.import_module(script).main(words)


def main() -> int:
    file = Path(sys.argv[1]).resolve()
    commands = json.loads(file.read_text())
    children = set()
    for rank in range(2):
        child = os.fork()
        if not child:
            status = 1
            try:
                run(rank, file.with_name("store"), commands)
                status = 0
            except SystemExit as stop:  # it has said why
                status = stop.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        children.add(child)
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(child, signal.SIGKILL) for child in children])
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            failed = True
            signal.alarm(10)  # the other may say what it sees of it
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
