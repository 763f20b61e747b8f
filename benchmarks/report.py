"""Shared by the benchmarks: models, turns, the description of the machine, tables, and JSON."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# The benchmarks can be run from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForQuestionAnswering, PreTrainedModel

from emmental import storage
from emmental.models.families import encoder_of, family_of, layers_of
from emmental.system.hardware import processor_name
from emmental.training import checkpoint


def machine(device: str = "cpu") -> str:
    """Processor, threads and versions, in one line."""
    processor = processor_name()
    if device == "cuda":
        processor = f"{torch.cuda.get_device_name()}, {processor}"
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )


def size_of(family: str, layers: int | None = None, hidden: int | None = None) -> dict[str, int]:
    """Settings of a family's configuration: so many layers, or a hidden size (a multiple of 64) in
    the proportions of its default. What is not given is as in the default.
    """
    default = CONFIG_MAPPING[family]()
    size = {"num_hidden_layers": layers} if layers else {}
    if hidden:
        scaled = ("intermediate_size", "hidden_dim", "num_attention_heads")
        known = {name: getattr(default, name) for name in scaled if hasattr(default, name)}
        size |= {name: value * hidden // default.hidden_size for name, value in known.items()}
        size["hidden_size"] = hidden
    return size


def random_model(family: str, remaining: float, **size: int) -> PreTrainedModel:
    """A freshly initialised model for questions, with a uniformly random mask over its encoder.

    remaining: density of the mask. size: settings of its configuration.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(CONFIG_MAPPING[family](**size)).eval()
    with torch.no_grad():
        for parameter in encoder_of(model).parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < remaining)
    return model


@torch.no_grad()
def structured_bert(heads: int, neurons: int, **size: int) -> PreTrainedModel:
    """A freshly initialised BERT in which each layer has lost random heads and neurons.

    heads, neurons: percentages that are left, rounded up. size: settings of its configuration.
    """
    model, generator = random_model("bert", 1.0, **size), torch.Generator().manual_seed(0)
    config, family = model.config, family_of(model.config)
    for layer in layers_of(model):
        for names, count, percent in (
            (family.heads, config.num_attention_heads, heads),
            (family.neurons, config.intermediate_size, neurons),
        ):
            *rows, columns = (layer.get_submodule(name).weight for name in names)
            kept = torch.zeros(count)
            kept[torch.randperm(count, generator=generator)[: -(-count * percent // 100)]] = 1
            kept = kept.repeat_interleave(columns.shape[1] // count)
            columns.mul_(kept)
            for weight in rows:
                weight.mul_(kept[:, None])
    return model


def load(checkpoint: str) -> PreTrainedModel:
    """The plain or compact model of a checkpoint, masked or not. Raises UserError."""
    model_class, config, state = storage.load_plain(checkpoint)
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return model.eval()


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference between the outputs of two models."""
    pairs = zip(found, expected, strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def take_turns(
    sides: dict[str, Callable[[], object]], warmup: int, repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of a call of each side in each of `repeats` turns, after `warmup` others."""
    times = {name: [] for name in sides}
    for turn in range(-warmup, repeats):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            sides[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print a Markdown table with numbers aligned to the right."""
    cells = [columns] + [[_shown(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True))]
    for row, texts in zip(rows, cells[1:], strict=True):
        aligned = (
            text.rjust(width) if isinstance(value, int | float) else text.ljust(width)
            for value, text, width in zip(row, texts, widths, strict=True)
        )
        lines.append(" | ".join(aligned))
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    header, *body = (f"| {line} |" for line in lines)
    print("", title, "", header, rule, *body, sep="\n", flush=True)


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: str | None, results: dict) -> None:
    """Write the results to the file of --json, if it was given."""
    if path:
        checkpoint.write_json(Path(path), results)
        print(f"\nresults written to {path}")
