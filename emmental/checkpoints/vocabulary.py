"""Cut the vocabulary of a plain model to what a corpus and single characters need.

Fine-pruning leaves the embeddings whole, and in a packed model they are most of the bytes. The
pieces that remain get new ids in the order of their old ones, in the tokenizer and in the model. On
the corpus the pieces are the same, and so are the outputs. Other text falls back to smaller pieces.

The corpus needs more than the pieces that it is split into:
- WordPiece takes the longest piece each time, and gives a word up where no piece fits. The pieces
  that were taken of such a word stay: without them, shorter pieces might fit.
- BPE merges pieces. Each merge whose result stays is kept, with both its parts.
- Unigram maximizes a sum of scores. An unknown character costs a fixed amount more than the lowest
  score, so the piece with this score stays.
"""

import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..models.inputs import padding_of_positions
from ..system.errors import TrainingError, UserError
from .corpus import batches_of

KINDS = ("WordPiece", "BPE", "Unigram")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # unknown characters fall back to these


def cut_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, files: Sequence[Path]
) -> PreTrainedTokenizerFast:
    """Drop the pieces that the texts of `files` do not need; returns the tokenizer that remains.

    The embeddings and the configuration of `model` change in place. Raises UserError for texts or
    a tokenizer that cannot be used.
    """
    whole = _bare(tokenizer)
    content = json.loads(whole.to_str())
    kind = content["model"]["type"]
    if kind not in KINDS:
        raise UserError(
            f"the vocabulary of a {kind} tokenizer cannot be cut, only {', '.join(KINDS)}"
        )
    rows = model.get_input_embeddings().num_embeddings
    token_ids = {n: i for n, i in model.config.to_dict().items() if n.endswith("_token_id")}
    token_ids = {n: i for n, i in token_ids.items() if type(i) is int and 0 <= i < rows}
    tokens = {*tokenizer.all_special_ids, *token_ids.values()}
    tokens |= {*range((padding_of_positions(model) or 0) + 1)}  # positions begin after padding
    needed = _needed(whole, content, files, tokens)
    if max(needed) >= rows:
        raise UserError(
            f"the tokenizer has more pieces than the model has embeddings: piece {max(needed):,} "
            f"of {rows:,}; give the tokenizer that it was trained with"
        )
    number = {old: new for new, old in enumerate(sorted(needed))}
    cut = _renumbered(tokenizer, content, number)
    pieces = {piece: number[i] for piece, i in whole.get_vocab().items() if i in number}
    if _bare(cut).get_vocab() != pieces or not _agree(whole, _bare(cut), number, files):
        raise TrainingError("this tokenizer cannot be cut: it would split the corpus differently")
    _cut_embeddings(model, number)
    for name, old in token_ids.items():
        setattr(model.config, name, number[old])
    return cut


def _bare(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of a tokenizer's backend that returns every token of a text, and no padding."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _agree(whole: Tokenizer, cut: Tokenizer, number: dict[int, int], files: Sequence[Path]) -> bool:
    """Whether both tokenizers split the texts of `files` into the same pieces."""
    return all(
        [number[i] for i in before.ids] == after.ids
        for texts in batches_of(files)
        for before, after in zip(whole.encode_batch_fast(texts), cut.encode_batch_fast(texts))
    )


def _needed(backend: Tokenizer, content: dict, files: Sequence[Path], tokens: set[int]) -> set[int]:
    """The ids `tokens`, and those that a tokenizer needs for them, for texts and for characters.

    Drops the merges of `content` that make no needed piece.
    """
    vocabulary, part = backend.get_vocab(), content["model"]
    prefix = part.get("continuing_subword_prefix") or ""
    unknown = vocabulary.get(part.get("unk_token"))
    needed = tokens | {container[key] for container, key in _ids_of(content)} | {unknown}
    for piece, i in vocabulary.items():
        if 1 in (len(piece), len(piece.removeprefix(prefix))) or BYTE.fullmatch(piece):
            needed.add(i)
    given_up = set()
    for texts in batches_of(files):
        for text, encoding in zip(texts, backend.encode_batch(texts)):
            needed.update(encoding.ids)
            places = zip(encoding.ids, encoding.offsets) if unknown in encoding.ids else ()
            given_up |= {text[slice(*place)] for i, place in places if i == unknown}
    if part["type"] == "WordPiece":
        normalize = backend.normalizer.normalize_str if backend.normalizer else str
        words = [w for w in map(normalize, given_up) if len(w) <= part["max_input_chars_per_word"]]
        starts = [word[:n] for word in words for n in range(1, len(word))]
        needed.update(*(encoding.ids for encoding in backend.encode_batch_fast(starts)))
    elif part["type"] == "BPE":
        _keep_merges(part, vocabulary, needed, len(prefix))
    else:
        scores = [score for _, score in part["vocab"]]
        needed.add(scores.index(min(scores)))
    return needed - {None}


def _keep_merges(part: dict, vocabulary: dict[str, int], needed: set[int], prefix: int) -> None:
    """Add the parts of every needed piece, down to characters; drop the merges of other pieces."""
    results = [first + second[prefix:] for first, second in part["merges"]]
    sources = {}
    for result, pair in zip(results, part["merges"]):
        sources.setdefault(result, []).extend(pair)
    new = [piece for piece, i in vocabulary.items() if i in needed]
    while new:
        parts = [x for x in sources.get(new.pop(), ()) if vocabulary[x] not in needed]
        needed.update(vocabulary[piece] for piece in parts)
        new += parts
    kept = (vocabulary[result] in needed for result in results)
    part["merges"] = list(itertools.compress(part["merges"], kept))


def _ids_of(content: dict) -> Iterator[tuple[dict | list, str | int]]:
    """Where the content of a tokenizer.json has ids beside its vocabulary: containers and keys."""
    for token in content["added_tokens"]:
        yield token, "id"
    if content["padding"]:
        yield content["padding"], "pad_id"
    if content["model"].get("unk_id") is not None:
        yield content["model"], "unk_id"
    processors = [content["post_processor"] or {}]
    while processors:
        processor = processors.pop()
        processors += processor.get("processors", ())
        yield from ((processor[name], 1) for name in ("cls", "sep") if name in processor)
        for token in processor.get("special_tokens", {}).values():
            yield from ((token["ids"], n) for n in range(len(token["ids"])))


def _renumbered(
    tokenizer: PreTrainedTokenizerFast, content: dict, number: dict[int, int]
) -> PreTrainedTokenizerFast:
    """The tokenizer with only the pieces of `number`, which says their new ids."""
    part = content["model"]
    for container, key in _ids_of(content):
        container[key] = number[container[key]]
    if part["type"] == "Unigram":
        part["vocab"] = [entry for i, entry in enumerate(part["vocab"]) if i in number]
    else:
        part["vocab"] = {piece: number[i] for piece, i in part["vocab"].items() if i in number}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        unknown = {"unk_id": part["unk_id"]} if "unk_id" in tokenizer.init_kwargs else {}
        return type(tokenizer).from_pretrained(folder, **unknown)


@torch.no_grad()
def _cut_embeddings(model: PreTrainedModel, number: dict[int, int]) -> None:
    embedding = model.get_input_embeddings()
    whole = embedding.weight
    rows = nn.Parameter(whole[list(number)].clone(), whole.requires_grad)
    for module in model.modules():
        if getattr(module, "weight", None) is whole:  # shared ones too
            module.weight = rows
    embedding.num_embeddings = model.config.vocab_size = len(number)
    embedding.padding_idx = number.get(embedding.padding_idx)
