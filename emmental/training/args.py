"""The command line of the training scripts: its flags, their checks, and the values made of them.

All contradictions are reported together, before anything is loaded: one line each, status 2.
"""

import argparse
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..errors import UserError
from ..families import FAMILIES, MASKED, granularity_of, is_masked
from ..losses import penalties
from ..modules.granularity import GRANULARITIES, Block, find_granularity
from ..modules.masked_nn import MASK_INITS
from ..modules.methods import METHODS, all_settings
from ..modules.topk import MIN_REMAINING
from ..schedule import Schedule, plateaus_overlap
from .parser import Parser, choice, number
from .task import Task

logger = logging.getLogger(__name__)

COUNT, COUNT_OR_0 = number(int, at_least=1), number(int, at_least=0)
NUMBER, POSITIVE, NOT_NEGATIVE = number(float), number(float, above=0), number(float, at_least=0)
OBSOLETE = ("fp16_opt_level", "server_ip", "server_port", "lang_id")  # the last: of SQuAD alone
RATES = ("learning_rate", "mask_scores_learning_rate", "weight_decay", "adam_epsilon")
SEED = number(int, at_least=0, below=2**32)


def model_type(text: str) -> str:
    """An argparse type: masked or dense of any family, or a family of models, masked or plain."""
    families = (prefix + family for family in FAMILIES for prefix in (MASKED, ""))
    return choice("masked", "dense", *families)(text)


def pruning_method(text: str) -> str:
    """An argparse type: the name of a pruning method, in the published or the usual spelling."""
    return choice(*METHODS)("sigmoied_threshold" if text == "sigmoid_threshold" else text)


def granularity(text: str) -> str:
    """An argparse type: the name of a granularity."""
    return choice(*GRANULARITIES)(text)


def penalty(text: str) -> str | None:
    """An argparse type: the name of a penalty, or None for the "null" of published commands."""
    return None if text == "null" else choice(*penalties(), "null")(text)


def add_mask_flags(add: Callable) -> None:
    """The flags of the scripts that read a masked checkpoint; see `given_masks`."""
    default = "(default: from config.json)"
    add("--pruning_method", type=pruning_method, help=f"method {default}")
    add("--threshold", type=float, help=f"threshold {default}: a fraction in [0, 1], or a score")
    ranked = f"all matrices were ranked together {default}"
    add("--global_topk", action="store_true", default=None, help=ranked)


def given_masks(args: argparse.Namespace) -> dict:
    """The values of `add_mask_flags`, as `load_masked` takes them."""
    return {name: getattr(args, name) for name in ("pruning_method", "threshold", "global_topk")}


