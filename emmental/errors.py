"""Errors that end a script with one line on stderr and an exit status, instead of a traceback."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A request that cannot be met. The message says what is wrong, where, and how to fix it."""

    status = 2


class TrainingError(UserError):
    """Training cannot go on. The last checkpoint is good."""

    status = 1


class Interrupted(UserError):
    """A signal stopped the training, which has written a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fail(problems: list[str], status: int = 2):
    """Print each problem on its own line and exit.

    All processes find wrong input (status 2) and interruptions (above 128), so the first process of
    each node prints them. Every process prints its other failures.
    """
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    if local_rank == 0 or (status != 2 and status <= 128):
        name = (Path(sys.argv[0]).name or "error") + (f" (rank {rank})" if rank else "")
        for problem in problems:
            print(f"{name}: error: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def one_line_errors(resume: str = "run it again"):
    """End the script with one line, not a traceback, when an expected error leaves the block.

    resume: how to go on after an interruption.
    """
    try:
        yield
    except UserError as error:
        fail([str(error)], error.status)
    except OSError as error:
        file = f": {error.filename}" if error.filename else ""
        fail([f"{error.strerror or error}{file}"], 1)
    except MemoryError:
        fail(["out of memory: use smaller batches, or close other programs"], 1)
    except RuntimeError as error:
        if not _lost_connection(error):
            raise
        fail([f"another process died; see its error above; {resume}"], 1)
    except KeyboardInterrupt:
        fail([f"interrupted; {resume}"], 130)


def _lost_connection(error: RuntimeError) -> bool:
    """Whether another process no longer answers. Gloo has no exception type of its own for this."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or (several and "gloo" in str(error).lower())
