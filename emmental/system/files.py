"""Files that are whole or absent: written to a folder aside, synced to the disk, then renamed.

The functions raise TrainingError, with the reason in one line, when they cannot write, and then
leave nothing behind.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import TrainingError, UserError, first_line


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write the folder `target` with `fill(folder)`, in place of an old one."""

    def fill_parent(parent: Path) -> None:
        (parent / target.name).mkdir()
        fill(parent / target.name)

    _write(target, target.parent, fill_parent)


def write_into(target: Path, fill: Callable[[Path], None]) -> None:
    """Add the files that `fill(folder)` writes to the folder `target`, in place of old ones."""
    _write(target, target, fill)


def write_file(target: Path, fill: Callable[[Path], None]) -> None:
    """Write the file `target` with `fill(path)`, in place of an old one."""
    _write(target, target.parent, lambda parent: fill(parent / target.name))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value) -> None:
    """Write `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
    """Have a file's content, or a folder's list of files, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _reason(error: BaseException | None) -> str:
    """What the system said, below the errors that libraries raise over it; else the error."""
    link = error
    while link:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__context__
    return first_line(error)
