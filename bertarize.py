"""Turn a fine-pruned checkpoint into a plain BERT with the same outputs.

    python bertarize.py --model_name_or_path OUT

writes the folder bertarized_OUT beside OUT. `BertForQuestionAnswering.from_pretrained` and the Auto
classes load it as any BERT. The checkpoint's config.json says which method and threshold it was
trained with; checkpoints of the 2020 code need --threshold.
"""

from pathlib import Path

import transformers

from emmental.card import CARD_FILE, derived_card, push_to_hub, read_card
from emmental.errors import UserError, one_line_errors
from emmental.export import bertarized_config, bertarized_state_dict, remaining_weights
from emmental.files import write_folder, write_text
from emmental.loading import load_masked
from emmental.tokenizer import tokenizer_to_copy
from emmental.training.args import Parser, add_mask_flags, given_masks
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
    add("--target_model_path", help="folder to write (default: bertarized_<name> beside it)")
    add("--push_to_hub", metavar="ID", help="also upload the folder to this repository of the hub")
    add_mask_flags(add)
    return parser


def target_folder(source: Path, asked: str | None) -> Path:
    """The folder of the plain model. Raises UserError for one that holds anything else."""
    target = Path(asked or source.resolve().with_name(f"bertarized_{source.resolve().name}"))
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


def main(argv: list[str] | None = None) -> Path:
    args = get_parser().parse_args(argv)
    set_up_logging()
    with one_line_errors():
        source = Path(args.model_name_or_path)
        target = target_folder(source, args.target_model_path)
        masked = load_masked(str(source), **given_masks(args))
        tokenizer = tokenizer_to_copy(str(source))

        plain_class = getattr(transformers, type(masked).__name__.removeprefix("Masked"))
        plain = plain_class(bertarized_config(masked.config)).eval()
        plain.load_state_dict(bertarized_state_dict(masked))
        origin = f"Converted with `bertarize.py` from `{source.resolve().name}`."
        card = derived_card(read_card(source), args.push_to_hub or target.name, plain, origin)

        def fill(folder: Path) -> None:
            plain.save_pretrained(folder)
            if tokenizer:
                tokenizer.save_pretrained(folder)
            write_text(folder / CARD_FILE, card)

        write_folder(target, fill)
        percent = remaining_weights(masked).linear_percent
        print(f"{plain_class.__name__} with {percent:.2f} % of its encoder's weights: {target}")
        if args.push_to_hub:
            print(f"pushed to {push_to_hub(target, args.push_to_hub)}")
    return target


if __name__ == "__main__":
    main()
