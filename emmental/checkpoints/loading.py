"""Load a checkpoint, and refuse in one line what does not fit.

transformers starts from random values what a checkpoint lacks. A researcher who does not notice
that a head or scores were random loses a day. So everything that is missing is checked here.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from ..models.families import COMPACT, MASKED, class_of, is_masked, stock_type
from ..modules.masks import find_masks, masked_layers
from ..modules.methods import METHODS, score_suffixes
from ..system.errors import UserError, first_line
from .configs import head_of, read_config, refuse_or_warn, saved_head, without_foreign
from .labels import align_labels, checkpoint_labels, head_linear, label_settings

logger = logging.getLogger(__name__)

INITIAL_SCORES = ("mask_init", "mask_scale")
DECIDED = (*INITIAL_SCORES, "model_type", "return_dict")  # by the code, whatever config.json says
GRANULARITY = {"granularity": "weight", "block_rows": 32, "block_columns": 32}  # older ones: unsaid
# Unexpected weights that change no result: buffers, an unused pooler. (Heads are found elsewhere.)
HARMLESS = re.compile(r"(^|\.)((position|token_type)_ids$|pooler\.)")


class NoThreshold(UserError):
    """A masked checkpoint that does not record at which threshold it was trained.

    advice: how to give one, which depends on the script; see `advising`.
    """

    def __init__(self, source: str, advice: str = "give it"):
        super().__init__(f"{source} does not record the threshold that it was trained at: {advice}")
        self.source = source


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Have a NoThreshold that leaves the block say what helps, such as a flag of the script."""
    try:
        yield
    except NoThreshold as error:
        raise NoThreshold(error.source, advice) from error


