"""Pack a fine-pruned model in one file close to the entropy of its weights, and unpack it.

    python saving_prunebert.py pack CHECKPOINT FILE     # masked or bertarized; --bits 2 to 32
    python saving_prunebert.py info FILE                # the size of each matrix and of the whole
    python saving_prunebert.py verify FILE CHECKPOINT   # masks and weights; --data_dir: metrics too
    python saving_prunebert.py unpack FILE FOLDER       # a normal from_pretrained folder

From Python, `emmental.storage.load_packed(FILE)` returns the model. The file contains the
embeddings, with one step per row. `pack --base_model NAME` leaves them out, if those of NAME are
the same.
"""

import io
import json
import sys
import tempfile
from argparse import Namespace
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

from emmental import storage
from emmental.checkpoints.loading import advising, head_of, read_config
from emmental.checkpoints.tokenizer import VOCABULARIES
from emmental.data.glue_tasks import CUSTOM, CUSTOM_ARGUMENTS, TASKS
from emmental.models.families import is_masked, prefix_of
from emmental.packing import coding
from emmental.system.errors import UserError, one_line_errors
from emmental.system.files import write_json
from emmental.training.checkpoint import ARGS_FILE
from emmental.training.flags import add_mask_flags, given_masks
from emmental.training.parser import Parser
from emmental.training.runlog import set_up_logging

MB = 1e6
ENTROPY = """entropy: that of the stored values, and of masks whose weights remain
independently of each other. A mask takes less where rows or columns are alike."""
LOADING = """load it elsewhere: `pip install .` in a clone of this project, and then
emmental.storage.load_packed("{file}"); or, for transformers alone, here:
python saving_prunebert.py unpack {file} FOLDER"""
LENGTHS = "max_seq_length", "max_query_length", "doc_stride", "stride"
# Flags of a training that an evaluation of its model needs again.
TASK_FLAGS = "task_name", *CUSTOM_ARGUMENTS, "version_2_with_negative", *LENGTHS
TASK_FLAGS += "word_column", "tag_column"
CHECKPOINT = "checkpoint", "folder of a masked, bertarized, compact or dense model with a task head"
FILE = "file", "packed file"
FOLDER = "folder", "folder to write"


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="pack | unpack | info | verify", help="what to do"
    )

    def verb(name: str, summary: str, *operands: tuple[str, str]):
        sub = verbs.add_parser(name, help=summary, description=summary)
        for operand, meaning in operands:
            sub.add_argument(operand, help=meaning)
        return sub.add_argument

    base = "model whose embeddings the file leaves out: a folder, or a name on the hub"
    # fmt: off
    add = verb("pack", "write a packed file", CHECKPOINT, FILE)
    add("--bits", type=int, default=8, choices=coding.BITS,
        help="precision of the matrices; bias and LayerNorm get at least 16")
    add("--base_model", help=base)
    add_mask_flags(add)
    add = verb("unpack", "write a normal model folder", FILE, FOLDER)
    add("--base_model", help=base)
    add = verb("info", "print the size of each matrix and of the whole", FILE)
    add("--json", help="also write the figures to this file")
    add = verb("verify", "compare a packed file with its checkpoint", FILE, CHECKPOINT)
    add("--base_model", help=base)
    add("--data_dir", help="folder of the data for evaluating both")
    add("--predict_file", help="SQuAD file for evaluating both")
    add("--task_name", help="GLUE task (default: that of the checkpoint's run, else SQuAD)")
    add("--max_seq_length", type=int, help="default: that of the checkpoint's run")
    add("--version_2_with_negative", action="store_true", help="SQuAD v2.0")
    for name in CUSTOM_ARGUMENTS:
        add(f"--{name}", action="store_true" if name == "regression" else "store",
            help=f"of a {CUSTOM} task (default: that of the checkpoint's run)")
    add_mask_flags(add)
    # fmt: on
    return parser


def print_info(packed: storage.Packed, report: dict) -> None:
    """Print the table of matrices and the totals of `storage.summary`."""
    header = packed.header
    base = header["base_model"]
    without = f", without the embeddings of {base['name']}" if base else ""
    print(f"{packed.path}: {header['architecture']}, {header['bits']} bits{without}\n")
    matrices = [row for row in report["rows"] if len(row["shape"]) == 2]
    vectors = [row["bytes"] for row in report["rows"] if len(row["shape"]) != 2]
    width = max(len(row["name"]) for row in matrices)
    print(
        f"{'matrix':<{width}}  {'shape':>11}  {'remaining':>11}  {'bits/weight':>11}  {'bytes':>11}"
    )
    for row in matrices:
        shape = " x ".join(map(str, row["shape"]))
        figures = f"{row['remaining']:>11.2%}  {row['bits_per_weight']:>11.2f}  {row['bytes']:>11,}"
        print(f"{row['name']:<{width}}  {shape:>11}  {figures}")
    name = f"{len(vectors)} vectors (bias, LayerNorm)"
    print(f"{name:<{width}}  {'':>11}  {'':>11}  {'':>11}  {sum(vectors):>11,}")
    print(f"\n{'MB':<18}{'dense float32':>15}{'packed':>10}{'entropy':>10}")
    for part, total in report["totals"].items():
        dense, size, entropy = (
            f"{total[name] / MB:.2f}" if name in total else ""
            for name in ("dense", "packed", "entropy")
        )
        print(f"{part:<18}{dense:>15}{size:>10}{entropy:>10}")
    print(f"\n{ENTROPY}")
    encoder = prefix_of(packed.model_class, "encoder")
    if all(row["remaining"] == 1 for row in matrices if row["name"].startswith(encoder)):
        print("\nNo matrix of the encoder is sparse: packing saves nothing beyond its precision.")


