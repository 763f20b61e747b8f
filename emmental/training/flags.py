"""The flags of the training scripts, in groups, and those of scripts that read a masked checkpoint.

The help of a flag says when to change it. `checks` says which of them go together.
"""

import argparse
from collections.abc import Callable

from ..losses import penalties
from ..models.families import FAMILIES, MASKED
from ..modules.granularity import GRANULARITIES
from ..modules.masked_nn import MASK_INITS
from ..modules.methods import METHODS, all_settings
from .parser import Parser, choice, number
from .task import Task

COUNT = number(int, at_least=1)
COUNT_OR_0 = number(int, at_least=0)
NUMBER = number(float)
POSITIVE = number(float, above=0)
NOT_NEGATIVE = number(float, at_least=0)
RATIO = number(float, at_least=0, below=1)
SEED = number(int, at_least=0, below=2**32)

# Flags of the 2020 scripts that do nothing. Only the SQuAD script has lang_id, and adds it itself.
OBSOLETE = ("fp16_opt_level", "server_ip", "server_port", "threads", "lang_id")


def make_parser(task: Task, description: str) -> Parser:
    """The parser of a script: the flags of every task, and the task's own."""
    parser = Parser(description=description, usage="%(prog)s [options]")
    add_run_flags(parser)
    add_model_flags(parser, task)
    add_pruning_flags(parser)
    add_method_flags(parser)
    add_distillation_flags(parser)
    add_optimisation_flags(parser)
    add_logging_flags(parser, task)
    add_hardware_flags(parser)
    task.add_arguments(parser)
    for name in OBSOLETE[:-1]:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser


# fmt: off
def add_run_flags(parser: Parser) -> None:
    add = parser.add_argument_group("what to run").add_argument
    add("--model_type", type=read_model_type, required=True,
        help="masked to fine-prune; dense for a dense model; masked_bert, bert, ... for one family")
    add("--model_name_or_path", required=True, help="checkpoint folder, or name on the hub")
    add("--output_dir", required=True, help="where the model, its results and checkpoints go")
    add("--do_train", action="store_true", help="train")
    add("--do_eval", action="store_true", help="evaluate the trained model, or the one given")
    add("--evaluate_during_training", action="store_true", help="evaluate every --logging_steps")
    add("--eval_all_checkpoints", action="store_true", help="evaluate all checkpoints, too")
    add("--overwrite_output_dir", action="store_true", help="train even if output_dir is not empty")
    add("--resume_from_checkpoint", help="checkpoint-<step> folder to continue, or 'latest'")
    add("--seed", type=SEED, default=42, help="seed of data order, dropout, fresh heads and scores")


def add_model_flags(parser: Parser, task: Task) -> None:
    add = parser.add_argument_group("model, tokenizer and features").add_argument
    add("--config_name", help="configuration, if not the model's own")
    add("--tokenizer_name", help="tokenizer, if not the model's own")
    add("--cache_dir", help="where downloads and features are cached")
    add("--do_lower_case", action="store_true",
        help="lower-case the text, even if its WordPiece tokenizer is cased")
    add("--max_seq_length", type=COUNT, default=task.max_seq_length, help="longest input in tokens")
    add("--max_train_samples", type=COUNT, help="train on the first so many examples only")
    add("--max_eval_samples", type=COUNT,
        help="evaluate on the first so many examples of each set only")
    add("--overwrite_cache", action="store_true", help="make the features again")


