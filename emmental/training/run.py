"""What a script does, from the command line to the results: load, train, evaluate, report."""

import argparse
import functools
import inspect
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..checkpoints.card import write_run_card
from ..checkpoints.configs import concrete_type
from ..checkpoints.counts import LayerCount, count_layers, mask_report
from ..checkpoints.loading import load_model
from ..inference import sparsify
from ..inference.onnx_model import OnnxModel
from ..models.families import family_of, is_masked, layers_of, stock_type
from ..modules.masks import count, find_masks, masked
from ..system.errors import fail, one_line_errors
from ..system.files import reserved
from .batches import BatchPlan, training_batches
from .checkpoint import (
    clean_output,
    describe_data,
    find_checkpoints,
    find_resume_folder,
    load_checkpoint,
    step_of,
)
from .checks import check_common_arguments, check_training
from .distributed import World, join_world, leave_world
from .evaluate import Predictor
from .flags import make_parser
from .hidden import add_projection
from .loop import train
from .optim import build_optimizer
from .pair import load_student, load_teacher
from .passes import Passes
from .runlog import RunLog, print_summary, set_up_logging, write_results
from .settings import (
    make_steering,
    precision_of,
    resumes_in_place,
    student_options,
    training_settings,
)
from .speed import plan_speedup, report_speedup
from .state import TrainingState
from .task import Task

logger = logging.getLogger(__name__)

ADVICE = "; if there is a checkpoint, resume with --resume_from_checkpoint latest"


def main(task: Task, description: str, argv: list[str] | None = None) -> dict[str, float | str]:
    """Run a script, and return its results."""
    set_up_logging()
    parser = make_parser(task, description)
    args = parser.parse_args(argv)
    problems = check_common_arguments(args) + task.check(args)
    if problems:
        fail(problems)
    with one_line_errors(ADVICE):
        try:
            world = join_world(args.no_cuda, args.local_rank, args.fp16)
            with reserved(Path(args.output_dir)) if world.is_main else nullcontext():
                return run(task, args, world)
        finally:
            leave_world()


def run(task: Task, args: argparse.Namespace, world: World) -> dict[str, float | str]:
    """Do all that the arguments ask for, and return the results of the evaluation."""
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    resumed = find_resume_folder(args.resume_from_checkpoint, output_dir, args.overwrite_output_dir)
    checkpoint = str(resumed or args.model_name_or_path)
    with world.main_first():
        args = with_families(args, checkpoint)
        task.load_examples(args, checkpoint)
    torch.manual_seed(args.seed)
    options = student_options(args, resumed=resumed is not None)
    model, tokenizer = load_student(checkpoint, task.head, labels=task.labels, **options)
    with world.main_first():
        task.make_features(args, tokenizer, model)
    log = RunLog(output_dir, world)
    predictor = Predictor(
        task,
        world,
        precision=precision_of(args),
        batch_size=args.per_gpu_eval_batch_size,
        num_workers=args.num_workers,
        output_dir=output_dir,
        prepare=prepare_of(args),
    )
    figures, results, metrics, earlier = {}, {}, {}, 0.0
    if args.do_train:
        figures, earlier = _train(task, args, model, tokenizer, resumed, world, log, predictor)
    if args.do_eval:
        if args.eval_all_checkpoints:
            results = _evaluate_checkpoints(task, args, predictor)
        metrics = predictor.evaluate(model)
        log.evaluation(metrics, figures.get("updates", 0))
        results |= metrics
    log.close()
    predictor.submit(model)
    if world.is_main:
        if is_masked(args.model_type):
            masks = find_masks(model)
            results |= mask_report(model, masks)
            _warn_of_empty_layers(count_layers(model, masks))
            if args.do_train and args.target_remaining:
                remaining = f"{count(masks).overall:.2%} of the weights remain"
                logger.info(f"--target_remaining {args.target_remaining:g}: {remaining}")
            if args.do_train and args.target_speedup is not None:
                results |= report_speedup(args, model)
        if args.do_eval:
            write_results(output_dir, results)
        if args.do_train:
            _write_card(task, args, model, metrics)
        seconds = {"total_seconds": earlier + time.perf_counter() - started}
        print_summary(results | figures | seconds, output_dir)
    world.barrier()
    return results


def prepare_of(args: argparse.Namespace) -> Callable[[PreTrainedModel], nn.Module] | None:
    """What makes the model for an evaluation with --sparse_inference or --onnx_file."""
    if args.onnx_file:
        logger.info(f"evaluating {args.onnx_file} in ONNX Runtime")
        return functools.partial(OnnxModel, Path(args.onnx_file))
    return sparsify if args.sparse_inference else None


def with_families(args: argparse.Namespace, checkpoint: str) -> argparse.Namespace:
    """The arguments with the families of the models, as records name them. Raises UserError."""
    types = {"model_type": concrete_type(args.model_type, checkpoint, args.cache_dir)}
    if teacher := args.teacher_name_or_path:
        types["teacher_type"] = concrete_type(args.teacher_type, teacher, args.cache_dir)
    return argparse.Namespace(**vars(args) | types)


