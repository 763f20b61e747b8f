"""A model that is an ONNX file, for evaluation: ONNX Runtime computes it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..checkpoints.onnx_file import open_session, sample_inputs
from ..models.inputs import MODEL_INPUTS, input_names
from ..system.errors import UserError, first_line


class OnnxModel(nn.Module):
    """The ONNX file of `model`, float32 or int8, with the inputs and outputs of `model`.

    Raises UserError for a file that cannot be read, or that has other inputs, outputs or labels.
    """

    def __init__(self, file: Path, model: PreTrainedModel):
        super().__init__()
        self.config, self.file = model.config, file
        self.session = _open(file)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        lacking = set(self.inputs) - set(input_names(model))
        if lacking:
            raise UserError(
                f"--onnx_file {file} takes {', '.join(sorted(lacking))}, which "
                f"{type(model).__name__} does not: give the file of this model"
            )
        inputs = sample_inputs(model, batch=2, length=8)
        with torch.no_grad():
            wanted = model(**{name: x.to(model.device) for name, x in inputs.items()})
        shapes = {name: tuple(output.shape) for name, output in wanted.items()}
        try:
            given = {name: tuple(x.shape) for name, x in self(**inputs).items()}
        except Exception as error:  # ONNX Runtime's have no common class
            raise UserError(f"--onnx_file {file}: {first_line(error)}") from error
        if given != shapes:
            raise UserError(
                f"--onnx_file {file} has the outputs {_described(given)}, and "
                f"{type(model).__name__} has {_described(shapes)}: the file is of another task, or "
                "of other labels"
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ModelOutput:
        tensors = dict(zip(MODEL_INPUTS, (input_ids, attention_mask, token_type_ids), strict=True))
        arrays = {name: tensors[name].cpu().numpy() for name in self.inputs}
        outputs = map(torch.from_numpy, self.session.run(self.outputs, arrays))
        return ModelOutput(zip(self.outputs, outputs, strict=True))


def _open(file: Path):
    if not file.is_file():
        raise UserError(f"--onnx_file {file} does not exist: bertarize.py --onnx writes one")
    try:
        return open_session(file)
    except ImportError as error:
        raise UserError("--onnx_file needs onnxruntime: run pip install onnxruntime") from error
    except Exception as error:  # ONNX Runtime's have no common class
        raise UserError(f"--onnx_file {file} cannot be read: {first_line(error)}") from error


def _described(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
