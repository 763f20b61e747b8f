"""Write a model to an ONNX file, which ONNX Runtime serves without torch or this code."""

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.inputs import input_names, longest_input
from ..system.errors import TrainingError, UserError
from ..system.files import write_file

PACKAGES = ("onnx==1.23.2", "onnxruntime==1.32.0", "onnxscript==0.7.2")
ROUNDING = 1e-4  # the most that an output may differ by (float32), relative to the largest one


def check_onnx(file: Path) -> None:
    """Raises UserError if `write_onnx` cannot write `file`, or lacks its optional packages."""
    if file.is_dir():
        raise UserError(f"{file} is a folder: give the name of the ONNX file to write")
    names = [package.partition("==")[0] for package in PACKAGES]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"writing ONNX needs {', '.join(missing)}: run pip install {' '.join(PACKAGES)}"
        )


def write_onnx(model: PreTrainedModel, file: Path) -> None:
    """Write a stock or compact model, in float32 on the CPU, to an ONNX file.

    The inputs are `input_ids`, `attention_mask` and, if the model tells them apart,
    `token_type_ids` (int64, batch x length, for multiple choice batch x choices x length), of any
    size; the outputs have the model's names. The file is kept only if ONNX Runtime computes what
    torch does. Raises UserError as `check_onnx` does, and TrainingError for a model that cannot be
    exported or computes something else.
    """
    check_onnx(file)

    def fill(path: Path) -> None:
        training = model.training
        logged = logging.root.manager.disable
        logging.disable(logging.WARNING)  # the exporter logs every node
        model.eval()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _export(model, path)
            _compare(model, path)
        finally:
            logging.disable(logged)
            model.train(training)

    write_file(file, fill)


def open_session(file: Path):
    """A session of ONNX Runtime on the CPU, with as many threads as torch.

    They do not spin between calls: sessions that take turns would slow each other down.
    """
    from onnxruntime import InferenceSession, SessionOptions  # optional

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return InferenceSession(file, options, providers=["CPUExecutionProvider"])


def sample_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs with padding and, if the model has them, two token types."""
    length = min(length, longest_input(model) or length)
    choices = (3,) if type(model).__name__.endswith("ForMultipleChoice") else ()
    shape = (batch, *choices, length)
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(shape, dtype=torch.long)
    types = torch.zeros(shape, dtype=torch.long)
    mask[0, ..., length - length // 3 :] = 0
    types[..., length // 2 :] = 1
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: inputs[name] for name in input_names(model)}


@torch.no_grad()
def _export(model: PreTrainedModel, path: Path) -> None:
    inputs = sample_inputs(model, batch=2, length=16)
    axes = ("batch", "choices", "length") if inputs["input_ids"].dim() == 3 else ("batch", "length")
    torch.onnx.export(
        model,
        kwargs=inputs,
        f=path,
        input_names=list(inputs),
        output_names=list(model(**inputs)),
        dynamic_shapes={name: dict(enumerate(axes)) for name in inputs},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


@torch.no_grad()
def _compare(model: PreTrainedModel, path: Path) -> None:
    """Raises TrainingError unless ONNX Runtime has the outputs of torch for two shapes.

    Outputs of padding are not compared: they are of no use, and where a window of ModernBERT holds
    only padding, attention sums to another number.
    """
    session = open_session(path)
    for batch, length in ((1, 9), (3, 40)):
        inputs = sample_inputs(model, batch, length)
        outputs = model(**inputs)
        arrays = session.run(list(outputs), {name: x.numpy() for name, x in inputs.items()})
        mask = inputs["attention_mask"].bool()
        for (name, output), array in zip(outputs.items(), arrays, strict=True):
            difference = (output - torch.from_numpy(array)).abs()
            if difference.shape[: mask.dim()] == mask.shape:
                difference = difference[mask]
            error = difference.max().item()
            bound = ROUNDING * max(1.0, output.abs().max().item())
            if not error <= bound:  # nan as well
                raise TrainingError(
                    f"{name} of ONNX Runtime differs from torch by {error:.3g}, more than "
                    f"rounding ({bound:.3g})"
                )
