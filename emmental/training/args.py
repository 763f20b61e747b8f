"""The command line that the scripts share, the checks on it, and the values that are made of it.

All problems are reported together, before anything is loaded: one line each, exit status 2.
"""

import argparse
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..families import FAMILIES, MASKED, is_masked
from ..losses import PENALTIES
from ..modules.masked_nn import MASK_INITS
from ..modules.methods import METHODS
from ..modules.topk import MIN_REMAINING
from ..schedule import Schedule, plateaus_overlap
from .parser import Parser, choice, number
from .settings import Distillation, Precision, Settings
from .task import Task

logger = logging.getLogger(__name__)

PRUNING_ARGUMENTS = (
    "pruning_method", "mask_init", "mask_scale", "mask_scores_learning_rate", "initial_threshold", "final_threshold",
    "initial_warmup", "final_warmup", "regularization", "final_lambda", "target_remaining", "global_topk", "global_topk_frequency_compute",
)  # fmt: skip
WITHOUT_MEANING = ("fp16_opt_level", "server_ip", "server_port", "lang_id")
COUNT, POSITIVE, NOT_NEGATIVE = (
    number(int, at_least=1),
    number(float, above=0),
    number(float, at_least=0),
)


def pruning_method(text: str) -> str:
    """An argparse type: the name of a pruning method."""
    return choice(*METHODS, aliases={"sigmoid_threshold": "sigmoied_threshold"})(text)


def add_mask_flags(add: Callable) -> None:
    """The flags of the scripts that read a masked checkpoint; see `given_masks`."""
    add("--pruning_method", type=pruning_method, help="method (default: from config.json)")
    add(
        "--threshold",
        type=float,
        help="threshold (default: from config.json): a fraction in [0, 1], or a score for `threshold`",
    )
    add(
        "--global_topk",
        action="store_true",
        default=None,
        help="all matrices were ranked together (default: from config.json)",
    )


def given_masks(args: argparse.Namespace) -> dict:
    """The values of `add_mask_flags`, as `load_masked` takes them."""
    return {name: getattr(args, name) for name in ("pruning_method", "threshold", "global_topk")}


def model_types() -> list[str]:
    """What --model_type may be."""
    return [prefix + family for family in FAMILIES for prefix in ("", MASKED)]


def make_parser(task: Task, description: str) -> Parser:
    """The parser of a script: the flags of every task, and the task's own."""
    parser = Parser(description=description)
    add_common_arguments(parser, task)
    task.add_arguments(parser)
    return parser


