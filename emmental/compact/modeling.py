"""BERT without the heads and neurons that pruning emptied: transformers' classes, smaller Linears.

The configuration says what is left of each layer. The state dict has the keys of the stock class;
where a layer has no heads, or no neurons, of that part only the last bias remains. A folder of
such a model loads with the Auto classes after `import emmental`, and trains as any BERT.
"""

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import initialization
from transformers.models.bert.modeling_bert import BertSelfAttention

from ..models.families import BERT, Family, layers_of
from ..models.masked import register
from .configuration import CompactBertConfig


class Headless(BertSelfAttention):
    """The attention of a layer without heads. `Bias` comes next, and ignores what it returns."""

    num_attention_heads = attention_head_size = all_head_size = 0

    def __init__(self):
        nn.Module.__init__(self)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        return hidden_states, hidden_states.new_zeros(batch, 0, length, length)


class Bias(nn.Module):
    """An `nn.Linear` without inputs: its bias, for tokens of as many features."""

    in_features = 0

    def __init__(self, features: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.bias.expand(hidden_states.shape)


def attention_of(layer: nn.Module, family: Family) -> nn.Module:
    """The part of a layer that has the heads."""
    return layer.get_submodule(family.heads[0].rpartition(".")[0])


def resize_attention(layer: nn.Module, family: Family, heads: int, size: int) -> None:
    """Give a layer so many heads of `size` rows, with new weights that are not initialised.

    No heads are for BERT alone.
    """
    *inputs, output = family.heads
    attention, context = attention_of(layer, family), layer.get_submodule(output)
    hidden, total = context.out_features, heads * size
    if total == context.in_features and size == attention.attention_head_size:
        return
    layer.set_submodule(output, _resized(context, total, hidden))
    if not total:
        layer.attention.self = Headless().train(attention.training)
        return
    for name in inputs:
        layer.set_submodule(name, _resized(layer.get_submodule(name), hidden, total))
    attention.num_attention_heads, attention.attention_head_size = heads, size
    attention.all_head_size = total  # the scale of the scores stays that of the whole head


def resize_neurons(layer: nn.Module, family: Family, neurons: int) -> None:
    """Give a layer so many neurons, with new weights that are not initialised.

    No neurons are for BERT alone.
    """
    first, second = family.neurons
    old = layer.get_submodule(second)
    if neurons == old.in_features:
        return
    layer.set_submodule(second, _resized(old, neurons, old.out_features))
    if neurons:
        old = layer.get_submodule(first)
        layer.set_submodule(first, _resized(old, old.in_features, neurons))
    else:
        layer.intermediate = nn.Identity()


def _resized(old: nn.Linear, inputs: int, outputs: int) -> nn.Module:
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = skip_init(nn.Linear, inputs, outputs, **like) if inputs else Bias(outputs, **like)
    return new.requires_grad_(old.weight.requires_grad).train(old.training)


class Compact:
    """What the compact base model and heads share."""

    config_class = CompactBertConfig

    def __init__(self, config: CompactBertConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        sizes = zip(config.layer_heads, config.layer_head_sizes, config.layer_neurons)
        for layer, (heads, size, neurons) in zip(layers_of(self), sizes):
            resize_attention(layer, BERT, heads, size)
            resize_neurons(layer, BERT, neurons)
            layer.apply(self._init_weights)

    def _init_weights(self, module):
        # from_pretrained calls this for the parameters that the checkpoint lacks
        if isinstance(module, Bias):
            initialization.zeros_(module.bias)
        super()._init_weights(module)


class CompactBertModel(Compact, transformers.BertModel):
    """`BertModel` with fewer heads and neurons."""


class CompactBertForQuestionAnswering(Compact, transformers.BertForQuestionAnswering):
    """`BertForQuestionAnswering` with fewer heads and neurons."""


class CompactBertForSequenceClassification(Compact, transformers.BertForSequenceClassification):
    """`BertForSequenceClassification` with fewer heads and neurons."""


class CompactBertForTokenClassification(Compact, transformers.BertForTokenClassification):
    """`BertForTokenClassification` with fewer heads and neurons."""


class CompactBertForMultipleChoice(Compact, transformers.BertForMultipleChoice):
    """`BertForMultipleChoice` with fewer heads and neurons."""


register(CompactBertConfig, Compact.__subclasses__())