# fmt: off
# name, type (bool: a switch), default (...: required; None in places where the task has one), help
FLAGS = {
    "what to run": [
        ("model_type", model_type, ..., "masked to fine-prune; dense for a dense model; "
         "masked_bert, bert, ... for models of one family alone"),
        ("model_name_or_path", str, ..., "checkpoint folder, or name of a model on the hub"),
        ("output_dir", str, ..., "where the model, its results and checkpoints go"),
        ("do_train", bool, False, "train"),
        ("do_eval", bool, False, "evaluate the trained model, or the one given"),
        ("evaluate_during_training", bool, False, "also evaluate every --logging_steps"),
        ("eval_all_checkpoints", bool, False, "with --do_eval: evaluate all checkpoints, too"),
        ("overwrite_output_dir", bool, False, "train even if output_dir is not empty"),
        ("resume_from_checkpoint", str, None, "checkpoint-<step> folder to continue, or 'latest'"),
        ("seed", SEED, 42, "seed of data order, dropout, fresh heads and scores"),
    ],
    "model, tokenizer and features": [
        ("config_name", str, None, "configuration, if not the model's own"),
        ("tokenizer_name", str, None, "tokenizer, if not the model's own"),
        ("cache_dir", str, None, "where downloads and features are cached"),
        ("do_lower_case", bool, False, "lower-case even if the tokenizer's files do not say so"),
        ("max_seq_length", COUNT, None, "tokens at which longer inputs are cut"),
        ("max_train_samples", COUNT, None, "train on the first examples only, so many"),
        ("max_eval_samples", COUNT, None, "evaluate the first examples only, so many of each set"),
        ("threads", COUNT, 1, "processes that make features"),
        ("overwrite_cache", bool, False, "make the features again"),
    ],
    "pruning": [
        ("pruning_method", pruning_method, "topK", "topK (movement), sigmoied_threshold (soft "
         "movement), magnitude, l0, threshold, sensitivity or platon"),
        ("granularity", granularity, None, "what one score stands for: weight (if not given), "
         "block, structure (heads, neurons) or hybrid (blocks in attention, neurons)"),
        ("block_rows", COUNT, None, "rows of a block (block, hybrid; 32 if not given)"),
        ("block_columns", COUNT, None, "columns of a block (likewise)"),
        ("initial_threshold", NUMBER, 1.0, "threshold at the start, a fraction: of remaining "
         "weights (1 for topK), or on sigmoid(score) (0 for sigmoied_threshold)"),
        ("final_threshold", NUMBER, 0.7, "threshold at the end; what remains, for methods that "
         "rank"),
        ("initial_warmup", NOT_NEGATIVE, 1, "updates at the first threshold, in warmup_steps"),
        ("final_warmup", NOT_NEGATIVE, 2, "updates at the last threshold, in warmup_steps; "
         "raise it if the metric still climbs at the end"),
        ("mask_init", choice(*MASK_INITS), "constant", "constant, uniform or kaiming scores"),
        ("mask_scale", NUMBER, 0.0, "value (constant) or range (uniform) of initial scores"),
        ("regularization", penalty, None, "penalty on the scores: l1 (soft movement), l0 or null"),
        ("final_lambda", NOT_NEGATIVE, 0.0, "final weight of the penalty; raise it to prune more"),
        ("target_remaining", NUMBER, None, "fraction of the weights to keep: steers lambda, "
         "from --final_lambda or a usual value (soft movement, l0)"),
        ("global_topk", bool, False, "rank all matrices together (not with a penalty)"),
        ("global_topk_frequency_compute", COUNT, 25, "updates between two global cut-offs"),
    ],
    "distillation": [
        ("teacher_type", model_type, None, "model type of the teacher"),
        ("teacher_name_or_path", str, None, "fine-tuned teacher: folder or name on the hub"),
        ("alpha_ce", NOT_NEGATIVE, 0.5, "weight of the task's own loss"),
        ("alpha_distil", NOT_NEGATIVE, 0.5, "weight of the distillation loss"),
        ("alpha_hidden", NOT_NEGATIVE, 0.0, "weight of the distance between the hidden states of "
         "student and teacher"),
        ("temperature", POSITIVE, 2.0, "softens the distributions of student and teacher"),
    ],
    "optimisation": [
        ("per_gpu_train_batch_size", COUNT, 8, "examples per device and batch"),
        ("per_gpu_eval_batch_size", COUNT, 8, "examples per device in evaluation"),
        ("gradient_accumulation_steps", COUNT, 1, "batches per update"),
        ("learning_rate", POSITIVE, 5e-5, "peak learning rate of the weights"),
        ("mask_scores_learning_rate", POSITIVE, 1e-2, "of the scores; raise it for short runs"),
        ("num_train_epochs", POSITIVE, 3.0, "epochs, may be fractional"),
        ("max_steps", int, -1, "updates in all; overrides --num_train_epochs"),
        ("warmup_steps", COUNT_OR_0, 0, "updates of learning-rate warm-up; unit of plateaus"),
        ("warmup_ratio", number(float, at_least=0, below=1), None, "warm-up as a fraction of all "
         "updates, in place of --warmup_steps: fits data of any size"),
        ("weight_decay", NOT_NEGATIVE, 0.0, "decay of weights; none for scores, bias, LayerNorm"),
        ("adam_epsilon", POSITIVE, 1e-8, "epsilon of AdamW"),
        ("max_grad_norm", NOT_NEGATIVE, 1.0, "norm at which the gradient is clipped; 0: never"),
    ],
    "logging and checkpoints": [
        ("logging_steps", COUNT, None, "updates between points in TensorBoard"),
        ("save_steps", COUNT_OR_0, None, "updates between checkpoints; 0 for none"),
        ("save_total_limit", COUNT, None, "checkpoints to keep (2, or all if all are evaluated)"),
    ],
    "hardware": [
        ("no_cuda", bool, False, "stay on the CPU"),
        ("sparse_inference", bool, False, "evaluate with sparse kernels, faster on a CPU"),
        ("fp16", bool, False, "mixed precision in float16 (GPU)"),
        ("bf16", bool, False, "mixed precision in bfloat16 (GPU, recent CPUs)"),
        ("compile", bool, False, "compile the encoder; pays off after some hundred updates"),
        ("num_workers", COUNT_OR_0, 0, "processes that load batches"),
        ("check_ranks", bool, False, "for debugging: stop if masks or weights differ by rank"),
        ("local_rank", int, -1, "for old launchers; torchrun does not need it"),
    ],
}
# fmt: on


