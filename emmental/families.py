"""Encoder families: where a stock model keeps its parts, and what makes it a masked model.

A family is a row of `FAMILIES`, named by the `model_type` of its stock models. `modeling_masked`
makes the masked classes of each row: a stock class with one of the two mixins of this file.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .modules.granularity import Block, Columns, Rows, Weight, find_granularity
from .modules.masked_nn import MaskedLinear, drop_masked_weights, make_masked_weights
from .modules.masks import in_force, lock_of, masked, masked_layers
from .modules.methods import find_method, score_suffixes
from .modules.swap import swap_linears

HEADS = ("QuestionAnswering", "SequenceClassification", "TokenClassification", "MultipleChoice")
MASKED, COMPACT = "masked_", "compact_"


@dataclass(frozen=True)
class Family:
    """Names of the parts of a base model.

    encoder: the module whose `nn.Linear` are masked. layers: the list of its layers; a star stands
    for every module of a list of such lists. embeddings: the module that is frozen.
    heads: the `nn.Linear` of a layer that have rows for each head (query, key, last value), and the
        one that has columns (output). neurons: likewise the two of the feed-forward part. Without
        them a model has no granularity of heads and neurons.
    norms: the LayerNorm after attention and the one at the end, if a layer computes what BERT's
        does: then there are sparse kernels for it. activation: the setting of the feed-forward
        part's activation.
    """

    encoder: str
    layers: str
    embeddings: str = "embeddings"
    heads: tuple[str, ...] = ()
    neurons: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    activation: str = "hidden_act"


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
        norms=("sa_layer_norm", "output_layer_norm"),
        activation="activation",
    ),
    "mpnet": Family(
        encoder="encoder.layer",  # beside it are the relative positions
        layers="encoder.layer",
        heads=("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
        neurons=("intermediate.dense", "output.dense"),
    ),
    # All layers of a group are one module: its matrices have one set of scores, and count once. The
    # projection of the embeddings beside the groups belongs to no layer, and stays dense.
    "albert": Family(
        encoder="encoder.albert_layer_groups",
        layers="encoder.albert_layer_groups.*.albert_layers",
        heads=("attention.query", "attention.key", "attention.value", "attention.dense"),
        neurons=("ffn", "ffn_output"),
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
    # neuron, do not lie together. So there are weights and blocks, but no heads and neurons.
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


def prefix_of(model_class: type[PreTrainedModel], part: str = "embeddings") -> str:
    """How the names of the tensors of a `Family`'s part start in a class with a head."""
    family = FAMILIES[stock_type(model_class.config_class.model_type)]
    return f"{model_class.base_model_prefix}.{getattr(family, part)}."


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a stock, masked or compact model, by its configuration."""
    return FAMILIES[stock_type(config.model_type)]


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of a model of any kind, with any head."""
    return model.base_model.get_submodule(family_of(model.config).encoder)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of its encoder."""
    *parents, own = family_of(model.config).layers.split(".*.")
    modules = [model.base_model]
    for name in parents:
        modules = [child for module in modules for child in module.get_submodule(name)]
    return [layer for module in modules for layer in module.get_submodule(own)]


def register(config_class: type[PreTrainedConfig], model_classes: Iterable[type]) -> None:
    """Have the Auto classes load the base model and the heads of a configuration."""
    stock = CONFIG_MAPPING[stock_type(config_class.model_type)]
    transformers.AutoConfig.register(config_class.model_type, config_class)
    transformers.AutoTokenizer.register(config_class, transformers.TOKENIZER_MAPPING[stock])
    for model_class in model_classes:
        head = "".join(model_class.__name__.partition("For")[1:])
        getattr(transformers, f"AutoModel{head}").register(config_class, model_class)


class Masked:
    """What the masked base models and heads of all families share."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "forward") and "threshold" not in inspect.signature(cls.forward).parameters:
            cls.forward = _with_threshold(cls.forward)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_embeddings()  # loading replaces the frozen parameters by trainable ones
        return loaded

    def freeze_embeddings(self) -> None:
        """Keep the embeddings, those of relative positions too, at their pre-trained values."""
        self.base_model.get_submodule(family_of(self.config).embeddings).requires_grad_(False)
        for module in self.base_model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)

    def mask_encoder(self) -> None:
        """Replace the encoder's `nn.Linear` by masked layers, and freeze the embeddings."""
        names = ("mask_init", "mask_scale", "pruning_method")
        options = {name: getattr(self.config, name) for name in names}
        for setting in find_method(self.config.pruning_method).settings:
            options[setting.name] = getattr(self.config, setting.name, setting.default)
            setattr(self.config, setting.name, options[setting.name])
        granularity = granularity_of(self.config)
        for kind in granularity.shared:
            self._share_scores(kind, options)
        _check_blocks(self, granularity)
        swap_linears(encoder_of(self), granularity=granularity, **options)
        for layer in layers_of(self):
            layer.register_forward_pre_hook(make_masked_weights)
            layer.register_forward_hook(drop_masked_weights)
        self.freeze_embeddings()
        keys, ends = list(self.state_dict()), score_suffixes()
        scores = [end for end in ends if any(key.endswith(end) for key in keys)]
        self._keep_in_fp32_modules_strict = {end[1:] for end in scores}

    def _share_scores(self, kind: str, options: dict) -> None:
        """Mask the heads or neurons (`kind`) of all layers: one score each, in its first matrix."""
        names = getattr(family_of(self.config), kind)
        if not names:
            family = stock_type(self.config.model_type)
            raise ValueError(
                f"granularity {self.config.granularity}: {family} has no matrices of single {kind}"
                "; choose weight or block"
            )
        kinds = {}  # one object for equal matrices, so that equal layers share compiled code
        for layer in layers_of(self):
            modules = dict(layer.named_modules())
            own = [name for name in names if name in modules]
            holder, count = None, layer.get_submodule(names[0]).out_features
            count = self.config.num_attention_heads if kind == "heads" else count
            for name in own:
                side = Columns if name == names[-1] else Rows
                shared = kinds.setdefault((side, count), side(count))
                swap_linears(layer, name.__eq__, granularity=shared, scores_of=holder, **options)
                holder = holder or layer.get_submodule(name)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **options
    ):
        # partial, not a closure: a copy of the model must refer to itself
        keeping = functools.partial(_checkpoint_with_masks, self, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, keeping, **options)

    def _init_weights(self, module):
        # from_pretrained calls this for the parameters that the checkpoint lacks
        if isinstance(module, MaskedLinear):
            module.reset_scores()
        super()._init_weights(module)


