"""The native kernels (kernels.cpp): compiled at first use, kept in the cache folder."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..system.errors import UserError

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
BUILD_SECONDS = 120


class CMatrix(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int64), ("columns", ctypes.c_int64)] + [
        (name, ctypes.c_void_p) for name in ("starts", "indices", "values", "bias")
    ]


def cache_folder() -> Path:
    """The folder of compiled kernels. Raises OSError when there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emmental"
    except RuntimeError as error:
        raise OSError(f"there is no home folder ({error})") from error


@functools.cache
def load_native() -> ctypes.CDLL:
    """The native kernels, compiled unless this machine has done so before. Raises UserError."""
    candidates = os.environ.get("CXX") or "c++", "g++", "clang++"
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if not compiler:
        raise UserError("there is no C++ compiler (c++, g++, clang++ or $CXX)")
    # The compiler's verbose output names its version and the processor.
    target = _run([compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull])
    parts = "\0".join([SOURCE.read_text(), *FLAGS, target])
    name = f"kernels-{hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()}.so"
    try:
        return _open(_build(compiler, cache_folder() / name))
    except OSError as error:  # no home, or a cache folder that forbids writing or executing
        try:
            with tempfile.TemporaryDirectory() as aside:
                return _open(_build(compiler, Path(aside) / name))
        except OSError:
            raise UserError(f"the kernels cannot be loaded: {error}") from error


def _build(compiler: str, library: Path) -> Path:
    """Compile the kernels to this file, unless it exists."""
    library.parent.mkdir(parents=True, exist_ok=True)
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as aside:
            fresh = Path(aside) / library.name
            _run([compiler, *FLAGS, str(SOURCE), "-o", str(fresh)])
            os.replace(fresh, library)
    return library


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_SECONDS, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        reason = errors[0] if errors else f"status {done.returncode}"
        raise UserError(f"{command[0]} failed: {reason}")
    return done.stderr


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    matrix, pointer = ctypes.POINTER(CMatrix), ctypes.c_void_p
    long, integer, double = ctypes.c_int64, ctypes.c_int, ctypes.c_double
    # fmt: off
    arguments = {  # in the order of kernels.cpp
        "product": [matrix, pointer, pointer, pointer, long, long, integer, integer],
        "layer_norm": [pointer, pointer, pointer, double, long, long, long, integer],
        "attention": [pointer, pointer, long, pointer, pointer, long, long, pointer, double, long,
                      integer],
    }
    # fmt: on
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library
