"""Keep some layers of a fine-tuned BERT: the baseline of a smaller model, to be distilled.

    python results/drop_layers.py runs/dense runs/dense-3 --keep 0 2 4

writes the folder of a BERT with these layers (counted from 0; by default every second one). Train
it with --model_type bert --model_name_or_path runs/dense-3 and runs/dense as the teacher.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import nn
from transformers import PreTrainedModel

from emmental.checkpoints.loading import head_of, load_model, read_config
from emmental.checkpoints.tokenizer import tokenizer_to_copy
from emmental.models.families import COMPACT, encoder_of
from emmental.system.errors import UserError, one_line_errors
from emmental.system.files import write_folder
from emmental.training.parser import Parser
from emmental.training.runlog import set_up_logging


def smaller(source: str, keep: list[int] | None) -> PreTrainedModel:
    """The model of the folder `source` with the layers `keep`, or every second one."""
    values = read_config(source)
    if values["model_type"].startswith(COMPACT):
        raise UserError(f"{source} is a compact model: give a plain one")
    model = load_model(source, head_of(source, values), masked=False, trained=True)
    layers = encoder_of(model).layer
    keep = sorted(range(0, len(layers), 2) if keep is None else set(keep))
    if not set(keep) <= set(range(len(layers))):
        raise UserError(f"--keep: {source} has the layers 0 to {len(layers) - 1}")
    encoder_of(model).layer = nn.ModuleList(layers[number] for number in keep)
    model.config.num_hidden_layers = len(keep)
    print(f"layers {', '.join(map(str, keep))} of {len(layers)}")
    return model


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("source", help="folder of the fine-tuned BERT")
    parser.add_argument("target", help="folder to write")
    parser.add_argument("--keep", type=int, nargs="+", help="layers to keep, such as 0 2 4")
    args = parser.parse_args(argv)
    set_up_logging()
    with one_line_errors():
        target = Path(args.target)
        if target.exists():
            raise UserError(f"{target} exists: choose another folder")
        model = smaller(args.source, args.keep)
        tokenizer = tokenizer_to_copy(args.source, model)

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            if tokenizer:
                tokenizer.save_pretrained(folder)

        write_folder(target, fill)


if __name__ == "__main__":
    main()