def add_common_arguments(parser: argparse.ArgumentParser, task: Task) -> None:
    """Add every flag that is not a task's own, in groups."""
    # fmt: off
    group = parser.add_argument_group("what to run")
    add = group.add_argument
    add("--model_type", type=choice(*model_types()), required=True,
        help="masked_bert to fine-prune; bert for the dense baseline or the teacher")
    add("--model_name_or_path", required=True, help="checkpoint folder, or a model name on the hub")
    add("--output_dir", required=True, help="where the fine-pruned model, its results and its checkpoints go")
    add("--do_train", action="store_true", help="train")
    add("--do_eval", action="store_true", help="evaluate the trained model (or, without --do_train, the one given)")
    add("--evaluate_during_training", action="store_true", help="also evaluate at every --logging_steps")
    add("--eval_all_checkpoints", action="store_true", help="with --do_eval, evaluate each checkpoint-<step> as well")
    add("--overwrite_output_dir", action="store_true", help="train although output_dir is not empty")
    add("--resume_from_checkpoint", metavar="PATH",
        help="continue exactly from this checkpoint-<step> folder; 'latest' takes the newest one in output_dir")
    add("--seed", type=number(int, at_least=0, below=2**32), default=42, help="seed of data order, dropout, fresh heads and scores")

    group = parser.add_argument_group("model, tokenizer and features")
    add = group.add_argument
    add("--config_name", help="configuration, when it is not the model's own")
    add("--tokenizer_name", help="tokenizer, when it is not the model's own")
    add("--cache_dir", help="where downloads and features are cached")
    add("--do_lower_case", action="store_true", help="lower-case the text (uncased models)")
    add("--max_seq_length", type=COUNT, default=task.max_seq_length, help="longest input in tokens; longer ones are cut")
    add("--threads", type=COUNT, default=1, help="processes that make features")
    add("--overwrite_cache", action="store_true", help="make the features anew, whatever the cache holds")

    group = parser.add_argument_group(
        "pruning", "A threshold is a fraction in [0, 1]: the remaining weights for topK and magnitude, the cut on "
        "sigmoid(score) for sigmoied_threshold. It moves along a cubic between two plateaus."
    )
    add = group.add_argument
    add("--pruning_method", type=pruning_method, default="topK",
        help="topK (movement), sigmoied_threshold (soft movement), magnitude, l0, or threshold")
    add("--initial_threshold", type=number(float), default=1.0, help="threshold at the start (1 for topK, 0 for sigmoied_threshold)")
    add("--final_threshold", type=number(float), default=0.7, help="threshold at the end; sets the sparsity of topK and magnitude")
    add("--initial_warmup", type=NOT_NEGATIVE, default=1, help="first plateau of the threshold, in units of warmup_steps")
    add("--final_warmup", type=NOT_NEGATIVE, default=2,
        help="last plateau, in units of warmup_steps; lengthen it when the metric still climbs at the end")
    add("--mask_init", type=choice(*MASK_INITS), default="constant", help="initialisation of the scores")
    add("--mask_scale", type=number(float), default=0.0, help="value (constant) or range (uniform) of the initial scores")
    add("--regularization", type=choice(*PENALTIES, "null"), default=None,
        help="penalty on the scores: l1 for soft movement, l0 for l0; null for none")
    add("--final_lambda", type=NOT_NEGATIVE, default=0.0,
        help="coefficient of the penalty at the end; raise it for fewer remaining weights")
    add("--target_remaining", type=number(float),
        help="fraction of the weights to end with (soft movement, l0): lambda is steered to it, beginning at --final_lambda or at the paper's for this target")
    add("--global_topk", action="store_true", help="rank all matrices together (topK, threshold or magnitude)")
    add("--global_topk_frequency_compute", type=COUNT, default=25, help="updates between two global cut-offs")

    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add("--teacher_type", type=choice(*model_types()), help="type of the teacher; needed with --teacher_name_or_path")
    add("--teacher_name_or_path", help="fine-tuned teacher, a checkpoint folder or a name on the hub")
    add("--alpha_ce", type=NOT_NEGATIVE, default=0.5, help="weight of the task's own loss")
    add("--alpha_distil", type=NOT_NEGATIVE, default=0.5, help="weight of the distillation loss")
    add("--temperature", type=POSITIVE, default=2.0, help="softens both distributions of the distillation")

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--per_gpu_train_batch_size", type=COUNT, default=8, help="examples per device and step")
    add("--per_gpu_eval_batch_size", type=COUNT, default=8, help="examples per device in evaluation")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="batches per update")
    add("--learning_rate", type=POSITIVE, default=5e-5, help="peak learning rate of the weights")
    add("--mask_scores_learning_rate", type=POSITIVE, default=1e-2,
        help="peak learning rate of the scores; raise it for short runs")
    add("--num_train_epochs", type=number(float), default=3.0, help="epochs, may be fractional")
    add("--max_steps", type=int, default=-1, help="updates in all; overrides --num_train_epochs")
    add("--warmup_steps", type=number(int, at_least=0), default=0, help="updates of learning-rate warm-up; also the unit of the plateaus")
    add("--weight_decay", type=NOT_NEGATIVE, default=0.0, help="decay of the weights (not of scores, bias, LayerNorm)")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="epsilon of AdamW")
    add("--max_grad_norm", type=NOT_NEGATIVE, default=1.0, help="clip the gradient at this norm; 0 never clips")

    group = parser.add_argument_group("logging and checkpoints")
    add = group.add_argument
    add("--logging_steps", type=COUNT, default=task.logging_steps, help="updates between two lines in TensorBoard")
    add("--save_steps", type=number(int, at_least=0), default=task.save_steps, help="updates between two checkpoints; 0 for none")
    add("--save_total_limit", type=COUNT,
        help="checkpoints to keep, the newest (default: 2, or all with --eval_all_checkpoints)")

    group = parser.add_argument_group("hardware")
    add = group.add_argument
    add("--no_cuda", action="store_true", help="stay on the CPU")
    add("--sparse_inference", action="store_true",
        help="evaluate with sparse kernels, which are faster on a CPU; same predictions")
    add("--fp16", action="store_true", help="mixed precision in float16 (GPU)")
    add("--bf16", action="store_true", help="mixed precision in bfloat16 (GPU, recent CPUs)")
    add("--compile", action="store_true", help="compile the encoder; pays after some hundred updates")
    add("--num_workers", type=number(int, at_least=0), default=0, help="processes that load batches")
    add("--check_ranks", action="store_true",
        help="for debugging: compare cut-offs, masks and weights of all processes after every update, and stop where they differ")
    add("--local_rank", type=int, default=-1, help="accepted for old launchers; torchrun's environment wins")
    for name in WITHOUT_MEANING:
        if name != "lang_id":  # a SQuAD flag
            add(f"--{name}", default=None, help=argparse.SUPPRESS)


    # fmt: on


