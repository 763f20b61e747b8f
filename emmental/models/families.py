"""Encoder families: where a stock model keeps its parts.

A family is a row of `FAMILIES`, named by the `model_type` of its stock models. `masked.py` makes
the masked classes of each row.
"""

import re
from dataclasses import dataclass

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

HEADS = ("QuestionAnswering", "SequenceClassification", "TokenClassification", "MultipleChoice")
MASKED, COMPACT = "masked_", "compact_"


@dataclass(frozen=True)
class Family:
    """Names of the parts of a base model.

    encoder: the module whose `nn.Linear` are masked. layers: the list of its layers; a star stands
    for every module of a list of such lists. embeddings: the module that is frozen.
    heads: the `nn.Linear` of a layer that have rows for each head (query and key, then value), and
        the one that has columns (output). neurons: likewise the two of the feed-forward part. A
        family without these names has no granularity of heads and neurons.
    head_rows: whether single rows of a head can go: the scale of scores does not depend on them.
    bias_per_head: whether attention adds a bias that has a part for each head.
    norms: the LayerNorm after attention and the one at the end, if a layer computes what BERT's
        does: sparse kernels then fit. activation: the setting that names the activation of the
        feed-forward part.
    """

    encoder: str
    layers: str
    embeddings: str = "embeddings"
    heads: tuple[str, ...] = ()
    neurons: tuple[str, ...] = ()
    head_rows: bool = False
    bias_per_head: bool = False
    norms: tuple[str, ...] = ()
    activation: str = "hidden_act"

    @property
    def parts(self) -> dict:
        """What the configuration of a compact model says of its layers."""
        return {"layers": self.layers, "heads": list(self.heads), "neurons": list(self.neurons)}


BERT = Family(
    encoder="encoder",
    layers="encoder.layer",
    heads=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ),
    neurons=("intermediate.dense", "output.dense"),
    head_rows=True,
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
)
FAMILIES = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    # The projection of small embeddings to the width of the layers, outside `encoder`, stays dense.
    "electra": BERT,
    "distilbert": Family(
        encoder="transformer",
        layers="transformer.layer",
        heads=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        neurons=("ffn.lin1", "ffn.lin2"),
        head_rows=True,
        norms=("sa_layer_norm", "output_layer_norm"),
        activation="activation",
    ),
    "mpnet": Family(
        encoder="encoder.layer",  # beside it are the relative positions
        layers="encoder.layer",
        heads=("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
        neurons=("intermediate.dense", "output.dense"),
        bias_per_head=True,
    ),
    # All layers of a group are one module: its matrices have one set of scores, and count once. The
    # projection of the embeddings beside the groups belongs to no layer, and stays dense.
    "albert": Family(
        encoder="encoder.albert_layer_groups",
        layers="encoder.albert_layer_groups.*.albert_layers",
        heads=("attention.query", "attention.key", "attention.value", "attention.dense"),
        neurons=("ffn", "ffn_output"),
        head_rows=True,
    ),
    # A layer's projections of positions are matrices like the others, with rows for each head, and
    # are masked. Published models of v2 and v3 share them with query and key (`share_att_key`).
    "deberta-v2": Family(
        encoder="encoder.layer",  # beside it are the relative positions
        layers="encoder.layer",
        heads=(
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.pos_query_proj",
            "attention.self.pos_key_proj",
            "attention.self.value_proj",
            "attention.output.dense",
        ),
        neurons=("intermediate.dense", "output.dense"),
    ),
    # Query, key and value are one matrix, and so are inputs and gates: the rows of a head, or of a
    # neuron, do not lie together. So scores stand for weights or blocks, not for heads and neurons.
    "modernbert": Family(encoder="layers", layers="layers"),
}


def is_masked(model_type: str) -> bool:
    """Whether this is the `model_type` of a masked model, of a family or `masked` alone."""
    return model_type.partition("_")[0] == "masked"


def stock_type(model_type: str) -> str:
    """The `model_type` of the stock model that a masked or compact one was made from."""
    prefix = next((prefix for prefix in (MASKED, COMPACT) if model_type.startswith(prefix)), "")
    return model_type.removeprefix(prefix)


def class_of(model_type: str, head: str = "") -> type[PreTrainedModel] | None:
    """The class of a stock, masked or compact model with a head of `HEADS`, or the base model.

    None if there is none.
    """
    if model_type not in CONFIG_MAPPING:
        return None
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    return auto._model_mapping.get(CONFIG_MAPPING[model_type], None)


def stock_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers that a masked class, or one derived from it, is made from."""
    return next(kind for kind in model_class.__mro__ if kind.__module__.startswith("transformers."))


def remade(
    model: PreTrainedModel, kind: type[PreTrainedModel], config: PreTrainedConfig, state: dict
) -> PreTrainedModel:
    """A model of another class with these weights, on the device and in the mode of `model`."""
    made = kind.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    if getattr(model, "pooler", True) is None:
        made.pooler = None
    return made.to(model.device).train(model.training)


def prefix_of(model_class: type[PreTrainedModel], part: str = "embeddings") -> str:
    """The start of the names of the tensors of a `Family`'s part, in a class with a head."""
    family = FAMILIES[stock_type(model_class.config_class.model_type)]
    return f"{model_class.base_model_prefix}.{getattr(family, part)}."


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a stock, masked or compact model, by its configuration."""
    return FAMILIES[stock_type(config.model_type)]


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of a model of any kind, with any head."""
    return model.base_model.get_submodule(family_of(model.config).encoder)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the encoder of a model."""
    pattern = family_of(model.config).layers.replace(".", r"\.").replace("*", r"\d+") + r"\.\d+"
    return [x for name, x in model.base_model.named_modules() if re.fullmatch(pattern, name)]
