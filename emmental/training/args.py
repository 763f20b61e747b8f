"""The command line that the two scripts share, and the checks on it.

All problems are reported together, before anything is loaded: one line each, exit status 2.
"""

import argparse
import difflib
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ..families import FAMILIES, MASKED, is_masked
from ..losses import PENALTIES
from ..modules.masked_nn import MASK_INITS
from ..modules.methods import METHODS
from ..modules.topk import MIN_REMAINING
from ..schedule import LambdaSteering, plateaus_overlap, usual_lambda

logger = logging.getLogger(__name__)

PRUNING_ARGUMENTS = (
    "pruning_method", "mask_init", "mask_scale", "mask_scores_learning_rate", "initial_threshold", "final_threshold",
    "initial_warmup", "final_warmup", "regularization", "final_lambda", "target_remaining", "global_topk", "global_topk_frequency_compute",
)  # fmt: skip
WITHOUT_MEANING = ("fp16_opt_level", "server_ip", "server_port", "lang_id")


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what, where and how to fix it."""

    status = 2


class TrainingError(UsageError):
    """Training cannot go on; the last checkpoint is good."""

    status = 1


class Interrupted(UsageError):
    """A signal ended the training, which has written a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


def choice(*options: str, aliases: dict[str, str] | None = None) -> Callable[[str], str]:
    """An argparse type: one of `options` (or an alias of one), and an error that names the nearest."""

    def parse(text: str) -> str:
        value = (aliases or {}).get(text, text)
        if value not in options:
            nearest = difflib.get_close_matches(text.lower(), [o.lower() for o in options], n=1, cutoff=0.4)
            hint = next((f"; did you mean {o!r}?" for o in options if [o.lower()] == nearest), "")
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(options)}{hint}")
        return value

    parse.metavar = "{" + ",".join(options) + "}"
    return parse


def pruning_method(text: str) -> str:
    """An argparse type: the name of a pruning method."""
    return choice(*METHODS, aliases={"sigmoid_threshold": "sigmoied_threshold"})(text)


def model_types() -> list[str]:
    """What --model_type may be."""
    return [prefix + family for family in FAMILIES for prefix in ("", MASKED)]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which names the flag nearest to a mistyped one."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def format_usage(self) -> str:
        required = " ".join(f"{a.option_strings[0]} ..." if a.option_strings else a.metavar or a.dest
                            for a in self._actions if a.required)  # fmt: skip
        return f"usage: {self.prog} {required} [options]\n"

    def format_help(self) -> str:
        _, _, described = super().format_help().partition("\n\n")
        return f"{self.format_usage()}\n{described}"

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            nearest = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
        return parsed

    def given(self, args: Sequence[str] | None = None) -> set[str]:
        """Names of the arguments that stand on the command line, whatever their value."""
        bare = argparse.Namespace(**{action.dest: _NotGiven for action in self._actions})
        parsed, _ = self.parse_known_args(args, bare)
        return {name for name, value in vars(parsed).items() if value is not _NotGiven}

    def error(self, message: str):
        fail([message])


class _NotGiven:
    pass


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows choices, and defaults but where they say nothing (flags, None)."""

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", None) or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"


def fail(problems: list[str], status: int = 2):
    """Print each problem on a line of its own and exit.

    What is wrong with the input (status 2), and an interruption (above 128), every process finds alike: the
    first of a node speaks for all. Any other failure is a process's own to tell.
    """
    rank = int(os.environ.get("RANK", 0))
    if (status != 2 and status <= 128) or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        name = (os.path.basename(sys.argv[0]) or "error") + (f" (rank {rank})" if rank else "")
        for problem in problems:
            print(f"{name}: error: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def one_line_errors(*kinds: type[Exception]):
    """Turn the expected errors of a script into one line and an exit status, instead of a traceback."""
    try:
        yield
    except (UsageError, *kinds) as error:
        fail([str(error)], getattr(error, "status", 2))
    except OSError as error:
        fail([f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")], status=1)
    except MemoryError as error:
        fail([f"out of memory ({error or 'no size given'}): take smaller batches, or a machine with more"], 1)
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        fail(["lost another process of this run (its own message, if it had time for one, says why); continue with --resume_from_checkpoint latest"], 1)
    except KeyboardInterrupt:
        fail(["interrupted; a run with checkpoints continues with --resume_from_checkpoint latest"], status=130)


def lost_connection(error: RuntimeError) -> bool:
    """Whether an exchange between processes failed: nccl has a type for that, gloo a plain RuntimeError."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # they may have parted by now
    return isinstance(error, dist.DistError) or (several and "gloo" in str(error).lower())


