"""Fine-prune (or fine-tune) BERT on a GLUE task or on a task of one's own, evaluate it, predict its test set.

Movement pruning towards 15% of the encoder's weights on MNLI:

    python masked_run_glue.py --model_type masked_bert --model_name_or_path bert-base-uncased \\
        --task_name mnli --data_dir GLUE/MNLI --output_dir OUT \\
        --do_train --do_eval --do_lower_case --per_gpu_train_batch_size 32 --num_train_epochs 6 \\
        --learning_rate 3e-5 --mask_scores_learning_rate 1e-2 --warmup_steps 12000 \\
        --initial_threshold 1 --final_threshold 0.15 --initial_warmup 1 --final_warmup 2 --pruning_method topK

The dense teacher: --model_type bert. Several GPUs: torchrun --nproc_per_node 8 masked_run_glue.py ...
Without --data_dir the task comes from the hub. --task_name custom takes train and dev files of any task
(.tsv, .csv, .jsonl) whose columns --text_column, --text_pair_column and --label_column name.
"""

import argparse
import functools
import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from emmental.data import glue
from emmental.export import mask_report
from emmental.families import is_masked
from emmental.loading import LoadError, checkpoint_labels, load_model, load_student, load_teacher
from emmental.losses import distillation_loss, regression_distillation_loss
from emmental.training.args import (
    Parser,
    UsageError,
    add_common_arguments,
    check_common_arguments,
    fail,
    mask_settings,
    one_line_errors,
)
from emmental.training.checkpoint import find_resume_folder, write_text
from emmental.training.distributed import join_world, leave_world
from emmental.training.loop import evaluate_all, predict, train
from emmental.training.runlog import RunLog, print_summary, set_up_logging, write_results

logger = logging.getLogger(__name__)

HEAD = "SequenceClassification"
CUSTOM_ARGUMENTS = ("text_column", "text_pair_column", "label_column", "regression")


def task_name(text: str) -> str:
    """An argparse type: the canonical name of a task."""
    try:
        return glue.CUSTOM if text.lower() == glue.CUSTOM else glue.find_task(text).name
    except glue.GlueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_common_arguments(parser, max_seq_length=128, logging_steps=50, save_steps=50)
    add = parser.add_argument_group("GLUE").add_argument
    add("--task_name", type=task_name, required=True,
        help=f"{', '.join(glue.TASKS)} (in any case), or {glue.CUSTOM}; mnli-mm evaluates the mismatched set alone")
    add("--data_dir", help="folder of the task's files (default: the task comes from the hub)")
    add("--do_predict", action="store_true", help="write the predictions for the test set, as GLUE takes them")
    add("--text_column", default="text", help=f"{glue.CUSTOM}: column of the text, or of the first of a pair")
    add("--text_pair_column", help=f"{glue.CUSTOM}: column of the second text, where there are pairs")
    add("--label_column", default="label", help=f"{glue.CUSTOM}: column of the label")
    add("--regression", action="store_true", help=f"{glue.CUSTOM}: the labels are numbers to be approximated")
    return parser


def check_glue_arguments(args: argparse.Namespace, given: set[str]) -> list[str]:
    problems = []
    if args.task_name == glue.CUSTOM:
        if not args.data_dir:
            problems.append(f"--task_name {glue.CUSTOM} needs --data_dir: the folder of its train and dev files")
        for name in CUSTOM_ARGUMENTS:
            if getattr(args, name) == "":
                problems.append(f"--{name} is empty: is its variable set?")
    else:
        task = glue.TASKS[args.task_name]
        for name in sorted(given & set(CUSTOM_ARGUMENTS)):
            problems.append(f"--{name} is for --task_name {glue.CUSTOM}; the columns of {task.name} are known")
        if not task.evaluation_splits and (args.do_train or args.do_eval):
            problems.append(f"{task.name} has a test set only: give --do_predict, with a model fine-tuned on mnli")
        if task.is_regression and "temperature" in given:
            logger.warning("--temperature: no effect in a regression, whose teacher is followed in the squared error")
    if args.data_dir and not Path(args.data_dir).is_dir():
        problems.append(f"--data_dir {args.data_dir} is no folder")
    return problems


def load_task(args: argparse.Namespace, source: str) -> tuple[glue.Task, dict]:
    """The task, and the examples of each split that the arguments need."""
    evaluating = args.do_eval or args.evaluate_during_training
    if args.task_name != glue.CUSTOM:
        task = glue.TASKS[args.task_name]
        splits = ["train"] if args.do_train else []
        splits += task.evaluation_splits if evaluating else ()
        splits += task.submissions if args.do_predict else ()
        if args.data_dir:
            return task, {split: glue.read_examples(task, args.data_dir, split, args.cache_dir) for split in splits}
        return task, {split: glue.load_hub_examples(task, split, args.cache_dir) for split in splits}

    labels, examples = None, {}
    if not args.do_train:  # what the labels are is for the training file to say, else for the model
        labels = checkpoint_labels(source, args.cache_dir)
        if (len(labels) == 1) != args.regression:
            raise UsageError(f"{source} has {len(labels)} outputs: {'add' if len(labels) == 1 else 'drop'} --regression")
    wanted = {"train": args.do_train, "dev": evaluating, "test": args.do_predict}
    for split, file in glue.custom_files(args.data_dir, [split for split in wanted if wanted[split]]).items():
        examples[split], labels = glue.read_custom_examples(
            file,
            text_column=args.text_column,
            text_pair_column=args.text_pair_column,
            label_column=None if split == "test" else args.label_column,
            labels=labels,
            regression=args.regression,
            cache_dir=args.cache_dir,
        )
    return glue.custom_task(labels), examples


