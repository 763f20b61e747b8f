"""Store a fine-pruned BERT close to the entropy of its weights, in one file, and get it back.

    python saving_prunebert.py pack CHECKPOINT FILE        # masked or bertarized; --bits 32, 16, 8 (default), ... 2
    python saving_prunebert.py info FILE                   # what each matrix takes, and the whole
    python saving_prunebert.py verify FILE CHECKPOINT      # masks and weights; --data_dir: the metric too
    python saving_prunebert.py unpack FILE FOLDER          # a normal from_pretrained folder

From Python: `emmental.storage.load_packed(FILE)` is the ready `BertFor*` model. The embeddings are part of the file,
in 8 bits by row or as --bits says; `pack --base_model NAME` leaves them out where they are still those of NAME.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from emmental import coding, storage
from emmental.errors import UserError, one_line_errors
from emmental.families import is_masked
from emmental.files import write_json
from emmental.loading import read_config
from emmental.training.args import Parser, add_mask_flags, given_masks
from emmental.training.runlog import set_up_logging

MB = 1e6


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="pack | unpack | info | verify", help="what to do"
    )
    base = {
        "help": "model whose embeddings are left out of the file: a name on the hub, or a folder"
    }

    def verb(name: str, summary: str, *operands: tuple[str, str]):
        sub = verbs.add_parser(name, help=summary, description=summary)
        for operand, meaning in operands:
            sub.add_argument(operand, help=meaning)
        return sub.add_argument

    checkpoint = (
        "checkpoint",
        "folder of a masked checkpoint, or of a bertarized or dense BERT, with its tokenizer",
    )
    file = "file", "packed file"
    add = verb("pack", "write a packed file", checkpoint, file)
    add(
        "--bits",
        type=int,
        default=8,
        choices=coding.BITS,
        help="precision of the matrices (bias and LayerNorm: 16 at least)",
    )
    add("--base_model", **base)
    add_mask_flags(add)
    add = verb("unpack", "write a normal model folder", file, ("folder", "folder to write"))
    add("--base_model", **base)
    add = verb("info", "what each matrix takes, and the whole", file)
    add("--json", help="file to write the figures to")
    add = verb(
        "verify", "compare a packed file with the checkpoint it was made of", file, checkpoint
    )
    add("--base_model", **base)
    add("--task_name", help="GLUE task to evaluate both on, with --data_dir (else: SQuAD)")
    add("--data_dir", help="folder of the data to evaluate both on")
    add("--predict_file", help="SQuAD file to evaluate both on")
    add("--max_seq_length", type=int, help="as given in training, when not the default")
    add("--version_2_with_negative", action="store_true", help="SQuAD v2.0")
    add_mask_flags(add)
    return parser


def print_info(packed: storage.Packed, report: dict) -> None:
    header = packed.header
    print(f"{packed.path}: {header['architecture']}, {header['bits']} bits"
          + (f", without the embeddings of {header['base_model']['name']}" if header["base_model"] else ""))  # fmt: skip
    matrices = [row for row in report["rows"] if len(row["shape"]) == 2]
    width = max(len(row["name"]) for row in matrices)
    print(
        f"\n{'matrix':<{width}}  {'shape':>13}  {'remaining':>9}  {'bits/weight':>11}  {'bytes':>11}"
    )
    for row in matrices:
        shape = " x ".join(map(str, row["shape"]))
        print(
            f"{row['name']:<{width}}  {shape:>13}  {row['remaining']:>8.2%}  {row['bits_per_weight']:>11.2f}  {row['bytes']:>11,}"
        )
    others = [row for row in report["rows"] if len(row["shape"]) != 2]
    print(
        f"{f'{len(others)} vectors (bias, LayerNorm)':<{width}}  {'':>13}  {'':>9}  {'':>11}  {sum(row['bytes'] for row in others):>11,}"
    )
    print(f"\n{'MB':<18}{'dense float32':>15}{'packed':>10}{'entropy':>10}")
    for part, total in report["totals"].items():
        cells = (total.get(name) for name in ("dense", "packed", "entropy"))
        shown = ("" if value is None else f"{value / MB:.2f}" for value in cells)
        print(
            f"{part:<18}"
            + "".join(f"{text:>{size}}" for text, size in zip(shown, (15, 10, 10), strict=True))
        )
    linears = [row for row in matrices if ".encoder." in row["name"]]
    if all(row["remaining"] == 1 for row in linears):
        print(
            "\nno matrix of the encoder is sparse: nothing is gained over other files of as many bits"
        )


def evaluate(model: str, args) -> dict:
    """Results of the evaluation script on a model folder, in a process of its own."""
    script = "masked_run_glue.py" if args.task_name else "masked_run_squad.py"
    model_type = read_config(model)["model_type"]
    masked = is_masked(model_type)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name(script)), "--do_eval", "--output_dir", f"{folder}/out",
                   "--model_type", model_type, "--model_name_or_path", model]  # fmt: skip
        for name in ("task_name", "data_dir", "predict_file", "max_seq_length"):
            if getattr(args, name):
                command += [f"--{name}", str(getattr(args, name))]
        command += ["--version_2_with_negative"] * args.version_2_with_negative
        if masked:
            settings = {"pruning_method": args.pruning_method, "final_threshold": args.threshold}
            command += [
                word
                for name, value in settings.items()
                if value is not None
                for word in (f"--{name}", str(value))
            ]
            command += ["--global_topk"] * bool(args.global_topk)
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise UserError(
                f"{script} cannot evaluate {model}: {lines[-1] if lines else 'it was stopped'}"
            )
        results = json.loads(
            (Path(folder) / "out" / "eval_results.json").read_text(encoding="utf-8")
        )
    unwanted = ("remaining", "threshold", "entropy", "total")
    return {k: v for k, v in results.items() if isinstance(v, float) and not k.startswith(unwanted)}


def verify(args) -> int:
    """Compare, print, and return the exit status: 0 when all is as it must be."""
    problems = storage.compare(args.file, args.checkpoint, args.base_model, **given_masks(args))
    for problem in problems:
        print(problem)
    if not problems:
        bits = storage.open_packed(args.file).header["bits"]
        print(f"all masks are equal, and all weights within the bound of {bits} bits")
    if args.data_dir or args.predict_file:
        with tempfile.TemporaryDirectory() as folder:
            storage.unpack(args.file, f"{folder}/model", args.base_model)
            before, after = evaluate(args.checkpoint, args), evaluate(f"{folder}/model", args)
        for name, value in before.items():
            print(
                f"{name}: {value:.4g} of the checkpoint, {after.get(name, float('nan')):.4g} packed"
            )
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    set_up_logging()
    with one_line_errors():
        if args.verb == "pack":
            packed = storage.pack(
                args.checkpoint, args.file, args.bits, args.base_model, **given_masks(args)
            )
            size = packed.path.stat().st_size
            print(f"{args.file}: {size / MB:.2f} MB, {args.bits} bits")
        elif args.verb == "unpack":
            model = storage.unpack(args.file, args.folder, args.base_model)
            print(f"{type(model).__name__} and its tokenizer, written to {args.folder}")
        elif args.verb == "info":
            packed = storage.open_packed(args.file)
            report = storage.summary(packed)
            print_info(packed, report)
            if args.json:
                write_json(Path(args.json), report)
        else:
            return verify(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