class MaskedModel(Masked):
    """A stock base model with a masked encoder."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.mask_encoder()


class MaskedHead(Masked):
    """A stock head over the masked base model of its family, `masked_base`."""

    masked_base: type[MaskedModel]

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.base_model.__class__ = self.masked_base  # its `_init_weights` is needed in loading
        self.base_model.mask_encoder()
        self._keep_in_fp32_modules_strict = self.base_model._keep_in_fp32_modules_strict
        # transformers returns the hidden states of the classes that its initialiser has seen.
        PreTrainedModel.__init__(self.masked_base.__new__(self.masked_base), config)


def granularity_of(config: PreTrainedConfig) -> Weight:
    """The granularity of a masked model. Raises ValueError for an unknown name."""
    return find_granularity(config.granularity).sized(config.block_rows, config.block_columns)


def _check_blocks(model: nn.Module, granularity: Weight) -> None:
    """Raises ValueError if blocks do not divide an `nn.Linear` of the encoder."""
    linears = [x for x in encoder_of(model).named_modules() if type(x[1]) is nn.Linear]
    for name, linear in linears if isinstance(granularity, Block) else ():
        try:
            granularity.shape(linear.weight.shape)
        except ValueError as error:
            rows, columns = zip(*(linear.weight.shape for _, linear in linears), strict=True)
            raise ValueError(
                f"{family_of(model.config).encoder}.{name}: {error}: block_rows can be "
                f"{_divisors(*rows)}, and block_columns {_divisors(*columns)}"
            ) from None


def _divisors(*numbers: int) -> str:
    common = math.gcd(*numbers)
    return ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)


def _with_threshold(stock: Callable) -> Callable:
    """The forward of a stock class, with `threshold` as a further argument."""
    signature = inspect.signature(stock)
    places = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in signature.parameters.values())

    @functools.wraps(stock)
    def forward(self, *args, threshold: float | None = None, **kwargs):
        if len(args) == places:  # self is not in args: ONNX's old exporter adds the threshold
            *args, threshold = args
        with _forward_masks(self, threshold):
            return stock(self, *args, **kwargs)

    kind = inspect.Parameter.KEYWORD_ONLY
    own = inspect.Parameter("threshold", kind, default=None, annotation=float | None)
    parameters = sorted([*signature.parameters.values(), own], key=lambda p: p.kind)
    forward.__signature__ = signature.replace(parameters=parameters)  # Trainer reads it
    return forward


@contextmanager
def _forward_masks(model: nn.Module, threshold: float | None) -> Iterator[None]:
    """The masks of one forward: those of the block around it, else its own.

    Raises ValueError for another threshold than the block's.
    """
    first = next(module for module in model.modules() if isinstance(module, MaskedLinear))
    with nullcontext() if torch.compiler.is_compiling() else lock_of(first):  # no graph has locks
        given = first.in_force
        if given is None or (given.sampled and not model.training):  # no samples in evaluation
            with masked(model, threshold, lasting=False):
                yield
            return
    if first.method.threshold_is and threshold not in (None, given.threshold):
        raise ValueError(f"threshold={threshold} inside a block masked at {given.threshold}")
    yield


def _checkpoint_with_masks(model: nn.Module, checkpoint: Callable, function: Callable, *args):
    """Checkpoint a layer so that its second run, in the backward, has the masks of its first."""
    layers = masked_layers(model).layers
    masks = [layer.in_force for layer in layers]

    def rerun(*args):
        with in_force(layers, masks):
            return function(*args)

    return checkpoint(rerun, *args)
