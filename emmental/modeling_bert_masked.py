"""BERT with masked linear layers: the stock classes of transformers, with the encoder's Linears swapped.

Only the six `nn.Linear` of each encoder layer are masked (query, key, value, attention output,
intermediate, output); pooler and heads stay dense, and the embeddings are frozen at their pre-trained
values. State-dict keys are those of the stock classes plus `<linear>.mask_scores`, so a plain BERT
checkpoint loads with fresh scores, and a checkpoint of the 2020 code loads with its own.

    model = MaskedBertForQuestionAnswering.from_pretrained("bert-base-uncased", pruning_method="topK")
    model(input_ids=..., attention_mask=..., token_type_ids=..., threshold=0.15)
"""

import torch
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
from .modules.masked_nn import MaskedLinear, keep_masked_weights, masks_are_current, swap_linears, update_masks


class _MaskedPreTrained:
    """What `MaskedBertModel` and the heads share: the configuration, and scores that get initialised."""

    config_class = MaskedBertConfig
    _keep_in_fp32_modules_strict = ["mask_scores"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_embeddings()  # loading puts trainable parameters in place of the frozen ones
        return loaded

    def freeze_embeddings(self) -> None:
        self.base_model.embeddings.requires_grad_(False)

    def _init_weights(self, module):
        # from_pretrained builds the model without storage and calls this for what the checkpoint lacks.
        if isinstance(module, MaskedLinear):
            module.reset_scores()
        super()._init_weights(module)

    def update_masks(self, threshold=None, cutoff=None, generator=None) -> float | None:
        """Compute and store the masks of all layers, see `emmental.modules.update_masks`.

        threshold: defaults to the one last used, then to `config.threshold`; ValueError if none is known.
        """
        base = self.base_model
        base.threshold = base.resolve_threshold(threshold)
        return update_masks(base, base.threshold, self.config.global_topk, cutoff, generator)


class MaskedBertModel(_MaskedPreTrained, BertModel):
    """`BertModel` with masked encoder layers.

    `forward` takes all that the stock model takes, and `threshold` (see `MaskedBertConfig`). In
    training, a given threshold computes the masks anew, and none uses the masks as they stand. In
    evaluation the masks are computed once and kept until the threshold, the scores or the weights change; without
    gradients, so are the masked weights. With
    gradient checkpointing, run the backward of a forward before the next forward: what is recomputed uses
    the masks of the latest.
    """

    def __init__(self, config: MaskedBertConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer)
        swap_linears(self.encoder, config.mask_init, config.mask_scale, config.pruning_method)
        self.freeze_embeddings()
        self.threshold = None

    def resolve_threshold(self, threshold: float | None) -> float:
        """`threshold`, or the one last used, or the configuration's; ValueError if none is known."""
        for candidate in (threshold, self.threshold, self.config.threshold):
            if candidate is not None:
                return float(candidate)
        if self.config.pruning_method == "l0":  # masks of l0 know no threshold
            return 1.0
        raise ValueError("the model knows no threshold yet: pass threshold=..., or set config.threshold")

    def forward(self, *args, threshold: float | None = None, **kwargs):
        wanted = self.resolve_threshold(threshold)
        if self.training:
            stale = threshold is not None or any(
                module.mask is None for module in self.modules() if isinstance(module, MaskedLinear)
            )
        else:
            stale = not masks_are_current(self, wanted, self.config.global_topk)
        if stale:
            self.update_masks(wanted)
        if not (self.training or torch.is_grad_enabled()):
            keep_masked_weights(self)
        return super().forward(*args, **kwargs)


class _MaskedHead(_MaskedPreTrained):
    """A stock head over a `MaskedBertModel`; `threshold` reaches it through the head's `**kwargs`."""

    def __init__(self, config: MaskedBertConfig):
        super().__init__(config)
        self.bert = MaskedBertModel(config, add_pooling_layer=self.bert.pooler is not None)
        self.post_init()


class MaskedBertForQuestionAnswering(_MaskedHead, BertForQuestionAnswering):
    """`BertForQuestionAnswering` over a `MaskedBertModel`."""

    _keys_to_ignore_on_load_unexpected = [r"^bert\.pooler\."]  # the 2020 class had one, unused


class MaskedBertForSequenceClassification(_MaskedHead, BertForSequenceClassification):
    """`BertForSequenceClassification` over a `MaskedBertModel`."""


class MaskedBertForTokenClassification(_MaskedHead, BertForTokenClassification):
    """`BertForTokenClassification` over a `MaskedBertModel`."""

    _keys_to_ignore_on_load_unexpected = [r"^bert\.pooler\."]


class MaskedBertForMultipleChoice(_MaskedHead, BertForMultipleChoice):
    """`BertForMultipleChoice` over a `MaskedBertModel`."""


AutoConfig.register("masked_bert", MaskedBertConfig)
AutoTokenizer.register(MaskedBertConfig, fast_tokenizer_class=transformers.BertTokenizerFast)
AutoModel.register(MaskedBertConfig, MaskedBertModel)
AutoModelForQuestionAnswering.register(MaskedBertConfig, MaskedBertForQuestionAnswering)
AutoModelForSequenceClassification.register(MaskedBertConfig, MaskedBertForSequenceClassification)
AutoModelForTokenClassification.register(MaskedBertConfig, MaskedBertForTokenClassification)
AutoModelForMultipleChoice.register(MaskedBertConfig, MaskedBertForMultipleChoice)
