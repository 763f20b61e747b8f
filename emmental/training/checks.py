"""Which arguments of a training script go together.

All contradictions are reported together, before anything is loaded: one line each, status 2.
"""

import logging
import math
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedConfig

from ..checkpoints.onnx_file import check_onnx
from ..models.families import is_masked
from ..models.masked import granularity_of
from ..modules.granularity import GRANULARITIES, Block
from ..modules.methods import METHODS
from ..modules.topk import MIN_REMAINING
from ..system.errors import UserError
from .flags import (
    OBSOLETE,
    add_distillation_flags,
    add_method_flags,
    add_pruning_flags,
    methods_with,
)
from .settings import first_cut_of, resumes_in_place, warmup_updates

logger = logging.getLogger(__name__)


def check_common_arguments(args: Namespace) -> list[str]:
    """The problems of the arguments, one line each. Warns of arguments without effect."""
    problems = []
    for name in sorted(args.given & set(OBSOLETE)):
        logger.warning("--%s is obsolete and ignored", name)
    if not (args.do_train or _evaluates(args)):
        problems.append("nothing to do: give --do_train or --do_eval")
    if args.fp16 and args.bf16:
        problems.append("--fp16 and --bf16 exclude each other: give one")
    if args.sparse_inference and (args.fp16 or args.bf16):
        problems.append("--sparse_inference computes in float32: drop --fp16 and --bf16")
    others = args.do_train, args.eval_all_checkpoints, args.sparse_inference, args.fp16, args.bf16
    if args.onnx_file and any(others):
        problems.append(
            "--onnx_file evaluates one file, by ONNX Runtime: drop --do_train, "
            "--eval_all_checkpoints, --sparse_inference, --fp16 and --bf16"
        )
    if (args.teacher_type is None) != (args.teacher_name_or_path is None):
        problems.append("--teacher_type and --teacher_name_or_path go together: give both or none")
    if args.teacher_name_or_path and not (args.alpha_ce or args.alpha_distil or args.alpha_hidden):
        problems.append(
            "--alpha_ce, --alpha_distil and --alpha_hidden 0 leave nothing to learn from: raise one"
        )
    if {"warmup_steps", "warmup_ratio"} <= args.given:
        problems.append("--warmup_steps and --warmup_ratio exclude each other: give one")
    if args.resume_from_checkpoint and not args.do_train:
        problems.append("--resume_from_checkpoint continues training: add --do_train")
    if is_masked(args.model_type):
        problems += _check_pruning(args)
    if not problems:
        _warn_of_no_effect(args)
        _warn_of_no_pruning(args)
    return problems + _check_output_dir(args)


def check_training(args: Namespace, total_step: int, config: PreTrainedConfig) -> None:
    """The checks that need the model and the number of updates.

    Raises UserError for plateaus that overlap. Warns of a layer without heads.
    """
    if not is_masked(args.model_type):
        return
    if problem := _plateau_problem(args, total_step):
        raise UserError(problem)
    heads = config.num_attention_heads
    ranks_heads = "heads" in granularity_of(config).shared and not args.global_topk
    ranks_heads &= METHODS[args.pruning_method].threshold_is == "remains"
    if ranks_heads and int(args.final_threshold * heads) == 0:
        logger.warning(
            f"--final_threshold {args.final_threshold:g} keeps none of the {heads} heads of each "
            "layer: its attention becomes a bias. --global_topk ranks the heads of all layers "
            "together"
        )


