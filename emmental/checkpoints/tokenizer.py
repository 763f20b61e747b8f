"""The tokenizer of a checkpoint, cased or uncased as its files say.

Where the files do not say, transformers lower-cases for every BERT. Here a tokenizer.json, or
`do_lower_case` in tokenizer_config.json, decides. A vocab.txt alone is cased, unless the caller
asks for lower case. Only WordPiece tokenizers can be asked: others stay as they were made.
"""

import logging

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file, is_protobuf_available, is_sentencepiece_available

from ..models.inputs import input_names
from ..system.errors import UserError, first_line
from .configs import bare_config

logger = logging.getLogger(__name__)

VOCABULARIES = (  # files that need no further package come first
    "tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model",
    "spm.model",
)  # fmt: skip


def has_tokenizer(checkpoint: str, cache_dir: str | None = None) -> bool:
    """Whether a checkpoint has files of a tokenizer, whole or damaged."""
    return any(_find_file(checkpoint, name, cache_dir) for name in VOCABULARIES)


def _find_file(checkpoint: str, name: str, cache_dir: str | None) -> str | None:
    quiet = {"_raise_exceptions_for_missing_entries": False}
    return cached_file(checkpoint, name, cache_dir=cache_dir, **quiet)


def lower_cases(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer (the `backend_tokenizer` of transformers') lower-cases its text."""
    normalizer = tokenizer.normalizer
    return bool(normalizer) and "A" not in normalizer.normalize_str("A")


def declared_casing(checkpoint: str, cache_dir: str | None) -> bool | None:
    """Whether the files of a tokenizer say that it lower-cases; None if they do not say."""
    declared = get_tokenizer_config(checkpoint, cache_dir=cache_dir).get("do_lower_case")
    file = _find_file(checkpoint, "tokenizer.json", cache_dir)
    if declared is None and file:
        return lower_cases(Tokenizer.from_file(file))
    return declared


def load_tokenizer(
    checkpoint: str, do_lower_case: bool = False, cache_dir: str | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint: uncased by its files, or by `do_lower_case` if it can be.

    Raises UserError when there is none; transformers would make up an empty one.
    """
    options = {"cache_dir": cache_dir, "use_fast": True, "trust_remote_code": False}
    try:
        names = [name for name in VOCABULARIES if _find_file(checkpoint, name, cache_dir)]
        if not names:
            raise ValueError("there is no vocabulary")
        can_read_model = is_sentencepiece_available() and is_protobuf_available()
        if names[0].endswith(".model") and not can_read_model:
            raise ValueError(f"for its {names[0]}, run `pip install sentencepiece protobuf`")
        config = PreTrainedConfig.get_config_dict(checkpoint, cache_dir=cache_dir)[0]
        if "model_type" not in config and (config or "vocab.txt" in names):
            options["config"] = BertConfig()  # as in `read_config`
        elif config.get("model_type") in CONFIG_MAPPING:
            options["config"] = bare_config(config["model_type"], config)
        declared = declared_casing(checkpoint, cache_dir)
        if do_lower_case or declared is not None or "vocab.txt" in names:
            options["do_lower_case"] = do_lower_case or bool(declared)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
        backend = tokenizer.backend_tokenizer
        has_pieces = isinstance(backend.model, models.WordPiece)
        if do_lower_case and has_pieces and not lower_cases(backend):  # a class without the option
            parts = [normalizers.BertNormalizer(lowercase=True), backend.normalizer]
            backend.normalizer = normalizers.Sequence([part for part in parts if part])
    except Exception as error:  # errors of the hub, tokenizers and transformers
        raise UserError(f"no usable tokenizer at {checkpoint!r} ({first_line(error)})") from error
    return tokenizer


def put_spaces_before_words(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make the tokenizer, also as saved, read each word of a list as in a text, behind a space.

    Otherwise byte-level and some SentencePiece tokenizers take a word for the end of the last one.
    """
    backend = tokenizer.backend_tokenizer
    if backend.encode(["a", "a"], is_pretokenized=True).ids == backend.encode("a a").ids:
        return
    tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = True
    before_words = backend.pre_tokenizer
    if isinstance(before_words, pre_tokenizers.ByteLevel):
        before_words.add_prefix_space = True
        backend.pre_tokenizer = before_words
    else:
        parts = [normalizers.Prepend(" "), backend.normalizer]
        backend.normalizer = normalizers.Sequence([part for part in parts if part])


def fit_to_model(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    """Make the tokenizer, also as saved, give the inputs of the model, padded on the right."""
    for name, value in (("model_input_names", input_names(model)), ("padding_side", "right")):
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # which is saved


def tokenizer_to_copy(checkpoint: str, model: PreTrainedModel) -> PreTrainedTokenizerFast | None:
    """The checkpoint's tokenizer, to write beside `model`. Warns if there is none."""
    if not has_tokenizer(checkpoint):
        logger.warning("%s has no tokenizer: none is written", checkpoint)
        return None
    tokenizer = load_tokenizer(checkpoint)
    if declared_casing(checkpoint, None) is None:
        message = "%s does not say whether its tokenizer lower-cases: it is written as cased"
        logger.warning(message, checkpoint)
    fit_to_model(tokenizer, model)
    return tokenizer
