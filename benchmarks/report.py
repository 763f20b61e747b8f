"""What the benchmarks share: the machine in words, tables on the screen, results as JSON."""

import os
import platform
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the benchmarks run from any folder

import torch
import transformers
from transformers import BertConfig, BertForQuestionAnswering

from emmental.hardware import processor_name
from emmental.training import checkpoint


def machine(device: str = "cpu") -> str:
    """Processor, threads and versions, in a line."""
    processor = processor_name()
    if device == "cuda":
        processor = f"{torch.cuda.get_device_name()}, {processor}"
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def random_bert(remaining: float, **size: int) -> BertForQuestionAnswering:
    """A BERT, base or of another `size`, with weights as at initialisation and a uniformly random mask over its encoder."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**size)).eval()
    with torch.no_grad():
        for parameter in model.bert.encoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < remaining)
    return model


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    """A Markdown table: numbers to the right, floats in three digits or so."""
    cells = [[_shown(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}\n")
    print(
        "| "
        + " | ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True))
        + " |"
    )
    print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for row, texts in zip(rows, cells, strict=True):
        aligned = [
            text.rjust(width) if isinstance(value, int | float) else text.ljust(width)
            for value, text, width in zip(row, texts, widths, strict=True)
        ]
        print("| " + " | ".join(aligned) + " |", flush=True)


def _shown(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:.3f}"
            if abs(value) < 10
            else f"{value:.1f}"
            if abs(value) < 1000
            else f"{value:,.0f}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: str | None, results: dict) -> None:
    """Write the results where --json says, if it says so."""
    if path:
        checkpoint.write_json(Path(path), results)
        print(f"\nwritten to {path}")
