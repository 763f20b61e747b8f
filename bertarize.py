"""Turn a fine-pruned checkpoint into a plain model with the same outputs.

    python bertarize.py --model_name_or_path OUT             # a plain model, pruned weights at zero
    python bertarize.py --model_name_or_path OUT --compact   # without its empty heads and neurons
    python bertarize.py --model_name_or_path OUT --compact --onnx model.onnx   # for ONNX Runtime

writes the folder bertarized_OUT (or compact_OUT) beside OUT. transformers loads the plain model as
any other, and the compact one with `trust_remote_code=True`, without this package. The checkpoint's
config.json says which method and threshold it was trained with. Checkpoints of the 2020 code need
--threshold, and some need --pruning_method. --compact, --onnx and --keep_vocabulary_of also take a
plain or compact model. With such a model, --onnx alone writes only the ONNX file.
"""

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from emmental.checkpoints.card import CARD_FILE, derived_card, loading_of, push_to_hub, read_card
from emmental.checkpoints.corpus import corpus_files
from emmental.checkpoints.counts import plain_percents
from emmental.checkpoints.export import bertarize
from emmental.checkpoints.loading import advising, load_masked, load_plain, read_config
from emmental.checkpoints.onnx_file import check_onnx, write_onnx
from emmental.checkpoints.tokenizer import tokenizer_to_copy
from emmental.checkpoints.vocabulary import cut_vocabulary
from emmental.inference import compacted
from emmental.inference.int8 import (
    BATCH,
    LENGTH,
    PRESETS,
    Comparison,
    int8_file,
    preset_of_this_cpu,
    write_int8,
)
from emmental.models.families import family_of, is_masked, layers_of
from emmental.system.errors import UserError, one_line_errors
from emmental.system.files import write_folder, write_text
from emmental.training.flags import add_mask_flags, given_masks
from emmental.training.parser import Parser
from emmental.training.runlog import set_up_logging

# The files of a bertarized folder. A target folder with any other file is not overwritten.
MODEL_FILES = set(
    """README.md config.json configuration.py modeling.py model.safetensors pytorch_model.bin
    tokenizer.json vocab.txt tokenizer_config.json special_tokens_map.json
    added_tokens.json""".split()
)
# Files of sentence-transformers beside the model of an encoder. The folders are those of pooling.
ENCODER_FILES = "modules.json sentence_bert_config.json config_sentence_transformers.json [0-9]_*"


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="checkpoint folder: masked, plain or compact")
    beside = "bertarized_<name>, or compact_<name>, beside it"
    add("--target_model_path", help=f"folder to write (default: {beside})")
    compact = "drop empty heads and neurons: a smaller model, faster in any runtime"
    add("--compact", action="store_true", help=compact)
    pieces = "drop the pieces of the vocabulary that these texts (files, folders) do not need"
    add("--keep_vocabulary_of", nargs="+", metavar="PATH", help=pieces)
    add("--onnx", metavar="FILE", help="also write the model to this file, for ONNX Runtime")
    int8 = "also write FILE as int8 (m.onnx: m_int8.onnx) for a kind of CPU (default: this CPU)"
    add("--int8", nargs="?", const="this", choices=["this", *PRESETS], help=int8)
    add("--push_to_hub", metavar="ID", help="also upload the folder to this repository of the hub")
    add_mask_flags(add)
    return parser


def target_folder(checkpoint: Path, asked: str | None, kind: str) -> Path:
    """The folder of the plain model. Raises UserError for a folder with other files."""
    target = Path(asked or checkpoint.resolve().with_name(f"{kind}_{checkpoint.resolve().name}"))
    if target.resolve() == checkpoint.resolve():
        raise UserError("--target_model_path is the checkpoint itself: choose another folder")
    if target.is_file():
        raise UserError(f"--target_model_path {target} is a file: choose a folder")
    known = MODEL_FILES | {file.name for file in encoder_files(target)}
    others = {file.name for file in target.glob("*")} - known
    if others:
        raise UserError(
            f"--target_model_path {target} holds other files ({', '.join(sorted(others)[:3])}): "
            "choose another folder"
        )
    return target


def encoder_files(folder: Path) -> list[Path]:
    """The `ENCODER_FILES` in the folder of a sentence encoder. Other folders have none."""
    if not (folder / "modules.json").is_file():
        return []
    return [file for pattern in ENCODER_FILES.split() for file in sorted(folder.glob(pattern))]


