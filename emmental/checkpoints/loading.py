"""Load a checkpoint, and refuse in one line what does not fit.

transformers fills what a checkpoint lacks with random values. A researcher who does not notice that
a head or scores were random loses a day. So everything that is missing is checked here.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from .. import compact
from ..models.families import COMPACT, MASKED, class_of, is_masked, stock_type
from ..modules.masks import find_masks, masked_layers
from ..modules.methods import METHODS, score_suffixes
from ..system.errors import UserError, first_line
from .configs import computed_settings, head_of, read_config, refuse_or_warn, saved_head
from .export import bertarize
from .labels import align_labels, checkpoint_labels, head_linear, label_settings

logger = logging.getLogger(__name__)

INITIAL_SCORES = ("mask_init", "mask_scale")
DECIDED = (*INITIAL_SCORES, "model_type", "return_dict")  # by the code, whatever config.json says
GRANULARITY = {"granularity": "weight", "block_rows": 32, "block_columns": 32}  # older ones: unsaid
# Unexpected weights that change no result: buffers, an unused pooler. (Heads are found elsewhere.)
HARMLESS = re.compile(r"(^|\.)((position|token_type)_ids$|pooler\.)")


class NoThreshold(UserError):
    """A masked checkpoint that does not record at which threshold it was trained."""


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Add advice, such as a flag of the script, to a NoThreshold that leaves the block."""
    try:
        yield
    except NoThreshold as error:
        raise UserError(f"{error}: {advice}") from error


