"""Inference that is faster because the model is pruned: `sparsify(model)`.

The encoder of BERT is first compacted: heads, neurons and rows that no output depends on are
removed exactly (`compaction.py`). On a CPU, matrices with few weights then become sparse (CSR), and
the encoder computes with them (`encoder.py`, `kernels.py`). Embeddings and head stay the stock
modules, so any head works.

    model = sparsify(BertForQuestionAnswering.from_pretrained("bertarized"))
    with torch.inference_mode():
        outputs = model(**tokenizer(question, context, return_tensors="pt"))
"""

import copy
import logging
from collections.abc import Callable

import torch
import transformers
from scipy.sparse import csr_array
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel

from ..errors import UserError
from ..export import bertarized_config, bertarized_state_dict
from ..families import encoder_of
from ..modeling_bert_compact import Bias
from ..modules.masked_nn import MaskedLinear
from ..modules.masks import masked_layers
from .compaction import NAMES, Affine, compact, compact_model, compacted, density, read_layer
from .encoder import SparseEncoder, SparseLayer
from .kernels import BACKENDS, Library, Matrix, Native, load_native

__all__ = ["compacted", "sparse_model", "sparsify"]

logger = logging.getLogger(__name__)

KERNELS = ("auto", *BACKENDS, "compact")
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
PRUNED = 0.99  # a model with a higher density counts as dense
CSR_BELOW = 0.3  # a matrix with a lower density is faster in CSR


def sparsify(
    model: PreTrainedModel, kernel: str = "auto", csr_below: float = CSR_BELOW
) -> PreTrainedModel:
    """A faster model with the outputs of the pruned `model`, up to float32 rounding.

    model: a bertarized, compact or masked BERT with any head. It is not changed.
    kernel: "native" (our C++ kernels, compiled at first use), "library" (torch's CSR product),
        "compact" (dense products, made smaller by compaction), or "auto": compact for an encoder
        whose density is not below `csr_below`, else native, or library without a C++ compiler.
    csr_below: density, in [0, 1], below which a matrix becomes CSR.
    On a GPU and in training mode CSR does not pay: "auto" only compacts, with a warning.
    Raises ValueError for another architecture, an unknown kernel, or a kernel that cannot be used.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}")
    if not 0.0 <= csr_below <= 1.0:
        raise ValueError(f"csr_below is a density in [0, 1], not {csr_below}")
    _check_model(model)
    unfit = _unfit(model)
    if unfit and kernel in BACKENDS:
        raise ValueError(f"kernel {kernel!r} cannot be used: {unfit}; choose auto or compact")
    if unfit:
        logger.warning("%s: compaction only, with dense products", unfit)
    model = _plain(model)
    encoder = encoder_of(model)
    left = density(encoder)
    if left > PRUNED:
        logger.warning(
            "%.0f%% of the encoder's weights remain: sparse inference gains nothing", 100 * left
        )
    if kernel == "compact" or unfit or (kernel == "auto" and left >= csr_below):
        sparse = copy.deepcopy(model)
        compact_model(sparse, encoder_of(sparse))
        return _without_saving(sparse)
    backend = _backend(kernel)
    layers = [
        _sparse_layer(
            model.config,
            block.attention.self.num_attention_heads,
            dict(block.named_parameters()).get,
            backend,
            csr_below,
        )
        for block in encoder.layer
    ]
    sparse = copy.deepcopy(model, {id(encoder): SparseEncoder(model.config, backend, layers)})
    sparse.config._attn_implementation = "sdpa"  # BertModel then makes the mask SparseEncoder takes
    return _without_saving(sparse)


def sparse_model(
    model_class: type[PreTrainedModel],
    config: BertConfig,
    tensors: dict[str, Tensor | csr_array],
    kernel: str = "auto",
    csr_below: float = CSR_BELOW,
) -> PreTrainedModel:
    """The sparse model of these tensors, by their names in `model_class`.

    The encoder's matrices are csr_arrays; one with a density below `csr_below` is never made dense.
    """
    backend = _backend(kernel)
    prefix = f"{model_class.base_model_prefix}.encoder.layer."
    whole = [config.num_attention_heads] * config.num_hidden_layers
    layers = []
    for number, heads in enumerate(getattr(config, "layer_heads", whole)):

        def fetch(name: str, own: str = f"{prefix}{number}.") -> Tensor | csr_array | None:
            return tensors.get(own + name)

        layers.append(_sparse_layer(config, heads, fetch, backend, csr_below))
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = 0
    model = model_class.from_pretrained(None, config=shallow, state_dict=rest, dtype=torch.float32)
    model.config.num_hidden_layers = config.num_hidden_layers
    model.bert.encoder = SparseEncoder(model.config, backend, layers)
    return _without_saving(model.eval())


def _check_model(model: nn.Module) -> None:
    bert = model if isinstance(model, BertModel) else getattr(model, "bert", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(bert, BertModel):
        raise ValueError(
            "sparse inference knows BERT only, plain or masked, with any head; this is a "
            f"{type(model).__name__}"
        )
    if isinstance(bert.encoder, SparseEncoder):
        raise ValueError("this model is already sparse")
    if model.config.is_decoder:
        raise ValueError("sparse inference needs an encoder; is_decoder is set in this config")
    if any(parameter.dtype != torch.float32 for parameter in bert.encoder.parameters()):
        raise ValueError("sparse inference computes in float32: call float() on the model first")
    for block in bert.encoder.layer:
        for name, module in block.named_modules():
            kind = type(module)
            if name in NAMES.values() and kind not in (nn.Linear, MaskedLinear, Bias):
                raise ValueError(
                    f"the encoder has a {kind.__module__}.{kind.__name__} instead of nn.Linear: "
                    "give the model without quantisation or adapters"
                )


def _unfit(model: PreTrainedModel) -> str | None:
    """The reason why CSR cannot be used for this model, or does not pay."""
    devices = {parameter.device.type for parameter in model.parameters()} - {"cpu"}
    if devices:
        return f"CSR does not pay on {'/'.join(sorted(devices))}"
    if model.training:
        return "the model is in training mode, for which there are no sparse kernels"
    return None


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The bertarized form of a masked model; a plain model is returned as it is."""
    if not masked_layers(model):
        return model
    names = (kind.__name__.removeprefix("Masked") for kind in type(model).__mro__)
    plain_class = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    config = bertarized_config(model.config)
    state = {name: tensor.detach() for name, tensor in bertarized_state_dict(model).items()}
    plain = plain_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    if getattr(model, "pooler", True) is None:
        plain.pooler = None
    return plain.to(model.device).train(model.training)