def _check_pruning(args: Namespace) -> list[str]:
    problems = []
    method = METHODS[args.pruning_method]
    is_fraction = method.threshold_is in ("remains", "sigmoid") or args.global_topk
    for name in ("initial_threshold", "final_threshold"):
        value = getattr(args, name)
        if is_fraction and not 0 <= value <= 1:
            problems.append(f"--{name} is a fraction and must lie in [0, 1], got {value}")
    if args.regularization and method.scores != "learned":
        problems.append(f"--regularization needs learned scores: {method.name} has none")
    if args.do_train and args.final_lambda and not args.regularization:
        problems.append("--final_lambda has no effect without --regularization: add it (l1 or l0)")
    if args.global_topk and not method.ranks_together:
        fitting = ", ".join(name for name, other in METHODS.items() if other.ranks_together)
        problems.append(f"--global_topk goes with {fitting}, not with {method.name}")
    granularity = GRANULARITIES[args.granularity or "weight"]
    if (args.block_rows or args.block_columns) and not isinstance(granularity, Block):
        fitting = " or ".join(name for name, x in GRANULARITIES.items() if isinstance(x, Block))
        problems.append(f"--block_rows and --block_columns need --granularity {fitting}: add it")
    if args.mask_init == "kaiming" and method.scores and granularity.shared:
        problems.append(
            "--mask_init kaiming needs a matrix of scores, unlike those of heads and neurons: "
            "choose constant or uniform"
        )
    if args.mask_init == "magnitude" and args.mask_scale <= 0 and method.scores:
        problems.append("--mask_init magnitude needs a --mask_scale above 0, such as 3")
    if (args.lr_cycles or 1) > 1:
        problems += _check_cycles(args)
    if args.target_remaining is not None:
        problems += _check_target(args)
    if args.target_speedup is not None:
        problems += _check_speedup(args)
    if args.do_train and (problem := _plateau_problem(args, args.max_steps)):
        problems.append(problem)
    return problems


def _check_cycles(args: Namespace) -> list[str]:
    if METHODS[args.pruning_method].threshold_is != "remains" and not args.global_topk:
        return ["--lr_cycles needs a method that ranks: topK, magnitude, platon, ..."]
    problems = []
    first = max(args.initial_threshold, args.final_threshold)
    if not args.final_threshold <= (cut := first_cut_of(args)) <= first:
        problems.append(
            f"--first_cut {cut:g} must lie between --final_threshold and --initial_threshold"
        )
    return problems


def _check_target(args: Namespace) -> list[str]:
    problems = []
    method = METHODS[args.pruning_method]
    if not method.penalty or args.regularization != method.penalty:
        penalized = [other for other in METHODS.values() if other.penalty]
        options = " or ".join(f"{m.name} with --regularization {m.penalty}" for m in penalized)
        problems.append(f"--target_remaining steers a penalty: use {options}")
    elif not args.final_lambda and method.usual_lambda(0.5) is None:
        problems.append(
            "--target_remaining: no usual lambda is known for this method: add --final_lambda"
        )
    lowest = 1.2 * MIN_REMAINING
    if not lowest < args.target_remaining < 1:
        problems.append(f"--target_remaining must lie between {lowest:g} and 1")
    if method.penalty and method.threshold_is and not 0 < args.final_threshold < 1:
        problems.append("--target_remaining needs a --final_threshold between 0 and 1")
    return problems


def _check_speedup(args: Namespace) -> list[str]:
    problems = []
    if args.target_speedup <= 1:
        problems.append("--target_speedup must be above 1: 4 means 4 times as fast as dense")
    if args.granularity != "structure" or not args.global_topk:
        problems.append("--target_speedup needs --granularity structure --global_topk: add them")
    if "final_threshold" in args.given:
        problems.append("--target_speedup sets --final_threshold: drop that flag")
    if args.speedup_of == "onnx":
        try:
            check_onnx(Path("model.onnx"))
        except UserError as error:
            problems.append(f"--speedup_of onnx: {error}")
    return problems


def _plateau_problem(args: Namespace, total_step: int) -> str | None:
    """Why the threshold's plateaus do not fit into `total_step` updates; None if they do.

    total_step: not positive if it is not known yet.
    """
    if (args.lr_cycles or 1) > 1:
        return None  # the threshold moves in steps
    has_target = args.target_remaining is not None or args.target_speedup is not None
    if args.initial_threshold == args.final_threshold and not has_target:
        return None  # the threshold is constant
    plateaus = args.initial_warmup + args.final_warmup
    if plateaus * (args.warmup_ratio or 0) >= 1:
        return (
            f"--warmup_ratio {args.warmup_ratio:g}: the plateaus last initial_warmup + "
            f"final_warmup = {plateaus:g} times as long as the warm-up, and leave no update "
            f"to move the threshold; use a ratio below 1/{plateaus:g}"
        )
    if total_step <= 0:
        return None
    warmup_steps = warmup_updates(args, total_step)
    return plateaus_overlap(total_step, warmup_steps, args.initial_warmup, args.final_warmup)


