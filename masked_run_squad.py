"""Fine-prune (or fine-tune) BERT on SQuAD v1.1 or v2.0, and evaluate it.

Movement pruning towards 15% of the encoder's weights, as in the paper:

    python masked_run_squad.py --model_type masked_bert --model_name_or_path bert-base-uncased \\
        --data_dir SQUAD --train_file train-v1.1.json --predict_file dev-v1.1.json --output_dir OUT \\
        --do_train --do_eval --do_lower_case --per_gpu_train_batch_size 16 --num_train_epochs 10 \\
        --learning_rate 3e-5 --mask_scores_learning_rate 1e-2 --warmup_steps 5400 \\
        --initial_threshold 1 --final_threshold 0.15 --initial_warmup 1 --final_warmup 2 --pruning_method topK

The dense teacher: --model_type bert. Several GPUs: torchrun --nproc_per_node 8 masked_run_squad.py ...
Without --data_dir and files, SQuAD comes from the hub.
"""

import argparse
import functools
import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from emmental.data import squad
from emmental.export import mask_report
from emmental.families import is_masked
from emmental.loading import LoadError, load_model, load_student, load_teacher
from emmental.training.args import (
    Parser,
    UsageError,
    add_common_arguments,
    check_common_arguments,
    fail,
    mask_settings,
    one_line_errors,
)
from emmental.training.checkpoint import find_resume_folder, write_json
from emmental.training.distributed import join_world, leave_world
from emmental.training.loop import evaluate_all, predict, train
from emmental.training.runlog import RunLog, print_summary, set_up_logging, write_results

logger = logging.getLogger(__name__)

HEAD = "QuestionAnswering"
PADDING_LOGIT = -1e9
RESULT_FILES = ("eval_results.*", "predictions_*.json", "nbest_predictions_*.json", "null_odds_*.json")


def get_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_common_arguments(parser, max_seq_length=384, logging_steps=500, save_steps=500)
    add = parser.add_argument_group("SQuAD").add_argument
    add("--data_dir", help="folder of the SQuAD JSON files")
    add("--train_file", help="training file (default in --data_dir: train-v1.1.json or train-v2.0.json)")
    add("--predict_file", help="evaluation file (default in --data_dir: dev-v1.1.json or dev-v2.0.json)")
    add("--version_2_with_negative", action="store_true", help="SQuAD v2.0: some questions have no answer")
    add("--null_score_diff_threshold", type=float, default=0.0,
        help="v2.0: predict no answer when its score exceeds the best answer's by more than this")
    add("--doc_stride", type=int, default=128, help="tokens by which the windows over a long context advance")
    add("--max_query_length", type=int, default=64, help="longest question in tokens; longer ones are cut")
    add("--n_best_size", type=int, default=20, help="predictions per question in nbest_predictions_.json")
    add("--max_answer_length", type=int, default=30, help="longest answer in tokens")
    add("--verbose_logging", action="store_true", help="log one feature, and every skipped question")
    add("--lang_id", default=None, help=argparse.SUPPRESS)
    return parser


def check_squad_arguments(args: argparse.Namespace) -> list[str]:
    problems = []
    for name in ("doc_stride", "max_query_length", "n_best_size", "max_answer_length"):
        if getattr(args, name) < 1:
            problems.append(f"--{name} must be at least 1, got {getattr(args, name)}")
    for wanted, split in ((args.do_train, "train"), (needs_evaluation_data(args), "predict")):
        file = data_file(args, split)
        if wanted and file and not file.is_file():
            problems.append(f"--{split}_file: there is no file {file}")
    return problems


def needs_evaluation_data(args: argparse.Namespace) -> bool:
    return args.do_eval or args.evaluate_during_training


def data_file(args: argparse.Namespace, split: str) -> Path | None:
    """The local file of a split ("train" or "predict"); None when SQuAD comes from the hub."""
    name = getattr(args, f"{split}_file")
    if not name and not args.data_dir:
        return None
    version = "v2.0" if args.version_2_with_negative else "v1.1"
    return Path(args.data_dir or "") / (name or f"{'train' if split == 'train' else 'dev'}-{version}.json")


def load_examples(args: argparse.Namespace, split: str):
    file = data_file(args, split)
    if file:
        return squad.read_examples(file, args.version_2_with_negative, unique_ids=split == "predict", cache_dir=args.cache_dir)
    hub_split = "train" if split == "train" else "validation"
    return squad.load_hub_examples(hub_split, args.version_2_with_negative, args.cache_dir)


