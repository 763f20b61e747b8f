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
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .errors import UserError, first_line
from .families import FAMILIES, HEADS, MASKED, family_of, is_masked
from .modules.masks import find_masks, masked_layers
from .modules.methods import METHODS

logger = logging.getLogger(__name__)


def read_config(source: str, cache_dir: str | None = None) -> dict:
    """The `config.json` of a checkpoint of a known family, plain or masked. Raises UserError."""
    try:
        config = dict(PreTrainedConfig.get_config_dict(source, cache_dir=cache_dir)[0])
        if not config:
            raise ValueError("there is no config.json")
    except Exception as error:  # of the hub, of JSON, of transformers
        raise UserError(
            f"no checkpoint found at {source!r}: give a folder with a config.json, or the name "
            f"of a model on the hub ({first_line(error)})"
        ) from error
    if "hidden_size" in config:
        config.setdefault("model_type", "bert")  # the first BERT checkpoints do not say it
    model_type = str(config.get("model_type"))
    if model_type.removeprefix(MASKED) not in FAMILIES:
        raise UserError(
            f"{source} is of type {model_type!r}; these scripts take {', '.join(FAMILIES)}"
        )
    return config


def head_of(source: str, config: dict) -> str:
    """Which of `HEADS` a checkpoint was saved with. Raises UserError if it does not say."""
    names = [str(name) for name in config.get("architectures") or ()]
    for head in HEADS:
        if any(name.endswith(f"For{head}") for name in names):
            return head
    raise UserError(
        f"{source} has no fine-tuned head: `architectures` in its config.json must end with "
        f"For{', For'.join(HEADS)}"
    )


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
    overrides: values in place of the configuration's. A masked checkpoint's are logged.
    Raises UserError for a checkpoint that is missing or broken, or does not fit what is asked for.
    """
    values = read_config(source, cache_dir)
    family, was_masked = values["model_type"].removeprefix(MASKED), is_masked(values["model_type"])
    if was_masked and not masked:
        raise UserError(
            f"{source} is a masked checkpoint: use model type {MASKED}{family}, or bertarize it"
        )
    if trained and masked and not was_masked:
        raise UserError(
            f"{source} is a plain model without masks: use model type {family}, or fine-prune it"
        )
    if config_name:
        values = read_config(config_name, cache_dir)
    for name, value in overrides.items():
        old = values.get(name)
        if was_masked and None not in (value, old) and value != old:
            logger.warning("%s %s contradicts %s of the checkpoint, and is used", name, value, old)
    del values["model_type"]  # the class of the configuration has its own
    values |= overrides | ({} if labels is None else _label_settings(labels))
    try:
        config = CONFIG_MAPPING[MASKED + family if masked else family].from_dict(values)
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
        raise UserError(f"cannot load the checkpoint {source}: {first_line(error)}") from error
    fresh = _check_weights(source, model, info, trained)
    if masked:
        _check_masks(source, model, trained)
    if isinstance(labels, Sequence) and labels:
        own = checkpoint_labels(source, cache_dir)
        _align_labels(source, model, fresh, own, labels, trained)
    return model.eval()


def _label_settings(labels: int | Sequence[str]) -> dict:
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
    base, family = f"{model.base_model_prefix}.", family_of(model.config)
    for key in sorted(fresh):
        theirs, ours = shapes.get(key, (None, None))
        are_scores = key.endswith(".mask_scores")
        if key.startswith((f"{base}{family.encoder}.", f"{base}{family.embeddings}.")):
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
            "it first with --do_train"
        )
    return fresh


def _check_masks(source: str, model: PreTrainedModel, trained: bool) -> None:
    """Raises UserError for a masked model without layers or, if trained, without usable masks."""
    layers, config = masked_layers(model).values(), model.config
    if not layers:
        raise UserError(f"{source} has no layers: correct num_hidden_layers of its config.json")
    if not trained:
        return
    if config.threshold is None and METHODS[config.pruning_method].threshold:
        raise UserError(
            f"{source} does not record the threshold that it was trained at: give --threshold "
            "(counts_parameters.py, bertarize.py) or --final_threshold (training scripts); "
            "bertarize a teacher first"
        )
    if not all(x.mask_scores.isfinite().all() for x in layers if x.mask_scores is not None):
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
    linears = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)]
    name, head = linears[-1]  # its rows are the outputs
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
    return load_model(folder, head, masked=True, trained=True, **overrides)


def load_tokenizer(
    source: str, do_lower_case: bool = False, cache_dir: str | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint; `do_lower_case` can only switch lower-casing on.

    Raises UserError when there is none.
    """
    options = {"do_lower_case": True} if do_lower_case else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, cache_dir=cache_dir, use_fast=True, trust_remote_code=False, **options
        )
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers made it up
            raise ValueError("there is no vocabulary")
    except Exception as error:  # a missing vocabulary has many errors
        raise UserError(
            f"no tokenizer found at {source!r}: give one with --tokenizer_name "
            f"({first_line(error)})"
        ) from error
    return tokenizer


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
    model = load_model(source, head, cache_dir=cache_dir, **options)
    tokenizer_name = tokenizer_name or source
    tokenizer = load_tokenizer(tokenizer_name, do_lower_case, cache_dir)
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
    if getattr(config, "type_vocab_size", 2) < 2:
        raise UserError(
            f"{source} has one token type, and these scripts use two to tell two texts apart"
        )
    if max_seq_length > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {max_seq_length} exceeds what the model takes "
            f"({config.max_position_embeddings})"
        )
    return model, tokenizer


def load_teacher(
    source: str,
    head: str,
    *,
    masked: bool,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: str | None = None,
) -> PreTrainedModel:
    """The teacher for distillation, frozen, in evaluation mode, its labels in the student's order.

    Raises UserError when its vocabulary, labels or sizes do not fit the student.
    """
    labels = [str(name) for name in student.config.id2label.values()]
    labels = None if _are_anonymous(labels) else labels
    teacher = load_model(
        source, head, masked=masked, trained=True, labels=labels, cache_dir=cache_dir
    )
    misfit = f"the teacher {source} does not fit the student: "
    for name in ("vocab_size", "num_labels", "max_position_embeddings", "type_vocab_size"):
        ours, theirs = (getattr(m.config, name, 0) for m in (student, teacher))
        if theirs < ours or (theirs > ours and name in ("vocab_size", "num_labels")):
            raise UserError(f"{misfit}{name} {theirs} against {ours}")
    try:
        vocabulary = load_tokenizer(source, cache_dir=cache_dir).get_vocab()
    except UserError:
        message = "the teacher %s has no tokenizer: its vocabulary cannot be compared"
        logger.warning(message, source)
    else:
        if vocabulary != tokenizer.get_vocab():
            raise UserError(f"{misfit}their vocabularies differ")
    return teacher.requires_grad_(False)
