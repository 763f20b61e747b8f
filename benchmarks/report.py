"""What the benchmarks share: flags, the frame of a script, models, turns, and tables."""

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

from emmental.models.families import encoder_of, family_of, layers_of
from emmental.system.errors import one_line_errors
from emmental.system.files import write_json
from emmental.system.hardware import processor_name
from emmental.training.parser import Parser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_parser(doc: str) -> Parser:
    """A parser with this help, and the flag --json."""
    parser = Parser(description=doc)
    parser.add_argument("--json", help="file for the results")
    return parser


def at_least(least: int, step: int = 1) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`, and a multiple of `step`."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        if int(text) % step:
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {step}")
        return int(text)

    return number


positive = at_least(1)
hidden_size = at_least(64, step=64)


def fraction(text: str) -> float:
    """An argparse type: a fraction above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction above 0 and up to 1")
    return value


def device(text: str) -> str:
    """An argparse type: cpu, or cuda where there is one."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no GPU here")
    return text


def main(args: argparse.Namespace, run: Callable[[argparse.Namespace], dict]) -> dict:
    """Print the machine, run a benchmark, and write what it returns to --json."""
    transformers.utils.logging.set_verbosity_error()  # no warnings about fresh scores
    transformers.utils.logging.disable_progress_bar()
    results = {"machine": machine(getattr(args, "device", "cpu"))}
    print(results["machine"])
    with one_line_errors():
        results |= run(args)
        if args.json:
            write_json(Path(args.json), results)
    return results


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
    model = random_model("bert", 1.0, **size)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    family = family_of(config)
    for layer in layers_of(model):
        for names, count, percent in (
            (family.heads, config.num_attention_heads, heads),
            (family.neurons, config.intermediate_size, neurons),
        ):
            *rows, columns = (layer.get_submodule(name).weight for name in names)
            mask = torch.zeros(count)
            mask[torch.randperm(count, generator=generator)[: -(-count * percent // 100)]] = 1
            mask = mask.repeat_interleave(columns.shape[1] // count)
            columns.mul_(mask)
            for weight in rows:
                weight.mul_(mask[:, None])
    return model


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference between the outputs of two models."""
    return max((a - b).abs().max().item() for a, b in zip(outputs, expected, strict=True))


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
