"""The training loop and the evaluation pass. Neither knows a task: hooks bring its logits and its loss."""

import argparse
import hashlib
import itertools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ..inference import sparsify
from ..losses import distillation_loss, regularization
from ..families import layers_of
from ..modules.masks import Masks, count, find_masks, masked, masked_layers, masks_above
from ..schedule import LambdaSteering, learning_rate_factor, schedule_threshold
from .args import (
    Interrupted,
    TrainingError,
    UsageError,
    check_plateaus,
    lambda_steering,
    regularization_mode,
    resumes_in_place,
)
from .batches import BatchPlan, LocalBatches, evaluation_batches
from .checkpoint import (
    TrainingState,
    clear_output,
    find_checkpoints,
    remove_leftovers,
    remove_old_checkpoints,
    save_final,
)
from .distributed import World, describe_hardware
from .optim import build_optimizer, set_learning_rates
from .runlog import RunLog, progress_bar

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
STEERED_WITHIN = 0.02  # of --target_remaining, relative
SAME_SIGNAL = 3.0  # seconds in which a second signal is taken for the first
PATIENCE_FP16 = 50  # updates in a row that the gradient scaler may skip


def train(
    args: argparse.Namespace,
    world: World,
    model: nn.Module,
    teacher: nn.Module | None,
    train_set: Dataset,
    lengths: np.ndarray,
    log: RunLog,
    *,
    collate: Callable[[list[dict]], dict[str, Tensor]],
    task_logits: Callable,
    task_loss: Callable,
    save_model: Callable[[Path], None],
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    distil_loss: Callable = distillation_loss,
    resume_folder: Path | None = None,
    result_files: tuple[str, ...] = (),
) -> dict[str, float]:
    """Fine-prune (or, without masked layers, fine-tune) `model` in place, and write it to output_dir.

    lengths: tokens of each training example. task_logits(outputs, batch): tuple of logits of a model's
    outputs. task_loss(logits, batch): the task's own loss, a mean over the examples of the batch.
    save_model(folder): writes model, configuration and tokenizer. evaluate(model, step): metrics.
    result_files: patterns of what an evaluation leaves in output_dir; a new run removes what an old one left.

    Returns figures of the run for its summary. Raises UsageError when the schedule does not fit the
    data or the checkpoint does not fit the run, TrainingError when a loss is no longer finite.
    """
    plan = BatchPlan(lengths, args.per_gpu_train_batch_size * world.size, args.gradient_accumulation_steps, args.seed)
    total = args.max_steps if args.max_steps > 0 else plan.total_updates(args.num_train_epochs)
    has_masks = bool(masked_layers(model))
    if has_masks and (problems := check_plateaus(args, total)):
        raise UsageError(problems[0])

    output_dir = Path(args.output_dir)
    model.to(world.device).train()
    if teacher:
        teacher.to(world.device).eval()
        _halve_linears(teacher, args)
    optimizer = build_optimizer(
        model, args.learning_rate, args.mask_scores_learning_rate, args.weight_decay, args.adam_epsilon
    )
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(world.device.type, enabled=args.fp16),
        mask_generator=torch.Generator(world.device).manual_seed(args.seed),  # alike on all ranks
        world=world,
        train_set=train_set,
        steering=lambda_steering(args, total) if has_masks else None,
    )
    torch.manual_seed(args.seed + world.rank)  # dropout differs between ranks
    if world.is_main:
        remove_leftovers(output_dir)
    if resume_folder:
        state.load(resume_folder, args)
    if world.is_main and not (resume_folder and resumes_in_place(args)):
        clear_output(output_dir, result_files)
    started_at, started = state.step, time.perf_counter()
    logger.info(
        "training: %d examples, %d updates of %d examples (%g epochs), starting at update %d",
        len(lengths), total, plan.batch_size * plan.accumulation, total / plan.updates_per_epoch, state.step,
    )  # fmt: skip

    if args.compile:
        for layer in layers_of(model):  # one by one: they are alike, and share what is compiled
            layer.compile()
    parallel = model
    if world.size > 1:
        parallel = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    passes = _Passes(args, world, parallel, teacher, task_logits, task_loss, distil_loss)
    log.start(state.step)
    batches = LocalBatches(plan, state.step, total, world.rank, world.size)
    loader = iter(
        DataLoader(
            train_set,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=args.num_workers,
            pin_memory=world.device.type == "cuda",
            generator=torch.Generator(),  # else making the iterator would draw from dropout's generator
        )
    )
    keep = args.save_total_limit or (None if args.eval_all_checkpoints else 2)
    skipped, figures = 0, _Figures(world)
    bar = progress_bar(world, total=total, initial=state.step, desc="training", unit="update")

    with _Signals() as signals, bar:  # which ends its line, so that an error begins one
        for step in range(state.step, total):
            threshold, penalty_weight = schedule_threshold(
                step, total, args.warmup_steps, args.initial_threshold, args.final_threshold,
                args.initial_warmup, args.final_warmup, 1.0 if state.steering else args.final_lambda,
            )  # fmt: skip
            if state.steering:
                above = masks_above(model, state.steering.reference(step))
                penalty_weight *= state.steering.steer(step, count(above).overall)
            set_learning_rates(optimizer, learning_rate_factor(step, total, args.warmup_steps))
            renew = step % args.global_topk_frequency_compute == 0
            shares = batches.shares(step)
            with masked(model, threshold, None if renew else state.cutoff, state.mask_generator) as masks:
                losses = passes.backward(itertools.islice(loader, len(shares)), shares, penalty_weight, state.scaler)
            state.cutoff = masks.cutoff if masks else None
            state.scaler.unscale_(optimizer)
            _observe(model, state.scaler)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or torch.inf)
            skipped = 0 if torch.isfinite(grad_norm) else skipped + 1
            if skipped > (PATIENCE_FP16 if args.fp16 else 0):
                raise TrainingError(_explain_non_finite(step, losses, args, world))
            state.scaler.step(optimizer)
            state.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.step = step + 1
            if args.check_ranks:
                _check_ranks(model, masks, state.step, world)

            figures.add(losses, grad_norm, skipped > 0)
            bar.update()
            if bar.n % 10 == 0 or state.step == total:
                shown = {"loss": f"{losses['loss'].item():.3f}", "lr": f"{optimizer.param_groups[-1]['lr']:.1e}"}
                if masks:
                    shown |= {"threshold": f"{threshold:.3f}", "remaining": f"{count(masks).overall:.1%}"}
                bar.set_postfix(shown, refresh=False)
            if state.step % args.logging_steps == 0 or state.step == total:
                values = figures.take() | {f"learning_rate/{g['name']}": g["lr"] for g in optimizer.param_groups}
                if masks:
                    counts = count(masks)
                    values |= {"threshold": threshold, "lambda": penalty_weight, "remaining/overall": counts.overall}
                    values |= {f"remaining/{name}": value for name, value in counts.fractions.items()}
                log.scalars(values, state.step)
            if evaluate and args.evaluate_during_training and state.step % args.logging_steps == 0:
                log.scalars({f"eval/{name}": value for name, value in evaluate(model, state.step).items()}, state.step)
                model.train()
            stopping = world.largest(signals.number)  # of any rank
            if stopping or (args.save_steps and state.step % args.save_steps == 0):
                _check_weights(model, state.step, output_dir)
                seconds = state.seconds + time.perf_counter() - started
                state.save(output_dir / f"checkpoint-{state.step}", args, save_model, seconds)
                log.score_histograms(model, state.step)
                if world.is_main:
                    remove_old_checkpoints(output_dir, keep)
            if stopping:
                raise Interrupted(
                    f"stopped by {signal.Signals(stopping).name} after update {state.step} of {total}: give the same command "
                    "again with --resume_from_checkpoint latest to continue",
                    stopping,
                )

    _check_weights(model, state.step, output_dir)
    model.eval()
    if has_masks:
        model.config.threshold = args.final_threshold
        log.score_histograms(model, state.step)
        if state.steering:
            _report_steering(state.steering, count(find_masks(model)).overall, penalty_weight)
    seconds = time.perf_counter() - started
    summary = {"updates": state.step, "seconds": seconds, "seconds_per_update": seconds / max(1, total - started_at)}
    if world.is_main:
        whole = {"seconds": state.seconds + seconds, "hardware": describe_hardware(world), "torch": torch.__version__}
        save_final(output_dir, args, save_model, summary | whole)
    return summary