def check_common_arguments(args: argparse.Namespace, given: set[str]) -> list[str]:
    """Every problem that the arguments have among themselves, one line each."""
    problems = []
    for name in sorted(given & set(WITHOUT_MEANING)):
        logger.warning("--%s is obsolete and ignored", name)

    actions = [name for name in ("do_train", "do_eval", "do_predict") if name in vars(args)]
    if not any(getattr(args, name) for name in actions):
        problems.append(
            f"nothing to do: give {' or '.join(f'--{name}' for name in actions)}, or several of them"
        )
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < float("inf"):
        problems.append(f"--num_train_epochs must be positive, got {args.num_train_epochs}")
    if args.fp16 and args.bf16:
        problems.append("--fp16 and --bf16 exclude each other: give one")
    if args.sparse_inference and (args.fp16 or args.bf16):
        problems.append("--sparse_inference computes in float32: drop --fp16 and --bf16")
    if (args.teacher_type is None) != (args.teacher_name_or_path is None):
        problems.append("--teacher_type and --teacher_name_or_path go together: give both or none")
    if args.teacher_name_or_path and args.alpha_ce == args.alpha_distil == 0:
        problems.append("--alpha_ce 0 and --alpha_distil 0 leave nothing to learn from: raise one")
    if args.resume_from_checkpoint and not args.do_train:
        problems.append("--resume_from_checkpoint continues training: add --do_train")
    if is_masked(args.model_type):
        problems += _check_pruning_arguments(args)
    if not problems:
        _warn_of_idle_arguments(args, given)
    if not args.output_dir.strip():
        problems.append("--output_dir is empty: is its variable set?")
        return problems
    existing = os.path.abspath(args.output_dir)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        problems.append(f"--output_dir {args.output_dir}: {existing} is a file, not a folder")
    elif not os.access(existing, os.W_OK):
        problems.append(f"--output_dir {args.output_dir}: {existing} cannot be written to")
    elif (
        args.do_train
        and not (args.overwrite_output_dir or resumes_in_place(args))
        and (os.path.isdir(args.output_dir) and os.listdir(args.output_dir))
    ):
        problems.append(
            f"--output_dir {args.output_dir} is not empty: choose another folder, or give --overwrite_output_dir, "
            "or --resume_from_checkpoint latest to continue the run there"
        )
    return problems


def resumes_in_place(args: argparse.Namespace) -> bool:
    """Whether the run continues one of output_dir itself; another one's checkpoints may lie anywhere."""
    asked = args.resume_from_checkpoint
    return (
        asked == "latest"
        or bool(asked)
        and Path(asked).resolve().parent == Path(args.output_dir).resolve()
    )


def _warn_of_idle_arguments(args: argparse.Namespace, given: set[str]) -> None:
    """Warn of arguments that ask for something and change nothing, as they stand together."""
    idle = {
        "--do_train": ()
        if args.do_train
        else (
            "evaluate_during_training",
            "teacher_name_or_path",
            "regularization",
            "target_remaining",
        ),
        "--do_eval": () if args.do_eval else ("eval_all_checkpoints",),
        "--teacher_name_or_path": ()
        if args.teacher_name_or_path
        else ("alpha_ce", "alpha_distil", "temperature"),
        f"--model_type {MASKED}{args.model_type}": ()
        if is_masked(args.model_type)
        else PRUNING_ARGUMENTS,
    }
    for needed, names in idle.items():
        if without_effect := [f"--{name}" for name in names if name in given]:
            logger.warning("%s: no effect without %s", ", ".join(without_effect), needed)
    method = METHODS[args.pruning_method]
    if args.do_train and is_masked(args.model_type) and method.penalty:
        if not (regularization_mode(args) and (args.final_lambda or args.target_remaining)):
            logger.warning(
                "%s prunes little without a penalty: add --regularization %s --final_lambda ...",
                method.title,
                method.penalty,
            )
        if method.threshold and args.initial_threshold > args.final_threshold:
            logger.warning(
                "%s starts at --initial_threshold %g, which masks more than --final_threshold %g does: "
                "the paper starts at 0", method.title, args.initial_threshold, args.final_threshold,
            )  # fmt: skip


