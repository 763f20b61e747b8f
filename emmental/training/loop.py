"""The training loop, for every task and pruning method."""

import time

from torch import nn

from ..modules.masks import count, find_masks, masked, masked_layers
from ..modules.observation import observe_scores, observed_norms
from .checkpoint import save_checkpoint, save_trained
from .evaluate import Predictor
from .guards import GradientGuard, agreed_signal, check_ranks, interruption, stop_signals
from .optim import set_learning_rates, trained_parameters
from .passes import Means, Passes
from .runlog import RunLog, progress_bar, show_progress
from .state import TrainingState


def train(
    state: TrainingState, passes: Passes, batches, log: RunLog, predictor: Predictor
) -> dict[str, float]:
    """Train from `state` to the end of the schedule, and save to output_dir. Returns figures.

    Raises TrainingError for a gradient that is not finite, and Interrupted after a signal.
    """
    settings, schedule, world = state.settings, state.settings.schedule, state.world
    model, optimizer, scaler, steering = state.model, state.optimizer, state.scaler, state.steering
    layers, parameters = masked_layers(model), trained_parameters(model, optimizer)
    means, guard = Means(world), GradientGuard(scaler.is_enabled(), world)
    begun, total = time.perf_counter() - state.seconds, schedule.total_step
    log.start(state.step, total)
    steps = {"iterable": range(state.step, total), "initial": state.step, "total": total}
    bar = progress_bar(world, **steps, desc="training", unit="update")
    with stop_signals() as signals, bar:
        for step in bar:
            threshold, penalty_weight = schedule.threshold(step)
            if steering:
                remaining = count(find_masks(layers, above=steering.reference(step))).overall
                penalty_weight *= steering.steer(step, remaining)
            set_learning_rates(optimizer, schedule.learning_rate(step))
            cutoff = state.cutoff if step % settings.global_topk_frequency_compute else None

            with masked(layers, threshold, cutoff, state.mask_generator) as masks:
                losses = passes.backward(*next(batches), penalty_weight)
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            skipped = guard.skips(step, [grad_norm, *observed_norms(layers)], losses)
            observe_scores(layers, scaler, skipped)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.step, state.cutoff = step + 1, masks and masks.cutoff
            if settings.check_ranks:
                check_ranks(state, masks)

            means.add(losses, grad_norm, skipped)
            show_progress(bar, state.step, guard.loss, masks)
            logs = state.step % settings.logging_steps == 0
            if logs or state.step == total:
                values = {"threshold": threshold, "lambda": penalty_weight} if masks else {}
                log.update(state.step, means.take() | values, optimizer, masks)
            if logs and settings.evaluate_during_training:
                log.evaluation(predictor.evaluate(model, state.step), state.step)
                model.train()
            stopping = agreed_signal(signals, state.step, world)
            if stopping or (settings.save_steps and state.step % settings.save_steps == 0):
                save_checkpoint(state, time.perf_counter() - begun)
                log.score_histograms(layers, state.step)
            if stopping:
                raise interruption(stopping, state.step, total)
    figures = save_trained(state, time.perf_counter() - begun)
    log.score_histograms(layers, total)
    return figures