def _report_steering(steering: LambdaSteering, remaining: float, penalty_weight: float) -> None:
    off = remaining / steering.target - 1
    report = logger.info if abs(off) <= STEERED_WITHIN else logger.warning
    report(
        "--target_remaining %g: %.2f%% of the weights remain, %+.1f%% off, at lambda %.4g%s",
        steering.target, 100 * remaining, 100 * off, penalty_weight,
        "" if abs(off) <= STEERED_WITHIN else "; for a closer hit train longer, or raise --mask_scores_learning_rate",
    )  # fmt: skip


class _Signals:
    """SIGTERM and SIGINT while it is entered: noted, for the update to be finished. A later one interrupts at once.

    (One that follows soon is the same: a process group's, which torchrun passes on besides.)
    """

    def __init__(self):
        self.number, self.noted = 0, 0.0
        self.handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.number:
            if time.monotonic() - self.noted >= SAME_SIGNAL:
                raise KeyboardInterrupt
            return
        self.number, self.noted = number, time.monotonic()
        logger.warning("%s: stopping after this update, with a checkpoint", signal.Signals(number).name)


class _Passes:
    """Forward and backward over the batches of one update."""

    def __init__(self, args, world, model, teacher, task_logits, task_loss, distil_loss):
        self.args, self.world, self.model, self.teacher = args, world, model, teacher
        self.task_logits, self.task_loss, self.distil_loss = task_logits, task_loss, distil_loss
        self.penalty = regularization_mode(args)

    def backward(self, loader, shares: list[float], penalty_weight: float, scaler) -> dict[str, Tensor]:
        """Gradients of one update, left in the parameters; its losses, of this rank's examples, by name.

        A batch weighs as much as it has examples, so that the update is the mean over all of its
        examples whatever the batches, the ranks and the remainder of an epoch.
        """
        sums: dict[str, Tensor] = {}
        for place, (share, batch) in enumerate(zip(shares, loader, strict=True)):
            last = place == len(shares) - 1
            batch = {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()}
            with nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                parts = self._losses(batch)
                weight = share * self.world.size  # DistributedDataParallel averages over the ranks
                objective = weight * parts["loss"]
                if last and self.penalty:  # a function of the scores alone: once per update
                    parts["loss/penalty"] = regularization(self.model, self.penalty)
                    objective = objective + penalty_weight * parts["loss/penalty"]
                scaler.scale(objective).backward()
            for name, value in parts.items():
                value = value.detach() * (1.0 if name == "loss/penalty" else weight)
                sums[name] = sums[name] + value if name in sums else value
        if self.penalty:
            sums["loss"] = sums["loss"] + penalty_weight * sums["loss/penalty"]
        return sums

    def _losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        args = self.args
        logits = self._logits(self.model, batch)
        task = self.task_loss(logits, batch)
        if self.teacher is None:
            return {"loss": task, "loss/task": task}
        with torch.no_grad():
            teacher_logits = self._logits(self.teacher, batch)
        distil = self.distil_loss(logits, teacher_logits, args.temperature)
        return {"loss": args.alpha_distil * distil + args.alpha_ce * task, "loss/task": task, "loss/distil": distil}

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with autocast(self.args, self.world):
            outputs = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
        return self.task_logits(outputs, batch)


