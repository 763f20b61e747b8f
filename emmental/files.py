"""Files that are whole or absent: written aside, synced to the disk, renamed.

Every function raises TrainingError, with the reason in one line, for what cannot be written; nothing of it is left.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TrainingError, UserError, first_line


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` through `fill(folder)`, replacing an old one."""
    with _aside(target, target.parent, f".{target.name}-") as place:
        fill(place / "new")
        _finish(place / "new")
        if target.exists():
            target.rename(place / "old")
        (place / "new").rename(target)
        _sync_folder(target.parent)


def write_into(target: Path, fill: Callable[[Path], None]) -> None:
    """Put the files that `fill(folder)` makes into the folder `target`, each whole."""
    with _aside(target, target, ".writing-") as place:
        fill(place / "new")
        _finish(place / "new")
        for file in sorted((place / "new").iterdir()):
            os.replace(file, target / file.name)
        _sync_folder(target)


def write_file(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the file `target` through `fill(path)`, replacing an old one."""
    with _aside(target, target.parent, f".{target.name}-") as place:
        fill(place / "new" / target.name)
        _finish(place / "new")
        os.replace(place / "new" / target.name, target)
        _sync_folder(target.parent)


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


@contextmanager
def _aside(target: Path, parent: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder below `parent` with an empty folder `new` in it, gone afterwards."""
    place = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        (place / "new").mkdir()
        yield place
    except Exception as error:  # a full disk is an OSError here, a RuntimeError of torch or an error of safetensors there
        if isinstance(error, UserError) and not isinstance(
            error, TrainingError
        ):  # what was to be written is wrong
            raise
        raise TrainingError(f"cannot write {target}: {_reason(error)}") from error
    finally:
        if place:
            shutil.rmtree(place, ignore_errors=True)


def _finish(folder: Path) -> None:
    """Give the files the permissions that the umask allows, and have them and their names on the disk."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: Exception) -> str:
    """An error in a line, without the names of files that are written aside."""
    if isinstance(error, TrainingError) and error.__cause__:
        error = error.__cause__
    chain = [error]
    while chain[-1].__context__:  # torch raises an error of its own over what the system said
        chain.append(chain[-1].__context__)
    error = next((link for link in chain if isinstance(link, OSError)), error)
    return getattr(error, "strerror", None) or first_line(error)
