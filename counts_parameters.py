"""Count the remaining weights of a fine-pruned encoder, by matrix and in total, and the remaining
heads and neurons of each layer: those through which an input reaches the output of the layer.

    python counts_parameters.py --serialization_dir OUT
    python counts_parameters.py --serialization_dir OUT --plot remaining.png

The checkpoint's config.json says which method and threshold it was trained with. Checkpoints of the
2020 code need --threshold, and some need --pruning_method.
"""

from dataclasses import asdict
from pathlib import Path

from emmental.checkpoints.counts import (
    LayerCount,
    RemainingWeights,
    count_layers,
    remaining_weights,
)
from emmental.checkpoints.loading import advising, load_masked
from emmental.modules.masks import find_masks
from emmental.system.errors import one_line_errors
from emmental.system.files import write_json
from emmental.training.flags import add_mask_flags, given_masks
from emmental.training.parser import Parser
from emmental.training.runlog import set_up_logging


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--serialization_dir", required=True, help="folder of the fine-pruned (masked) checkpoint")
    add_mask_flags(add)
    add("--json", metavar="FILE", help="also write the counts to this file")
    add("--plot", metavar="FILE", help="draw the counts as a grid of layers: .png, .pdf, .svg")
    return parser


def described(counts: RemainingWeights) -> str:
    return f"{counts.settings['pruning_method']}{counts.conditions}"


def print_report(counts: RemainingWeights, layers: list[LayerCount], depth: int) -> None:
    print(described(counts))
    width = max(len(matrix.name) for matrix in counts.matrices)
    print(f"{'matrix':<{width}}  {'remaining %':>11}  {'remaining':>12}")
    for matrix in counts.matrices:
        floor = "  (floor)" if matrix.floored else ""
        print(f"{matrix.name:<{width}}  {matrix.percent:>11.3f}  {matrix.remaining:>12,}{floor}")
    if any(matrix.floored for matrix in counts.matrices):
        print("(floor): the least that this method keeps of a matrix, 0.5% or one score")
    print(f"\n{'layer':>5}  {'remaining %':>11}  {'heads':>13}  {'neurons':>13}" if layers else "")
    for number, layer in enumerate(layers):
        percent = 100 * layer.remaining / layer.total
        heads = f"{layer.heads} of {layer.all_heads}"
        neurons = f"{layer.neurons} of {layer.all_neurons}"
        print(f"{number:>5}  {percent:>11.3f}  {heads:>13}  {neurons:>13}")
    if len(layers) < depth and layers:
        print(f"{'':>5}  these matrices serve {depth} layers")
    convention = "published convention (encoder, bias and LayerNorm counted):"
    print(f"\nRemaining weights, {convention} {counts.published_percent:.3f} %")
    print(f"Remaining weights, {'Linear weights only:':<59} {counts.linear_percent:.3f} %")


def main(argv: list[str] | None = None) -> RemainingWeights:
    args = get_parser().parse_args(argv)
    set_up_logging()
    with one_line_errors(), advising("give --threshold"):
        if args.plot:
            from paper.plots import check_picture, layer_figure, save_figure  # slow to import

            check_picture("--plot", Path(args.plot))
        model = load_masked(args.serialization_dir, **given_masks(args))
        masks = find_masks(model)
        counts = remaining_weights(model, masks)
        layers = count_layers(model, masks)
        if args.json:
            write_json(Path(args.json), counts.as_dict() | {"layers": list(map(asdict, layers))})
        if args.plot:
            title = f"{described(counts)}: {counts.published_percent:.1f}% remaining"
            save_figure(layer_figure(counts, layers, title), Path(args.plot))
        print_report(counts, layers, model.config.num_hidden_layers)
    return counts


if __name__ == "__main__":
    main()
