"""What ends a run, and how: one line on stderr and an exit status, in place of a traceback."""

import os
import sys
from contextlib import contextmanager


class UserError(Exception):
    """What was asked for cannot be done; the message says what, where and how to fix it."""

    status = 2


class TrainingError(UserError):
    """Training cannot go on; the last checkpoint is good."""

    status = 1


class Interrupted(UserError):
    """A signal ended the training, which has written a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The message of an exception in one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def fail(problems: list[str], status: int = 2):
    """Print each problem on a line of its own and exit.

    What is wrong with the input (status 2), and an interruption (above 128), every process finds alike: the first of
    a node speaks for all. Any other failure is a process's own to tell.
    """
    rank = int(os.environ.get("RANK", 0))
    if (status != 2 and status <= 128) or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        name = (os.path.basename(sys.argv[0]) or "error") + (f" (rank {rank})" if rank else "")
        for problem in problems:
            print(f"{name}: error: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def one_line_errors():
    """Turn the expected errors of a script into one line and an exit status, instead of a traceback."""
    try:
        yield
    except UserError as error:
        fail([str(error)], error.status)
    except OSError as error:
        fail(
            [f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")],
            status=1,
        )
    except MemoryError as error:
        fail(
            [
                f"out of memory ({error or 'no size given'}): take smaller batches, or a machine with more"
            ],
            1,
        )
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        fail(
            [
                "another process died; see its error above; resume with --resume_from_checkpoint latest"
            ],
            1,
        )
    except KeyboardInterrupt:
        fail(
            ["interrupted; a run with checkpoints continues with --resume_from_checkpoint latest"],
            status=130,
        )


def lost_connection(error: RuntimeError) -> bool:
    """Whether an exchange between processes failed: nccl has a type for that, gloo a plain RuntimeError."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # they may have parted by now
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or (several and "gloo" in str(error).lower())
