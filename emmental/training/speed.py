"""--target_speedup: prune heads and neurons until the compact model is so many times as fast."""

import logging
from argparse import Namespace
from dataclasses import asdict

from transformers import PreTrainedModel

from ..checkpoints.export import bertarize
from ..inference import compacted
from ..inference.times import SpeedTable, measure_speedup, measure_table
from ..models.families import is_masked
from ..system.errors import UserError
from .distributed import World

MET = 0.9  # of the asked speed; below, a warning

logger = logging.getLogger(__name__)


def plan_speedup(args: Namespace, model: PreTrainedModel, resumed: bool, world: World) -> Namespace:
    """The arguments with the final threshold of --target_speedup, a fraction of the layers' time.

    The cost of heads and neurons is measured, or taken from the checkpoint of a resumed run, and
    set in the configuration of the model. Raises UserError for a speed that cannot be reached.
    """
    if not is_masked(args.model_type):
        return args
    if not resumed:
        model.config.structure_times = None
    if args.target_speedup is None:
        return args
    if not model.config.structure_times:
        shape = args.speedup_of or "torch", args.speedup_batch or 1, args.speedup_length or 128
        logger.info(
            "measuring what heads and neurons cost: seconds in torch, a minute in ONNX Runtime"
        )
        table = measure_table(model, *shape) if world.is_main else None
        model.config.structure_times = world.gather(table and asdict(table))[0]
    table = SpeedTable(**model.config.structure_times)
    if not table.in_order:
        logger.warning(
            "more heads or neurons took less time: this machine is busy, and the speed may be "
            "missed; start again when it is idle"
        )
    if args.target_speedup >= table.most:
        raise UserError(
            f"--target_speedup {args.target_speedup:g}: without any heads and neurons, the model "
            f"is {table.most:.1f} times as fast ({describe(table)}): give less"
        )
    fraction = min(1.0, table.fraction(args.target_speedup))
    logger.info(
        f"{args.target_speedup:g} times as fast ({describe(table)}): {fraction:.1%} of the time of "
        "the layers remains"
    )
    return Namespace(**vars(args) | {"final_threshold": fraction})


def report_speedup(args: Namespace, model: PreTrainedModel) -> dict[str, float]:
    """How many times as fast the compact model is: asked, predicted and measured."""
    table = SpeedTable(**model.config.structure_times)
    plain = bertarize(model).float()
    small = compacted(plain)
    config = small.config
    predicted = table.dense / table.time_of(config.layer_heads, config.layer_neurons)
    dense = type(plain)(plain.config).to(model.device)
    logger.info("measuring how fast the compact model is")
    measured = measure_speedup(dense, small, table.runtime, table.batch, table.length)
    missed = measured < MET * args.target_speedup
    logger.log(
        logging.WARNING if missed else logging.INFO,
        f"times as fast ({describe(table)}): asked {args.target_speedup:g}, predicted "
        f"{predicted:.2f}, measured {measured:.2f}" + "; measure again on an idle machine" * missed,
    )
    return {"speedup_predicted": predicted, "speedup": measured}


def describe(table: SpeedTable) -> str:
    """The runtime and the shape of the inputs of a table, for a message."""
    runtime = {"torch": "torch", "onnx": "ONNX Runtime"}[table.runtime]
    return f"{table.batch} x {table.length} tokens, {runtime}"
