"""The int8 form of an ONNX file, by ONNX Runtime's own dynamic quantization."""

import functools
import logging
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from ..checkpoints.onnx_file import open_session, sample_inputs
from ..system.files import write_file
from .times import time_in_turns

# Kinds of CPUs, and whether weights have 7 bits there: without VNNI, sums of products saturate.
PRESETS = {"avx2": True, "avx512": True, "avx512_vnni": False, "arm64": False}
BATCH, LENGTH = 1, 128  # size of the inputs that are timed
DEVIATION = 0.2  # above this, a warning. MiniLM on SST-2 has 0.04 and loses at most 0.5 points

logger = logging.getLogger(__name__)


@dataclass
class Comparison:
    """An ONNX file and its int8 form: megabytes, and milliseconds for 1 x 128 tokens.

    deviation: root mean square of the difference of outputs, relative to that of the outputs.
    """

    megabytes: tuple[float, float]
    milliseconds: tuple[float, float]
    deviation: float


def preset_of_this_cpu() -> str:
    """The preset that fits this machine: `avx2` if its CPU is not known."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    if flags & {"avx512_vnni", "avx_vnni"}:
        return "avx512_vnni"
    return "avx512" if "avx512f" in flags else "avx2"


def int8_file(file: Path) -> Path:
    """Where the int8 form of `file` is saved: `x_int8.onnx` beside `x.onnx`."""
    return file.with_name(f"{file.stem}_int8{file.suffix}")


def quantize(file: Path, preset: str) -> Path:
    """Write the int8 form of an ONNX file beside it.

    Weights have a scale per output channel; activations get a scale as they come.
    """
    from onnxruntime.quantization import quantize_dynamic

    def fill(path: Path) -> None:
        logged = logging.root.manager.disable
        logging.disable(logging.WARNING)  # ONNX Runtime asks for a preparation that has no effect
        try:
            quantize_dynamic(file, path, per_channel=True, reduce_range=PRESETS[preset])
        finally:
            logging.disable(logged)

    write_file(int8_file(file), fill)
    return int8_file(file)


def write_int8(model: PreTrainedModel, file: Path, preset: str) -> Comparison:
    """Write the int8 form of the ONNX file of `model`, and compare the two."""
    quantize(file, preset)
    comparison = _compare(model, file)
    if not comparison.deviation <= DEVIATION:
        logger.warning(
            "%s: outputs differ from float32 by %.0f%%: evaluate the file with --onnx_file before "
            "you use it",
            int8_file(file),
            100 * comparison.deviation,
        )
    return comparison


def _compare(model: PreTrainedModel, file: Path) -> Comparison:
    files = file, int8_file(file)
    sessions = [open_session(path) for path in files]
    error, total = 0.0, 0.0
    for batch, length in ((1, 16), (4, 64)):
        inputs = _arrays(model, batch, length)
        exact, rounded = (session.run(None, inputs)[0] for session in sessions)
        error += float(np.square(exact - rounded).sum())
        total += float(np.square(exact).sum())
    inputs = _arrays(model, BATCH, LENGTH)
    calls = [functools.partial(session.run, None, inputs) for session in sessions]
    return Comparison(
        megabytes=tuple(path.stat().st_size / 1e6 for path in files),
        milliseconds=tuple(time / 1000 for time in time_in_turns(calls)),
        deviation=(error / total) ** 0.5,
    )


def _arrays(model: PreTrainedModel, batch: int, length: int) -> dict[str, np.ndarray]:
    inputs = sample_inputs(model, batch, length)
    return {name: tensor.numpy() for name, tensor in inputs.items()}
