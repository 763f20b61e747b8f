"""Load a checkpoint, and refuse in one line what does not fit.

transformers initialises what a checkpoint lacks and ignores what it has too much; a score or a head
that silently starts from random values costs a researcher a day. Here every gap is looked at.
"""

import logging
import math
import os
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
from .families import FAMILIES, HEADS, MASKED, family_of, head_name, is_masked
from .modules.masks import find_masks, masked_layers
from .modules.methods import METHODS

logger = logging.getLogger(__name__)


def read_config(name_or_path: str, cache_dir: str | None = None) -> dict:
    """The `config.json` of a checkpoint of a known family, plain or masked. Raises UserError for anything else."""
    if not os.path.isdir(name_or_path) and (
        name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    ):
        raise UserError(f"no checkpoint found at {name_or_path}: there is no such folder")
    if os.path.isdir(name_or_path):
        require_folder(name_or_path, "the checkpoint")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path, cache_dir=cache_dir)
        if type(config) is not dict:
            raise ValueError("it is no object")
    except (
        Exception
    ) as error:  # the hub has errors of its own, and JSON that is nested too deep another
        raise UserError(
            f"no checkpoint found at {name_or_path!r}: it must be a folder with a config.json, "
            f"or a model name that the hub can serve ({first_line(error)})"
        ) from error
    if "hidden_size" in config:  # before there was another family than BERT, this was not said
        config.setdefault("model_type", "bert")
    model_type = str(config.get("model_type"))
    if model_type.removeprefix(MASKED) not in FAMILIES:
        raise UserError(
            f"{name_or_path} is a checkpoint of type {model_type!r}; these scripts take {', '.join(FAMILIES)}"
        )
    return config


def head_of(name_or_path: str, config: dict) -> str:
    """Which of the four heads a checkpoint was saved with. Raises UserError if it does not say."""
    architectures = config.get("architectures")
    for architecture in architectures if isinstance(architectures, list) else ():
        if head := head_name(str(architecture)):
            return head
    raise UserError(
        f"{name_or_path}/config.json names no fine-tuned head: its `architectures` is "
        f"{str(architectures)[:100]}, expected one that ends with For{', For'.join(HEADS)}"
    )


def load_model(
    name_or_path: str,
    head: str,
    *,
    masked: bool,
    trained: bool = False,
    config_name: str | None = None,
    cache_dir: str | None = None,
    labels: int | Sequence[str] | None = None,
    **overrides,
) -> PreTrainedModel:
    """The model of a checkpoint with the stock or the masked head of its family, in float32, in evaluation mode.

    trained: the checkpoint must hold the head and, if it is masked, its scores and threshold; else they may
        be fresh. labels: outputs of the head, when not those of the configuration: how many, or their names; no
        name makes a regression, with one output. A trained classifier is brought into the order of the names;
        one with other names is initialised anew, or refused if `trained`. overrides: values that replace those
        of the configuration; a masked checkpoint that contradicts them is warned of.
    Raises UserError for what is missing, broken, of another architecture, or masked where a plain model
    is asked for and the other way round.
    """
    config_source = config_name or name_or_path
    values = read_config(config_source, cache_dir)
    checkpoint = read_config(name_or_path, cache_dir)
    family = checkpoint["model_type"].removeprefix(MASKED)
    masked_before = is_masked(checkpoint["model_type"])
    if masked_before and not masked:
        raise UserError(
            f"{name_or_path} is a masked checkpoint: use model type {MASKED}{family}, or convert it with bertarize.py first"
        )
    if trained and masked and not masked_before:
        raise UserError(f"{name_or_path} is a plain model without masks: use model type {family}")
    for name, value in overrides.items():
        if masked_before and value is not None and values.get(name, value) not in (value, None):
            logger.warning(
                "%s %s contradicts %s of the checkpoint; %s is used",
                name,
                value,
                values[name],
                value,
            )
    stale = ["model_type", "architectures", "transformers_version", "dtype", "torch_dtype"]
    if labels is not None:
        stale += ["id2label", "label2id", "num_labels", "problem_type"]
        overrides |= _label_settings(labels)
    values = {name: value for name, value in values.items() if name not in stale} | overrides
    try:
        config = CONFIG_MAPPING[MASKED + family if masked else family].from_dict(values)
        model, info = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
            name_or_path,
            config=config,
            cache_dir=cache_dir,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the name of the matrix
        )
    except Exception as error:  # broken files raise the errors of three libraries
        raise UserError(
            f"cannot load the checkpoint {name_or_path}: {first_line(error)}"
        ) from error
    if masked and not masked_layers(model):
        raise UserError(
            f"{name_or_path}/config.json gives the encoder no layers: correct num_hidden_layers"
        )
    fresh_head = _check_loaded(name_or_path, model, info, trained and masked, trained)
    if labels and not isinstance(labels, int) and not fresh_head:
        _align_head(
            name_or_path,
            _output_layer(model)[1],
            _label_names(name_or_path, checkpoint),
            labels,
            trained,
        )
    return model.eval()


