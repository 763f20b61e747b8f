"""Files that are whole or absent: written to a folder aside, synced to the disk, then renamed.

A target that is a link is followed: the file that it points to is written, or made. Functions that
cannot write raise TrainingError, with the reason in one line, and leave nothing behind.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import TrainingError, UserError, first_line


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write the folder `target` with `fill(folder)`, in place of an old one."""

    place = followed(target)

    def fill_parent(parent: Path) -> None:
        (parent / place.name).mkdir()
        fill(parent / place.name)

    _write(target, place.parent, fill_parent)


def write_into(target: Path, fill: Callable[[Path], None]) -> None:
    """Add the files that `fill(folder)` writes to the folder `target`, in place of old ones."""
    _write(target, followed(target), fill)


def write_file(target: Path, fill: Callable[[Path], None]) -> None:
    """Write the file `target` with `fill(path)`, in place of an old one."""
    place = followed(target)
    _write(target, place.parent, lambda parent: fill(parent / place.name))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value) -> None:
    """Write `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link without its target."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Make a folder, if need be, and reserve it for the block. An empty new folder goes again.

    Raises UserError if another process has reserved the folder. However a process ends, the system
    frees its folders.
    """
    place = followed(folder)
    is_new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # the file system has no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another run writes to {folder}: wait for its end, or choose another folder"
                ) from error
        yield
    finally:
        os.close(handle)
        if is_new:
            with contextlib.suppress(OSError):
                place.rmdir()


def followed(path: Path) -> Path:
    """Where a path leads, with every link in it followed."""
    return Path(os.path.realpath(path))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(target: Path, parent: Path, fill: Callable[[Path], None]) -> None:
    """Move what `fill(folder)` writes to a folder aside into `parent`. Errors name `target`."""
    aside = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=parent))
        new = aside / "new"
        new.mkdir()
        fill(new)
        for path in new.rglob("*"):
            if path.is_file():  # some libraries write files that only their owner can read
                path.chmod(new.stat().st_mode & 0o666)
            _sync(path)
        for path in sorted(new.iterdir()):
            if path.is_dir() and (parent / path.name).exists():
                (parent / path.name).rename(aside / "old")
            path.replace(parent / path.name)
        _sync(parent)
    except Exception as error:  # torch and safetensors have their own errors for a full disk
        if type(error) is UserError:
            raise
        raise TrainingError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Sync a file's content, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _reason(error: BaseException | None) -> str:
    """The error of the system beneath those that libraries raise, or else the error itself."""
    link = error
    while link:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__context__
    return first_line(error)
