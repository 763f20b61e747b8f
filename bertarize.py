"""Turn a fine-pruned checkpoint into a plain model with the same outputs.

    python bertarize.py --model_name_or_path OUT             # a plain model, pruned weights at zero
    python bertarize.py --model_name_or_path OUT --compact   # without its empty heads and neurons
    python bertarize.py --model_name_or_path OUT --compact --onnx model.onnx   # for ONNX Runtime

writes the folder bertarized_OUT (or compact_OUT) beside OUT. `BertForQuestionAnswering` and the
Auto classes load the plain model as any other; for a compact one, import emmental first. The
checkpoint's config.json says which method and threshold it was trained with; checkpoints of the
2020 code need --threshold. --compact and --onnx also take a plain or compact model.
"""

from argparse import Namespace
from pathlib import Path

from transformers import PreTrainedModel

from emmental.checkpoints.card import CARD_FILE, derived_card, push_to_hub, read_card
from emmental.checkpoints.counts import plain_percents
from emmental.checkpoints.export import bertarize
from emmental.checkpoints.loading import advising, head_of, load_masked, load_model, read_config
from emmental.checkpoints.onnx_file import check_onnx, write_onnx
from emmental.checkpoints.tokenizer import tokenizer_to_copy
from emmental.inference import compacted
from emmental.models.families import is_masked
from emmental.system.errors import UserError, one_line_errors
from emmental.system.files import write_folder, write_text
from emmental.training.flags import add_mask_flags, given_masks
from emmental.training.parser import Parser
from emmental.training.runlog import set_up_logging

# The files of a bertarized folder. A target folder with any other file is not overwritten.
MODEL_FILES = set(
    """README.md config.json model.safetensors pytorch_model.bin tokenizer.json vocab.txt
    tokenizer_config.json special_tokens_map.json added_tokens.json""".split()
)


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder of the fine-pruned (masked) checkpoint")
    beside = "bertarized_<name>, or compact_<name>, beside it"
    add("--target_model_path", help=f"folder to write (default: {beside})")
    compact = "drop empty heads and neurons: a smaller model, which needs this package to load"
    add("--compact", action="store_true", help=compact)
    add("--onnx", metavar="FILE", help="also write the model to this file, for ONNX Runtime")
    add("--push_to_hub", metavar="ID", help="also upload the folder to this repository of the hub")
    add_mask_flags(add)
    return parser


def target_folder(source: Path, asked: str | None, kind: str) -> Path:
    """The folder of the plain model. Raises UserError for one that holds anything else."""
    target = Path(asked or source.resolve().with_name(f"{kind}_{source.resolve().name}"))
    if target.resolve() == source.resolve():
        raise UserError("--target_model_path is the checkpoint itself: choose another folder")
    if target.is_file():
        raise UserError(f"--target_model_path {target} is a file: choose a folder")
    others = {file.name for file in target.glob("*")} - MODEL_FILES
    if others:
        raise UserError(
            f"--target_model_path {target} holds other files ({', '.join(sorted(others)[:3])}): "
            "choose another folder"
        )
    return target


def load_plain(args: Namespace) -> PreTrainedModel:
    """The plain model of a masked checkpoint; with --compact or --onnx also of a plain one."""
    source, masks = args.model_name_or_path, given_masks(args)
    if (args.compact or args.onnx) and Path(source).is_dir():
        values = read_config(source)
        if not is_masked(values["model_type"]):
            given = [f"--{name}" for name, value in masks.items() if value is not None]
            if given:
                raise UserError(f"{source} has no masks: leave out {', '.join(given)}")
            return load_model(source, head_of(source, values), masked=False, trained=True)
    return bertarize(load_masked(source, **masks))


def drop(model: PreTrainedModel) -> PreTrainedModel:
    """The compact form of a plain model. Prints what is dropped. Raises UserError."""
    try:
        small = compacted(model)
    except ValueError as error:
        raise UserError(f"--compact: {error}") from error
    config = small.config
    head_size = config.hidden_size // config.num_attention_heads
    print(f"{'layer':>5}{'heads':>12}{'head size':>12}{'neurons':>16}")
    sizes = zip(config.layer_heads, config.layer_head_sizes, config.layer_neurons)
    for layer, (heads, size, neurons) in enumerate(sizes):
        cells = (
            f"{heads} of {config.num_attention_heads}",
            f"{size} of {head_size}" if heads else "",
            f"{neurons:,} of {config.intermediate_size:,}",
        )
        print(f"{layer:>5}{cells[0]:>12}{cells[1]:>12}{cells[2]:>16}")
        for count, part in ((heads, "attention"), (neurons, "feed-forward part")):
            if not count:
                print(f"{'':>5}  nothing remains of the {part}: it becomes a bias")
    before, after = (sum(p.numel() for p in part.parameters()) for part in (model, small))
    print(f"parameters: {before:,} before, {after:,} after ({4e-6 * after:.1f} MB in float32)")
    if before == after:
        print("no head and no neuron is empty: nothing could be dropped")
    return small


def main(argv: list[str] | None = None) -> Path:
    args = get_parser().parse_args(argv)
    set_up_logging()
    with one_line_errors(), advising("give --threshold"):
        source = Path(args.model_name_or_path)
        kind = "compact" if args.compact else "bertarized"
        target = target_folder(source, args.target_model_path, kind)
        if args.onnx:
            check_onnx(Path(args.onnx))
        model = load_plain(args)
        tokenizer = tokenizer_to_copy(str(source))
        if args.compact:
            model = drop(model)
        origin = f"Converted with `bertarize.py` from `{source.resolve().name}`."
        card = derived_card(read_card(source), args.push_to_hub or target.name, model, origin)

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            if tokenizer:
                tokenizer.save_pretrained(folder)
            write_text(folder / CARD_FILE, card)

        write_folder(target, fill)
        percent = plain_percents(model)[0]
        print(f"{type(model).__name__} with {percent:.2f} % of its encoder's weights: {target}")
        if args.onnx:
            write_onnx(model, Path(args.onnx))
            print(f"its outputs are the same in ONNX Runtime: {args.onnx}")
        if args.push_to_hub:
            print(f"pushed to {push_to_hub(target, args.push_to_hub)}")
    return target


if __name__ == "__main__":
    main()
