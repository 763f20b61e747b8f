"""BERT with masked linear layers: the stock classes of transformers, with the encoder's Linears swapped.

Only the six `nn.Linear` of each encoder layer are masked (query, key, value, attention output, intermediate, output);
pooler and heads stay dense, and the embeddings are frozen at their pre-trained values. State-dict keys are those of
the stock classes plus `<linear>.mask_scores`, so a plain BERT checkpoint loads with fresh scores, and a checkpoint of
the 2020 code loads with its own.

    model = MaskedBertForQuestionAnswering.from_pretrained("bert-base-uncased", pruning_method="topK")
    model(input_ids=..., attention_mask=..., token_type_ids=..., threshold=0.15)

`forward` takes all that the stock model takes, and `threshold` (default: the configuration's). Every forward finds
its own masks; a block of `emmental.modules.masked` finds them once for many.
"""

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from .configuration_bert_masked import MaskedBertConfig
from .families import MaskedHead, MaskedModel


class MaskedBertModel(MaskedModel, BertModel):
    """`BertModel` with masked encoder layers."""

    config_class = MaskedBertConfig


class _MaskedBertHead(MaskedHead):
    config_class = MaskedBertConfig
    masked_base = MaskedBertModel


class MaskedBertForQuestionAnswering(_MaskedBertHead, BertForQuestionAnswering):
    """`BertForQuestionAnswering` over a `MaskedBertModel`."""

    _keys_to_ignore_on_load_unexpected = [r"^bert\.pooler\."]  # the 2020 class had one, unused


class MaskedBertForSequenceClassification(_MaskedBertHead, BertForSequenceClassification):
    """`BertForSequenceClassification` over a `MaskedBertModel`."""


class MaskedBertForTokenClassification(_MaskedBertHead, BertForTokenClassification):
    """`BertForTokenClassification` over a `MaskedBertModel`."""

    _keys_to_ignore_on_load_unexpected = [r"^bert\.pooler\."]


class MaskedBertForMultipleChoice(_MaskedBertHead, BertForMultipleChoice):
    """`BertForMultipleChoice` over a `MaskedBertModel`."""


AutoConfig.register("masked_bert", MaskedBertConfig)
AutoTokenizer.register(MaskedBertConfig, fast_tokenizer_class=transformers.BertTokenizerFast)
AutoModel.register(MaskedBertConfig, MaskedBertModel)
AutoModelForQuestionAnswering.register(MaskedBertConfig, MaskedBertForQuestionAnswering)
AutoModelForSequenceClassification.register(MaskedBertConfig, MaskedBertForSequenceClassification)
AutoModelForTokenClassification.register(MaskedBertConfig, MaskedBertForTokenClassification)
AutoModelForMultipleChoice.register(MaskedBertConfig, MaskedBertForMultipleChoice)
