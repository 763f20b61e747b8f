"""What a script does, from the command line to the results: load, train, evaluate, report."""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..errors import UserError, fail, one_line_errors
from ..export import mask_report
from ..families import is_masked
from ..loading import load_model, load_student, load_teacher
from ..modules.masks import masked
from .args import (
    check_common_arguments,
    check_plateaus,
    make_parser,
    mask_settings,
    precision_of,
    resumes_in_place,
    training_settings,
)
from .batches import BatchPlan
from .checkpoint import clear_output, find_checkpoints, find_resume_folder, remove_leftovers
from .distributed import World, join_world, leave_world
from .evaluate import Predictor
from .loop import train
from .runlog import RunLog, print_summary, set_up_logging, write_results
from .stages import begin, load_batches, make_passes
from .task import Task


def main(
    task: Task,
    description: str,
    argv: list[str] | None = None,
    sparsify: Callable[[nn.Module], nn.Module] | None = None,
) -> dict[str, float | str]:
    """Run a script: `sparsify` makes the faster model that --sparse_inference evaluates. Returns the results."""
    set_up_logging()
    parser = make_parser(task, description)
    args, given = parser.parse_args(argv), parser.given(argv)
    problems = (
        parser.range_problems(args) + check_common_arguments(args, given) + task.check(args, given)
    )
    if args.sparse_inference and not sparsify:
        problems.append("--sparse_inference: this script has no sparse form of its models")
    if problems:
        fail(problems)
    with one_line_errors():
        try:
            return run(task, args, given, sparsify)
        finally:
            leave_world()


def run(
    task: Task,
    args: argparse.Namespace,
    given: set[str],
    sparsify: Callable[[nn.Module], nn.Module] | None = None,
) -> dict[str, float | str]:
    """All that the arguments ask for; returns the evaluation's results."""
    started = time.perf_counter()
    world = join_world(args.no_cuda, args.local_rank, args.fp16)
    output_dir, has_masks = Path(args.output_dir), is_masked(args.model_type)
    resume_folder = find_resume_folder(
        args.resume_from_checkpoint, output_dir, args.overwrite_output_dir
    )
    source = str(resume_folder or args.model_name_or_path)

    with world.main_first():
        task.load_examples(args, source)
    torch.manual_seed(args.seed)
    model, tokenizer = load_student(
        source,
        task.head,
        masked=has_masks,
        trained=not args.do_train,
        config_name=None if resume_folder else args.config_name,
        cache_dir=args.cache_dir,
        tokenizer_name=args.tokenizer_name,
        do_lower_case=args.do_lower_case,
        max_seq_length=args.max_seq_length,
        labels=task.labels,
        **(mask_settings(args, given) if has_masks else {}),
    )
    with world.main_first():
        task.make_features(args, tokenizer, model)

    log = RunLog(output_dir, world)
    prepare = sparsify if args.sparse_inference else None
    predictor = Predictor(
        task,
        world,
        precision_of(args),
        args.per_gpu_eval_batch_size,
        args.num_workers,
        output_dir,
        prepare,
    )
    summary, results = {}, {}
    if args.do_train:
        summary = _train(task, args, model, tokenizer, resume_folder, world, log, predictor)
    if args.do_eval:
        if args.eval_all_checkpoints:
            results = _evaluate_checkpoints(args, task, predictor)
        final = predictor.evaluate(model)
        log.evaluation(final)
        results |= final
    log.close()
    predictor.submit(model)
    if has_masks and world.is_main:
        results |= mask_report(model)
    if args.do_eval and world.is_main:
        write_results(output_dir, results)
    print_summary(
        world, results | summary | {"total_seconds": time.perf_counter() - started}, output_dir
    )
    world.barrier()
    return results


def _train(
    task: Task,
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    resume_folder: Path | None,
    world: World,
    log: RunLog,
    predictor: Predictor,
) -> dict[str, float]:
    """Train the model in place, and save it to output_dir. Raises UserError when the schedule does not fit the data."""
    lengths, batch_size = (
        np.asarray(task.train_set["length"]),
        args.per_gpu_train_batch_size * world.size,
    )
    plan = BatchPlan(lengths, batch_size, args.gradient_accumulation_steps, args.seed)
    total = args.max_steps if args.max_steps > 0 else plan.total_updates(args.num_train_epochs)
    if is_masked(args.model_type) and (problems := check_plateaus(args, total)):
        raise UserError(problems[0])
    teacher = None
    if args.teacher_name_or_path:
        teacher = load_teacher(
            args.teacher_name_or_path,
            task.head,
            masked=is_masked(args.teacher_type),
            student=model,
            tokenizer=tokenizer,
            cache_dir=args.cache_dir,
        )
    settings = training_settings(args, total)
    state = begin(task, model, tokenizer, settings, world)
    if world.is_main:
        remove_leftovers(settings.output_dir)
    if resume_folder:
        state.load(resume_folder, settings.arguments)
    if world.is_main and not (resume_folder and resumes_in_place(args)):
        clear_output(settings.output_dir, task.result_files)
    passes = make_passes(task, model, teacher, settings, world)
    batches = load_batches(task, plan, state.step, settings, world)
    with masked(teacher) if teacher else nullcontext():  # its masks never change
        return train(state, passes, batches, settings, world, log, predictor)


def _evaluate_checkpoints(
    args: argparse.Namespace, task: Task, predictor: Predictor
) -> dict[str, float]:
    """Results of every checkpoint, whose step ends their names."""
    results, has_masks = {}, is_masked(args.model_type)
    for folder in find_checkpoints(
        Path(args.output_dir if args.do_train else args.model_name_or_path)
    ):
        step = int(folder.name.rpartition("-")[2])
        model = load_model(
            str(folder), task.head, masked=has_masks, trained=True, labels=task.labels
        )
        results |= {
            f"{name}_{step}": value for name, value in predictor.evaluate(model, step).items()
        }
    return results