def make_parser(task: Task, description: str) -> Parser:
    """The parser of a script: the flags of every task, and the task's own."""
    parser = Parser(description=description, usage="%(prog)s [options]")
    for title, flags in FLAGS.items():
        add = parser.add_argument_group(title).add_argument
        for name, kind, default, text in flags:
            default = getattr(task, name, default)
            if kind is bool:
                add(f"--{name}", action="store_true", help=text)
            else:
                add(f"--{name}", type=kind, default=default, required=default is ..., help=text)
    add = parser.add_argument_group("settings of pruning methods").add_argument
    for name, setting in all_settings().items():
        kind = number(float, above=setting.above, below=setting.below)
        fitting = ", ".join(_methods_with(name))
        text = f"{fitting}: {setting.help} ({setting.default:g} if not given)"
        add(f"--{name}", type=kind, help=text)
    task.add_arguments(parser)
    for name in OBSOLETE[:-1]:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser


def _methods_with(setting: str) -> list[str]:
    """The names of the methods that have this setting."""
    return [n for n, m in METHODS.items() if setting in (known.name for known in m.settings)]


def check_common_arguments(args: argparse.Namespace, given: set[str]) -> list[str]:
    """The problems of the arguments, one line each. Warns of arguments without effect."""
    problems = []
    for name in sorted(given & set(OBSOLETE)):
        logger.warning("--%s is obsolete and ignored", name)
    if not (args.do_train or args.do_eval or getattr(args, "do_predict", False)):
        problems.append("nothing to do: give --do_train or --do_eval")
    if args.fp16 and args.bf16:
        problems.append("--fp16 and --bf16 exclude each other: give one")
    if args.sparse_inference and (args.fp16 or args.bf16):
        problems.append("--sparse_inference computes in float32: drop --fp16 and --bf16")
    if (args.teacher_type is None) != (args.teacher_name_or_path is None):
        problems.append("--teacher_type and --teacher_name_or_path go together: give both or none")
    if args.teacher_name_or_path and not (args.alpha_ce or args.alpha_distil or args.alpha_hidden):
        problems.append(
            "--alpha_ce, --alpha_distil and --alpha_hidden 0 leave nothing to learn from: raise one"
        )
    if {"warmup_steps", "warmup_ratio"} <= given:
        problems.append("--warmup_steps and --warmup_ratio exclude each other: give one")
    if args.resume_from_checkpoint and not args.do_train:
        problems.append("--resume_from_checkpoint continues training: add --do_train")
    if is_masked(args.model_type):
        problems += _check_pruning(args)
    if not problems:
        _warn(args, given)
    return problems + _check_output_dir(args)


def _check_pruning(args: argparse.Namespace) -> list[str]:
    problems, method = [], METHODS[args.pruning_method]
    for name in ("initial_threshold", "final_threshold"):
        value = getattr(args, name)
        if (
            method.threshold_is in ("remains", "sigmoid") or args.global_topk
        ) and not 0 <= value <= 1:
            problems.append(f"--{name} is a fraction and must lie in [0, 1], got {value}")
    if args.regularization and method.scores != "learned":
        problems.append(f"--regularization needs learned scores, and {method.name} has none")
    if args.do_train and args.final_lambda and not args.regularization:
        problems.append("--final_lambda has no effect without --regularization: add it (l1 or l0)")
    if args.global_topk and not method.ranks_together:
        fitting = ", ".join(name for name, other in METHODS.items() if other.ranks_together)
        problems.append(f"--global_topk goes with {fitting}, not with {method.name}")
    granularity = find_granularity(args.granularity or "weight")
    if (args.block_rows or args.block_columns) and not isinstance(granularity, Block):
        fitting = " or ".join(n for n, other in GRANULARITIES.items() if isinstance(other, Block))
        problems.append(f"--block_rows and --block_columns need --granularity {fitting}: add it")
    if args.mask_init == "kaiming" and method.scores and granularity.shared:
        problems.append(
            "--mask_init kaiming needs a matrix of scores, unlike those of heads and neurons: "
            "choose constant or uniform"
        )
    if args.target_remaining is not None:
        known = method.usual_lambda(0.5) is not None or args.final_lambda
        if method.penalty and not known:
            problems.append(
                "--target_remaining: no usual lambda is known for this method: add --final_lambda"
            )
        if not method.penalty or args.regularization != method.penalty:
            options = [
                f"{n} with --regularization {m.penalty}" for n, m in METHODS.items() if m.penalty
            ]
            problems.append(f"--target_remaining steers a penalty: use {' or '.join(options)}")
        if not 1.2 * MIN_REMAINING < args.target_remaining < 1:
            problems.append(f"--target_remaining must lie between {1.2 * MIN_REMAINING:g} and 1")
        if method.penalty and method.threshold_is and not 0 < args.final_threshold < 1:
            problems.append("--target_remaining needs a --final_threshold between 0 and 1")
    if args.do_train and (problem := plateau_problem(args, args.max_steps)):
        problems.append(problem)
    return problems


