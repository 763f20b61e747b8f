"""Encoder families: where a stock model of transformers keeps what masking touches, and how it becomes a masked one.

A family is a row of `FAMILIES` and, in its modelling file, a class statement for the base model and for each head:

    class MaskedBertModel(MaskedModel, BertModel): ...
    class MaskedBertForQuestionAnswering(MaskedBertHead, BertForQuestionAnswering): ...

Its classes are named like the stock ones with "Masked" in front, its `model_type` like the stock one with "masked_", and
both are registered with the Auto classes.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from .modules.masked_nn import MaskedLinear, swap_linears
from .modules.masks import LOCK, in_force, masked, masked_layers

HEADS = ("QuestionAnswering", "SequenceClassification", "TokenClassification", "MultipleChoice")
MASKED = "masked_"  # what precedes the stock `model_type` in that of a masked model


@dataclass(frozen=True)
class Family:
    """Where the base model of an encoder keeps its parts, as dotted names, and the heads there are.

    encoder: the module whose `nn.Linear` are masked. layers: the list of its layers. embeddings: what stays frozen.
    """

    encoder: str
    layers: str
    embeddings: str = "embeddings"
    heads: tuple[str, ...] = HEADS


FAMILIES = {"bert": Family(encoder="encoder", layers="encoder.layer")}


def is_masked(model_type: str) -> bool:
    """Whether a `model_type` is that of a masked model."""
    return model_type.startswith(MASKED)


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a stock or masked model, by its configuration."""
    return FAMILIES[config.model_type.removeprefix(MASKED)]


def head_name(class_name: str) -> str | None:
    """The head in the name of a model class of any family, None if there is none of `HEADS`."""
    head = re.sub(r"^\w*?For(?=[A-Z])", "", class_name)
    return head if head in HEADS else None


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of a stock or masked model with any head."""
    return model.base_model.get_submodule(family_of(model.config).encoder)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of its encoder."""
    return model.base_model.get_submodule(family_of(model.config).layers)


class Masked:
    """What the masked base model and the masked heads of every family share."""

    _keep_in_fp32_modules_strict = ["mask_scores"]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "forward") and "threshold" not in inspect.signature(cls.forward).parameters:
            cls.forward = _with_threshold(cls.forward)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_embeddings()  # loading puts trainable parameters in place of the frozen ones
        return loaded

    def freeze_embeddings(self) -> None:
        """Keep the embeddings at their pre-trained values."""
        self.base_model.get_submodule(family_of(self.config).embeddings).requires_grad_(False)

    def mask_encoder(self) -> None:
        """Put masked layers in place of the encoder's `nn.Linear`, and freeze the embeddings."""
        names = ("mask_init", "mask_scale", "pruning_method")
        swap_linears(encoder_of(self), **{name: getattr(self.config, name) for name in names})
        self.freeze_embeddings()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **options
    ):
        keeping = _KeepsMasks(self, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, keeping, **options)

    def _init_weights(self, module):
        # from_pretrained builds the model without storage and calls this for what the checkpoint lacks.
        if isinstance(module, MaskedLinear):
            module.reset_scores()
        super()._init_weights(module)


class MaskedModel(Masked):
    """A stock base model with masked encoder layers."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.mask_encoder()


class MaskedHead(Masked):
    """A stock head over the masked base model of its family, `masked_base`."""

    masked_base: type[MaskedModel]

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # transformers asks the base model's own class to initialise what a checkpoint lacks: the scores.
        self.base_model.__class__ = self.masked_base
        self.base_model.mask_encoder()


@contextmanager
def _masked_forward(model: nn.Module, threshold: float | None = None) -> Iterator[None]:
    """What a forward of a masked model runs in: the block around it, or else one of its own.

    Raises ValueError for a threshold that is not the block's.
    """
    with LOCK:  # of several threads one at a time has masks of its own in force
        block = next((layer for layer in masked_layers(model).values() if layer.in_force), None)
        if not block or (
            block.in_force.sampled and not model.training
        ):  # evaluation takes no samples
            with masked(model, threshold, lasting=False):
                yield
            return
    given = block.in_force.threshold
    if threshold is not None and block.method.threshold and float(threshold) != given:
        raise ValueError(f"threshold={threshold} inside a block masked at {given}")
    yield


class _KeepsMasks:
    """A checkpointing function that runs a layer again with the masks of its forward."""

    def __init__(self, model: nn.Module, checkpoint: Callable):
        self.model, self.checkpoint = model, checkpoint

    def __call__(self, function: Callable, *args):
        layers = list(masked_layers(self.model).values())
        masks = [layer.in_force for layer in layers]

        def recomputed(*args):
            with in_force(layers, masks):
                return function(*args)

        return self.checkpoint(recomputed, *args)


def _with_threshold(stock):
    """The forward of a stock class with `threshold` beside its own arguments."""

    @functools.wraps(stock)
    def forward(self, *args, threshold: float | None = None, **kwargs):
        with _masked_forward(self, threshold):
            return stock(self, *args, **kwargs)

    signature = inspect.signature(stock)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    own = inspect.Parameter(
        "threshold", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float | None
    )
    forward.__signature__ = signature.replace(parameters=[*parameters, own, *rest])
    return forward
