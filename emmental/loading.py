"""Load a checkpoint, and refuse in one line what does not fit.

transformers starts from random values what a checkpoint lacks. A researcher who does not notice
that a head or scores were random loses a day. So everything that is missing is checked here.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from .configs import head_of, read_config, refuse_or_warn, saved_head, without_foreign
from .errors import UserError, first_line
from .families import COMPACT, MASKED, is_masked, stock_type
from .inputs import longest_input
from .modules.masks import find_masks, masked_layers
from .modules.methods import METHODS, score_suffixes
from .tokenizer import (
    declared_casing,
    has_tokenizer,
    load_tokenizer,
    lower_cases,
    make_the_same_ids,
)

logger = logging.getLogger(__name__)

INITIAL_SCORES = ("mask_init", "mask_scale")
DECIDED = (*INITIAL_SCORES, "model_type", "return_dict")  # by the code, whatever config.json says
GRANULARITY = {"granularity": "weight", "block_rows": 32, "block_columns": 32}  # older ones: unsaid
# Unexpected weights that change no result: buffers, an unused pooler. (Heads are found elsewhere.)
HARMLESS = re.compile(r"(^|\.)((position|token_type)_ids$|pooler\.)")


def load_model(
    source: str,
    head: str,
    *,
    masked: bool,
    trained: bool = False,
    config_name: str | None = None,
    cache_dir: str | None = None,
    labels: int | Sequence[str] | None = None,
    advice: str = "bertarize it first",
    **overrides,
) -> PreTrainedModel:
    """The model of a checkpoint with a stock or masked head, in float32 and evaluation mode.

    trained: the checkpoint must hold the head and, if masked, the scores and the threshold.
        Otherwise they may start fresh.
    labels: the outputs of the head, by default the configuration's: their number or their names. No
        names mean a regression. The outputs of a trained head are put in the order of the names. A
        head with other names is refused if `trained`, and otherwise starts fresh.
    advice: how the caller's user can help where a masked checkpoint records no threshold.
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
    values |= masks | _label_settings(labels)
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
        model, info = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
            source,
            config=config,
            cache_dir=cache_dir,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_weights` reports them
        )
    except Exception as error:  # of three libraries, for a broken file
        raise UserError(f"cannot load {source}: {first_line(error)}") from error
    fresh = _check_weights(source, model, info, trained)
    if masked:
        _check_masks(source, model, trained, advice)
        for layer in masked_layers(model).values() if other_scores else ():
            layer.reset_scores()
    if isinstance(labels, Sequence) and labels:
        own = checkpoint_labels(source, cache_dir)
        _align_labels(source, model, fresh, own, labels, trained)
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
                logger.warning("the checkpoint's scores are kept; --%s has no effect", name)
            continue
        fresh = "; the scores start fresh" if fresh_scores and name == "pruning_method" else ""
        message = "%s %s contradicts %s of the checkpoint, and is used%s"
        logger.warning(message, name, value, old, fresh)
    kept = [*GRANULARITY, *(() if fresh_scores else INITIAL_SCORES)]
    return asked | {name: recorded[name] for name in kept if name in recorded}, fresh_scores


def _label_settings(labels: int | Sequence[str] | None) -> dict:
    if labels is None:
        return {}
    names = [f"LABEL_{n}" for n in range(labels)] if isinstance(labels, int) else list(labels)
    problem_type = None if names else "regression"
    columns = dict(enumerate(names or ["LABEL_0"]))
    return {
        "num_labels": len(columns),
        "id2label": columns,
        "label2id": {name: column for column, name in columns.items()},
        "problem_type": problem_type,
    }


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


def _check_masks(source: str, model: PreTrainedModel, trained: bool, advice: str) -> None:
    """Raises UserError for a masked model without layers or, if trained, without usable masks."""
    layers, config = masked_layers(model).values(), model.config
    if not layers:
        raise UserError(f"{source} has no layers: correct num_hidden_layers of its config.json")
    if not trained:
        return
    if config.threshold is None and METHODS[config.pruning_method].threshold_is:
        raise UserError(f"{source} does not record the threshold that it was trained at: {advice}")
    if not all(x.source.isfinite().all() for x in layers if x.mask_scores is not None):
        raise UserError(f"{source} holds scores that are not finite: its training diverged")
    try:
        find_masks(model)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def checkpoint_labels(source: str, cache_dir: str | None = None) -> tuple[str, ...]:
    """Names of the outputs of a checkpoint's head, by default LABEL_0, ... Raises UserError."""
    config = read_config(source, cache_dir)
    known = {name: config[name] for name in ("id2label", "num_labels") if config.get(name)}
    try:
        names = PreTrainedConfig(**known).id2label
        return tuple(str(names[column]) for column in sorted(names))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}/config.json: its id2label must name the outputs 0, 1, ..."
        ) from error


def _are_anonymous(labels: Sequence[str]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+", name) for name in labels)


@torch.no_grad()
def _align_labels(
    source: str,
    model: PreTrainedModel,
    fresh: set[str],
    own: Sequence[str],
    wanted: Sequence[str],
    trained: bool,
) -> None:
    """Put the outputs of a trained head in the order of the `wanted` labels."""
    base = f"{model.base_model_prefix}."  # whose modules come last in some classes
    linears = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)]
    name, head = [item for item in linears if not item[0].startswith(base)][-1]
    if f"{name}.weight" in fresh:
        return
    places = {label.casefold(): place for place, label in enumerate(own)}
    order = [places.get(label.casefold()) for label in wanted]
    names = ", ".join(own)
    if set(order) == set(range(len(own))):
        head.weight.copy_(head.weight[order].clone())
        head.bias.copy_(head.bias[order].clone())
    elif _are_anonymous(own):
        message = "the labels of %s have no names; they are read as %s"
        logger.warning(message, source, ", ".join(wanted))
    elif trained:
        raise UserError(
            f"{source} has the labels {names}, but those of the task are {', '.join(wanted)}: "
            "give a model of this task"
        )
    else:
        logger.warning("the head of %s has other labels (%s): it starts fresh", source, names)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)


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
    advice = "give --threshold"
    return load_model(folder, head, masked=True, trained=True, advice=advice, **overrides)


def load_student(
    source: str,
    head: str,
    *,
    tokenizer_name: str | None,
    do_lower_case: bool,
    max_seq_length: int,
    cache_dir: str | None = None,
    **options,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model to train or evaluate (for `options` see `load_model`), and its tokenizer.

    Raises UserError when the model, the tokenizer and `max_seq_length` (tokens) do not fit.
    """
    advice = "give --final_threshold"
    model = load_model(source, head, cache_dir=cache_dir, advice=advice, **options)
    tokenizer_name = tokenizer_name or source
    try:
        tokenizer = load_tokenizer(tokenizer_name, do_lower_case, cache_dir)
    except UserError as error:
        raise UserError(f"{error}: give one with --tokenizer_name") from error
    casing = "uncased" if lower_cases(tokenizer.backend_tokenizer) else "cased"
    if do_lower_case and casing == "cased":
        logger.warning("%s has cased tokens: --do_lower_case has no effect", tokenizer_name)
    elif do_lower_case and declared_casing(tokenizer_name, cache_dir) is False:
        logger.warning("%s declares a cased tokenizer; --do_lower_case wins", tokenizer_name)
    logger.info("tokenizer: %s", casing)
    config, highest = model.config, max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise UserError(
            f"the tokenizer at {tokenizer_name} does not fit the model: it has ids up to "
            f"{highest}, the model's vocabulary has {config.vocab_size} entries"
        )
    special = ("cls_token", "sep_token", "pad_token")
    lacking = [name for name in special if getattr(tokenizer, f"{name}_id") is None]
    if lacking:
        raise UserError(
            f"the tokenizer at {tokenizer_name} is not for an encoder such as BERT: it has no "
            f"{', '.join(lacking)}"
        )
    longest = longest_input(model)
    if longest and max_seq_length > longest:
        raise UserError(
            f"--max_seq_length {max_seq_length} is more than the model takes: give {longest} or "
            "less"
        )
    return model, tokenizer


def load_teacher(
    source: str,
    head: str,
    *,
    masked: bool,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int | None = None,
    cache_dir: str | None = None,
) -> PreTrainedModel:
    """The teacher for distillation, frozen, in evaluation mode, its labels in the student's order.

    max_seq_length: tokens of the longest input, by default as many as the student takes. Raises
    UserError when the teacher's vocabulary, labels or sizes do not fit.
    """
    labels = [str(name) for name in student.config.id2label.values()]
    labels = None if _are_anonymous(labels) else labels
    teacher = load_model(
        source, head, masked=masked, trained=True, labels=labels, cache_dir=cache_dir
    )
    config, own, exact = teacher.config, student.config, {"num_labels"}
    misfit = f"the teacher {source} does not fit the student: "
    if has_tokenizer(source, cache_dir):
        casing = lower_cases(tokenizer.backend_tokenizer)
        theirs = load_tokenizer(source, casing, cache_dir)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{misfit}their vocabularies differ")
        if not make_the_same_ids(theirs, tokenizer):
            raise UserError(f"{misfit}their tokenizers make other ids of the same text")
        if declared_casing(source, cache_dir) not in (None, casing):
            message = "the teacher %s is %s, unlike the tokenizer in use"
            logger.warning(message, source, "cased" if casing else "uncased")
        words = max(theirs.get_vocab().values()) + 1  # a model may have more, as padding
    else:
        message = "the teacher %s has no tokenizer: its vocabulary cannot be compared"
        logger.warning(message, source)
        words = own.vocab_size
        exact.add("vocab_size")
    for name, need in (("vocab_size", words), ("num_labels", own.num_labels)):
        has = getattr(config, name)
        if has < need or (has > need and name in exact):
            raise UserError(f"{misfit}{name} {has} against {need}")
    length, longest = max_seq_length or longest_input(student), longest_input(teacher)
    if longest and length and longest < length:
        raise UserError(f"{misfit}it takes {longest} tokens, and {length} are needed")
    return teacher.requires_grad_(False)