def _train(
    task: Task,
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    resumed: Path | None,
    world: World,
    log: RunLog,
    predictor: Predictor,
) -> tuple[dict[str, float], float]:
    """Train the model in place, and save it to output_dir.

    Returns the figures of the training, and how many seconds of it earlier processes took. resumed:
    the checkpoint to continue from, whose weights the model has already.
    """
    lengths = task.train_set["length"]
    batch_size = args.per_gpu_train_batch_size * world.size
    plan = BatchPlan(lengths, batch_size, args.gradient_accumulation_steps, args.seed)
    args = plan_speedup(args, model.to(world.device), resumed is not None, world)
    total = args.max_steps if args.max_steps > 0 else plan.total_updates(args.num_train_epochs)
    check_training(args, total, model.config)
    if is_masked(args.model_type):
        logger.info(_what_follows(model.config))
    teacher = None
    if args.teacher_name_or_path:
        teacher = load_teacher(
            args.teacher_name_or_path,
            task.head,
            masked=is_masked(args.teacher_type),
            student=model,
            tokenizer=tokenizer,
            max_seq_length=args.max_seq_length,
            cache_dir=args.cache_dir,
        )
        teacher.to(world.device)
        if args.alpha_hidden:
            add_projection(model, teacher, args.seed)
    model.to(world.device).train()
    settings = training_settings(args, total)
    state = TrainingState(
        settings=settings,
        world=world,
        data=describe_data(task.train_set, model.config),
        tokenizer=tokenizer,
        model=model,
        optimizer=build_optimizer(
            model,
            learning_rate=args.learning_rate,
            mask_scores_learning_rate=args.mask_scores_learning_rate,
            weight_decay=args.weight_decay,
            adam_epsilon=args.adam_epsilon,
        ),
        scaler=torch.amp.GradScaler(world.device.type, enabled=args.fp16),
        mask_generator=torch.Generator(world.device).manual_seed(args.seed),
        steering=make_steering(args, model, settings.schedule),
    )
    torch.manual_seed(args.seed + world.rank)  # other dropout on each rank
    if resumed:
        load_checkpoint(state, resumed)
    if args.compile:
        for layer in layers_of(model):
            layer.compile()  # one by one, as equal layers share compiled code
    if world.is_main:
        clean_output(settings.output_dir, task.result_files, resumes_in_place(args))
    logger.info(
        f"training: {len(lengths)} examples, {total} updates of "
        f"{batch_size * args.gradient_accumulation_steps} examples "
        f"({total / plan.updates_per_epoch:g} epochs), starting at update {state.step}"
    )
    passes = Passes(task, state, teacher)
    batches = training_batches(plan, task, state)
    with masked(teacher) if teacher else nullcontext():  # its masks never change
        return train(state, passes, batches, log, predictor), state.seconds


def _what_follows(config: PreTrainedConfig) -> str:
    """What a model of this family and granularity can become after training."""
    kind = stock_type(config.model_type)
    if config.granularity in ("structure", "hybrid"):
        return (
            f"heads and neurons: bertarize.py --compact will make a smaller {kind} model, for "
            "transformers and, with --onnx FILE --int8, for ONNX Runtime"
        )
    fast = "sparsify makes it fast on a CPU" if family_of(config).norms else "it gets no faster"
    structures = "; --granularity structure makes it fast in every runtime"
    return (
        f"{config.granularity}s: saving_prunebert.py will make a small file of this {kind} model, "
        f"and {fast}{structures if family_of(config).heads else ''}"
    )


def _warn_of_empty_layers(layers: list[LayerCount]) -> None:
    for kind, part in (("heads", "attention"), ("neurons", "feed-forward part")):
        empty = ", ".join(str(n) for n, layer in enumerate(layers) if not getattr(layer, kind))
        if empty:
            logger.warning(f"no {kind} remain in layer {empty}: there, the {part} only adds a bias")


def _write_card(
    task: Task, args: argparse.Namespace, model: PreTrainedModel, metrics: dict[str, float]
) -> None:
    command = ["python", Path(inspect.getfile(type(task))).name]
    for name, value in vars(args).items():
        if name in args.given and name != "resume_from_checkpoint":
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    write_run_card(
        Path(args.output_dir),
        model,
        base=args.model_name_or_path,
        data=task.data,
        dataset=task.dataset,
        teacher=args.teacher_name_or_path,
        metrics={name: value for name, value in metrics.items() if isinstance(value, float)},
        command=command,
    )


def _evaluate_checkpoints(
    task: Task, args: argparse.Namespace, predictor: Predictor
) -> dict[str, float]:
    """The metrics of every checkpoint. The names of metrics end in the step."""
    results = {}
    options = {"masked": is_masked(args.model_type), "trained": True, "labels": task.labels}
    for folder in find_checkpoints(
        Path(args.output_dir if args.do_train else args.model_name_or_path)
    ):
        model = load_model(str(folder), task.head, **options)
        metrics = predictor.evaluate(model, step_of(folder))
        results |= {f"{name}_{step_of(folder)}": value for name, value in metrics.items()}
    return results
