"""Models with masked linear layers: transformers' classes with the encoder's `nn.Linear` replaced.

The `nn.Linear` of each encoder layer are masked: in BERT the six of query, key, value, attention
output, intermediate and output. Pooler and heads stay dense. The embeddings are frozen at their
pre-trained values. The state dict has the keys of the stock class plus `<linear>.mask_scores`: a
plain checkpoint loads with fresh scores, a checkpoint of the 2020 code with its own.

    model = MaskedBertForQuestionAnswering.from_pretrained("bert-base-uncased")
    model(input_ids=..., attention_mask=..., token_type_ids=..., threshold=0.15)

`forward` takes the arguments of the stock model and `threshold` (default: the configuration's).
Every forward finds its own masks; in a block of `emmental.modules.masked` they are found once.

`make_masked` makes the classes of a family, and gives them the names of the stock classes after
"Masked", and their `model_type` after "masked_". For BERT it does what these statements say:

    class MaskedBertConfig(MaskSettings, BertConfig):
        model_type = "masked_bert"

    class MaskedBertModel(MaskedModel, BertModel):
        config_class = MaskedBertConfig

    class MaskedBertForQuestionAnswering(MaskedHead, BertForQuestionAnswering):
        config_class, masked_base = MaskedBertConfig, MaskedBertModel
        _keys_to_ignore_on_load_unexpected = [r"^bert\\.pooler\\."]

and likewise for each further head.
"""

from dataclasses import dataclass, fields

from transformers import CONFIG_MAPPING

from .families import FAMILIES, HEADS, MASKED, MaskedHead, MaskedModel, class_of, register
from .modules.methods import all_settings


@dataclass
class MaskSettings:
    """What the configuration of a masked model says of its masks.

    pruning_method: the name of one of `emmental.modules.methods.METHODS`.
    mask_init, mask_scale: the initial scores, see `MaskedLinear`.
    threshold: the last threshold that was used: a fraction in [0, 1], for the method `threshold` a
        cut on the scores. None if unknown, as in checkpoints of the 2020 code.
    global_topk: whether all matrices are ranked together.
    granularity: what one score stands for, a name in `emmental.modules.granularity.GRANULARITIES`.
    block_rows, block_columns: the size of a block, for granularities with blocks.
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


def mask_fields() -> tuple[str, ...]:
    """The fields of a configuration that speak of masks, with the settings of all methods."""
    return *(field.name for field in fields(MaskSettings)), *all_settings()


def make_masked(model_type: str) -> dict[str, type]:
    """Make and register the masked classes of a row of `FAMILIES`; returned by name.

    They are attributes of this module, where pickles look for them.
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