def load_model(
    source: str,
    head: str,
    *,
    masked: bool,
    trained: bool = False,
    config_name: str | None = None,
    cache_dir: str | None = None,
    labels: int | Sequence[str] | None = None,
    **overrides,
) -> PreTrainedModel:
    """The model of a checkpoint with a stock or masked head, in float32 and evaluation mode.

    trained: the checkpoint must hold the head and, if masked, the scores and the threshold.
        Otherwise they may start fresh.
    labels: the outputs of the head, by default the configuration's: their number or their names. No
        names mean a regression. The outputs of a trained head are put in the order of the names. A
        head with other names is refused if `trained`, and otherwise starts fresh.
    overrides: settings of the masks in place of the configuration's. The scores of a masked
        checkpoint are kept, unless another method is to be trained.
    Raises UserError for a checkpoint that is missing or broken, does not fit what is asked for, or,
    if `trained`, holds what the model cannot compute.
    """
    recorded = values = read_config(source, cache_dir)
    model_type = values["model_type"]
    _check_kind(source, model_type, masked, trained)
    saved = saved_head(recorded)
    if trained and saved not in (None, head):  # some have weights of the same names
        raise UserError(f"{source} is for {saved}: give a model with a trained {head} head")
    model_type = MASKED + stock_type(model_type) if masked else model_type
    if config_name:
        values = read_config(config_name, cache_dir)
    values = without_foreign(config_name or source, values, trained)
    values = {name: value for name, value in values.items() if name not in DECIDED}
    masks, other_scores = _mask_settings(recorded, overrides, trained)
    values |= masks | label_settings(labels)
    model_class = class_of(model_type, head)
    if not model_class:
        raise UserError(f"{source}: there is no {head} head for {stock_type(model_type)}")
    try:
        model, info = model_class.from_pretrained(
            source,
            config=CONFIG_MAPPING[model_type].from_dict(values),
            cache_dir=cache_dir,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_weights` reports them
        )
    except Exception as error:  # of three libraries, for a broken file
        raise UserError(f"cannot load {source}: {first_line(error)}") from error
    fresh = _check_weights(source, model, info, trained)
    if masked:
        _check_masks(source, model, trained)
    if other_scores:
        for layer in masked_layers(model).values():
            layer.reset_scores()
    if isinstance(labels, Sequence) and labels and f"{head_linear(model)[0]}.weight" not in fresh:
        names = checkpoint_labels(source, cache_dir)
        align_labels(source, model, names, labels, trained)
    return model.eval()


def _check_kind(source: str, model_type: str, masked: bool, trained: bool) -> None:
    """Raises UserError for a masked checkpoint if plain is asked for, or the other way round."""
    family = stock_type(model_type)
    if model_type.startswith(COMPACT) and masked:
        raise UserError(f"{source} is a compact model, without masks: give the type {family}")
    if is_masked(model_type) and not masked:
        raise UserError(
            f"{source} is a masked checkpoint: give the type {MASKED}{family}, or bertarize it"
        )
    if trained and masked and not is_masked(model_type):
        raise UserError(
            f"{source} is a plain model without masks: fine-prune it first (to evaluate it as it "
            f"is, give the type {family})"
        )


def _mask_settings(recorded: dict, asked: dict, trained: bool) -> tuple[dict, bool]:
    """The settings of the masks, and whether the scores of a masked checkpoint start fresh.

    recorded: the configuration of the checkpoint. asked: what the caller wants; differences are
    logged. Raises UserError for another granularity.
    """
    if not is_masked(recorded["model_type"]):
        return asked, False
    for name, default in GRANULARITY.items():
        old = recorded.get(name, default)
        if asked.get(name, old) != old:
            raise UserError(
                f"{name} {asked[name]} contradicts {old} of the checkpoint: go on with its own, or "
                "convert it with bertarize.py and start from the result"
            )
    methods = {settings.get("pruning_method") for settings in (recorded, asked)} - {None}
    fresh_scores = not trained and len(methods) > 1
    for name, value in asked.items():
        old = recorded.get(name)
        if None in (value, old) or value == old:
            continue
        if name in INITIAL_SCORES:
            if not fresh_scores:
                logger.warning("the checkpoint's scores are kept; %s has no effect", name)
            continue
        fresh = "; the scores start fresh" if fresh_scores and name == "pruning_method" else ""
        message = "%s %s contradicts %s of the checkpoint, and is used%s"
        logger.warning(message, name, value, old, fresh)
    kept = [*GRANULARITY, *(() if fresh_scores else INITIAL_SCORES)]
    return asked | {name: recorded[name] for name in kept if name in recorded}, fresh_scores


def _check_weights(source: str, model: PreTrainedModel, info: dict, trained: bool) -> set[str]:
    """The weights that start fresh. Raises UserError if they may not: only scores and head may."""
    shapes = {key: (theirs, ours) for key, theirs, ours in info["mismatched_keys"]}
    fresh = {*info["missing_keys"], *shapes}
    base = f"{model.base_model_prefix}."
    for key in sorted(fresh):
        theirs, ours = shapes.get(key, (None, None))
        are_scores = key.endswith(score_suffixes())
        if key.startswith(base) and not HARMLESS.search(key):
            if theirs or not are_scores:
                problem = f"has another shape ({theirs})" if theirs else "is missing"
                raise UserError(f"{source} does not fit its configuration: {key} {problem}")
        if not trained:
            continue
        if are_scores:
            raise UserError(
                f"{source} holds no scores for pruning_method {model.config.pruning_method} "
                f"({key} is missing): give the method that it was trained with"
            )
        if theirs and not key.startswith(base):
            raise UserError(
                f"the head of {source} has {theirs[0]} outputs, and {ours[0]} are needed: is it "
                "of another task?"
            )
        raise UserError(
            f"{source} has no trained {type(model).__name__} head ({key} is missing): fine-tune "
            "it first"
        )
    _check_extra_weights(source, model, info["unexpected_keys"], trained)
    return fresh


def _check_extra_weights(
    source: str, model: PreTrainedModel, keys: Sequence[str], trained: bool
) -> None:
    """Refuse, or warn of, weights in parts of the model that have no place for them."""
    own = {name for part in (model, model.base_model) for name, _ in part.named_children()}
    extra = sorted(k for k in keys if k.split(".")[0] in own and not HARMLESS.search(k))
    if is_masked(model.config.model_type):  # a method without scores leaves them
        extra = [key for key in extra if not key.endswith(score_suffixes())]
    if extra:
        shown = ", ".join(extra[:2]) + (f" and {len(extra) - 2} more" if extra[2:] else "")
        name = type(model).__name__
        refuse_or_warn(f"{source} holds weights that a {name} lacks ({shown})", trained)


def _check_masks(source: str, model: PreTrainedModel, trained: bool) -> None:
    """Raises UserError for a masked model without layers or, if trained, without usable masks."""
    layers, config = masked_layers(model).values(), model.config
    if not layers:
        raise UserError(f"{source} has no layers: correct num_hidden_layers of its config.json")
    if not trained:
        return
    if config.threshold is None and METHODS[config.pruning_method].threshold_is:
        raise NoThreshold(source)
    if not all(x.source.isfinite().all() for x in layers if x.mask_scores is not None):
        raise UserError(f"{source} holds scores that are not finite: its training diverged")
    try:
        find_masks(model)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def load_masked(
    folder: str,
    pruning_method: str | None = None,
    threshold: float | None = None,
    global_topk: bool | None = None,
) -> PreTrainedModel:
    """A fine-pruned masked model with any head, in evaluation mode.

    None means the value of the checkpoint's config.json; a value that contradicts it is used, with
    a warning. Raises UserError for a checkpoint without masks, method or threshold.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: give that of a fine-pruned checkpoint")
    given = {"pruning_method": pruning_method, "threshold": threshold, "global_topk": global_topk}
    overrides = {name: value for name, value in given.items() if value is not None}
    head = head_of(folder, read_config(folder))
    return load_model(folder, head, masked=True, trained=True, **overrides)