class _Figures:
    """Means of the losses over the updates since they were last taken."""

    def __init__(self, world: World):
        self.world = world
        self.sums: dict[str, Tensor] = {}
        self.count = self.skipped = 0

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor, skipped: bool) -> None:
        if skipped:  # by the gradient scaler: its losses or gradients may be infinite
            self.skipped += 1
            return
        for name, value in (losses | {"gradient_norm": grad_norm.detach()}).items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def take(self) -> dict[str, float]:
        values = {"skipped_updates": self.skipped} if self.skipped else {}
        if self.count:
            means = self.world.sum(torch.stack(list(self.sums.values())) / (self.count * self.world.size))
            values |= dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.count, self.skipped = {}, 0, 0
        return values


def autocast(args: argparse.Namespace, world: World):
    """Mixed precision as --fp16 or --bf16 ask for it; parameters and scores stay float32."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(world.device.type, dtype, enabled=args.fp16 or args.bf16)


def _halve_linears(teacher: nn.Module, args: argparse.Namespace) -> None:
    """Keep a teacher's linear layers in the precision that autocast would cast them to for every batch."""
    if args.fp16 or args.bf16:
        for module in teacher.modules():
            if type(module) is nn.Linear:
                module.to(torch.float16 if args.fp16 else torch.bfloat16)