def load_model(
    checkpoint: str,
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
    head: one of `HEADS`; or "" for a base model, which may lack a pooler.
    labels: the outputs of the head, by default the configuration's: their number or their names. No
        names mean a regression. The outputs of a trained head are put in the order of the names. A
        head with other names is refused if `trained`, and otherwise starts fresh.
    overrides: settings of the masks in place of the configuration's. The scores of a masked
        checkpoint are kept, unless another method is to be trained.
    Raises UserError for a checkpoint that is missing or broken, does not fit what is asked for, or,
    if `trained`, holds what the model cannot compute.
    """
    recorded = read_config(checkpoint, cache_dir)
    family = stock_type(recorded["model_type"])
    _check_kind(checkpoint, recorded["model_type"], masked, trained)
    saved = saved_head(recorded)
    if trained and saved not in (None, head):  # some have weights of the same names
        raise UserError(f"{checkpoint} is for {saved}: give a model with a trained {head} head")
    model_type = MASKED + family if masked else recorded["model_type"]
    model_class = class_of(model_type, head)
    if not model_class:
        raise UserError(f"{checkpoint}: there is no {head} head for {family}")
    if model_type.startswith(COMPACT):
        _warn_of_other_code(Path(checkpoint))
    settings = read_config(config_name, cache_dir) if config_name else recorded
    settings = computed_settings(config_name or checkpoint, settings, trained)
    if labels is not None and settings.get("problem_type") == "multi_label_classification":
        problem = f"{checkpoint}/config.json has problem_type multi_label_classification"
        refuse_or_warn(f"{problem}, and a task of these scripts has one label", trained)
    settings = {name: value for name, value in settings.items() if name not in DECIDED}
    masks, fresh_scores = _mask_settings(recorded, overrides, trained)
    settings |= masks | label_settings(labels)
    try:
        model, info = model_class.from_pretrained(
            checkpoint,
            config=CONFIG_MAPPING[model_type].from_dict(settings),
            cache_dir=cache_dir,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_weights` reports them
        )
    except Exception as error:  # broken files raise errors of three libraries
        raise UserError(f"cannot load {checkpoint}: {first_line(error)}") from error
    fresh = _check_weights(checkpoint, model, info, trained)
    if not head and any(key.startswith("pooler.") for key in fresh):
        model.pooler = None
    if masked:
        _check_masks(checkpoint, model, trained)
    if fresh_scores:
        for layer in masked_layers(model).values():
            layer.reset_scores()
    if isinstance(labels, Sequence) and labels and f"{head_linear(model)[0]}.weight" not in fresh:
        names = checkpoint_labels(checkpoint, cache_dir)
        align_labels(checkpoint, model, names, labels, trained)
    return model.eval()


def _warn_of_other_code(folder: Path) -> None:
    """Warn if the code in the folder of a compact model differs from that of the package."""
    for module in (compact.configuration, compact.modeling):
        file, code = folder / Path(module.__file__).name, Path(module.__file__)
        if file.is_file() and file.read_bytes() != code.read_bytes():
            logger.warning("%s is of another version: the code of this package is used", file)


def load_masked(
    folder: str,
    pruning_method: str | None = None,
    threshold: float | None = None,
    global_topk: bool | None = None,
) -> PreTrainedModel:
    """A fine-pruned masked model with any head or none, in evaluation mode.

    None means the value of the checkpoint's config.json; a value that contradicts it is used, with
    a warning. Raises UserError for a checkpoint without masks, method or threshold.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: give one of a fine-pruned checkpoint")
    given = {"pruning_method": pruning_method, "threshold": threshold, "global_topk": global_topk}
    overrides = {name: value for name, value in given.items() if value is not None}
    recorded = read_config(folder)
    if not is_masked(recorded["model_type"]):
        kind = "compact" if recorded["model_type"].startswith(COMPACT) else "plain"
        raise UserError(
            f"{folder} is a {kind} model, without masks: give the fine-pruned checkpoint that it "
            "was made from"
        )
    head = head_of(folder, recorded, base=True)
    return load_model(folder, head, masked=True, trained=True, **overrides)


def load_plain(checkpoint: str, base: bool = False, **masks) -> PreTrainedModel:
    """A plain or compact model, or a masked one bertarized, with its head, in evaluation mode.

    base: whether a model without a head will do. masks: arguments of `load_masked`, for a masked
    checkpoint alone. Raises UserError.
    """
    recorded = read_config(checkpoint)
    head = head_of(checkpoint, recorded, base)
    if is_masked(recorded["model_type"]):
        return bertarize(load_masked(checkpoint, **masks))
    if given := [f"--{name}" for name, value in masks.items() if value is not None]:
        raise UserError(f"{checkpoint} has no masks: leave out {', '.join(given)}")
    return load_model(checkpoint, head, masked=False, trained=True)


def _check_kind(checkpoint: str, model_type: str, masked: bool, trained: bool) -> None:
    """Raises UserError for a masked checkpoint if plain is asked for, or the other way round."""
    family = stock_type(model_type)
    if model_type.startswith(COMPACT) and masked:
        raise UserError(f"{checkpoint} is a compact model, without masks: give the type {family}")
    if is_masked(model_type) and not masked:
        raise UserError(
            f"{checkpoint} is a masked checkpoint: give the type {MASKED}{family}, or bertarize it"
        )
    if trained and masked and not is_masked(model_type):
        raise UserError(
            f"{checkpoint} is a plain model without masks: fine-prune it first (to evaluate it as "
            f"it is, give the type {family})"
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
                f"{name} {asked[name]} contradicts {old} of the checkpoint: drop the flag, or "
                "convert it with bertarize.py and start from the result"
            )
    methods = {settings.get("pruning_method") for settings in (recorded, asked)} - {None}
    fresh_scores = not trained and len(methods) > 1
    for name, value in asked.items():
        old = recorded.get(name)
        if None in (value, old) or value == old:
            continue
        if name not in INITIAL_SCORES:
            fresh = "; the scores start fresh" if fresh_scores and name == "pruning_method" else ""
            message = "%s %s contradicts %s of the checkpoint, and is used%s"
            logger.warning(message, name, value, old, fresh)
        elif not fresh_scores:
            logger.warning("the checkpoint's scores are kept; %s has no effect", name)
    of_checkpoint = [*GRANULARITY] if fresh_scores else [*GRANULARITY, *INITIAL_SCORES]
    return asked | {n: recorded[n] for n in of_checkpoint if n in recorded}, fresh_scores


def _check_weights(checkpoint: str, model: PreTrainedModel, info: dict, trained: bool) -> set[str]:
    """The weights that start fresh. Raises UserError if they may not: only scores and head may."""
    shapes = {key: (saved, needed) for key, saved, needed in info["mismatched_keys"]}
    fresh = {*info["missing_keys"], *shapes}
    for key in sorted(fresh):
        saved, needed = shapes.get(key, (None, None))
        are_scores = key.endswith(score_suffixes())
        is_base = model.base_model is model
        in_base = is_base or key.startswith(f"{model.base_model_prefix}.")
        if in_base and not HARMLESS.search(key) and (saved or not are_scores):
            problem = f"has another shape ({saved})" if saved else "is missing"
            raise UserError(f"{checkpoint} does not fit its configuration: {key} {problem}")
        if not trained or (is_base and HARMLESS.search(key)):
            continue
        if are_scores:
            raise UserError(
                f"{checkpoint} holds no scores for pruning_method {model.config.pruning_method} "
                f"({key} is missing): give the method that it was trained with"
            )
        if saved and not in_base:
            raise UserError(
                f"the head of {checkpoint} has {saved[0]} outputs, and {needed[0]} are needed: "
                "give a model of this task"
            )
        raise UserError(
            f"{checkpoint} has no trained {type(model).__name__} head ({key} is missing): "
            "fine-tune it first"
        )
    _check_extra_weights(checkpoint, model, info["unexpected_keys"], trained)
    return fresh


def _check_extra_weights(
    checkpoint: str, model: PreTrainedModel, keys: Sequence[str], trained: bool
) -> None:
    """Refuse a checkpoint with weights that parts of the model do not have; or warn of them."""
    parts = {name for m in (model, model.base_model) for name, _ in m.named_children()}
    extra = sorted(k for k in keys if k.split(".")[0] in parts and not HARMLESS.search(k))
    if is_masked(model.config.model_type):  # a method without scores leaves them
        extra = [key for key in extra if not key.endswith(score_suffixes())]
    if extra:
        shown = ", ".join(extra[:2]) + (f" and {len(extra) - 2} more" if extra[2:] else "")
        name = type(model).__name__
        refuse_or_warn(f"{checkpoint} holds weights that a {name} lacks ({shown})", trained)


def _check_masks(checkpoint: str, model: PreTrainedModel, trained: bool) -> None:
    """Raises UserError for a masked model without layers or, if trained, without usable masks."""
    layers = masked_layers(model).values()
    if not layers:
        raise UserError(f"{checkpoint} has no layers: correct num_hidden_layers of its config.json")
    if not trained:
        return
    if model.config.threshold is None and METHODS[model.config.pruning_method].threshold_is:
        raise NoThreshold(
            f"{checkpoint}/config.json does not record the threshold that it was trained at"
        )
    if not all(x.source.isfinite().all() for x in layers if x.mask_scores is not None):
        raise UserError(f"{checkpoint} has scores that are not finite: give an earlier checkpoint")
    try:
        find_masks(model)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from error
