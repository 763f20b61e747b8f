"""The models of a run: the student, with its tokenizer, and the teacher that fits it."""

import logging

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..checkpoints.labels import are_anonymous
from ..checkpoints.loading import advising, load_model
from ..checkpoints.tokenizer import declared_casing, has_tokenizer, load_tokenizer, lower_cases
from ..models.inputs import longest_input
from ..system.errors import UserError

logger = logging.getLogger(__name__)


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
    with advising("give --final_threshold"):
        model = load_model(source, head, cache_dir=cache_dir, **options)
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
    _check_tokenizer(tokenizer_name, tokenizer, model)
    longest = longest_input(model)
    if longest and max_seq_length > longest:
        raise UserError(
            f"--max_seq_length {max_seq_length} is more than the model takes: give {longest} or "
            "less"
        )
    return model, tokenizer


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    """Raises UserError for ids that the model lacks, or a tokenizer that is not an encoder's."""
    highest = max(tokenizer.get_vocab().values())
    vocab_size = model.config.vocab_size
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer at {name} does not fit the model: it has ids up to {highest}, the "
            f"model's vocabulary has {vocab_size} entries"
        )
    special = ("cls_token", "sep_token", "pad_token")
    lacking = [token for token in special if getattr(tokenizer, f"{token}_id") is None]
    if lacking:
        raise UserError(
            f"the tokenizer at {name} is not for an encoder such as BERT: it has no "
            f"{', '.join(lacking)}"
        )


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
    options = {"masked": masked, "trained": True, "cache_dir": cache_dir}
    if not are_anonymous(labels):
        options["labels"] = labels
    with advising("bertarize it first"):
        teacher = load_model(source, head, **options)
    misfit = f"the teacher {source} does not fit the student: "
    has_vocabulary = has_tokenizer(source, cache_dir)
    if has_vocabulary:
        casing = lower_cases(tokenizer.backend_tokenizer)
        teachers = load_tokenizer(source, casing, cache_dir)
        if teachers.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{misfit}their vocabularies differ")
        if declared_casing(source, cache_dir) not in (None, casing):
            message = "the teacher %s is %s, unlike the tokenizer in use"
            logger.warning(message, source, "cased" if casing else "uncased")
        words = max(teachers.get_vocab().values()) + 1  # a model may have more, as padding
    else:
        message = "the teacher %s has no tokenizer: its vocabulary cannot be compared"
        logger.warning(message, source)
        words = student.config.vocab_size
    size = teacher.config.vocab_size
    if size < words or (size > words and not has_vocabulary):
        raise UserError(f"{misfit}vocab_size {size} against {words}")
    outputs, needed = teacher.config.num_labels, student.config.num_labels
    if outputs != needed:
        raise UserError(f"{misfit}num_labels {outputs} against {needed}")
    length = max_seq_length or longest_input(student)
    longest = longest_input(teacher)
    if longest and length and longest < length:
        raise UserError(f"{misfit}it takes {longest} tokens, and {length} are needed")
    return teacher.requires_grad_(False)
