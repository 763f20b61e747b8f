"""The settings of a training, which follow from the arguments of its script."""

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..models.families import is_masked
from ..modules.masks import count, find_masks, masked_layers
from ..modules.methods import METHODS
from ..schedule import Schedule
from ..steering import LambdaSteering
from ..system.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What the training loop needs to know. Functions below `run` do not see the command line.

    Fields without a comment are flags of the same name.
    """

    arguments: dict  # the command line, saved with every checkpoint, compared when one is resumed
    output_dir: Path
    schedule: Schedule
    precision: torch.dtype | None  # for mixed precision; None for float32. Parameters stay float32
    keep: int | None  # checkpoints to keep, None for all
    max_grad_norm: float  # infinite for no clipping
    alpha_ce: float
    alpha_distil: float
    alpha_hidden: float
    temperature: float
    regularization: str | None  # l0, l1 or None
    global_topk_frequency_compute: int
    logging_steps: int
    save_steps: int
    evaluate_during_training: bool
    num_workers: int
    check_ranks: bool


def first_cut_of(args: Namespace) -> float:
    """The threshold in the second cycle of --lr_cycles."""
    return 0.3 if args.first_cut is None else args.first_cut


def training_settings(args: Namespace, total_step: int) -> Settings:
    """The settings of a training of `total_step` updates."""
    return Settings(
        arguments={name: value for name, value in vars(args).items() if name != "given"},
        output_dir=Path(args.output_dir),
        schedule=Schedule(
            total_step=total_step,
            warmup_steps=warmup_updates(args, total_step),
            initial_threshold=args.initial_threshold,
            final_threshold=args.final_threshold,
            initial_warmup=args.initial_warmup,
            final_warmup=args.final_warmup,
            cycles=args.lr_cycles or 1,
            first_cut=first_cut_of(args),
            # with a target, the schedule scales the lambda of the steering
            final_lambda=args.final_lambda if args.target_remaining is None else 1.0,
        ),
        precision=precision_of(args),
        keep=args.save_total_limit or (None if args.eval_all_checkpoints else 2),
        max_grad_norm=args.max_grad_norm or math.inf,
        alpha_ce=args.alpha_ce,
        alpha_distil=args.alpha_distil,
        alpha_hidden=args.alpha_hidden,
        temperature=args.temperature,
        regularization=args.regularization,
        global_topk_frequency_compute=args.global_topk_frequency_compute,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        evaluate_during_training=args.evaluate_during_training,
        num_workers=args.num_workers,
        check_ranks=args.check_ranks,
    )


def make_steering(
    args: Namespace, model: PreTrainedModel, schedule: Schedule
) -> LambdaSteering | None:
    """What steers lambda to --target_remaining, if it is given.

    Raises UserError for a target below what the floor leaves, which is much if there are few heads.
    """
    target = args.target_remaining
    if target is None or not masked_layers(model):
        return None
    lowest = count(find_masks(model, above=math.inf)).overall
    if target <= lowest:
        raise UserError(
            f"--target_remaining {target:g}: {lowest:.4f} of the weights remain at least, because "
            "every matrix keeps 0.5% of its scores, at least one: give more"
        )
    config, method = model.config, METHODS[model.config.pruning_method]
    return LambdaSteering(
        target=target,
        first_cut=config.mask_scale if config.mask_init == "constant" else 0.0,
        last_cut=method.closing_score(schedule.final_threshold),
        start=schedule.initial_warmup * schedule.warmup_steps,
        end=schedule.total_step - schedule.final_warmup * schedule.warmup_steps,
        total_step=schedule.total_step,
        first_lambda=args.final_lambda or method.usual_lambda(target),
    )


def student_options(args: Namespace, resumed: bool) -> dict:
    """Options of `load_student`.

    In evaluation, settings of masks come from the configuration, unless flags are given. Settings
    of scores always do so.
    """
    options = {
        "masked": is_masked(args.model_type),
        "trained": not args.do_train,
        "config_name": None if resumed else args.config_name,
        "tokenizer_name": args.tokenizer_name,
        "do_lower_case": args.do_lower_case,
        "max_seq_length": args.max_seq_length,
        "cache_dir": args.cache_dir,
    }
    if not options["masked"]:
        return options
    of_scores = {"mask_init", "mask_scale", "granularity", "block_rows", "block_columns"}
    of_method = {setting.name for setting in METHODS[args.pruning_method].settings}
    of_masks = {"pruning_method", "global_topk"}
    replaced = args.given & (of_scores | of_method | of_masks)
    if args.do_train:
        replaced |= of_masks
        options["threshold"] = None  # known once the model is trained
    elif "final_threshold" in args.given:
        options["threshold"] = args.final_threshold
    return options | {name: getattr(args, name) for name in replaced}


def precision_of(args: Namespace) -> torch.dtype | None:
    """The dtype of --fp16 or --bf16; None for float32."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else None


def warmup_updates(args: Namespace, total_step: int) -> int:
    """The updates of warm-up, out of `total_step`."""
    if args.warmup_ratio is None:
        return args.warmup_steps
    return int(args.warmup_ratio * total_step + 1e-9)  # 0.29 of 100 is 28.99... in floats


def resumes_in_place(args: Namespace) -> bool:
    """Whether the run continues from a checkpoint in output_dir itself."""
    checkpoint = args.resume_from_checkpoint
    if not checkpoint or checkpoint == "latest":
        return bool(checkpoint)
    folders = Path(checkpoint).resolve().parent, Path(checkpoint).parent.resolve()  # for links
    return Path(args.output_dir).resolve() in folders
