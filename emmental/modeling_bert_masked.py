"""BERT with masked linear layers: transformers' classes with the encoder's `nn.Linear` replaced.

The six `nn.Linear` of each encoder layer are masked: query, key, value, attention output,
intermediate and output. Pooler and heads stay dense. The embeddings are frozen at their pre-trained
values. The state dict has the keys of the stock class plus `<linear>.mask_scores`: a plain BERT
checkpoint loads with fresh scores, a checkpoint of the 2020 code with its own.

    model = MaskedBertForQuestionAnswering.from_pretrained("bert-base-uncased")
    model(input_ids=..., attention_mask=..., token_type_ids=..., threshold=0.15)

`forward` takes the arguments of the stock model and `threshold` (default: the configuration's).
Every forward finds its own masks; in a block of `emmental.modules.masked` they are found once.
"""

import transformers

from .configuration_bert_masked import MaskedBertConfig
from .families import MaskedHead, MaskedModel, register


class MaskedBertModel(MaskedModel, transformers.BertModel):
    """`BertModel` with a masked encoder."""

    config_class = MaskedBertConfig


class _MaskedBertHead(MaskedHead):
    config_class = MaskedBertConfig
    masked_base = MaskedBertModel


class MaskedBertForQuestionAnswering(_MaskedBertHead, transformers.BertForQuestionAnswering):
    """`BertForQuestionAnswering` over a `MaskedBertModel`."""

    _keys_to_ignore_on_load_unexpected = [r"^bert\.pooler\."]  # of the 2020 code, unused


class MaskedBertForSequenceClassification(
    _MaskedBertHead, transformers.BertForSequenceClassification
):
    """`BertForSequenceClassification` over a `MaskedBertModel`."""


class MaskedBertForTokenClassification(_MaskedBertHead, transformers.BertForTokenClassification):
    """`BertForTokenClassification` over a `MaskedBertModel`."""

    _keys_to_ignore_on_load_unexpected = [r"^bert\.pooler\."]


class MaskedBertForMultipleChoice(_MaskedBertHead, transformers.BertForMultipleChoice):
    """`BertForMultipleChoice` over a `MaskedBertModel`."""


register(MaskedBertConfig, [MaskedBertModel, *_MaskedBertHead.__subclasses__()])