def _label_settings(labels: int | Sequence[str]) -> dict:
    if isinstance(labels, int):
        return {"num_labels": labels}
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: column for column, name in enumerate(labels)},
    }


def checkpoint_labels(name_or_path: str, cache_dir: str | None = None) -> tuple[str, ...]:
    """Names of the outputs of a checkpoint's head; LABEL_0, LABEL_1, ... where it has none. Raises UserError."""
    return _label_names(name_or_path, read_config(name_or_path, cache_dir))


def _label_names(name_or_path: str, config: dict) -> tuple[str, ...]:
    try:
        names = config.get("id2label") or {
            column: f"LABEL_{column}" for column in range(config.get("num_labels", 2))
        }
        return tuple(
            str(name) for _, name in sorted((int(column), name) for column, name in names.items())
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{name_or_path}/config.json: its id2label must name the outputs 0, 1, ...; correct it"
        ) from error


def are_anonymous(labels: Sequence[str]) -> bool:
    """Whether these label names say nothing: LABEL_0, LABEL_1, ..."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in labels)


def label_order(own: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Where each wanted label stands among `own`, by name, in any case if need be; None when the names differ."""
    for fold in (str, str.casefold):
        places = {fold(name): place for place, name in enumerate(own)}
        if len(places) == len(own) and sorted(places) == sorted(map(fold, wanted)):
            return [places[fold(name)] for name in wanted]
    return None