def add_pruning_flags(parser: Parser) -> None:
    add = parser.add_argument_group("pruning").add_argument
    add("--pruning_method", type=read_method, default="topK",
        help=f"{', '.join(METHODS)}; topK is movement pruning, sigmoied_threshold soft movement")
    # what one score stands for
    add("--granularity", type=choice(*GRANULARITIES),
        help=f"what one score stands for: {', '.join(GRANULARITIES)} (structure: heads and "
             "neurons; hybrid: blocks in attention, and neurons); weight if not given")
    add("--block_rows", type=COUNT, help="rows of a block; 32 if not given")
    add("--block_columns", type=COUNT, help="columns of a block; 32 if not given")
    # the schedule of the threshold
    add("--initial_threshold", type=NUMBER, default=1.0,
        help="threshold at the start: the fraction that remains (1 for topK), or the value that "
             "the sigmoid of a score must exceed (0 for sigmoied_threshold)")
    add("--final_threshold", type=NUMBER, default=0.7,
        help="threshold at the end; for methods that rank, the fraction that remains")
    add("--initial_warmup", type=NOT_NEGATIVE, default=1,
        help="updates at the initial threshold, as a multiple of --warmup_steps")
    add("--final_warmup", type=NOT_NEGATIVE, default=2,
        help="updates at the final threshold, as a multiple of --warmup_steps; raise it if the "
             "metric still climbs at the end")
    add("--lr_cycles", type=COUNT,
        help="cycles of the learning rate; with several, the threshold steps down as each begins")
    add("--first_cut", type=NUMBER, help="threshold in the second cycle; 0.3 if not given")
    # scores at the start
    add("--mask_init", type=choice(*MASK_INITS), default="constant",
        help="how scores start: constant, uniform, kaiming, or at the magnitudes of the weights")
    add("--mask_scale", type=NUMBER, default=0.0,
        help="value (constant), range (uniform) or root mean square (magnitude) of initial scores")
    # the penalty
    add("--regularization", type=read_penalty,
        help=f"penalty on the scores: {', '.join(penalties())}, or null; soft movement takes l1")
    add("--final_lambda", type=NOT_NEGATIVE, default=0.0,
        help="lambda, the weight of the penalty, at the end; raise it to prune more")
    add("--target_remaining", type=NUMBER,
        help="fraction of the weights that shall remain: lambda is adjusted, starting from "
             "--final_lambda or a usual value")
    # a time to keep to
    add("--target_speedup", type=NUMBER,
        help="how many times as fast the compact model shall be; sets --final_threshold")
    add("--speedup_of", type=choice("torch", "onnx"),
        help="runtime whose times count: torch, or onnx (on a CPU); torch if not given")
    add("--speedup_batch", type=COUNT, help="sequences of a forward that is timed; 1 if not given")
    add("--speedup_length", type=COUNT, help="tokens of a sequence that is timed; 128 if not given")
    # one cut-off for all matrices
    together = ", ".join(name for name, method in METHODS.items() if method.ranks_together)
    add("--global_topk", action="store_true",
        help=f"rank all matrices together ({together}); each keeps at least 0.5%% of its weights")
    add("--global_topk_frequency_compute", type=COUNT, default=25,
        help="updates between two cut-offs of --global_topk")


def add_method_flags(parser: Parser) -> None:
    """The settings that single methods declare."""
    add = parser.add_argument_group("settings of pruning methods").add_argument
    for name, setting in all_settings().items():
        methods = ", ".join(methods_with(name))
        add(f"--{name}", type=number(float, above=setting.above, below=setting.below),
            help=f"{methods}: {setting.help} ({setting.default:g} if not given)")


