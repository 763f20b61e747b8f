"""From a tokenizer's ids to the padded batch of a model."""

import copy

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.inputs import MODEL_INPUTS, longest_input
from ..system.errors import UserError


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer inside `tokenizer`, without truncation and padding."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    if backend.num_special_tokens_to_add(is_pair=True) < 3:
        raise UserError(
            "the tokenizer adds no [CLS] and [SEP]: its tokenizer.json needs a post-processor"
        )
    return backend


def padding_of(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict:
    """The options of `pad_batch` for a model.

    There are token types if the tokenizer has them, also for a teacher that takes them: a forward
    of `training` gives each model its own inputs. The id of padding is the model's, because RoBERTa
    counts positions from there. Raises UserError for token types that `pad_batch` does not give.
    """
    padding = model.get_input_embeddings().padding_idx
    pair = fast_backend(tokenizer).encode("a", "b")
    has_types = any(pair.type_ids)
    second_start = pair.sequence_ids.index(1)
    if has_types and pair.type_ids != [int(n >= second_start) for n in range(len(pair))]:
        raise UserError(
            f"the tokenizer gives the token types {pair.type_ids} for two texts: its "
            "post-processor must give 0 up to the second text, and 1 from there on"
        )
    return {
        "pad_token_id": tokenizer.pad_token_id if padding is None else padding,
        "input_names": [name for name in MODEL_INPUTS if has_types or name != "token_type_ids"],
        "multiple_of": 1 if (longest_input(model) or 8) % 8 else 8,
    }


def pad_batch(
    features: list[dict],
    second_starts: list[int] | None = None,
    pad_token_id: int = 0,
    multiple_of: int = 8,
    input_names: tuple[str, ...] = MODEL_INPUTS,
    columns: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """Pad `input_ids` to the longest of the batch, rounded up to a multiple of `multiple_of`.

    second_starts: index of the first token of type 1 for each feature; None if there is none.
    columns: further lists of a feature, such as tags, and what they are padded with. A list with an
    entry for each token gets the length of the inputs, any other list the length of the longest.
    Returns the `MODEL_INPUTS` that are in `input_names`, int64 (batch, tokens), and the columns.
    """
    ids = [torch.as_tensor(feature["input_ids"]) for feature in features]
    lengths = torch.tensor([[len(row)] for row in ids])
    positions = torch.arange(-(-int(lengths.max()) // multiple_of) * multiple_of)
    is_token = positions < lengths
    starts = lengths if second_starts is None else torch.tensor(second_starts)[:, None]
    is_second = is_token & (positions >= starts)
    input_ids = torch.full(is_token.shape, pad_token_id)
    input_ids[is_token] = torch.cat(ids)
    batch = dict(zip(MODEL_INPUTS, (input_ids, is_token.long(), is_second.long())))
    batch = {name: tensor for name, tensor in batch.items() if name in input_names}
    for name, value in (columns or {}).items():
        rows = [torch.as_tensor(feature[name]) for feature in features]
        per_token = all(len(row) == len(tokens) for row, tokens in zip(rows, ids, strict=True))
        width = len(positions) if per_token else max(map(len, rows))
        batch[name] = torch.full((len(rows), width), value, dtype=rows[0].dtype)
        for place, row in enumerate(rows):
            batch[name][place, : len(row)] = row
    return batch


def collate_features(
    features: list[dict], pad_token_id: int, *, second_start: str, **padding
) -> dict[str, Tensor]:
    """Pad features with `pad_batch`, and add their labels, start_positions and end_positions.

    second_start: column with the index of the first token of type 1. Labels are (batch,) tensors:
    int64, or float32 for a regression.
    """
    starts = [feature[second_start] for feature in features]
    batch = pad_batch(features, starts, pad_token_id, **padding)
    for name in ("label", "start_position", "end_position"):
        if name in features[0]:
            batch[f"{name}s"] = torch.tensor([feature[name] for feature in features])
    return batch
