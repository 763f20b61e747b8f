"""Prune once for all: bake the masks of a fine-pruned checkpoint into a plain BERT.

    python bertarize.py --model_name_or_path OUT

writes the folder bertarized_OUT beside OUT, which `BertForQuestionAnswering.from_pretrained` and the Auto
classes load as any BERT. Method and threshold are read from the checkpoint's
config.json; checkpoints of the 2020 code want --threshold.
"""

from pathlib import Path

import transformers

from emmental.errors import UserError, one_line_errors
from emmental.export import bertarized_config, bertarized_state_dict, remaining_weights
from emmental.files import write_folder
from emmental.loading import load_masked, load_tokenizer, require_folder
from emmental.training.args import Parser, pruning_method
from emmental.training.runlog import set_up_logging

# What an earlier bertarized folder may hold; a target with anything else in it is not ours to replace.
MODEL_FILES = {
    "config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt", "added_tokens.json",
}  # fmt: skip


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder of the fine-pruned (masked) checkpoint")
    add(
        "--target_model_path",
        help="folder to write (default: bertarized_<name> beside the checkpoint)",
    )
    add(
        "--pruning_method",
        type=pruning_method,
        help="method, when not the one recorded in config.json",
    )
    add(
        "--threshold",
        type=float,
        help="threshold, when not the one recorded: a fraction in [0, 1] (for `threshold`, a cut on the scores)",
    )
    add(
        "--global_topk",
        action="store_true",
        default=None,
        help="all matrices were ranked together, and the checkpoint does not record it",
    )
    return parser


def target_folder(source: Path, asked: str | None) -> Path:
    """Where the plain model goes. Raises UserError for a folder that holds other things."""
    target = (
        Path(asked) if asked else source.resolve().parent / f"bertarized_{source.resolve().name}"
    )
    if target.resolve() == source.resolve():
        raise UserError("--target_model_path is the checkpoint itself: choose another folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"--target_model_path {target} is a file")
    others = (
        sorted({file.name for file in target.iterdir()} - MODEL_FILES) if target.is_dir() else []
    )
    if others:
        raise UserError(
            f"--target_model_path {target} holds other files ({', '.join(others[:3])}): choose another folder"
        )
    return target


def main(argv: list[str] | None = None) -> Path:
    args = get_parser().parse_args(argv)
    set_up_logging()
    with one_line_errors():
        source = require_folder(args.model_name_or_path, "--model_name_or_path")
        target = target_folder(source, args.target_model_path)
        masked = load_masked(str(source), args.pruning_method, args.threshold, args.global_topk)
        try:
            tokenizer = load_tokenizer(str(source))
        except UserError:
            print(f"{source} holds no tokenizer: none is written")
            tokenizer = None

        plain_class = getattr(transformers, type(masked).__name__.removeprefix("Masked"))
        plain = plain_class(bertarized_config(masked.config)).eval()
        plain.load_state_dict(bertarized_state_dict(masked))

        def fill(folder: Path) -> None:
            plain.save_pretrained(folder)
            if tokenizer:
                tokenizer.save_pretrained(folder)

        write_folder(target, fill)
        counts = remaining_weights(masked)
        print(
            f"{plain_class.__name__} with {counts.linear_percent:.2f} % of its encoder's weights, written to {target}"
        )
    return target


if __name__ == "__main__":
    main()