def add_common_arguments(parser: argparse.ArgumentParser, *, max_seq_length: int, logging_steps: int, save_steps: int):
    """Add every flag that is not a task's own, in groups."""
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
    add("--seed", type=int, default=42, help="seed of data order, dropout, fresh heads and scores")

    group = parser.add_argument_group("model, tokenizer and features")
    add = group.add_argument
    add("--config_name", help="configuration, when it is not the model's own")
    add("--tokenizer_name", help="tokenizer, when it is not the model's own")
    add("--cache_dir", help="where downloads and features are cached")
    add("--do_lower_case", action="store_true", help="lower-case the text (uncased models)")
    add("--max_seq_length", type=int, default=max_seq_length, help="longest input in tokens; longer ones are cut")
    add("--threads", type=int, default=1, help="processes that make features")
    add("--overwrite_cache", action="store_true", help="make the features anew, whatever the cache holds")

    group = parser.add_argument_group(
        "pruning", "A threshold is a fraction in [0, 1]: the remaining weights for topK and magnitude, the cut on "
        "sigmoid(score) for sigmoied_threshold. It moves along a cubic between two plateaus."
    )
    add = group.add_argument
    add("--pruning_method", type=pruning_method, default="topK",
        help="topK (movement), sigmoied_threshold (soft movement), magnitude, l0, or threshold")
    add("--initial_threshold", type=float, default=1.0, help="threshold at the start (1 for topK, 0 for sigmoied_threshold)")
    add("--final_threshold", type=float, default=0.7, help="threshold at the end; sets the sparsity of topK and magnitude")
    add("--initial_warmup", type=float, default=1, help="first plateau of the threshold, in units of warmup_steps")
    add("--final_warmup", type=float, default=2,
        help="last plateau, in units of warmup_steps; lengthen it when the metric still climbs at the end")
    add("--mask_init", type=choice(*MASK_INITS), default="constant", help="initialisation of the scores")
    add("--mask_scale", type=float, default=0.0, help="value (constant) or range (uniform) of the initial scores")
    add("--regularization", type=choice(*PENALTIES, "null"), default=None,
        help="penalty on the scores: l1 for soft movement, l0 for l0; null for none")
    add("--final_lambda", type=float, default=0.0,
        help="coefficient of the penalty at the end; raise it for fewer remaining weights")
    add("--target_remaining", type=float,
        help="fraction of the weights to end with (soft movement, l0): lambda is steered to it, beginning at --final_lambda or at the paper's for this target")
    add("--global_topk", action="store_true", help="rank all matrices together (topK, threshold or magnitude)")
    add("--global_topk_frequency_compute", type=int, default=25, help="updates between two global cut-offs")

    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add("--teacher_type", type=choice(*model_types()), help="type of the teacher; needed with --teacher_name_or_path")
    add("--teacher_name_or_path", help="fine-tuned teacher, a checkpoint folder or a name on the hub")
    add("--alpha_ce", type=float, default=0.5, help="weight of the task's own loss")
    add("--alpha_distil", type=float, default=0.5, help="weight of the distillation loss")
    add("--temperature", type=float, default=2.0, help="softens both distributions of the distillation")

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--per_gpu_train_batch_size", type=int, default=8, help="examples per device and step")
    add("--per_gpu_eval_batch_size", type=int, default=8, help="examples per device in evaluation")
    add("--gradient_accumulation_steps", type=int, default=1, help="batches per update")
    add("--learning_rate", type=float, default=5e-5, help="peak learning rate of the weights")
    add("--mask_scores_learning_rate", type=float, default=1e-2,
        help="peak learning rate of the scores; raise it for short runs")
    add("--num_train_epochs", type=float, default=3.0, help="epochs, may be fractional")
    add("--max_steps", type=int, default=-1, help="updates in all; overrides --num_train_epochs")
    add("--warmup_steps", type=int, default=0, help="updates of learning-rate warm-up; also the unit of the plateaus")
    add("--weight_decay", type=float, default=0.0, help="decay of the weights (not of scores, bias, LayerNorm)")
    add("--adam_epsilon", type=float, default=1e-8, help="epsilon of AdamW")
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient at this norm; 0 never clips")

    group = parser.add_argument_group("logging and checkpoints")
    add = group.add_argument
    add("--logging_steps", type=int, default=logging_steps, help="updates between two lines in TensorBoard")
    add("--save_steps", type=int, default=save_steps, help="updates between two checkpoints; 0 for none")
    add("--save_total_limit", type=int,
        help="checkpoints to keep, the newest (default: 2, or all with --eval_all_checkpoints)")

    group = parser.add_argument_group("hardware")
    add = group.add_argument
    add("--no_cuda", action="store_true", help="stay on the CPU")
    add("--sparse_inference", action="store_true",
        help="evaluate with sparse kernels, which are faster on a CPU; same predictions")
    add("--fp16", action="store_true", help="mixed precision in float16 (GPU)")
    add("--bf16", action="store_true", help="mixed precision in bfloat16 (GPU, recent CPUs)")
    add("--compile", action="store_true", help="compile the encoder; pays after some hundred updates")
    add("--num_workers", type=int, default=0, help="processes that load batches")
    add("--check_ranks", action="store_true",
        help="for debugging: compare cut-offs, masks and weights of all processes after every update, and stop where they differ")
    add("--local_rank", type=int, default=-1, help="accepted for old launchers; torchrun's environment wins")
    for name in WITHOUT_MEANING:
        if name != "lang_id":  # a SQuAD flag
            add(f"--{name}", default=None, help=argparse.SUPPRESS)
    return parser