def plateaus_overlap(
    total_step: int, warmup_steps: int, initial_warmup: float, final_warmup: float
) -> str | None:
    """Why the threshold cannot reach its final value, and what helps; None when it can."""
    plateaus = initial_warmup + final_warmup
    if total_step > plateaus * warmup_steps or plateaus * warmup_steps == 0:
        return None
    return (
        f"the threshold schedule does not fit: with T = {total_step} updates, the plateaus of "
        f"initial_warmup * warmup_steps = {initial_warmup:g} * {warmup_steps} and final_warmup * "
        f"warmup_steps = {final_warmup:g} * {warmup_steps} updates overlap; use --warmup_steps "
        f"{math.ceil(total_step / plateaus) - 1} or less, --warmup_ratio below 1/{plateaus:g}, or "
        "more updates"
    )


def _check_output_dir(args: Namespace) -> list[str]:
    folder = Path(args.output_dir).absolute()
    if not args.output_dir.strip():
        return ["--output_dir is empty: is its variable set?"]
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"--output_dir {folder} cannot be written to: check {existing}"]
    may_exist = args.overwrite_output_dir or resumes_in_place(args) or not args.do_train
    if existing == folder and any(folder.iterdir()) and not may_exist:
        return [
            f"--output_dir {folder} is not empty: choose another folder, or give "
            "--overwrite_output_dir, or --resume_from_checkpoint latest to continue the run there"
        ]
    return []


def _warn_of_no_effect(args: Namespace) -> None:
    """Warn of flags without effect, because they need another flag."""

    def warn(names: list[str], needed: str) -> None:
        if idle := [f"--{name}" for name in names if name in args.given]:
            logger.warning("%s: no effect without %s", ", ".join(idle), needed)

    if not args.teacher_name_or_path:
        warn(_names(add_distillation_flags), "--teacher_name_or_path")
    if not _evaluates(args):
        warn(["sparse_inference", "onnx_file"], "--do_eval")
    if not args.do_eval:
        warn(["eval_all_checkpoints"], "--do_eval")
    if not is_masked(args.model_type):
        warn(_names(add_pruning_flags) + _names(add_method_flags), "--model_type masked")
        return
    if args.target_speedup is None:
        warn(["speedup_of", "speedup_batch", "speedup_length"], "--target_speedup")
    if (args.lr_cycles or 1) == 1:
        warn(["first_cut"], "--lr_cycles of 2 or more")
    for name in _names(add_method_flags):
        methods = methods_with(name)
        if args.pruning_method not in methods:
            warn([name], f"--pruning_method {' or '.join(methods)}")


def _names(add_flags: Callable[[ArgumentParser], None]) -> list[str]:
    """The names of the flags of a group."""
    parser = ArgumentParser(add_help=False)
    add_flags(parser)
    return list(vars(parser.parse_args([])))


def _warn_of_no_pruning(args: Namespace) -> None:
    """Warn of settings with which soft movement or l0 hardly prunes."""
    method = METHODS[args.pruning_method]
    if not (is_masked(args.model_type) and args.do_train and method.penalty):
        return
    if not args.regularization or not (args.final_lambda or args.target_remaining):
        advice = f"add --regularization {method.penalty} --final_lambda ..."
        logger.warning("%s prunes little without a penalty: %s", method.title, advice)
    if method.threshold_is and args.initial_threshold > args.final_threshold:
        logger.warning("%s: the paper starts with --initial_threshold 0", method.title)


def _evaluates(args: Namespace) -> bool:
    return args.do_eval or getattr(args, "do_predict", False)
