"""The models of a run: the student, with its tokenizer, and a teacher that fits the student."""

import logging

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..checkpoints.labels import are_anonymous
from ..checkpoints.loading import advising, load_model
from ..checkpoints.tokenizer import (
    declared_casing,
    fit_to_model,
    has_tokenizer,
    load_tokenizer,
    lower_cases,
    put_spaces_before_words,
)
from ..models.inputs import longest_input
from ..system.errors import UserError

logger = logging.getLogger(__name__)


def load_student(
    checkpoint: str,
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
        model = load_model(checkpoint, head, cache_dir=cache_dir, **options)
    tokenizer_name = tokenizer_name or checkpoint
    try:
        tokenizer = load_tokenizer(tokenizer_name, do_lower_case, cache_dir)
    except UserError as error:
        raise UserError(f"{error}: give one with --tokenizer_name") from error
    uncased = lower_cases(tokenizer.backend_tokenizer)
    if do_lower_case and not uncased:
        logger.warning("%s has cased tokens: --do_lower_case has no effect", tokenizer_name)
    elif do_lower_case and declared_casing(tokenizer_name, cache_dir) is False:
        logger.warning("%s declares a cased tokenizer; --do_lower_case wins", tokenizer_name)
    logger.info("tokenizer: %s", "uncased" if uncased else "cased")
    highest, vocab_size = max(tokenizer.get_vocab().values()), model.config.vocab_size
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer at {tokenizer_name} does not fit the model: it has ids up to {highest}"
            f", and the model has {vocab_size} embeddings; give the tokenizer of this model"
        )
    longest = longest_input(model)
    if longest and max_seq_length > longest:
        raise UserError(
            f"--max_seq_length {max_seq_length} is more than the model takes: give {longest} or "
            "less"
        )
    fit_to_model(tokenizer, model)
    if head == "TokenClassification":
        put_spaces_before_words(tokenizer)
    return model, tokenizer


def load_teacher(
    checkpoint: str,
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
    options = {"masked": masked, "trained": True, "cache_dir": cache_dir}
    labels = [str(name) for name in student.config.id2label.values()]
    if not are_anonymous(labels):
        options["labels"] = labels
    with advising("bertarize it first"):
        teacher = load_model(checkpoint, head, **options)
    misfit = f"the teacher {checkpoint} does not fit the student: "
    size = teacher.config.vocab_size
    if has_tokenizer(checkpoint, cache_dir):
        uncased = lower_cases(tokenizer.backend_tokenizer)
        vocabulary = load_tokenizer(checkpoint, uncased, cache_dir).get_vocab()
        if vocabulary != tokenizer.get_vocab():
            raise UserError(f"{misfit}their vocabularies differ")
        if declared_casing(checkpoint, cache_dir) not in (None, uncased):
            casing = "cased" if uncased else "uncased"
            logger.warning(f"the teacher {checkpoint} is {casing}, unlike the tokenizer in use")
        words = max(vocabulary.values()) + 1
        fits = size >= words  # a model may have more embeddings, as padding
    else:
        logger.warning(
            f"the teacher {checkpoint} has no tokenizer: its vocabulary cannot be compared"
        )
        words = student.config.vocab_size
        fits = size == words
    if not fits:
        raise UserError(f"{misfit}its vocab_size is {size}, and {words} is needed")
    if teacher.config.num_labels != student.config.num_labels:
        raise UserError(
            f"{misfit}it has {teacher.config.num_labels} labels, not {student.config.num_labels}"
        )
    needed = max_seq_length or longest_input(student)
    longest = longest_input(teacher)
    if longest and needed and longest < needed:
        raise UserError(f"{misfit}it takes {longest} tokens, and {needed} are needed")
    return teacher.requires_grad_(False)