def check_common_arguments(args: argparse.Namespace, given: set[str]) -> list[str]:
    """Every problem that the arguments have among themselves, one line each."""
    problems = []
    for name in sorted(given & set(WITHOUT_MEANING)):
        logger.warning("--%s has lost its meaning and is ignored", name)

    actions = [name for name in ("do_train", "do_eval", "do_predict") if name in vars(args)]
    if not any(getattr(args, name) for name in actions):
        problems.append(f"nothing to do: give {' or '.join(f'--{name}' for name in actions)}, or several of them")
    for name in ("per_gpu_train_batch_size", "per_gpu_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
                 "global_topk_frequency_compute", "max_seq_length", "threads"):
        if getattr(args, name) < 1:
            problems.append(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in ("learning_rate", "mask_scores_learning_rate", "adam_epsilon", "temperature"):
        if not 0 < getattr(args, name) < math.inf:
            problems.append(f"--{name} must be positive, got {getattr(args, name)}")
    for name in ("warmup_steps", "weight_decay", "max_grad_norm", "final_lambda", "initial_warmup", "final_warmup",
                 "alpha_ce", "alpha_distil", "save_steps", "num_workers"):
        if not 0 <= getattr(args, name) < math.inf:
            problems.append(f"--{name} must not be negative, got {getattr(args, name)}")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        problems.append(f"--num_train_epochs must be positive, got {args.num_train_epochs}")
    if args.save_total_limit is not None and args.save_total_limit < 1:
        problems.append(f"--save_total_limit must be at least 1, got {args.save_total_limit}")
    if not 0 <= args.seed < 2**32:
        problems.append(f"--seed must lie in [0, 2^32), got {args.seed}")
    if not math.isfinite(args.mask_scale):
        problems.append(f"--mask_scale must be finite, got {args.mask_scale}")
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
    elif args.do_train and not (args.overwrite_output_dir or resumes_in_place(args)) and (
        os.path.isdir(args.output_dir) and os.listdir(args.output_dir)
    ):
        problems.append(
            f"--output_dir {args.output_dir} is not empty: choose another folder, or give --overwrite_output_dir, "
            "or --resume_from_checkpoint latest to continue the run there"
        )
    return problems


def resumes_in_place(args: argparse.Namespace) -> bool:
    """Whether the run continues one of output_dir itself; another one's checkpoints may lie anywhere."""
    asked = args.resume_from_checkpoint
    return asked == "latest" or bool(asked) and Path(asked).resolve().parent == Path(args.output_dir).resolve()


def _warn_of_idle_arguments(args: argparse.Namespace, given: set[str]) -> None:
    """Warn of arguments that ask for something and change nothing, as they stand together."""
    idle = {
        "--do_train": () if args.do_train else ("evaluate_during_training", "teacher_name_or_path", "regularization", "target_remaining"),
        "--do_eval": () if args.do_eval else ("eval_all_checkpoints",),
        "--teacher_name_or_path": () if args.teacher_name_or_path else ("alpha_ce", "alpha_distil", "temperature"),
        f"--model_type {MASKED}{args.model_type}": () if is_masked(args.model_type) else PRUNING_ARGUMENTS,
    }
    for needed, names in idle.items():
        if without_effect := [f"--{name}" for name in names if name in given]:
            logger.warning("%s: no effect without %s", ", ".join(without_effect), needed)
    method = METHODS[args.pruning_method]
    if args.do_train and is_masked(args.model_type) and method.penalty:
        if not (regularization_mode(args) and (args.final_lambda or args.target_remaining)):
            logger.warning(
                "%s prunes little without a penalty: add --regularization %s --final_lambda ...", method.title, method.penalty
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
                problems.append(f"--{name} is a fraction and must lie in [0, 1], got {getattr(args, name)}")
    penalty = regularization_mode(args)
    if penalty and not method.scores:
        problems.append(f"--regularization {penalty} needs scores, and --pruning_method {args.pruning_method} has none")
    if args.target_remaining is not None:
        problems += _check_target(args)
    elif penalty and args.do_train and args.final_lambda == 0:
        logger.warning("--regularization %s has no effect with --final_lambda 0", penalty)
    if args.final_lambda and not penalty and args.do_train:
        problems.append("--final_lambda has no effect without --regularization: add --regularization l1 or l0")
    if args.global_topk and not method.ranks_together:
        fitting = [name for name, other in METHODS.items() if other.ranks_together]
        problems.append(f"--global_topk goes with {', '.join(fitting)}, not with {method.name}")
    if args.do_train and args.max_steps > 0:
        problems += check_plateaus(args, args.max_steps)
    return problems


def _check_target(args: argparse.Namespace) -> list[str]:
    problems, method = [], METHODS[args.pruning_method]
    if not 0 < args.target_remaining < 1:
        problems.append(f"--target_remaining is a fraction and must lie between 0 and 1, got {args.target_remaining}")
    elif method.penalty and method.has_floor and args.target_remaining <= 1.2 * MIN_REMAINING:
        problems.append(
            f"--target_remaining {args.target_remaining:g}: each matrix keeps {MIN_REMAINING:.1%} at least, so ask for more than "
            f"{1.2 * MIN_REMAINING:g}"
        )
    if not method.penalty:
        methods = " and ".join(name for name, other in METHODS.items() if other.penalty)
        problems.append(f"--target_remaining goes with {methods}; --final_threshold sets what {method.name} leaves")
    elif regularization_mode(args) != method.penalty:
        problems.append(f"--target_remaining steers the penalty: add --regularization {method.penalty}")
    elif method.threshold and not 0 < args.final_threshold < 1:
        problems.append(f"--target_remaining needs a --final_threshold between 0 and 1, got {args.final_threshold}")
    return problems


def lambda_steering(args: argparse.Namespace, total_step: int) -> LambdaSteering | None:
    """The steering that --target_remaining asks for, None if it does not."""
    if args.target_remaining is None:
        return None
    method = METHODS[args.pruning_method]
    return LambdaSteering(
        target=args.target_remaining,
        first_cut=args.mask_scale if args.mask_init == "constant" else 0.0,
        last_cut=method.closing_score(args.final_threshold),
        start=args.initial_warmup * args.warmup_steps,
        end=total_step - args.final_warmup * args.warmup_steps,
        total_step=total_step,
        first_lambda=args.final_lambda or usual_lambda(args.target_remaining, method.penalty),
    )


def check_plateaus(args: argparse.Namespace, total_step: int) -> list[str]:
    """The problem, if any, that the plateaus of the threshold have with `total_step` updates."""
    if args.initial_threshold == args.final_threshold and args.target_remaining is None:
        return []  # a constant threshold needs no room to move
    problem = plateaus_overlap(total_step, args.warmup_steps, args.initial_warmup, args.final_warmup)
    return [problem] if problem else []


def mask_settings(args: argparse.Namespace, given: set[str]) -> dict:
    """What the arguments say about the masks of a model: all of it in training, else what stands on the command line."""
    settings = {name: getattr(args, name) for name in ("pruning_method", "mask_init", "mask_scale", "global_topk")}
    if args.do_train:
        return settings | {"threshold": None}  # known once it is trained
    settings = {name: value for name, value in settings.items() if name in given}
    return settings | ({"threshold": args.final_threshold} if "final_threshold" in given else {})


def regularization_mode(args: argparse.Namespace) -> str | None:
    """The penalty asked for, None for none (published commands may say "null")."""
    return None if args.regularization == "null" else args.regularization