def add_distillation_flags(parser: Parser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher_type", type=read_model_type, help="model type of the teacher")
    add("--teacher_name_or_path", help="fine-tuned teacher: folder or name on the hub")
    add("--alpha_ce", type=NOT_NEGATIVE, default=0.5, help="weight of the task's own loss")
    add("--alpha_distil", type=NOT_NEGATIVE, default=0.5, help="weight of the distillation loss")
    add("--alpha_hidden", type=NOT_NEGATIVE, default=0.0,
        help="weight of the mean squared error between hidden states of student and teacher")
    add("--temperature", type=POSITIVE, default=2.0,
        help="softens the predictions of student and teacher in the distillation loss")


def add_optimisation_flags(parser: Parser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--per_gpu_train_batch_size", type=COUNT, default=8, help="examples per device and batch")
    add("--per_gpu_eval_batch_size", type=COUNT, default=8,
        help="examples per device and batch in evaluation")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="batches per update")
    add("--learning_rate", type=POSITIVE, default=5e-5, help="peak learning rate of the weights")
    add("--mask_scores_learning_rate", type=POSITIVE, default=1e-2,
        help="peak learning rate of the scores; raise it for short runs")
    add("--num_train_epochs", type=POSITIVE, default=3.0, help="epochs, may be fractional")
    add("--max_steps", type=int, default=-1, help="updates in all; overrides --num_train_epochs")
    add("--warmup_steps", type=COUNT_OR_0, default=0,
        help="updates in which the learning rate warms up; unit of --initial_warmup and "
             "--final_warmup")
    add("--warmup_ratio", type=RATIO,
        help="warm-up as a fraction of all updates, in place of --warmup_steps: fits data of any "
             "size")
    add("--weight_decay", type=NOT_NEGATIVE, default=0.0,
        help="weight decay, but none of scores, bias and LayerNorm")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="epsilon of AdamW")
    add("--max_grad_norm", type=NOT_NEGATIVE, default=1.0,
        help="clip gradients to this norm; 0: never")


def add_logging_flags(parser: Parser, task: Task) -> None:
    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--logging_steps", type=COUNT, default=task.logging_steps,
        help="updates between points in TensorBoard, and between lines of a log")
    add("--save_steps", type=COUNT_OR_0, default=task.save_steps,
        help="updates between checkpoints; 0 for none")
    add("--save_total_limit", type=COUNT,
        help="checkpoints to keep (default: 2; with --eval_all_checkpoints, all)")


def add_hardware_flags(parser: Parser) -> None:
    add = parser.add_argument_group("hardware").add_argument
    add("--no_cuda", action="store_true", help="stay on the CPU")
    add("--sparse_inference", action="store_true", help="evaluate with sparse kernels, on a CPU")
    add("--onnx_file", help="evaluate this ONNX file of the model, which bertarize.py wrote")
    add("--fp16", action="store_true", help="mixed precision in float16 (GPU)")
    add("--bf16", action="store_true", help="mixed precision in bfloat16 (GPU, recent CPUs)")
    add("--compile", action="store_true", help="compile the encoder; slow to start")
    add("--num_workers", type=COUNT_OR_0, default=0, help="processes that load batches")
    add("--check_ranks", action="store_true",
        help="stop if masks or weights differ between processes")
    add("--local_rank", type=int, default=-1, help="for old launchers; torchrun does not need it")


def add_mask_flags(add: Callable) -> None:
    """The flags of the scripts that read a masked checkpoint; see `given_masks`."""
    default = "(default: from config.json)"
    add("--pruning_method", type=read_method, help=f"method of the checkpoint {default}")
    add("--threshold", type=float,
        help=f"threshold of the checkpoint {default}: a fraction in [0, 1], or a score")
    add("--global_topk", action="store_true", default=None,
        help=f"all matrices of the checkpoint were ranked together {default}")
# fmt: on


def given_masks(args: argparse.Namespace) -> dict:
    """The values of `add_mask_flags`, as `load_masked` takes them."""
    return {name: getattr(args, name) for name in ("pruning_method", "threshold", "global_topk")}


def read_model_type(text: str) -> str:
    """An argparse type: masked or dense for any family, or a masked or plain family."""
    families = (prefix + family for family in FAMILIES for prefix in (MASKED, ""))
    return choice("masked", "dense", *families)(text)


def read_method(text: str) -> str:
    """An argparse type: the name of a pruning method, in the published or the usual spelling."""
    return choice(*METHODS)("sigmoied_threshold" if text == "sigmoid_threshold" else text)


def read_penalty(text: str) -> str | None:
    """An argparse type: the name of a penalty, or None for the "null" of published commands."""
    return None if text == "null" else choice(*penalties(), "null")(text)


def methods_with(setting: str) -> list[str]:
    """The names of the methods that have this setting."""
    return [name for name, x in METHODS.items() if setting in {s.name for s in x.settings}]
