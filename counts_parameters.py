"""Count the remaining weights of a fine-pruned encoder: of each matrix, and in total.

    python counts_parameters.py --serialization_dir OUT

The checkpoint's config.json says which method and threshold it was trained with. Checkpoints of the
2020 code need --threshold, and some need --pruning_method.
"""

from pathlib import Path

from emmental.errors import one_line_errors
from emmental.export import RemainingWeights, remaining_weights
from emmental.files import write_json
from emmental.loading import load_masked
from emmental.modules.methods import METHODS
from emmental.training.args import Parser, add_mask_flags, given_masks
from emmental.training.runlog import set_up_logging


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--serialization_dir", required=True, help="folder of the fine-pruned (masked) checkpoint")
    add_mask_flags(add)
    add("--json", metavar="FILE", help="write the counts to this file too")
    return parser


def print_report(counts: RemainingWeights) -> None:
    method, threshold, global_topk = counts.settings.values()
    ranked = ", all matrices ranked together" if global_topk else ""
    print(method + (f" at threshold {threshold:g}{ranked}" if METHODS[method].threshold else ""))
    width = max(len(m.name) for m in counts.matrices)
    print(f"{'matrix':<{width}}  {'remaining %':>11}  {'remaining':>12}")
    for m in counts.matrices:
        floor = "  (floor of 0.5%)" if m.floored else ""
        print(f"{m.name:<{width}}  {m.percent:>11.3f}  {m.remaining:>12,}{floor}")
    convention = "published convention (encoder, bias and LayerNorm counted):"
    print(f"\nRemaining weights, {convention} {counts.published_percent:.3f} %")
    print(f"Remaining weights, {'Linear weights only:':<59} {counts.linear_percent:.3f} %")


def main(argv: list[str] | None = None) -> RemainingWeights:
    args = get_parser().parse_args(argv)
    set_up_logging()
    with one_line_errors():
        counts = remaining_weights(load_masked(args.serialization_dir, **given_masks(args)))
        if args.json:
            write_json(Path(args.json), counts.as_dict())
        print_report(counts)
    return counts


if __name__ == "__main__":
    main()