def drop(model: PreTrainedModel) -> PreTrainedModel:
    """The compact form of a plain model. Prints what is dropped. Raises UserError."""
    try:
        small = compacted(model)
    except ValueError as error:
        raise UserError(f"--compact: {error}") from error
    config, whole = small.config, model.config
    family, layers = family_of(whole), layers_of(model)
    head_size = whole.hidden_size // whole.num_attention_heads
    print(f"{'layer':>5}{'heads':>12}{'head size':>12}{'neurons':>16}")
    sizes = zip(config.layer_heads, config.layer_head_sizes, config.layer_neurons)
    for layer, (heads, size, neurons) in enumerate(sizes):
        most = layers[layer].get_submodule(family.neurons[1]).in_features
        cells = (
            f"{heads} of {whole.num_attention_heads}",
            f"{size} of {head_size}" if heads else "",
            f"{neurons:,} of {most:,}",
        )
        print(f"{layer:>5}{cells[0]:>12}{cells[1]:>12}{cells[2]:>16}")
        for count, part in ((heads, "attention"), (neurons, "feed-forward part")):
            if not count:
                print(f"{'':>5}  nothing remains of the {part}: it becomes a bias")
    before, after = model.num_parameters(), small.num_parameters()
    print(f"parameters: {before:,} before, {after:,} after ({4e-6 * after:.1f} MB in float32)")
    if before == after:
        print("no head and no neuron is empty: nothing could be dropped")
    elif after > 0.9 * before:
        print("single weights that are zero stay: emmental.inference.sparsify skips them, on a CPU")
    return small


def cut(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, files: list[Path]
) -> PreTrainedTokenizerFast:
    """Cut the vocabulary of a plain model to these texts. Prints its sizes. Raises UserError."""
    if not tokenizer:
        raise UserError("--keep_vocabulary_of: the checkpoint has no tokenizer to cut")
    embeddings = model.get_input_embeddings()
    before, width = embeddings.weight.shape
    tokenizer = cut_vocabulary(model, tokenizer, files)
    after = embeddings.num_embeddings
    sizes = " to ".join(f"{4e-6 * rows * width:.1f}" for rows in (before, after))
    print(f"vocabulary: {after:,} of {before:,} pieces remain, {before - after:,} went", end=" ")
    print(f"({sizes} MB in float32); other text falls back to smaller pieces")
    return tokenizer


def print_int8(file: Path, preset: str, comparison: Comparison) -> None:
    """Print the sizes and times of an ONNX file and its int8 form."""
    print(f"int8, per channel, for {preset} CPUs:")
    rows = zip((file, int8_file(file)), comparison.megabytes, comparison.milliseconds, strict=True)
    for path, megabytes, milliseconds in rows:
        print(f"  {path}: {megabytes:.1f} MB, {milliseconds:.1f} ms for {BATCH} x {LENGTH} tokens")
    print(f"  the outputs of the two files differ by {100 * comparison.deviation:.1f}%")


def main(argv: list[str] | None = None) -> Path:
    args = get_parser().parse_args(argv)
    set_up_logging()
    with one_line_errors(), advising("give --threshold"):
        checkpoint = Path(args.model_name_or_path)
        if not checkpoint.is_dir():
            raise UserError(f"{checkpoint} is not a folder: give one of a fine-pruned checkpoint")
        kind = "compact" if args.compact else "bertarized"
        masked = is_masked(read_config(args.model_name_or_path)["model_type"])
        changed = masked or args.compact or args.keep_vocabulary_of
        copied = changed or args.target_model_path or args.push_to_hub
        target = target_folder(checkpoint, args.target_model_path, kind) if copied else checkpoint
        if args.int8 and not args.onnx:
            raise UserError("--int8 needs an ONNX file: give --onnx FILE, too")
        if args.onnx:
            check_onnx(Path(args.onnx))
        corpus = corpus_files(args.keep_vocabulary_of or ())
        masks = given_masks(args)
        if args.compact or args.onnx or corpus:  # these take a plain model, too
            model = load_plain(args.model_name_or_path, base=True, **masks)
        else:
            model = bertarize(load_masked(args.model_name_or_path, **masks))
        tokenizer = tokenizer_to_copy(str(checkpoint), model)
        if corpus:
            tokenizer = cut(model, tokenizer, corpus)
        if args.compact:
            model = drop(model)
        origin = f"Converted with `bertarize.py` from `{checkpoint.resolve().name}`."
        if corpus:
            origin += f" Its vocabulary was cut to {model.config.vocab_size:,} pieces."
        card = derived_card(read_card(checkpoint), args.push_to_hub or target.name, model, origin)

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            if tokenizer:
                tokenizer.save_pretrained(folder)
            for file in encoder_files(checkpoint):
                copy = shutil.copytree if file.is_dir() else shutil.copyfile
                copy(file, folder / file.name)
            write_text(folder / CARD_FILE, card)

        if copied:
            write_folder(target, fill)
            percent = plain_percents(model)[0]
            print(f"{type(model).__name__} with {percent:.2f} % of its encoder's weights: {target}")
            print(f"load it anywhere, with torch and transformers: {loading_of(model, target)}")
        if args.onnx:
            write_onnx(model, Path(args.onnx))
            print(f"ONNX Runtime computes the same outputs: {args.onnx}")
        if args.int8:
            preset = preset_of_this_cpu() if args.int8 == "this" else args.int8
            print_int8(Path(args.onnx), preset, write_int8(model, Path(args.onnx), preset))
        if args.push_to_hub:
            print(f"pushed to {push_to_hub(target, args.push_to_hub)}")
    return target


if __name__ == "__main__":
    main()