def _check_output_dir(args: argparse.Namespace) -> list[str]:
    folder = Path(args.output_dir).absolute()
    if not args.output_dir.strip():
        return ["--output_dir is empty: is its variable set?"]
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"--output_dir {folder} cannot be written to: see {existing}"]
    may_exist = args.overwrite_output_dir or resumes_in_place(args) or not args.do_train
    if existing == folder and any(folder.iterdir()) and not may_exist:
        return [
            f"--output_dir {folder} is not empty: choose another folder, or give "
            "--overwrite_output_dir, or --resume_from_checkpoint latest to continue the run there"
        ]
    return []


def _warn(args: argparse.Namespace, given: set[str]) -> None:
    """Warn of flags without effect, and of soft movement and l0 that would hardly prune."""
    method, masked = METHODS[args.pruning_method], is_masked(args.model_type)
    names = {group: [name for name, *_ in flags] for group, flags in FLAGS.items()}
    settings = [
        (
            f"--pruning_method {' or '.join(_methods_with(name))}",
            [name],
            name in (setting.name for setting in method.settings) or not masked,
        )
        for name in all_settings()
    ]
    for needed, group, present in (
        ("--teacher_name_or_path", names["distillation"], args.teacher_name_or_path),
        ("--model_type masked", [*names["pruning"], *all_settings()], masked),
        *settings,
        ("--do_eval", ["sparse_inference"], args.do_eval or getattr(args, "do_predict", False)),
    ):
        idle = [f"--{name}" for name in group if name in given]
        if idle and not present:
            logger.warning("%s: no effect without %s", ", ".join(idle), needed)
    if not (masked and args.do_train and method.penalty):
        return
    if not args.regularization or not (args.final_lambda or args.target_remaining):
        advice = f"add --regularization {method.penalty} --final_lambda ..."
        logger.warning("%s prunes little without a penalty: %s", method.title, advice)
    if method.threshold_is and args.initial_threshold > args.final_threshold:
        logger.warning("%s: the paper starts with --initial_threshold 0", method.title)


def resumes_in_place(args: argparse.Namespace) -> bool:
    """Whether the run continues from a checkpoint in output_dir itself."""
    folder = args.resume_from_checkpoint
    if not folder or folder == "latest":
        return bool(folder)
    return Path(folder).resolve().parent == Path(args.output_dir).resolve()


def warmup_updates(args: argparse.Namespace, total_step: int) -> int:
    """The updates of warm-up, out of `total_step`."""
    if args.warmup_ratio is None:
        return args.warmup_steps
    return int(args.warmup_ratio * total_step + 1e-9)  # 0.29 of 100 is 28.99... in floats


def plateau_problem(args: argparse.Namespace, total_step: int) -> str | None:
    """Why the threshold's plateaus do not fit into `total_step` updates; None if they do.

    total_step: not positive if it is not known yet.
    """
    is_constant = args.initial_threshold == args.final_threshold and args.target_remaining is None
    plateaus = args.initial_warmup, args.final_warmup
    if is_constant:
        return None
    if sum(plateaus) * (args.warmup_ratio or 0) >= 1:
        return (
            f"--warmup_ratio {args.warmup_ratio:g}: the plateaus last initial_warmup + "
            f"final_warmup = {sum(plateaus):g} times as long as the warm-up, and leave no update "
            f"to move the threshold; use a ratio below 1/{sum(plateaus):g}"
        )
    if total_step <= 0:
        return None
    return plateaus_overlap(total_step, warmup_updates(args, total_step), *plateaus)


