"""Inference that is faster because the model is pruned: `sparsify(model)`.

The encoder is first compacted: heads, neurons and rows that no output depends on are removed
exactly (`compact/algebra.py`). On a CPU, matrices with few weights then become sparse (CSR), and
the encoder computes with them (`encoder.py`, `backends.py`). Embeddings and head stay the stock
modules, so any head works. There are kernels for BERT and the families whose layers compute what
BERT's do (those with `norms` in `families.FAMILIES`). Other families are only compacted.

    model = sparsify(BertForQuestionAnswering.from_pretrained("bertarized"))
    with torch.inference_mode():
        outputs = model(**tokenizer(question, context, return_tensors="pt"))
"""

import copy
import logging

import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.export import bertarize
from ..compact.algebra import Affine, Fetch, activation_of, compact, density, read_layer
from ..compact.configuration import CompactSettings
from ..compact.modeling import Bias, NoOutputs, sizes_of
from ..compact.surgery import compact_model
from ..models.families import FAMILIES, encoder_of, family_of, layers_of, prefix_of, stock_type
from ..modules.masked_nn import MaskedLinear
from ..system.errors import UserError
from .backends import BACKENDS, Library, Matrix, Native
from .build import load_native
from .encoder import SparseEncoder, SparseLayer

logger = logging.getLogger(__name__)

KERNELS = ("auto", *BACKENDS, "compact")
PRUNED = 0.99  # a model with a higher density counts as dense
CSR_BELOW = 0.3  # a matrix with a lower density is faster in CSR


