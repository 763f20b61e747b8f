"""The size of a fine-pruned BERT on disk, by format and precision.

    python benchmarks/storage.py      # BERT-base with random weights and masks: 5 min on 2 cores
    python benchmarks/storage.py --model OUT --task_name sst-2 --data_dir GLUE/SST-2     # and yours

Sizes are those of encoder and head, without the embeddings, like the published 11.28 MB for
BERT-base at 6.16%. "notebook" is the method of the published notebook, rewritten: int8, CSR with
16-bit columns, gzip in HDF5. "entropy" is the entropy of what our files store: masks whose entries
are kept independently with their matrix's density, and values at their own frequencies.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import report
import torch
from transformers import BertTokenizerFast

import saving_prunebert
from emmental import storage
from emmental.models.families import prefix_of

MB = 1e6
BITS = (32, 16, 8, 6, 5, 4)
# fmt: off
COLUMNS = ["format", "MB", "/notebook", "entropy MB", "masks MB", "/entropy", "pack s", "load s",
           "whole file MB"]
# fmt: on


def save_random_bert(folder: Path, remaining: float) -> None:
    """Save a random BERT-base with a tokenizer as a checkpoint."""
    report.random_model("bert", remaining).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(1000))]
    tokenizer = BertTokenizerFast(vocab={word: place for place, word in enumerate(words)})
    tokenizer.save_pretrained(folder)


def torch_save_bytes(state: dict[str, torch.Tensor], embeddings: str) -> int:
    """Size of encoder and head by torch.save: float32, matrices as CSR with 32-bit indices."""
    state = {name: x for name, x in state.items() if not name.startswith(embeddings)}
    for name, tensor in state.items():
        if tensor.dim() == 2:
            csr = tensor.to_sparse_csr()
            parts = csr.crow_indices().int(), csr.col_indices().int(), csr.values()
            state[name] = torch.sparse_csr_tensor(*parts, size=tensor.shape)
    memory = io.BytesIO()
    torch.save(state, memory)
    return len(memory.getvalue())


def measure(checkpoint: Path, flags: dict | None) -> dict:
    """A row for each format: MB of encoder and head and their entropy, seconds, task results."""
    model = storage.load_plain(str(checkpoint))
    embeddings = prefix_of(type(model))
    size = torch_save_bytes(model.state_dict(), embeddings)
    rows = {"torch.save, CSR": {"MB": size / MB}}
    if flags:
        rows["dense float32"] = {"results": saving_prunebert.evaluate(str(checkpoint), flags, {})}
    with tempfile.TemporaryDirectory() as folder:
        for bits in BITS:
            file = f"{folder}/{bits}.packed"
            begun = time.perf_counter()
            packed = storage.pack(str(checkpoint), file, bits)
            packing = time.perf_counter() - begun
            begun = time.perf_counter()
            storage.load_packed(file)
            loading = time.perf_counter() - begun
            summary = storage.summary(packed)
            total = summary["totals"]["encoder and head"]
            masks = sum(
                tensor["position_entropy"]
                for tensor in packed.header["tensors"]
                if not tensor["name"].startswith(embeddings)
            )
            row = rows[f"ours, {bits} bits"] = {
                "MB": total["packed"] / MB,
                "entropy": total["entropy"] / MB,
                "masks": masks / 8 / MB,
                "pack": packing,
                "load": loading,
                "file": summary["totals"]["file"]["packed"] / MB,
            }
            if bits == 8:
                rows.setdefault("dense float32", {})["MB"] = total["dense"] / MB
                rows["notebook, int8"] = {"MB": notebook_bytes(packed) / MB}
            if flags:
                storage.unpack(file, f"{folder}/{bits}")
                row["results"] = saving_prunebert.evaluate(f"{folder}/{bits}", flags, {})
    return rows


def notebook_bytes(packed: storage.Packed) -> int:
    """Size of encoder and head by the notebook's method (see the top), with vectors as float32."""
    memory = io.BytesIO()
    embeddings = prefix_of(packed.model_class)
    with h5py.File(memory, "w") as file:
        for entry, array in packed.tensors():
            name = entry["name"]
            if name.startswith(embeddings):
                continue
            if array.ndim != 2:
                file.create_dataset(name, data=array.astype(np.float32), compression="gzip")
                continue
            scale = np.abs(array).max() / 127 or 1.0
            rows, columns = array.nonzero()
            ends = np.cumsum(np.bincount(rows, minlength=len(array)))
            parts = {
                "data": np.clip(np.rint(array[rows, columns] / scale), -128, 127).astype(np.int8),
                "indices": columns.astype(np.uint16),
                "indptr": np.concatenate([[0], ends]).astype(np.int32),
            }
            for part, values in parts.items():
                gzip = "gzip" if len(values) else None
                file.create_dataset(f"{name}/{part}", data=values, compression=gzip)
            file[name].attrs["scale"] = scale
    return len(memory.getvalue())


def show(title: str, rows: dict) -> None:
    notebook = rows["notebook, int8"]["MB"]
    metrics = sorted({name for row in rows.values() for name in row.get("results", {})})
    table = []
    for name in sorted(rows, key=lambda name: -rows[name]["MB"]):
        row = rows[name]
        results = row.get("results", {})
        table.append(
            [
                name,
                row["MB"],
                row["MB"] / notebook,
                row.get("entropy"),
                row.get("masks"),
                row["MB"] / row["entropy"] if "entropy" in row else None,
                row.get("pack"),
                row.get("load"),
                row.get("file"),
                *(results.get(metric) for metric in metrics),
            ]
        )
    report.print_table(title, [*COLUMNS, *metrics], table)


def get_parser() -> argparse.ArgumentParser:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--remaining", type=report.fraction, nargs="*", default=[0.1, 0.0616, 0.03],
        help="densities of the random BERTs (default: 0.1 0.0616 0.03)")
    add("--model", help="folder of a fine-pruned checkpoint")
    add("--data_dir", help="folder of the data to evaluate --model with")
    add("--predict_file", help="SQuAD file to evaluate --model with")
    add("--task_name", help="GLUE task (default: that of the checkpoint's run, else SQuAD)")
    add("--max_seq_length", type=int, help="default: that of the checkpoint's run")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> None:
    report.main(get_parser().parse_args(argv), run)


def run(args: argparse.Namespace) -> dict:
    torch.sparse.check_sparse_tensor_invariants.disable()  # torch warns without this line
    results = {}
    for remaining in args.remaining:
        with tempfile.TemporaryDirectory() as folder:
            save_random_bert(Path(folder), remaining)
            rows = results[f"random, {remaining:.2%}"] = measure(Path(folder), None)
        show(f"BERT-base, random weights and mask, {remaining:.2%} remaining", rows)
    if args.model:
        has_data = args.data_dir or args.predict_file
        flags = saving_prunebert.evaluation_flags(args.model, args) if has_data else None
        rows = results[args.model] = measure(Path(args.model), flags)
        show(args.model, rows)
    return results


if __name__ == "__main__":
    main()
