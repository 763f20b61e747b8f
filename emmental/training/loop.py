"""The training loop. It knows no task: passes and batches are the task's."""

import time

from torch import nn

from ..modules.masks import count, find_masks, masked
from .batches import UpdateBatches
from .checkpoint import TrainingState
from .distributed import World
from .evaluate import Predictor
from .guards import GradientGuard, StopSignals, check_ranks
from .optim import set_learning_rates
from .passes import Means, Passes, observe_scores
from .runlog import RunLog, TrainingBar
from .settings import Settings
from .stages import finish, save


def train(
    state: TrainingState, passes: Passes, batches: UpdateBatches, settings: Settings,
    world: World, log: RunLog, predictor: Predictor,
) -> dict[str, float]:  # fmt: skip
    """Train from `state` to the end of the schedule, and save to output_dir. Returns figures.

    Raises TrainingError when a gradient is no longer finite, Interrupted after a signal.
    """
    schedule, total, start = settings.schedule, settings.schedule.total_step, state.step
    model, optimizer, scaler, steering = state.model, state.optimizer, state.scaler, state.steering
    means, guard, begun = Means(world), GradientGuard(settings, world), time.perf_counter()
    log.start(start)
    with StopSignals() as signals, TrainingBar(world, total, start) as bar:
        for step in range(start, total):
            threshold, penalty_weight = schedule.threshold(step)
            if steering:
                left = count(find_masks(model, above=steering.reference(step))).overall
                penalty_weight *= steering.steer(step, left)
            set_learning_rates(optimizer, schedule.learning_rate(step))
            cutoff = state.cutoff if step % settings.global_topk_frequency_compute else None

            with masked(model, threshold, cutoff, state.mask_generator) as masks:
                losses = passes.backward(*batches.take(step), penalty_weight, scaler)
            scaler.unscale_(optimizer)
            observe_scores(model, scaler)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            skipped = guard.skips(step, grad_norm, losses)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.step, state.cutoff = step + 1, masks and masks.cutoff
            if settings.check_ranks:
                check_ranks(model, masks, state.step, world)

            means.add(losses, grad_norm, skipped)
            bar.advance(losses, optimizer, threshold, masks)
            logs = state.step % settings.logging_steps == 0
            if logs or state.step == total:
                log.update(means.take(), optimizer, threshold, penalty_weight, masks, state.step)
            if logs and settings.evaluate:
                log.evaluation(predictor.evaluate(model, state.step), state.step)
                model.train()
            stopping = world.largest(signals.number)  # of any rank
            if stopping or (settings.save_steps and state.step % settings.save_steps == 0):
                save(state, settings, world, log, state.seconds + time.perf_counter() - begun)
            if stopping:
                raise signals.interruption(stopping, state.step, total)
    return finish(state, settings, world, log, time.perf_counter() - begun, total - start)