def _backend(kernel: str) -> type[Native] | type[Library]:
    """Raises ValueError when `kernel` is "native" and cannot be built."""
    if kernel == Library.name:
        return Library
    try:
        load_native()
    except UserError as error:
        if kernel == Native.name:
            raise ValueError(f"kernel 'native' cannot be used: {error}") from error
        logger.warning("%s: using torch's CSR product, which is slower", error)
        return Library
    return Native


def _sparse_layer(
    config: BertConfig,
    heads: int,
    fetch: Callable[[str], Tensor | csr_array | None],
    backend: type[Native] | type[Library],
    csr_below: float,
) -> SparseLayer:
    """A compacted layer; for `fetch` see `read_layer`."""

    def prepare(affine: Affine) -> Matrix:
        rows, columns = affine.weight.shape
        return backend.prepare(affine, affine.weight.nnz < csr_below * max(1, rows * columns))

    layer = compact(read_layer(fetch, heads), config.hidden_act)
    norms = [fetch(f"{norm}.{part}") for norm in NORMS for part in ("weight", "bias")]
    return SparseLayer(layer, norms, prepare)


def _without_saving(model: PreTrainedModel) -> PreTrainedModel:
    model.save_pretrained = _refuse_to_save
    return model


def _refuse_to_save(*args, **kwargs):
    raise ValueError(
        "a model of sparsify cannot be saved: save the model that it was made from, or what "
        "emmental.inference.compacted makes of it"
    )