def make_features(args: argparse.Namespace, examples, tokenizer, training: bool):
    return squad.build_features(
        examples,
        tokenizer,
        max_seq_length=args.max_seq_length,
        doc_stride=args.doc_stride,
        max_query_length=args.max_query_length,
        training=training,
        num_proc=args.threads,
        cache_dir=args.cache_dir,
        overwrite_cache=args.overwrite_cache,
    )


def span_logits(outputs, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end logits in float32; padding is no candidate, so that the loss ignores how much there is."""
    padding = batch["attention_mask"] == 0
    return tuple(
        logits.float().masked_fill(padding, PADDING_LOGIT) for logits in (outputs.start_logits, outputs.end_logits)
    )


def span_loss(logits, batch) -> torch.Tensor:
    start, end = logits
    return (F.cross_entropy(start, batch["start_positions"]) + F.cross_entropy(end, batch["end_positions"])) / 2


def evaluate(args, world, model, examples, features, collate, output_dir: Path, prefix: str) -> dict[str, float]:
    """Predict, write the three JSON files, score; {} but on rank 0."""
    logits = predict(
        args, world, model, features, np.asarray(features["length"]), collate=collate, task_logits=span_logits
    )
    if not world.is_main:
        return {}
    predictions, nbest, null_odds = squad.postprocess(
        examples,
        features,
        [start for start, _ in logits],
        [end for _, end in logits],
        n_best_size=args.n_best_size,
        max_answer_length=args.max_answer_length,
        version_2_with_negative=args.version_2_with_negative,
        null_score_diff_threshold=args.null_score_diff_threshold,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / f"predictions_{prefix}.json", predictions)
    write_json(output_dir / f"nbest_predictions_{prefix}.json", nbest)
    if args.version_2_with_negative:
        write_json(output_dir / f"null_odds_{prefix}.json", null_odds)
    return squad.squad_metrics(
        examples, predictions, null_odds, version_2_with_negative=args.version_2_with_negative
    )


def run(args: argparse.Namespace, given: set[str]) -> dict[str, float | str]:
    """All that the arguments ask for; returns the evaluation's results."""
    world = join_world(args)
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    masked = is_masked(args.model_type)
    resume_folder = find_resume_folder(args)
    source = str(resume_folder or args.model_name_or_path)

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
        labels=2,
        **(mask_settings(args, given) if masked else {}),
    )
    collate = functools.partial(
        squad.collate,
        pad_token_id=tokenizer.pad_token_id,
        input_names=tokenizer.model_input_names,
        multiple_of=8 if model.config.max_position_embeddings % 8 == 0 else 1,
    )

    evaluate_at = None
    if needs_evaluation_data(args):
        with world.main_first():
            dev_examples = load_examples(args, "predict")
            dev_features = make_features(args, dev_examples, tokenizer, training=False)

        def evaluate_at(model, step) -> dict[str, float]:
            prefix = "" if step is None else str(step)
            return evaluate(args, world, model, dev_examples, dev_features, collate, output_dir, prefix)

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
        with world.main_first():
            train_examples, skipped = squad.drop_misaligned(load_examples(args, "train"))
            if skipped:
                shown = [squad.shown(id_) for id_ in (skipped if args.verbose_logging else skipped[:5])]
                logger.warning(
                    "%d training questions skipped, their answer_start does not match their text: %s%s",
                    len(skipped), ", ".join(shown), "" if len(shown) == len(skipped) else ", ... (all with --verbose_logging)",
                )  # fmt: skip
            if not len(train_examples):
                raise UsageError("no training question is usable: see the warning above")
            train_features = make_features(args, train_examples, tokenizer, training=True)
        if args.verbose_logging:
            logger.info("first feature: %s", tokenizer.decode(train_features[0]["input_ids"]))

        def save_model(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        summary |= train(
            args,
            world,
            model,
            teacher,
            train_features,
            np.asarray(train_features["length"]),
            log,
            collate=collate,
            task_logits=span_logits,
            task_loss=span_loss,
            save_model=save_model,
            evaluate=evaluate_at,
            resume_folder=resume_folder,
            result_files=RESULT_FILES,
        )

    def load_checkpoint(folder: Path):
        return load_model(str(folder), HEAD, masked=masked, trained=True, labels=2)

    results = evaluate_all(args, model, evaluate_at, load_checkpoint, log) if args.do_eval else {}
    log.close()
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
    if problems := check_common_arguments(args, given) + check_squad_arguments(args):
        fail(problems)
    with one_line_errors(LoadError, squad.SquadError):
        try:
            return run(args, given)
        finally:
            leave_world()


if __name__ == "__main__":
    main()