def evaluate(args, world, model, task, examples, features, hooks) -> dict[str, float]:
    """Metrics and mean prediction entropy of every evaluation split; {} but on rank 0."""
    results = {}
    for split in task.evaluation_splits:
        logits = predict_split(args, world, model, features[split], hooks)
        if world.is_main:
            metrics = glue.glue_metrics(task, logits, np.asarray(examples[split]["label"]))
            if not task.is_regression:
                metrics["entropy"] = glue.mean_entropy(logits)
            kind = split.removeprefix("dev") if len(task.evaluation_splits) > 1 else ""
            results |= {name + kind: value for name, value in metrics.items()}
    return results


def predict_split(args, world, model, features, hooks) -> np.ndarray | None:
    """Logits (examples, labels); None but on rank 0."""
    rows = predict(args, world, model, features, np.asarray(features["length"]), **hooks)
    if not world.is_main:
        return None
    return np.stack([logits for (logits,) in rows])


def run(args: argparse.Namespace, given: set[str]) -> dict[str, float | str]:
    """All that the arguments ask for; returns the evaluation's results."""
    world = join_world(args)
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    masked = is_masked(args.model_type)
    resume_folder = find_resume_folder(args)
    source = str(resume_folder or args.model_name_or_path)

    with world.main_first():
        task, examples = load_task(args, source)
    torch.manual_seed(args.seed)
    model, tokenizer = load_student(
        source,
        HEAD,
        masked=masked,
        trained=not args.do_train,
        config_name=None if resume_folder else args.config_name,
        cache_dir=args.cache_dir,
        tokenizer_name=args.tokenizer_name,
        do_lower_case=args.do_lower_case,
        max_seq_length=args.max_seq_length,
        labels=task.labels,
        **(mask_settings(args, given) if masked else {}),
    )
    with world.main_first():
        features = {
            split: glue.build_features(
                rows,
                tokenizer,
                max_seq_length=args.max_seq_length,
                num_proc=args.threads,
                cache_dir=args.cache_dir,
                overwrite_cache=args.overwrite_cache,
            )
            for split, rows in examples.items()
        }

    def task_logits(outputs, batch) -> tuple[torch.Tensor]:
        return (outputs.logits.float(),)

    def task_loss(logits, batch) -> torch.Tensor:
        if task.is_regression:
            return F.mse_loss(logits[0].squeeze(-1), batch["labels"])
        return F.cross_entropy(logits[0], batch["labels"])

    def distil_loss(student, teacher, temperature) -> torch.Tensor:
        if task.is_regression:
            return regression_distillation_loss(student, teacher)
        return distillation_loss(student, teacher, temperature)

    collate = functools.partial(
        glue.collate,
        pad_token_id=tokenizer.pad_token_id,
        input_names=tokenizer.model_input_names,
        multiple_of=8 if model.config.max_position_embeddings % 8 == 0 else 1,
    )
    hooks = {"collate": collate, "task_logits": task_logits}

    def evaluate_at(model, step) -> dict[str, float]:
        return evaluate(args, world, model, task, examples, features, hooks)

    summary, log = {}, RunLog(output_dir, world)
    if args.do_train:
        teacher = None
        if args.teacher_name_or_path:
            teacher = load_teacher(
                args.teacher_name_or_path,
                HEAD,
                masked=is_masked(args.teacher_type),
                student=model,
                tokenizer=tokenizer,
                cache_dir=args.cache_dir,
            )

        def save_model(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        summary |= train(
            args,
            world,
            model,
            teacher,
            features["train"],
            np.asarray(features["train"]["length"]),
            log,
            **hooks,
            task_loss=task_loss,
            distil_loss=distil_loss,
            save_model=save_model,
            evaluate=evaluate_at,
            resume_folder=resume_folder,
            result_files=("eval_results.*", *glue.SUBMISSION_FILES),
        )

    def load_checkpoint(folder: Path):
        return load_model(str(folder), HEAD, masked=masked, trained=True, labels=task.labels)

    results = evaluate_all(args, model, evaluate_at, load_checkpoint, log) if args.do_eval else {}
    log.close()
    if args.do_predict:
        for split in task.submissions:
            logits = predict_split(args, world, model, features[split], hooks)
            if world.is_main:
                output_dir.mkdir(parents=True, exist_ok=True)
                write_text(output_dir / task.submissions[split], glue.submission(task, examples[split], logits))
    if masked and world.is_main:
        results |= mask_report(model)
    if args.do_eval and world.is_main:
        write_results(output_dir, results)
    print_summary(world, results | summary | {"total_seconds": time.perf_counter() - started}, output_dir)
    world.barrier()
    return results


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    set_up_logging()
    parser = get_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    if problems := check_common_arguments(args, given) + check_glue_arguments(args, given):
        fail(problems)
    with one_line_errors(LoadError, glue.GlueError):
        try:
            return run(args, given)
        finally:
            leave_world()


if __name__ == "__main__":
    main()