def _output_layer(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The last Linear of a head, whose rows are its outputs, and its name."""
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ][-1]


@torch.no_grad()
def _align_head(
    name_or_path: str, head: nn.Linear, own: Sequence[str], wanted: Sequence[str], trained: bool
) -> None:
    """Bring the outputs of a trained classifier into the order of the `wanted` labels."""
    order = label_order(own, wanted)
    if order:
        head.weight.copy_(head.weight[order].clone())
        head.bias.copy_(head.bias[order].clone())
    elif are_anonymous(own):
        logger.warning(
            "the labels of %s have no names; they are read as %s", name_or_path, ", ".join(wanted)
        )
    elif trained:
        raise UserError(
            f"{name_or_path} has the labels {', '.join(own)}, but those of the task are {', '.join(wanted)}: "
            "give a model of this task"
        )
    else:
        logger.warning(
            "the head of %s has other labels (%s): it is trained anew", name_or_path, ", ".join(own)
        )
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)


def load_masked(
    folder: str,
    pruning_method: str | None = None,
    threshold: float | None = None,
    global_topk: bool | None = None,
) -> PreTrainedModel:
    """A fine-pruned masked model of any head, whose masks can be found, in evaluation mode.

    What is None is taken from the checkpoint's config.json; a value that contradicts it is used, with a
    warning. Raises UserError when the checkpoint is not masked, or method or threshold are not known.
    """
    config = read_config(folder)
    if not is_masked(config["model_type"]):
        raise UserError(
            f"{folder} is a plain model without masks: give the fine-pruned masked checkpoint"
        )
    asked = {"pruning_method": pruning_method, "threshold": threshold, "global_topk": global_topk}
    overrides = {name: value for name, value in asked.items() if value is not None}
    model = load_model(folder, head_of(folder, config), masked=True, trained=True, **overrides)
    try:
        find_masks(model)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return model


def _check_loaded(
    name_or_path: str, model: PreTrainedModel, info: dict, need_masks: bool, need_head: bool
) -> bool:
    """Raises UserError for what must be there and is not; returns whether the head's outputs start afresh."""
    mismatched = {entry[0]: entry[1:] for entry in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) | set(mismatched)
    scores = {key for key in missing if key.endswith(".mask_scores")}
    base, family = model.base_model_prefix, family_of(model.config)
    body = {
        key
        for key in missing - scores
        if key.startswith((f"{base}.{family.encoder}.", f"{base}.{family.embeddings}."))
    }
    head = missing - scores - body  # a pooler is part of it
    for key in sorted(body | (scores & set(mismatched))):
        why = f"has another shape there ({mismatched[key]})" if key in mismatched else "lacks it"
        raise UserError(
            f"{name_or_path} does not fit its configuration: the model needs {key}, the checkpoint {why}"
        )
    if need_masks and scores:
        raise UserError(
            f"{name_or_path} holds no scores for pruning_method {model.config.pruning_method} "
            f"({min(scores)} is missing): give the method that it was trained with"
        )
    if (
        need_masks
        and model.config.threshold is None
        and METHODS[model.config.pruning_method].threshold
    ):
        raise UserError(
            f"{name_or_path} does not record the threshold that it was trained at: give it, with --threshold of "
            "counts_parameters.py and bertarize.py, --final_threshold of the training scripts (a teacher: bertarize it)"
        )
    if need_masks:
        _check_threshold(name_or_path, model.config)
    learned = [
        layer.mask_scores
        for layer in masked_layers(model).values()
        if layer.mask_scores is not None
    ]
    if need_masks and not all(scores.isfinite().all() for scores in learned):
        raise UserError(
            f"{name_or_path} holds scores that are not finite: its training had diverged"
        )
    resized = [key for key in sorted(head & set(mismatched)) if not key.startswith(f"{base}.")]
    if need_head and resized:
        theirs, ours = mismatched[resized[0]]
        raise UserError(
            f"the head of {name_or_path} has {theirs[0]} outputs, and {ours[0]} are needed: is it of another task?"
        )
    if need_head and head:
        raise UserError(
            f"{name_or_path} has no trained {type(model).__name__} head ({min(head)} is missing): "
            "fine-tune it first with --do_train"
        )
    output = _output_layer(model)[0]
    return any(key.startswith(f"{output}.") for key in head)


def _check_threshold(name_or_path: str, config: PreTrainedConfig) -> None:
    threshold, method = config.threshold, METHODS[config.pruning_method]
    if threshold is None or not method.threshold:
        return
    fraction = config.global_topk or method.is_fraction
    if (
        type(threshold) not in (int, float)
        or not -math.inf < threshold < math.inf
        or (fraction and not 0 <= threshold <= 1)
    ):
        wanted = "is a fraction and must lie in [0, 1]" if fraction else "must be a finite number"
        raise UserError(f"{name_or_path}: its threshold {wanted}, got {str(threshold)[:40]}")


def load_tokenizer(
    name_or_path: str, do_lower_case: bool = False, cache_dir: str | None = None
) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint; `do_lower_case` only ever switches lower-casing on.

    Raises UserError when there is none, or none that is fast.
    """
    options = {"do_lower_case": True} if do_lower_case else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, cache_dir=cache_dir, use_fast=True, trust_remote_code=False, **options
        )
    except Exception as error:  # a missing vocabulary surfaces as many things
        raise UserError(
            f"no tokenizer found at {name_or_path!r}: give one with --tokenizer_name ({first_line(error)})"
        ) from error
    if len(tokenizer) <= len(
        tokenizer.all_special_tokens
    ):  # transformers invents one where there is none
        raise UserError(
            f"no tokenizer found at {name_or_path!r}: give one with --tokenizer_name (there is no vocabulary)"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer at {name_or_path} is not a fast one: these scripts need its offsets"
        )
    return tokenizer


def load_student(
    name_or_path: str,
    head: str,
    *,
    tokenizer_name: str | None,
    do_lower_case: bool,
    max_seq_length: int,
    cache_dir: str | None = None,
    **options,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model to train or to evaluate (see `load_model` for `options`) and its tokenizer.

    Raises UserError, also when the two, or model and `max_seq_length` (tokens), do not fit together.
    """
    model = load_model(name_or_path, head, cache_dir=cache_dir, **options)
    tokenizer = load_tokenizer(tokenizer_name or name_or_path, do_lower_case, cache_dir)
    check_tokenizer(tokenizer, model, tokenizer_name or name_or_path)
    if getattr(model.config, "type_vocab_size", 2) < 2:
        raise UserError(
            f"{name_or_path} has one token type, and these scripts tell two texts apart by theirs"
        )
    if max_seq_length > model.config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {max_seq_length} exceeds what the model takes ({model.config.max_position_embeddings})"
        )
    return model, tokenizer


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, name_or_path: str
) -> None:
    """Raises UserError when the tokenizer does not fit the model: ids too large, or no [CLS] and [SEP]."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer at {name_or_path} does not fit the model: it has ids up to {highest}, "
            f"the model's vocabulary has {model.config.vocab_size} entries"
        )
    lacking = [
        name
        for name in ("cls_token", "sep_token", "pad_token")
        if getattr(tokenizer, f"{name}_id") is None
    ]
    if lacking:
        raise UserError(
            f"the tokenizer at {name_or_path} is not that of an encoder such as BERT: it has no {', '.join(lacking)}"
        )


def load_teacher(
    name_or_path: str,
    head: str,
    *,
    masked: bool,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: str | None = None,
) -> PreTrainedModel:
    """The distillation teacher, frozen and in evaluation mode.

    Raises UserError when its vocabulary or its labels are not the student's.
    """
    teacher = load_model(name_or_path, head, masked=masked, trained=True, cache_dir=cache_dir)
    for what in ("vocab_size", "num_labels"):
        ours, theirs = getattr(student.config, what), getattr(teacher.config, what)
        if ours != theirs:
            raise UserError(
                f"the teacher {name_or_path} does not fit the student: {what} {theirs} against {ours}"
            )
    for what in ("max_position_embeddings", "type_vocab_size"):
        ours, theirs = getattr(student.config, what, 0), getattr(teacher.config, what, 0)
        if ours > theirs:
            raise UserError(
                f"the teacher {name_or_path} does not fit the student: {what} {theirs} against {ours}"
            )
    ours, theirs = (tuple(map(str, m.config.id2label.values())) for m in (student, teacher))
    if are_anonymous(theirs) and not are_anonymous(ours):
        logger.warning(
            "the labels of the teacher %s have no names; they are read as %s",
            name_or_path,
            ", ".join(ours),
        )
    elif not are_anonymous(ours) and label_order(theirs, ours) != list(range(len(ours))):
        raise UserError(
            f"the teacher {name_or_path} does not fit the student: its labels are {', '.join(theirs)}, in this order, "
            f"against {', '.join(ours)}"
        )
    try:
        vocabulary = load_tokenizer(name_or_path, cache_dir=cache_dir).get_vocab()
    except UserError:
        logger.warning(
            "the teacher %s has no tokenizer of its own; its vocabulary cannot be compared",
            name_or_path,
        )
    else:
        if vocabulary != tokenizer.get_vocab():
            raise UserError(
                f"the teacher {name_or_path} does not fit the student: their vocabularies differ"
            )
    return teacher.requires_grad_(False)


def require_folder(path: str, what: str) -> Path:
    """`path` if it is a checkpoint folder. Raises UserError otherwise."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{what} {path} is no folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} {path} holds no config.json: is it a checkpoint folder?")
    return folder