@torch.no_grad()
def _observe(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """Hand the gradients of observed scores to their method; nothing else sees them."""
    layers = [layer for layer in masked_layers(model).values() if layer.method.observe]
    grads = [layer.mask_scores.grad for layer in layers]
    if layers and torch.stack([grad.isfinite().all() for grad in grads]).all():
        for layer, grad in zip(layers, grads, strict=True):
            layer.method.observe(layer, grad / scaler.get_scale())
    for layer in layers:
        layer.mask_scores.grad = None


def _explain_non_finite(step: int, losses: dict[str, Tensor], args: argparse.Namespace, world: World) -> str:
    values = {name: value.item() for name, value in losses.items()}
    found = [f"{name} = {value:.4g} on rank {rank}" for rank, part in enumerate(world.gather(values))
             for name, value in part.items() if name != "loss" and not math.isfinite(value)]  # fmt: skip
    what = f"{', '.join(found)}" if found else "the gradient is not finite, though every part of the loss is"
    series = f" for {PATIENCE_FP16 + 1} updates in a row" if args.fp16 else ""
    return (
        f"update {step + 1}{series}: {what}: training stops; lower the learning rates or do without --fp16, and continue "
        f"from the last checkpoint in {args.output_dir}"
    )


def _check_weights(model: nn.Module, step: int, output_dir: Path) -> None:
    """Raises TrainingError for weights or scores that are not finite: such a checkpoint would push out a good one."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TrainingError(
                f"update {step}: {name} is not finite any more: nothing is saved; lower the learning rates, and continue "
                f"from the last checkpoint in {output_dir}"
            )


def _check_ranks(model: nn.Module, masks: Masks | None, step: int, world: World) -> None:
    """Raises TrainingError when cut-off, masks, scores or weights are not the same on every rank, bit for bit."""
    tensors = dict(model.named_parameters())
    tensors |= {f"{name}.mask": mask for name, mask in masks.by_layer.items()} if masks else {}
    own = {name: hashlib.sha256(tensor.detach().cpu().numpy()).hexdigest() for name, tensor in tensors.items()}
    ranks = world.gather(own | {"global cut-off": masks and masks.cutoff})
    for name in ranks[0]:
        if other := next((rank for rank, values in enumerate(ranks) if values[name] != ranks[0][name]), None):
            raise TrainingError(f"--check_ranks: after update {step}, {name} of rank {other} is not that of rank 0")


def evaluate_all(
    args: argparse.Namespace,
    model: nn.Module,
    evaluate: Callable[[nn.Module, int | None], dict[str, float]],
    load_checkpoint: Callable[[Path], nn.Module],
    log: RunLog,
) -> dict[str, float]:
    """Results of `model` and, with --eval_all_checkpoints, those of every checkpoint, whose step ends their names.

    evaluate(model, step): metrics; the step of the final model is None.
    """
    results = {}
    if args.eval_all_checkpoints:
        for folder in find_checkpoints(Path(args.output_dir if args.do_train else args.model_name_or_path)):
            step = int(folder.name.rpartition("-")[2])
            figures = evaluate(load_checkpoint(folder), step)
            results |= {f"{name}_{step}": value for name, value in figures.items()}
    final = evaluate(model, None)
    log.scalars({f"eval/{name}": value for name, value in final.items()})
    return results | final


@torch.no_grad()
def predict(
    args: argparse.Namespace,
    world: World,
    model: nn.Module,
    dataset: Dataset,
    lengths: np.ndarray,
    *,
    collate: Callable[[list[dict]], dict[str, Tensor]],
    task_logits: Callable,
) -> list[tuple[np.ndarray, ...]] | None:
    """Logits of every example, in the order of `dataset`, as tuples of float32 arrays; None but on rank 0.

    The ranks share the examples out. Masks are computed once, before the first batch; so is the sparse form of the
    model that --sparse_inference asks for. Raises UsageError when logits are not finite.
    """
    model.to(world.device).eval()
    if args.sparse_inference:
        try:
            model = sparsify(model)
        except ValueError as error:
            raise UsageError(f"--sparse_inference: {error}") from error
    batches = evaluation_batches(lengths, args.per_gpu_eval_batch_size, world.rank, world.size)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=args.num_workers,
                        generator=torch.Generator())  # fmt: skip
    results = []
    bar = progress_bar(world, iterable=zip(batches, loader, strict=True), total=len(batches), desc="evaluating", unit="batch")
    with bar, masked(model):
        for indices, batch in bar:
            batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
            with autocast(args, world):
                outputs = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
            logits = [tensor.float().cpu().numpy() for tensor in task_logits(outputs, batch)]
            results += [(index, tuple(part[row] for part in logits)) for row, index in enumerate(indices)]
    gathered = world.gather(results)
    if not world.is_main:
        return None
    ordered = [logits for _, logits in sorted(itertools.chain(*gathered), key=lambda item: item[0])]
    if not all(np.isfinite(part).all() for logits in ordered for part in logits):
        raise UsageError("the outputs of the model are not finite: its training had diverged")
    return ordered
