"""What surrounds the loop: the state that a training starts from, its checkpoints, its end."""

import logging

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..families import layers_of
from ..modules.masks import count, find_masks, masked_layers
from ..modules.methods import METHODS
from ..steering import LambdaSteering, usual_lambda
from .batches import BatchPlan, LocalBatches, UpdateBatches
from .checkpoint import TrainingState, remove_old_checkpoints, save_final
from .distributed import World, describe_hardware
from .guards import check_weights
from .optim import build_optimizer
from .passes import Passes, halve_linears
from .runlog import RunLog
from .settings import Settings
from .task import Task

logger = logging.getLogger(__name__)

STEERED_WITHIN = 0.02  # of --target_remaining, relative


def begin(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    world: World,
) -> TrainingState:
    """The state that a training of this model starts from."""
    model.to(world.device).train()
    state = TrainingState(
        model=model,
        tokenizer=tokenizer,
        optimizer=build_optimizer(model, **settings.rates),
        scaler=torch.amp.GradScaler(world.device.type, enabled=settings.precision.scales_gradients),
        mask_generator=torch.Generator(world.device).manual_seed(
            settings.seed
        ),  # alike on all ranks
        world=world,
        train_set=task.train_set,
        steering=_steering(model, settings),
    )
    torch.manual_seed(settings.seed + world.rank)  # dropout differs between ranks
    if settings.compile:
        for layer in layers_of(model):  # one by one: they are alike, and share what is compiled
            layer.compile()
    return state


def _steering(model: PreTrainedModel, settings: Settings) -> LambdaSteering | None:
    if settings.target_remaining is None or not masked_layers(model):
        return None
    method, schedule = METHODS[model.config.pruning_method], settings.schedule
    return LambdaSteering(
        target=settings.target_remaining,
        first_cut=settings.first_cut,
        last_cut=method.closing_score(schedule.final_threshold),
        start=schedule.initial_warmup * schedule.warmup_steps,
        end=schedule.total_step - schedule.final_warmup * schedule.warmup_steps,
        total_step=schedule.total_step,
        first_lambda=settings.final_lambda
        or usual_lambda(settings.target_remaining, method.penalty),
    )


def make_passes(
    task: Task, model: nn.Module, teacher: nn.Module | None, settings: Settings, world: World
) -> Passes:
    """The passes of an update of the model, shared between the ranks, and of its teacher."""
    if teacher:
        teacher.to(world.device).eval()
        halve_linears(teacher, settings.precision)
    if world.size > 1:
        model = DistributedDataParallel(
            model, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    settings = (settings.penalty, settings.distillation, settings.precision)
    return Passes(task, world, model, teacher, *settings)


def load_batches(
    task: Task, plan: BatchPlan, start: int, settings: Settings, world: World
) -> UpdateBatches:
    """This rank's batches of all updates from `start` on."""
    total, examples = settings.schedule.total_step, plan.batch_size * plan.accumulation
    logger.info(
        "training: %d examples, %d updates of %d examples (%g epochs), starting at update %d",
        len(plan.lengths), total, examples, total / plan.updates_per_epoch, start,
    )  # fmt: skip
    local = LocalBatches(plan, start, total, world.rank, world.size)
    loader = DataLoader(
        task.train_set,
        batch_sampler=local,
        collate_fn=task.collate,
        num_workers=settings.num_workers,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),  # else making the iterator would draw from dropout's generator
    )
    return UpdateBatches(local, loader)


def save(state: TrainingState, settings: Settings, world: World, log: RunLog, seconds: float):
    """Write a checkpoint after so many seconds of training, and remove those that are too many."""
    check_weights(state.model, state.step, settings.output_dir)
    folder = settings.output_dir / f"checkpoint-{state.step}"
    state.save(folder, settings.arguments, seconds)
    log.score_histograms(state.model, state.step)
    if world.is_main:
        remove_old_checkpoints(settings.output_dir, settings.keep)


def finish(
    state: TrainingState,
    settings: Settings,
    world: World,
    log: RunLog,
    seconds: float,
    updates: int,
) -> dict[str, float]:
    """Save the trained model and the figures of its run, of so many updates. Returns the figures."""
    model = state.model
    check_weights(model, state.step, settings.output_dir)
    model.eval()
    if masked_layers(model):
        model.config.threshold = settings.schedule.final_threshold
        log.score_histograms(model, state.step)
        if state.steering:
            _report_steering(state.steering, count(find_masks(model)).overall)
    figures = {"updates": state.step, "seconds": seconds}
    figures["seconds_per_update"] = seconds / max(1, updates)
    if world.is_main:
        seconds += state.seconds  # those before the checkpoint that it was continued from
        whole = {
            "seconds": seconds,
            "hardware": describe_hardware(world),
            "torch": torch.__version__,
        }
        save_final(settings.output_dir, state, settings.arguments, figures | whole)
    return figures


def _report_steering(steering: LambdaSteering, remaining: float) -> None:
    off = remaining / steering.target - 1
    close = abs(off) <= STEERED_WITHIN
    advice = "; for a closer hit train longer, or raise --mask_scores_learning_rate"
    (logger.info if close else logger.warning)(
        "--target_remaining %g: %.2f%% of the weights remain, %+.1f%% off, at lambda %.4g%s",
        steering.target, 100 * remaining, 100 * off, steering.last_lambda, "" if close else advice,
    )  # fmt: skip
