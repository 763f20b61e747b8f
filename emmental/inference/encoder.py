"""The encoder of a pruned BERT on sparse matrices: takes the place of `BertEncoder` in any stock model."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import vstack
from torch import Tensor, nn
from transformers import BertConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .compaction import Affine, Layer
from .kernels import Matrix

GROUP_TOKENS = 512  # so many pass all layers at once: their activations then stay in the cache


class SparseLayer:
    """One layer's matrices, ready for a backend. `norms`: weight and bias of its two LayerNorms."""

    def __init__(self, layer: Layer, norms: Sequence[Tensor], prepare: Callable[[Affine], Matrix]):
        parts = [layer.query, layer.key, layer.value]
        together = Affine(
            vstack([p.weight for p in parts], format="csr"), np.concatenate([p.bias for p in parts])
        )
        self.qkv = prepare(together)
        self.output, self.first, self.second = map(
            prepare, (layer.output, layer.first, layer.second)
        )
        self.sizes = torch.tensor(layer.sizes, dtype=torch.int32)
        self.sizes_v = torch.tensor(layer.sizes_v, dtype=torch.int32)
        self.norms = [tensor.detach().clone() for tensor in norms]

    def __deepcopy__(self, memo: dict) -> "SparseLayer":
        return self  # nothing ever changes it

    def matrices(self) -> list[Matrix]:
        return [self.qkv, self.output, self.first, self.second]

    def multiply_adds(self, length: int) -> int:
        """Of products and attention, per token of a sequence of `length`."""
        attention = length * int(self.sizes.sum() + self.sizes_v.sum())
        return attention + sum(matrix.multiply_adds for matrix in self.matrices())


class SparseEncoder(nn.Module):
    """Same outputs as the `BertEncoder` of these layers, to float32 rounding. CPU, float32, evaluation only.

    Its weights are no parameters: the model cannot be trained, moved or saved with them.
    """

    def __init__(self, config: BertConfig, backend: type, layers: list[SparseLayer]):
        super().__init__()
        self.config, self.backend, self.layers = config, backend, layers
        self.eval()

    def multiply_adds(self, length: int) -> int:
        """Of the encoder, per token of a sequence of `length`: what bounds its speed."""
        return sum(layer.multiply_adds(length) for layer in self.layers)

    @torch.compiler.disable
    @torch.no_grad()
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """hidden_states: [batch, length, hidden]. attention_mask: bool, [batch, 1, length, length], alike for all queries.

        Raises ValueError for what the sparse kernels cannot do.
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
        epsilon, activation = self.config.layer_norm_eps, self.config.hidden_act
        scale = (self.config.hidden_size // self.config.num_attention_heads) ** -0.5
        x = run.enter(hidden)
        for layer in self.layers:
            context = x  # where no head is left, output has no columns to read it
            if len(layer.sizes):
                context = run.attention(
                    run.product(layer.qkv, x, "qkv"), layer.sizes, layer.sizes_v, mask, scale
                )
            x = run.layer_norm(
                run.product(layer.output, context, "between", residual=x), *layer.norms[:2], epsilon
            )
            inner = run.product(layer.first, x, "inner", activation=activation)
            x = run.layer_norm(
                run.product(layer.second, inner, "states", residual=x), *layer.norms[2:], epsilon
            )
        return run.leave(x)

    def _check(self, hidden_states: Tensor, kwargs: dict) -> None:
        if self.training:
            raise ValueError(
                "a sparse model cannot be trained: call eval(), or train the model that it was made from"
            )
        if hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32:
            raise ValueError(
                f"a sparse model computes in float32 on the CPU, not in {hidden_states.dtype} on {hidden_states.device}: "
                "call sparsify on a model that is on the GPU to have it compacted there"
            )
        given = [
            name
            for name in ("past_key_values", "encoder_hidden_states")
            if kwargs.get(name) is not None
        ]
        asked = ("output_attentions", "output_hidden_states")
        given += [name for name in asked if kwargs.get(name) or getattr(self.config, name, False)]
        if given:
            raise ValueError(
                f"a sparse model gives last states only, without {', '.join(given)}: use the dense model"
            )


def key_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Which keys are seen, bool [batch, length], from the mask that BertModel makes; None if all are.

    Raises ValueError for a mask that differs between queries.
    """
    if attention_mask is None:
        return None
    wanted = f"a sparse model takes an attention_mask of batch x length ({batch} x {length}), 1 for tokens and 0 for padding"
    if (
        attention_mask.dtype != torch.bool
        or attention_mask.dim() != 4
        or attention_mask.shape[-1] != length
    ):
        raise ValueError(f"{wanted}, not {list(attention_mask.shape)} of {attention_mask.dtype}")
    first = attention_mask[:, :1, :1]
    if attention_mask.shape[1:3] != (1, 1) and not torch.equal(
        first.expand_as(attention_mask), attention_mask
    ):
        raise ValueError(f"{wanted}, not one that differs between queries or heads")
    return first[:, 0, 0].expand(batch, length).contiguous()