def precision_of(args: argparse.Namespace) -> torch.dtype | None:
    """The dtype of --fp16 or --bf16; None for float32."""
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None


def student_options(args: argparse.Namespace, given: set[str], resumed: bool) -> dict:
    """Options of `load_student`. Only given flags replace the settings of masks in evaluation,
    and those of scores ever: their defaults are the configuration's."""
    names = ["cache_dir", "tokenizer_name", "do_lower_case", "max_seq_length"]
    masked = is_masked(args.model_type)
    if masked:
        names += [x for x in ("pruning_method", "global_topk") if args.do_train or x in given]
        own = ("mask_init", "mask_scale", "granularity", "block_rows", "block_columns")
        own += tuple(setting.name for setting in METHODS[args.pruning_method].settings)
        names += [x for x in own if x in given]
    options = {name: getattr(args, name) for name in names}
    if masked and args.do_train:
        options["threshold"] = None  # known once the model is trained
    elif masked and "final_threshold" in given:
        options["threshold"] = args.final_threshold
    config_name = None if resumed else args.config_name
    return options | {"masked": masked, "trained": not args.do_train, "config_name": config_name}


@dataclass(frozen=True)
class Settings:
    """What a training needs to know; functions below `run` do not see the command line.

    Fields without a comment are the flags of the same name.
    """

    arguments: dict  # the command line, saved with every checkpoint, compared when one is resumed
    output_dir: Path
    schedule: Schedule
    precision: torch.dtype | None  # of mixed precision; None for float32. Parameters stay float32
    rates: dict[str, float]  # learning rates, decay and epsilon, for `build_optimizer`
    first_cut: float  # the initial scores, for the steering
    keep: int | None  # checkpoints to keep, None for all
    seed: int
    max_grad_norm: float  # infinite for no clipping
    alpha_ce: float
    alpha_distil: float
    alpha_hidden: float
    temperature: float
    regularization: str | None  # l0, l1 or None
    target_remaining: float | None
    final_lambda: float
    global_topk_frequency_compute: int
    logging_steps: int
    save_steps: int
    evaluate_during_training: bool
    compile: bool
    num_workers: int
    check_ranks: bool


def training_settings(
    args: argparse.Namespace, total_step: int, config: PreTrainedConfig
) -> Settings:
    """The settings of a training of `total_step` updates. Raises UserError if plateaus overlap."""
    masked = is_masked(args.model_type)
    if masked and (problem := plateau_problem(args, total_step)):
        raise UserError(problem)
    if masked:
        _warn_of_no_heads(args, config)
    warmup_steps = warmup_updates(args, total_step)
    scheduled = vars(args) | {"total_step": total_step, "warmup_steps": warmup_steps}
    if args.target_remaining is not None:
        scheduled["final_lambda"] = 1.0  # the steering finds lambda, the schedule scales it
    values = vars(args) | {
        "arguments": vars(args),
        "output_dir": Path(args.output_dir),
        "schedule": _take_fields(Schedule, scheduled),
        "precision": precision_of(args),
        "rates": {name: getattr(args, name) for name in RATES},
        "first_cut": config.mask_scale if masked and config.mask_init == "constant" else 0.0,
        "keep": args.save_total_limit or (None if args.eval_all_checkpoints else 2),
        "max_grad_norm": args.max_grad_norm or math.inf,
    }
    return _take_fields(Settings, values)


def _warn_of_no_heads(args: argparse.Namespace, config: PreTrainedConfig) -> None:
    heads, final = config.num_attention_heads, args.final_threshold
    of_heads = "heads" in granularity_of(config).shared and not args.global_topk
    ranks = METHODS[args.pruning_method].threshold_is == "remains"
    if of_heads and ranks and int(final * heads) == 0:
        message = (
            "--final_threshold %g keeps none of the %d heads of each layer: its attention becomes "
            "a bias. --global_topk ranks the heads of all layers together"
        )
        logger.warning(message, final, heads)


def _take_fields(kind: type, values: dict):
    """An object of the dataclass `kind`; `values` may hold more than its fields."""
    return kind(**{field.name: values[field.name] for field in fields(kind)})
