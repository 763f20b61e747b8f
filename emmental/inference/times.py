"""What heads and neurons cost on a device: times of compact models, measured once per run."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checkpoints.export import bertarized_config
from ..checkpoints.onnx_file import open_session, sample_inputs, write_onnx
from ..compact.surgery import compact_config
from ..models.families import COMPACT, class_of, family_of, layers_of
from ..modules.budget import cost_table

ROUNDS = 15  # calls of each model, in turns
FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
COARSE = (1 / 16, 1 / 4, 1)  # for ONNX Runtime, where each model is exported


@dataclass(frozen=True)
class SpeedTable:
    """Microseconds of a forward of `batch` sequences of `length` tokens by a runtime.

    heads, neurons: two lists: numbers of heads or neurons, and the times of a layer with so many.
    rest: the time of embeddings, head, and layers without heads and neurons. dense: of the model.
    """

    heads: list[list[float]]
    neurons: list[list[float]]
    rest: float
    dense: float
    runtime: str
    batch: int
    length: int

    def time_of(self, heads: list[int], neurons: list[int]) -> float:
        """The microseconds of a model whose layers have these heads and neurons."""
        time = self.rest
        for times, sizes in ((self.heads, heads), (self.neurons, neurons)):
            table = cost_table(times, times[0][-1])
            time += sum(table[size] for size in sizes)
        return time

    def fraction(self, speedup: float) -> float:
        """The fraction of the layers' time that may remain in a model that is so much faster."""
        return (self.dense / speedup - self.rest) / (self.dense - self.rest)

    @property
    def in_order(self) -> bool:
        """Whether more heads or neurons took no less time, up to 5% of a layer's."""
        slack = 0.05 * (self.heads[1][-1] + self.neurons[1][-1])
        steps = [pair for _, times in (self.heads, self.neurons) for pair in pairwise(times)]
        return all(more >= fewer - slack for fewer, more in steps)

    @property
    def most(self) -> float:
        """How many times as fast the model is without heads and neurons."""
        return self.dense / self.rest


def measure_table(model: PreTrainedModel, runtime: str, batch: int, length: int) -> SpeedTable:
    """Measure how much time the heads and neurons of a stock or masked model take.

    Compact models with random weights are timed in turns, on the device of `model`. All layers of
    such a model have the same number of heads or neurons. runtime: torch, or onnx on the CPU.
    """
    layers, family = layers_of(model), family_of(model.config)
    second = layers[0].get_submodule(family.neurons[1])
    whole = model.config.num_attention_heads, second.in_features
    fractions = COARSE if runtime == "onnx" else FRACTIONS
    heads = sorted({max(1, round(whole[0] * part)) for part in fractions})
    neurons = sorted({max(1, round(whole[1] * part / 8) * 8) for part in fractions} | {whole[1]})
    sizes = [(0, 0), *((n, 0) for n in heads), *((0, n) for n in neurons), whole]
    with tempfile.TemporaryDirectory() as folder:
        calls = []
        for number, (some_heads, some_neurons) in enumerate(sizes):
            small = _small_model(model, some_heads, some_neurons)
            file = Path(folder, f"{number}.onnx")
            calls.append(forward_of(small, runtime, batch, length, file))
        times = time_in_turns(calls)
    rest, *of_heads = times[: 1 + len(heads)]
    of_neurons, dense = times[1 + len(heads) : -1], times[-1]
    # The two parts together take as long as the whole; because of caches, they differ a little.
    scale = (dense - rest) / (of_heads[-1] + of_neurons[-1] - 2 * rest) / len(layers)
    return SpeedTable(
        heads=[[0, *heads], [0.0, *((t - rest) * scale for t in of_heads)]],
        neurons=[[0, *neurons], [0.0, *((t - rest) * scale for t in of_neurons)]],
        rest=rest,
        dense=dense,
        runtime=runtime,
        batch=batch,
        length=length,
    )


def measure_speedup(
    dense: PreTrainedModel, small: PreTrainedModel, runtime: str, batch: int, length: int
) -> float:
    """How many times as fast `small` is as `dense`, both timed in turns."""
    with tempfile.TemporaryDirectory() as folder:
        calls = [
            forward_of(model, runtime, batch, length, Path(folder, f"{number}.onnx"))
            for number, model in enumerate((dense, small))
        ]
        slow, fast = time_in_turns(calls)
    return slow / fast


def forward_of(
    model: PreTrainedModel, runtime: str, batch: int, length: int, file: Path
) -> Callable[[], object]:
    """A call of a model in evaluation. For ONNX Runtime, the model is written to `file`."""
    inputs = sample_inputs(model, batch, length)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    if runtime == "onnx":
        write_onnx(model.cpu(), file)
        session = open_session(file)
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return lambda: session.run(None, arrays)
    model.eval()
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def forward():
        model(**inputs)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return forward


def time_in_turns(calls: list[Callable[[], object]]) -> list[float]:
    """The microseconds of each call, in its fastest round: other programs only make it slower.

    Each round makes every call once.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS + 2):
        for call, times in zip(calls, seconds):
            begun = time.perf_counter()
            call()
            if number > 1:  # the first ones warm up
                times.append(time.perf_counter() - begun)
    return [1e6 * min(times) for times in seconds]


def _small_model(model: PreTrainedModel, heads: int, neurons: int) -> PreTrainedModel:
    """A compact model with random weights, whose layers have so many heads and neurons."""
    config, count = bertarized_config(model.config), len(layers_of(model))
    compact_class = class_of(COMPACT + config.model_type, type(model).__name__.partition("For")[2])
    size = config.hidden_size // config.num_attention_heads
    sizes = {
        "layer_heads": [heads] * count,
        "layer_head_sizes": [size if heads else 0] * count,
        "layer_neurons": [neurons] * count,
    }
    if family_of(config).bias_per_head:
        sizes["layer_head_indices"] = [list(range(heads))] * count
    return compact_class(compact_config(config, **sizes)).to(model.device).eval()
