"""Models with masked linear layers: transformers' classes with the encoder's `nn.Linear` replaced.

The `nn.Linear` of each encoder layer are masked: in BERT the six of query, key, value, attention
output, intermediate and output. Pooler and heads stay dense. The embeddings are frozen at their
pre-trained values. The state dict has the keys of the stock class plus `<linear>.mask_scores`: a
plain checkpoint loads with fresh scores, a checkpoint of the 2020 code with its own.

    model = MaskedBertForQuestionAnswering.from_pretrained("bert-base-uncased")
    model(input_ids=..., attention_mask=..., token_type_ids=..., threshold=0.15)

`forward` takes the arguments of the stock model and `threshold` (default: the configuration's).
Every forward finds its own masks; in a block of `emmental.modules.masked` they are found once.

`make_masked` makes the classes of a family. Their names are those of the stock classes with
`Masked` in front; `model_type` has `masked_` in front. For BERT, these statements do the same:

    class MaskedBertConfig(MaskSettings, BertConfig):
        model_type = "masked_bert"

    class MaskedBertModel(MaskedModel, BertModel):
        config_class = MaskedBertConfig

    class MaskedBertForQuestionAnswering(MaskedHead, BertForQuestionAnswering):
        config_class, masked_base = MaskedBertConfig, MaskedBertModel
        _keys_to_ignore_on_load_unexpected = [r"^bert\\.pooler\\."]

and likewise for each further head.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..modules.granularity import Block, Columns, Rows, Weight, find_granularity
from ..modules.masked_nn import MaskedLinear, drop_masked_weights, make_masked_weights
from ..modules.masks import in_force, lock_of, masked, masked_layers
from ..modules.methods import all_settings, find_method, score_suffixes
from ..modules.swap import swap_linears
from .families import (
    FAMILIES,
    HEADS,
    MASKED,
    class_of,
    encoder_of,
    family_of,
    layers_of,
    stock_type,
)


def register(config_class: type[PreTrainedConfig], model_classes: Iterable[type]) -> None:
    """Let the Auto classes load the base model and the heads of a configuration."""
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
                shared = kinds.setdefault((side, count), side(count, kind))
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
    """The masks of one forward: those of the block around it, or else masks of its own.

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
        raise ValueError(
            f"threshold={threshold} inside a block masked at {given.threshold}: leave it out, or "
            "call the model outside the block"
        )
    yield


def _checkpoint_with_masks(model: nn.Module, checkpoint: Callable, function: Callable, *args):
    """Checkpoint a layer so that its second run, in the backward, has the masks of the first."""
    layers = masked_layers(model).layers
    masks = [layer.in_force for layer in layers]

    def rerun(*args):
        with in_force(layers, masks):
            return function(*args)

    return checkpoint(rerun, *args)


@dataclass
class MaskSettings:
    """What the configuration of a masked model says of its masks.

    pruning_method: the name of one of `emmental.modules.methods.METHODS`.
    mask_init, mask_scale: the initial scores, see `MaskedLinear`.
    threshold: the last threshold that was used: a fraction in [0, 1]; for the method `threshold`,
        any number. None if unknown, as in checkpoints of the 2020 code.
    global_topk: whether all matrices are ranked together.
    granularity: what one score stands for, a name in `emmental.modules.granularity.GRANULARITIES`.
    block_rows, block_columns: the size of a block, for granularities with blocks.
    structure_times: with `global_topk` and the granularity `structure`, the times of a layer with
        so many heads or neurons: see `keep_within_time`. The threshold is then a fraction of time.
    The settings of a method are fields, too, in the models of this method.
    """

    pruning_method: str = "topK"
    mask_init: str = "constant"
    mask_scale: float | int = 0.0
    threshold: float | int | None = None
    global_topk: bool = False
    granularity: str = "weight"
    block_rows: int = 32
    block_columns: int = 32
    structure_times: dict | None = None


def mask_fields() -> tuple[str, ...]:
    """The fields of a configuration that concern masks, with the settings of all methods."""
    return *(field.name for field in fields(MaskSettings)), *all_settings()


def make_masked(model_type: str) -> dict[str, type]:
    """Make and register the masked classes of a row of `FAMILIES`. Returns them by name.

    The classes are attributes of this module, where pickles look for them.
    """
    config = _derive(MaskSettings, CONFIG_MAPPING[model_type], model_type=MASKED + model_type)
    stock = class_of(model_type)
    base = _derive(MaskedModel, stock, config_class=config)
    unused = rf"^{stock.base_model_prefix}\.pooler\."  # in checkpoints of the 2020 code
    models = [base]
    for head in HEADS:
        stock_head = class_of(model_type, head)
        if stock_head:
            ignored = [*(stock_head._keys_to_ignore_on_load_unexpected or ()), unused]
            own = {"masked_base": base, "_keys_to_ignore_on_load_unexpected": ignored}
            models.append(_derive(MaskedHead, stock_head, config_class=config, **own))
    register(config, models)
    made = {each.__name__: each for each in (config, *models)}
    globals().update(made)
    return made


def _derive(mixin: type, stock: type, **attributes) -> type:
    """The masked class of a stock class."""
    doc = f"`{stock.__name__}` with `{mixin.__name__}`."
    return type(
        f"Masked{stock.__name__}",
        (mixin, stock),
        {"__doc__": doc, "__module__": __name__, **attributes},
    )


CLASSES = {name: each for row in FAMILIES for name, each in make_masked(row).items()}