def _check_pruning_arguments(args: argparse.Namespace) -> list[str]:
    problems, method = [], METHODS[args.pruning_method]
    if method.is_fraction or args.global_topk:
        for name in ("initial_threshold", "final_threshold"):
            if not 0 <= getattr(args, name) <= 1:
                problems.append(
                    f"--{name} is a fraction and must lie in [0, 1], got {getattr(args, name)}"
                )
    penalty = regularization_mode(args)
    if penalty and not method.scores:
        problems.append(
            f"--regularization {penalty} needs scores, and --pruning_method {args.pruning_method} has none"
        )
    if args.target_remaining is not None:
        problems += _check_target(args)
    elif penalty and args.do_train and args.final_lambda == 0:
        logger.warning("--regularization %s has no effect with --final_lambda 0", penalty)
    if args.final_lambda and not penalty and args.do_train:
        problems.append(
            "--final_lambda has no effect without --regularization: add --regularization l1 or l0"
        )
    if args.global_topk and not method.ranks_together:
        fitting = [name for name, other in METHODS.items() if other.ranks_together]
        problems.append(f"--global_topk goes with {', '.join(fitting)}, not with {method.name}")
    if args.do_train and args.max_steps > 0:
        problems += check_plateaus(args, args.max_steps)
    return problems


def _check_target(args: argparse.Namespace) -> list[str]:
    problems, method = [], METHODS[args.pruning_method]
    if not 0 < args.target_remaining < 1:
        problems.append(
            f"--target_remaining is a fraction and must lie between 0 and 1, got {args.target_remaining}"
        )
    elif method.penalty and method.has_floor and args.target_remaining <= 1.2 * MIN_REMAINING:
        problems.append(
            f"--target_remaining {args.target_remaining:g}: each matrix keeps {MIN_REMAINING:.1%} at least, so ask for more than "
            f"{1.2 * MIN_REMAINING:g}"
        )
    if not method.penalty:
        methods = " and ".join(name for name, other in METHODS.items() if other.penalty)
        problems.append(
            f"--target_remaining goes with {methods}; --final_threshold sets what {method.name} leaves"
        )
    elif regularization_mode(args) != method.penalty:
        problems.append(
            f"--target_remaining steers the penalty: add --regularization {method.penalty}"
        )
    elif method.threshold and not 0 < args.final_threshold < 1:
        problems.append(
            f"--target_remaining needs a --final_threshold between 0 and 1, got {args.final_threshold}"
        )
    return problems


def schedule_of(args: argparse.Namespace, total_step: int) -> Schedule:
    """The schedule of a run of so many updates. Steered, lambda is a factor of what the steering says."""
    steered = args.target_remaining is not None
    return Schedule(
        total_step=total_step,
        warmup_steps=args.warmup_steps,
        initial_threshold=args.initial_threshold,
        final_threshold=args.final_threshold,
        initial_warmup=args.initial_warmup,
        final_warmup=args.final_warmup,
        final_lambda=1.0 if steered else args.final_lambda,
    )


def check_plateaus(args: argparse.Namespace, total_step: int) -> list[str]:
    """The problem, if any, that the plateaus of the threshold have with `total_step` updates."""
    if args.initial_threshold == args.final_threshold and args.target_remaining is None:
        return []  # a constant threshold needs no room to move
    problem = plateaus_overlap(
        total_step, args.warmup_steps, args.initial_warmup, args.final_warmup
    )
    return [problem] if problem else []


def precision_of(args: argparse.Namespace) -> Precision:
    """Mixed precision as --fp16 or --bf16 ask for it."""
    return Precision(torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None)


def training_settings(args: argparse.Namespace, total_step: int) -> Settings:
    """The values of a training of so many updates."""
    rates = ("learning_rate", "mask_scores_learning_rate", "weight_decay", "adam_epsilon")
    same = ("seed", "target_remaining", "final_lambda", "global_topk_frequency_compute", "logging_steps",
            "save_steps", "compile", "num_workers", "check_ranks")  # fmt: skip
    return Settings(
        arguments=vars(args),
        output_dir=Path(args.output_dir),
        schedule=schedule_of(args, total_step),
        rates={name: getattr(args, name) for name in rates},
        max_grad_norm=args.max_grad_norm or math.inf,
        precision=precision_of(args),
        distillation=Distillation(args.alpha_ce, args.alpha_distil, args.temperature),
        penalty=regularization_mode(args),
        first_cut=args.mask_scale if args.mask_init == "constant" else 0.0,
        keep=args.save_total_limit or (None if args.eval_all_checkpoints else 2),
        evaluate=args.evaluate_during_training,
        **{name: getattr(args, name) for name in same},
    )


def mask_settings(args: argparse.Namespace, given: set[str]) -> dict:
    """What the arguments say about the masks of a model: all of it in training, else what stands on the command line."""
    settings = {
        name: getattr(args, name)
        for name in ("pruning_method", "mask_init", "mask_scale", "global_topk")
    }
    if args.do_train:
        return settings | {"threshold": None}  # known once it is trained
    settings = {name: value for name, value in settings.items() if name in given}
    return settings | ({"threshold": args.final_threshold} if "final_threshold" in given else {})


def regularization_mode(args: argparse.Namespace) -> str | None:
    """The penalty asked for, None for none (published commands may say "null")."""
    return None if args.regularization == "null" else args.regularization
