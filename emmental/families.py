"""Encoder families: where a stock model keeps its parts, and how it becomes a masked model.

A family is a row of `FAMILIES` and, in its modelling file, a class for the base model and for each
head:

    class MaskedBertModel(MaskedModel, BertModel): ...
    class MaskedBertForQuestionAnswering(MaskedHead, BertForQuestionAnswering): ...

A masked class has the name of the stock class after "Masked", and the stock `model_type` after
"masked_". Both are registered with the Auto classes.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from .modules.masked_nn import MaskedLinear, swap_linears
from .modules.masks import LOCK, in_force, masked, masked_layers

HEADS = ("QuestionAnswering", "SequenceClassification", "TokenClassification", "MultipleChoice")
MASKED, COMPACT = "masked_", "compact_"
SCORES = (".mask_scores", ".mask_uncertainty")  # how their names in a state dict end


@dataclass(frozen=True)
class Family:
    """Names of the parts of a base model.

    encoder: the module whose `nn.Linear` are masked. layers: the list of its layers.
    embeddings: the module that is frozen.
    """

    encoder: str
    layers: str
    embeddings: str = "embeddings"


FAMILIES = {"bert": Family(encoder="encoder", layers="encoder.layer")}


def is_masked(model_type: str) -> bool:
    """Whether this is the `model_type` of a masked model."""
    return model_type.startswith(MASKED)


def stock_type(model_type: str) -> str:
    """The `model_type` of the stock model that a masked or compact one was made from."""
    prefix = next((prefix for prefix in (MASKED, COMPACT) if model_type.startswith(prefix)), "")
    return model_type.removeprefix(prefix)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a stock, masked or compact model, by its configuration."""
    return FAMILIES[stock_type(config.model_type)]


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of a model of any kind, with any head."""
    return model.base_model.get_submodule(family_of(model.config).encoder)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of its encoder."""
    return model.base_model.get_submodule(family_of(model.config).layers)


def register(config_class: type[PreTrainedConfig], model_classes: Iterable[type]) -> None:
    """Have the Auto classes load the base model and the heads of a configuration."""
    transformers.AutoConfig.register(config_class.model_type, config_class)
    transformers.AutoTokenizer.register(
        config_class, fast_tokenizer_class=transformers.BertTokenizerFast
    )
    for model_class in model_classes:
        head = "".join(model_class.__name__.partition("For")[1:])
        getattr(transformers, f"AutoModel{head}").register(config_class, model_class)


class Masked:
    """What the masked base models and heads of all families share."""

    _keep_in_fp32_modules_strict = ["mask_scores", "mask_uncertainty"]

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
        """Keep the embeddings at their pre-trained values."""
        self.base_model.get_submodule(family_of(self.config).embeddings).requires_grad_(False)

    def mask_encoder(self) -> None:
        """Replace the encoder's `nn.Linear` by masked layers, and freeze the embeddings."""
        names = "mask_init mask_scale pruning_method importance_beta uncertainty_beta".split()
        known = [name for name in names if hasattr(self.config, name)]  # of a user's own family
        swap_linears(encoder_of(self), **{name: getattr(self.config, name) for name in known})
        self.freeze_embeddings()

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
        with torch.device("meta"):  # transformers returns hidden states of classes it has built
            self.masked_base(config)


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
    with nullcontext() if torch.compiler.is_compiling() else LOCK:  # which graphs cannot hold
        layers = (x for x in model.modules() if isinstance(x, MaskedLinear))
        layer = next((layer for layer in layers if layer.in_force), None)
        if not layer or (layer.in_force.sampled and not model.training):  # no samples in evaluation
            with masked(model, threshold, lasting=False):
                yield
            return
    given = layer.in_force.threshold
    if layer.method.threshold and threshold not in (None, given):
        raise ValueError(f"threshold={threshold} inside a block masked at {given}")
    yield


def _checkpoint_with_masks(model: nn.Module, checkpoint: Callable, function: Callable, *args):
    """Checkpoint a layer so that its second run, in the backward, has the masks of its first."""
    layers = list(masked_layers(model).values())
    masks = [layer.in_force for layer in layers]

    def rerun(*args):
        with in_force(layers, masks):
            return function(*args)

    return checkpoint(rerun, *args)