def evaluation_flags(checkpoint: str, args: Namespace) -> dict[str, object] | None:
    """The flags of an evaluation: those given, and those of the training if it had the same task.

    None for a task that no script has. Raises UserError for a classifier of an unknown task.
    """
    file = Path(checkpoint, ARGS_FILE)
    try:
        trained = dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged: remove it, and give --task_name") from error
    names = *TASK_FLAGS, "data_dir", "predict_file"
    flags = {name: value for name in names if (value := getattr(args, name, None))}
    task = trained.get("task_name")
    if flags.setdefault("task_name", task) == task:
        flags = {name: trained[name] for name in TASK_FLAGS if name in trained} | flags
    if args.task_name or task in (*TASKS, CUSTOM):
        return flags
    head = head_of(checkpoint, read_config(checkpoint))
    if head == "SequenceClassification" and not trained:
        raise UserError(f"{checkpoint} is a classifier of an unknown task: give its --task_name")
    is_squad = head == "QuestionAnswering" and (not trained or "doc_stride" in trained)
    is_tagger = head == "TokenClassification" and "tag_column" in trained
    return flags if is_squad or is_tagger else None


def evaluate(model: str, flags: dict[str, object], masks: dict[str, object]) -> dict[str, float]:
    """The metrics of a model folder, by the `main` of the evaluation script.

    flags: see `evaluation_flags`. masks: flags of a masked model alone.
    """
    script = "masked_run_ner" if "tag_column" in flags else "masked_run_squad"
    script = "masked_run_glue" if flags["task_name"] else script
    flags = flags | {"model_name_or_path": model, "model_type": "dense"}
    if is_masked(read_config(model)["model_type"]):
        flags |= masks | {"model_type": "masked"}
    words = ["--do_eval"]
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name}={value}")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        results = import_module(script).main([*words, f"--output_dir={folder}/out"])
    no_metrics = ("remaining", "threshold", "entropy", "total")
    return {
        name: value
        for name, value in results.items()
        if isinstance(value, float) and not name.startswith(no_metrics)
    }


def verify(args: Namespace) -> int:
    """Compare a packed file with its checkpoint, print the result, and return the exit status."""
    header = storage.open_packed(args.file).header
    with_data = args.data_dir or args.predict_file
    if with_data and {entry["name"] for entry in header["files"]}.isdisjoint(VOCABULARIES):
        raise UserError(
            f"{args.file} has no tokenizer, and cannot be evaluated: leave out --data_dir"
        )
    masks = given_masks(args)
    flags = evaluation_flags(args.checkpoint, args) if with_data else None
    problems = storage.compare(args.file, args.checkpoint, args.base_model, **masks)
    bound = f"all weights within the error bound of {header['bits']} bits"
    print("\n".join(problems) or f"all masks are equal, and {bound}")
    if with_data and not flags:
        print(f"metrics are not compared: no script here has the task of {args.checkpoint}")
    if flags:
        masks["final_threshold"] = masks.pop("threshold")
        before = evaluate(args.checkpoint, flags, masks)
        with tempfile.TemporaryDirectory() as folder:
            storage.unpack(args.file, f"{folder}/model", args.base_model)
            after = evaluate(f"{folder}/model", flags, masks)
        for name, value in before.items():
            print(f"{name}: {value:.4g} checkpoint, {after[name]:.4g} packed")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    set_up_logging()
    with one_line_errors(), advising("give --threshold"):
        if args.verb == "verify":
            return verify(args)
        if args.verb == "pack":
            packed = storage.pack(
                args.checkpoint, args.file, args.bits, args.base_model, **given_masks(args)
            )
            size = packed.path.stat().st_size
            print(f"{args.file}: {size / MB:.2f} MB, {args.bits} bits")
            print(LOADING.format(file=args.file))
        elif args.verb == "unpack":
            model = storage.unpack(args.file, args.folder, args.base_model)
            print(f"{type(model).__name__} is written to {args.folder}")
        else:
            packed = storage.open_packed(args.file)
            report = storage.summary(packed)
            if args.json:
                write_json(Path(args.json), report)
            print_info(packed, report)
            print(f"\n{LOADING.format(file=args.file)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