def sparsify(
    model: PreTrainedModel, kernel: str = "auto", csr_below: float = CSR_BELOW
) -> PreTrainedModel:
    """A faster model with the outputs of the pruned `model`, up to float32 rounding.

    model: a bertarized, compact or masked encoder with any head; not changed.
    kernel: "native" (our C++ kernels, compiled at first use), "library" (torch's CSR product),
        "compact" (dense products, made smaller by compaction), or "auto": compact for an encoder
        whose density is not below `csr_below`, else native, or library without a C++ compiler.
    csr_below: density, in [0, 1], below which a matrix becomes CSR.
    On a GPU and in training mode, CSR does not pay, and some families have no kernels. "auto" then
    only compacts what can be compacted, with a warning.
    Raises ValueError for another architecture, an unknown kernel, or a kernel that cannot be used.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}")
    if not 0.0 <= csr_below <= 1.0:
        raise ValueError(f"csr_below is a density in [0, 1], not {csr_below}")
    _check_model(model)
    unfit, instead = _unfit(model)
    if unfit and kernel in BACKENDS:
        raise ValueError(f"kernel {kernel!r} cannot be used: {unfit}; choose auto or compact")
    if unfit:
        logger.warning("%s: %s", unfit, instead)
    model = bertarize(model)
    encoder = encoder_of(model)
    left = density(encoder)
    if left > PRUNED:
        logger.warning(
            "%.0f%% of the encoder's weights remain: sparse inference gains nothing", 100 * left
        )
    if kernel == "compact" or unfit or (kernel == "auto" and left >= csr_below):
        sparse = copy.deepcopy(model)
        compact_model(sparse)
        return _without_saving(sparse)
    backend, family, layers = _backend(kernel), family_of(model.config), []
    for block in layers_of(model):
        fetch = dict(block.named_parameters()).get
        heads = sizes_of(block, family.parts)[0]
        layers.append(_sparse_layer(model.config, heads, fetch, backend, csr_below))
    sparse = copy.deepcopy(model, {id(encoder): SparseEncoder(model.config, backend, layers)})
    sparse.config._attn_implementation = "sdpa"  # the base model then makes a mask that fits
    return _without_saving(sparse)


def sparse_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, Tensor | csr_array],
) -> PreTrainedModel:
    """The sparse model of these tensors, by their names in `model_class`.

    Only for families with kernels. The encoder's matrices are csr_arrays; those with a density
    below `CSR_BELOW` are never made dense.
    """
    backend = _backend("auto")
    family = family_of(config)
    prefix = prefix_of(model_class, "layers")
    whole = [config.num_attention_heads] * config.num_hidden_layers
    layers = []
    for number, heads in enumerate(getattr(config, "layer_heads", whole)):

        def fetch(name: str, own: str = f"{prefix}{number}.") -> Tensor | csr_array | None:
            return tensors.get(own + name)

        layers.append(_sparse_layer(config, heads, fetch, backend, CSR_BELOW))
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = 0
    if isinstance(shallow, CompactSettings):
        shallow.layer_heads = shallow.layer_head_sizes = shallow.layer_neurons = []
    model = model_class.from_pretrained(None, config=shallow, state_dict=rest, dtype=torch.float32)
    model.config.num_hidden_layers = config.num_hidden_layers
    model.base_model.set_submodule(family.encoder, SparseEncoder(model.config, backend, layers))
    return _without_saving(model.eval())


def _check_model(model: nn.Module) -> None:
    kind = isinstance(model, PreTrainedModel) and stock_type(model.config.model_type)
    if kind not in FAMILIES:
        raise ValueError(
            f"sparse inference knows {', '.join(FAMILIES)}, plain or masked, with any head, "
            f"not {type(model).__name__}"
        )
    encoder, family = encoder_of(model), family_of(model.config)
    if isinstance(encoder, SparseEncoder):
        raise ValueError("this model is already sparse")
    if getattr(model.config, "is_decoder", False):
        raise ValueError("sparse inference needs an encoder; is_decoder is set in this config")
    if any(parameter.dtype != torch.float32 for parameter in encoder.parameters()):
        raise ValueError("sparse inference computes in float32: call float() on the model first")
    for block in layers_of(model):
        for name, module in block.named_modules():
            known, kind = name in family.heads + family.neurons, type(module)
            if known and kind not in (nn.Linear, MaskedLinear, Bias, NoOutputs):
                raise ValueError(
                    f"the encoder has {kind.__module__}.{kind.__name__} instead of nn.Linear: give "
                    "the model without quantisation or adapters"
                )


def _unfit(model: PreTrainedModel) -> tuple[str, str]:
    """Why CSR cannot be used for this model, or does not pay, and what happens instead."""
    if not family_of(model.config).norms:
        reason = f"there are no sparse kernels for {stock_type(model.config.model_type)} layers"
        if activation_of(model.config):
            return reason, "compaction only, with dense products"
        return reason, "computes dense"
    instead = "compaction only, with dense products"
    devices = {parameter.device.type for parameter in model.parameters()} - {"cpu"}
    if devices:
        return f"CSR does not pay on {'/'.join(sorted(devices))}", instead
    if model.training:
        return "the model is in training mode, for which there are no sparse kernels", instead
    return "", instead


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
    config: PreTrainedConfig,
    heads: int,
    fetch: Fetch,
    backend: type[Native] | type[Library],
    csr_below: float,
) -> SparseLayer:
    """A compacted layer; for `fetch` see `read_layer`."""

    def prepare(affine: Affine) -> Matrix:
        rows, columns = affine.weight.shape
        return backend.prepare(affine, affine.weight.nnz < csr_below * max(1, rows * columns))

    family = family_of(config)
    layer = compact(read_layer(fetch, family, heads), activation_of(config))
    norms = [fetch(f"{norm}.{part}") for norm in family.norms for part in ("weight", "bias")]
    return SparseLayer(layer, norms, prepare)


def _without_saving(model: PreTrainedModel) -> PreTrainedModel:
    model.save_pretrained = _refuse_to_save
    return model


def _refuse_to_save(*args, **kwargs):
    raise ValueError(
        "a model of sparsify cannot be saved: save the model that it was made from, or the result "
        "of emmental.inference.compacted"
    )
