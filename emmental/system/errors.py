"""Errors that end a script with one line on stderr and an exit status, instead of a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .launcher import read_launch


class UserError(Exception):
    """A request that cannot be met. The message says what is wrong, where, and how to fix it."""

    status = 2


class TrainingError(UserError):
    """Training cannot go on. The last checkpoint is good."""

    status = 1


class Interrupted(UserError):
    """A signal stopped the script. A training has written a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


class Terminated(SystemExit):
    """SIGTERM outside the training loop: files written aside are removed on the way out.

    A SystemExit passes every `except Exception`, and ends forked processes silently.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fail(problems: list[str], status: int = 2):
    """Print each problem on its own line and exit.

    All processes find wrong input (status 2) and interruptions (above 128), so only the first
    process of each node prints them. Other failures are printed by the process that has them.
    """
    launch = read_launch()
    if launch.local_rank == 0 or (status != 2 and status <= 128):
        rank = f" (rank {launch.rank})" if launch.rank else ""
        name = (Path(sys.argv[0]).name or "error") + rank
        for problem in problems:
            print(f"{name}: error: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(status)


OUT_OF_MEMORY = (
    "out of memory: use smaller batches (and --gradient_accumulation_steps), or free some memory"
)


@contextmanager
def one_line_errors(advice: str = "") -> Iterator[None]:
    """End the script with one line, not a traceback, when an expected error leaves the block.

    SIGTERM also ends the script with one line. If nobody reads the output any more (`| head -1`),
    the script ends silently. advice: how to go on after an interruption.
    """
    try:
        with handled_signals(_stop, signal.SIGTERM):
            yield
            print(end="", flush=True)
    except UserError as error:
        fail([str(error)], error.status)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise SystemExit(128 + signal.SIGPIPE) from None
        file = f": {error.filename}" if error.filename else ""
        fail([f"{error.strerror or error}{file}"], 1)
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            fail([OUT_OF_MEMORY], 1)
        if not _lost_connection(error):
            raise
        fail([f"another process died; see its error above{advice}"], 1)
    except KeyboardInterrupt:
        fail([f"interrupted{advice}"], 130)
    except Terminated as stop:
        fail([f"stopped by SIGTERM{advice}"], stop.code)


def _stop(number: int, frame) -> None:
    signal.signal(number, signal.SIG_IGN)  # torchrun passes on what the process group also got
    raise Terminated(128 + number)


@contextmanager
def handled_signals(handler, *numbers: int) -> Iterator[None]:
    """Let `handler` handle signals inside the block. Only the main thread can have handlers."""
    in_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in numbers if in_main}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_unread() -> bool:
    """Whether nobody reads the output any more. If so, the rest of it is discarded."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _is_out_of_memory(error: Exception) -> bool:
    """Also for torch, whose errors are RuntimeErrors, on a GPU and on a CPU."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return of_torch or isinstance(error, MemoryError)


def _lost_connection(error: RuntimeError) -> bool:
    """Whether another process no longer answers, for which Gloo has no exception type."""
    types = {base.__name__ for base in type(error).__mro__}
    return "DistError" in types or (read_launch().size > 1 and "gloo" in str(error).lower())
