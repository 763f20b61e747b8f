"""Count the remaining weights of a fine-pruned encoder, per matrix and over all.

    python counts_parameters.py --serialization_dir OUT

Method and threshold are read from the checkpoint's config.json; checkpoints of the 2020 code do not
record the threshold, and want --threshold (and --pruning_method, if theirs is not recorded either).
"""

from pathlib import Path

from emmental.errors import one_line_errors
from emmental.export import RemainingWeights, remaining_weights
from emmental.files import write_json
from emmental.loading import load_masked, require_folder
from emmental.modules.methods import METHODS
from emmental.training.args import Parser, pruning_method
from emmental.training.runlog import set_up_logging


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--serialization_dir", required=True, help="folder of the fine-pruned (masked) checkpoint")
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
    add("--json", metavar="FILE", help="write the counts to this file as well")
    return parser


def print_report(
    counts: RemainingWeights, method: str, threshold: float | None, global_topk: bool
) -> None:
    ranked = ", all matrices ranked together" if global_topk else ""
    print(method + (f" at threshold {threshold:g}{ranked}" if METHODS[method].threshold else ""))
    width = max(len(m.name) for m in counts.matrices)
    print(f"{'matrix':<{width}}  {'remaining %':>11}  {'remaining':>12}")
    for m in counts.matrices:
        print(
            f"{m.name:<{width}}  {m.percent:>11.3f}  {m.remaining:>12,}"
            + ("  (floor of 0.5%)" if m.floored else "")
        )
    print(
        f"\nRemaining weights, published convention (encoder, bias and LayerNorm counted): {counts.published_percent:.3f} %"
    )
    print(
        f"Remaining weights, Linear weights only:                                        {counts.linear_percent:.3f} %"
    )


def main(argv: list[str] | None = None) -> RemainingWeights:
    args = get_parser().parse_args(argv)
    set_up_logging()
    with one_line_errors():
        folder = require_folder(args.serialization_dir, "--serialization_dir")
        model = load_masked(str(folder), args.pruning_method, args.threshold, args.global_topk)
        counts = remaining_weights(model)
        print_report(
            counts, model.config.pruning_method, model.config.threshold, model.config.global_topk
        )
        if args.json:
            settings = {
                name: getattr(model.config, name)
                for name in ("pruning_method", "threshold", "global_topk")
            }
            write_json(Path(args.json), settings | counts.as_dict())
    return counts


if __name__ == "__main__":
    main()
