"""Inference that is faster because the model is pruned: `sparsify(model)`.

The encoder of BERT is compacted first (`compaction.py`: dead heads, neurons and rows go, exactly). On a CPU its
matrices with few weights then become CSR, and the encoder computes on them
(`encoder.py`, `kernels.py`); embeddings and head stay the stock ones, so that any head works.

    model = sparsify(BertForQuestionAnswering.from_pretrained("bertarized"))
    with torch.inference_mode():
        outputs = model(**tokenizer(question, context, return_tensors="pt"))
"""

import copy
import logging
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.activations import ACT2FN

from ..errors import UserError
from ..export import bertarized_config, bertarized_state_dict
from ..families import encoder_of
from ..modules.masked_nn import MaskedLinear
from ..modules.masks import masked_layers
from .compaction import NAMES, compact, compact_model, density, read_layer
from .encoder import SparseEncoder, SparseLayer
from .kernels import BACKENDS, MOST_COLUMNS, Library, Native, load_native

logger = logging.getLogger(__name__)

KERNELS = ("auto", *BACKENDS, "compact")
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
PRUNED = 0.99  # a model with more left than this is called dense
CSR_BELOW = 0.3  # density: a matrix with fewer weights than this is faster in CSR


def sparsify(
    model: PreTrainedModel, kernel: str = "auto", csr_below: float = CSR_BELOW
) -> PreTrainedModel:
    """A model with the outputs of `model` (float32 rounding aside) that is faster because it is pruned.

    model: a BERT of any head, bertarized or masked. It is left as it is.
    kernel: "native" (kernels of our own; they need a C++ compiler once), "library" (torch's CSR product),
        "compact" (dense products, smaller by what compaction takes out), or "auto": native where there is a
        compiler, else library; compact where no sparse product pays.
    csr_below: density, in [0, 1], below which a matrix becomes CSR.
    On a GPU, or for a model in training mode, CSR does not pay: "auto" compacts only, and says so.
    Raises ValueError for another architecture, an unknown kernel, or a kernel that cannot work here.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}")
    if not 0.0 <= csr_below <= 1.0:
        raise ValueError(f"csr_below is a density in [0, 1], not {csr_below}")
    _check_model(model)
    unfit = _unfit(model)
    if unfit and kernel in BACKENDS:
        raise ValueError(f"kernel {kernel!r} cannot be used: {unfit}; choose auto or compact")
    model = _plain(model)
    left = density(encoder_of(model))
    if left > PRUNED:
        logger.warning(
            "%.0f%% of the encoder's weights are left: nothing is gained by sparse inference",
            100 * left,
        )
    if unfit:
        logger.warning("%s: compaction only, with dense products", unfit)
    if kernel == "compact" or unfit or (kernel == "auto" and left >= csr_below):
        return _compacted(model)
    backend = _backend(kernel)
    encoder = encoder_of(model)
    layers = [
        _sparse_layer(
            model.config,
            block.attention.self.num_attention_heads,
            block.get_parameter,
            backend,
            csr_below,
        )
        for block in encoder.layer
    ]
    sparse = copy.deepcopy(model, {id(encoder): SparseEncoder(model.config, backend, layers)})
    sparse.config._attn_implementation = "sdpa"  # the form of mask that SparseEncoder takes
    return _finished(sparse)


def sparse_model(
    model_class: type[PreTrainedModel],
    config: BertConfig,
    tensors: dict,
    kernel: str = "auto",
    csr_below: float = CSR_BELOW,
) -> PreTrainedModel:
    """The sparse model of these tensors, by their names in `model_class`: csr_array for the encoder's matrices.

    Embeddings and head are torch tensors. No matrix is made dense but those that are denser than `csr_below`.
    """
    backend = _backend(kernel)
    prefix = f"{model_class.base_model_prefix}.encoder.layer."
    layers = []
    for number in range(config.num_hidden_layers):
        own = f"{prefix}{number}."
        fetch = {
            name.removeprefix(own): tensor
            for name, tensor in tensors.items()
            if name.startswith(own)
        }.__getitem__
        layers.append(_sparse_layer(config, config.num_attention_heads, fetch, backend, csr_below))
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = 0
    model = model_class.from_pretrained(None, config=shallow, state_dict=rest, dtype=torch.float32)
    model.config.num_hidden_layers = config.num_hidden_layers
    model.bert.encoder = SparseEncoder(model.config, backend, layers)
    return _finished(model.eval())


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(config, BertConfig) or not (
        isinstance(model, BertModel) or isinstance(getattr(model, "bert", None), BertModel)
    ):  # fmt: skip
        raise ValueError(
            f"sparse inference knows BERT, plain or masked, with any head; this is a {name}"
        )
    encoder = encoder_of(model)
    if isinstance(encoder, SparseEncoder):
        raise ValueError("this model is sparse already")
    if config.is_decoder or config.add_cross_attention:
        raise ValueError(
            "sparse inference knows BERT as an encoder; this one is a decoder (is_decoder of its configuration)"
        )
    if any(parameter.dtype != torch.float32 for parameter in encoder.parameters()):
        raise ValueError("sparse inference computes in float32: call float() on the model first")
    if not isinstance(config.hidden_act, str) or config.hidden_act not in ACT2FN:
        raise ValueError(
            f"unknown hidden_act {config.hidden_act!r} in the configuration of the {name}"
        )
    for block in encoder.layer:
        function = block.intermediate.intermediate_act_fn
        if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
            raise ValueError(
                f"hidden_act {config.hidden_act!r} has parameters of its own, which sparse inference does not know"
            )
        if type(function) is not type(ACT2FN[config.hidden_act]):
            raise ValueError(
                f"the layers have another activation than hidden_act {config.hidden_act!r} of the configuration"
            )
    linears = [block.get_submodule(name) for block in encoder.layer for name in NAMES.values()]
    if any(linear.bias is None for linear in linears if isinstance(linear, nn.Linear)):
        raise ValueError(
            "the encoder has Linears without bias: sparse inference knows those of BERT, which have one"
        )
    if odd := {
        type(linear).__name__ for linear in linears if type(linear) not in (nn.Linear, MaskedLinear)
    }:
        raise ValueError(
            f"the encoder has {', '.join(sorted(odd))} in place of nn.Linear (quantised, adapted): give the plain model"
        )


def _unfit(model: PreTrainedModel) -> str | None:
    """Why CSR does not pay or cannot be used for this model."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        return f"CSR does not pay on {'/'.join(sorted(devices - {'cpu'}))}"
    if model.training:
        return "the model is in training mode, for which there are no sparse kernels"
    if max(model.config.hidden_size, model.config.intermediate_size) > MOST_COLUMNS:
        return f"the matrices have more than {MOST_COLUMNS} columns"
    return None


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or the plain one that a masked one is with its masks."""
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


def _backend(kernel: str) -> type:
    """Raises ValueError when the native kernels are asked for and cannot be had."""
    if kernel == Library.name:
        return Library
    try:
        load_native()
    except UserError as error:
        if kernel == Native.name:
            raise ValueError(f"kernel 'native' cannot be used: {error}") from error
        logger.warning("%s: torch's CSR product is used, which is slower", error)
        return Library
    return Native


def _sparse_layer(
    config: BertConfig, heads: int, fetch: Callable[[str], Tensor], backend: type, csr_below: float
) -> SparseLayer:
    layer = compact(read_layer(fetch, heads), config.hidden_act)

    def prepare(affine):
        rows, columns = affine.weight.shape
        return backend.prepare(
            affine, sparse=affine.weight.nnz < csr_below * max(1, rows * columns)
        )

    norms = [
        torch.as_tensor(fetch(f"{norm}.{part}")) for norm in NORMS for part in ("weight", "bias")
    ]
    return SparseLayer(layer, norms, prepare)


def _compacted(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    compact_model(model, encoder_of(model))
    return _finished(model)


def _finished(model: PreTrainedModel) -> PreTrainedModel:
    model.save_pretrained = _refuse_to_save
    return model


def _refuse_to_save(*args, **kwargs):
    raise ValueError(
        "a sparse or compacted model fits no configuration: save the model that it was made from"
    )
