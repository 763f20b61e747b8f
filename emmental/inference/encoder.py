"""The encoder of a pruned model on sparse matrices.

`SparseEncoder` replaces the stock encoder in families whose layers compute what BERT's do.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import vstack
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..compact.algebra import Affine, Layer, activation_of
from ..modules.lists import is_traced
from .backends import Library, Matrix, Native

NOT_IN_GRAPHS = "a sparse model cannot be traced or exported: take the bertarized model instead"
GROUP_TOKENS = 512  # tokens that pass all layers together, so that activations stay in the cache


class SparseLayer:
    """The matrices of one layer, prepared for a backend.

    norms: weight and bias of the LayerNorm after attention, then of the one at the end.
    """

    def __init__(self, layer: Layer, norms: Sequence[Tensor], prepare: Callable[[Affine], Matrix]):
        parts = [layer.query, layer.key, layer.value]
        weight = vstack([part.weight for part in parts], format="csr")
        self.qkv = prepare(Affine(weight, np.concatenate([part.bias for part in parts])))
        self.output = prepare(layer.output)
        self.first, self.second = prepare(layer.first), prepare(layer.second)
        self.sizes = torch.tensor(layer.sizes, dtype=torch.int32)
        self.sizes_v = torch.tensor(layer.sizes_v, dtype=torch.int32)
        self.norms = [tensor.detach().clone() for tensor in norms]

    def __deepcopy__(self, memo: dict) -> "SparseLayer":
        return self  # a layer is never changed

    def matrices(self) -> list[Matrix]:
        return [self.qkv, self.output, self.first, self.second]


class SparseEncoder(nn.Module):
    """The outputs of the stock encoder with these layers, up to float32 rounding.

    For the CPU, float32 and evaluation only. The weights are not parameters, so the model cannot be
    trained, moved or saved.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        backend: type[Native] | type[Library],
        layers: list[SparseLayer],
    ):
        super().__init__()
        self.config, self.backend, self.layers = config, backend, layers
        self.eval()

    @torch.compiler.disable(reason=NOT_IN_GRAPHS)
    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """hidden_states: [batch, length, hidden]. attention_mask: see `key_mask`.

        Raises ValueError for a call that the sparse kernels do not support.
        """
        self._check(hidden_states, kwargs)
        batch, length, _ = hidden_states.shape
        mask = key_mask(attention_mask, batch, length)
        output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        group = max(1, GROUP_TOKENS // max(1, length))
        for first in range(0, batch if length else 0, group):
            part = slice(first, first + group)
            output[part] = self._run(hidden_states[part], None if mask is None else mask[part])
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output)

    def _run(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        run = self.backend(*hidden.shape[:2])
        activation = activation_of(self.config)
        epsilon = getattr(self.config, "layer_norm_eps", 1e-12)  # DistilBERT's is fixed
        scale = (self.config.hidden_size // self.config.num_attention_heads) ** -0.5
        x = run.enter(hidden)
        for layer in self.layers:
            context = x  # not read where no head remains, as output then has no columns
            if len(layer.sizes):
                qkv = run.product(layer.qkv, x, "qkv")
                context = run.attention(qkv, layer.sizes, layer.sizes_v, mask, scale)
            x = run.product(layer.output, context, "between", residual=x)
            x = run.layer_norm(x, *layer.norms[:2], epsilon)
            inner = run.product(layer.first, x, "inner", activation=activation)
            x = run.product(layer.second, inner, "states", residual=x)
            x = run.layer_norm(x, *layer.norms[2:], epsilon)
        return run.leave(x)

    def _check(self, hidden_states: Tensor, kwargs: dict) -> None:
        if is_traced():
            raise ValueError(NOT_IN_GRAPHS)
        if self.training:
            raise ValueError(
                "a sparse model cannot be trained: call eval(), or train the model it was made from"
            )
        if hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32:
            raise ValueError(
                "a sparse model computes in float32 on the CPU, not in "
                f"{hidden_states.dtype} on {hidden_states.device}: for a GPU, move the model there "
                "before you call sparsify"
            )
        asked = [
            name
            for name in ("output_attentions", "output_hidden_states")
            if kwargs.get(name) or getattr(self.config, name, False)
        ]
        if asked:
            raise ValueError(
                f"a sparse model returns last hidden states only: use the dense model for "
                f"{', '.join(asked)}"
            )


def key_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The visible keys, bool [batch, length], from the mask of the base model; None for all.

    attention_mask: bool [batch, 1, 1 or length, length]. Raises ValueError for another mask, such
    as one that differs between queries.
    """
    if attention_mask is None:
        return None
    wanted = (
        f"a sparse model takes an attention_mask of batch x length ({batch} x {length}), "
        "1 for tokens and 0 for padding"
    )
    shape, dtype = list(attention_mask.shape), attention_mask.dtype
    if dtype != torch.bool or len(shape) != 4 or shape[-1] != length:
        raise ValueError(f"{wanted}, not {shape} of {dtype}")
    first = attention_mask[:, :1, :1]
    if shape[1:3] != [1, 1] and not torch.equal(first.expand(shape), attention_mask):
        raise ValueError(f"{wanted}, not one that differs between queries or heads")
    return first[:, 0, 0].expand(batch, length).contiguous()
