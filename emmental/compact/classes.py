"""The compact classes of all families with heads and neurons, known to the Auto classes."""

from transformers import CONFIG_MAPPING

from ..models.families import FAMILIES, HEADS, class_of
from ..models.masked import register
from . import configuration, modeling


def make_compact(model_type: str) -> dict[str, type]:
    """Make and register the compact classes of a row of `FAMILIES`. Returns them by name."""
    config = getattr(configuration, f"Compact{CONFIG_MAPPING[model_type].__name__}")
    stock = filter(None, (class_of(model_type, head) for head in ("", *HEADS)))
    models = [getattr(modeling, f"Compact{model_class.__name__}") for model_class in stock]
    register(config, models)
    return {made.__name__: made for made in (config, *models)}


def auto_map(config: type) -> dict[str, str]:
    """Where the Auto classes find a compact configuration and its models within a folder."""
    stem = config.__name__.removesuffix("Config")
    models = {f"AutoModelFor{head}": f"modeling.{stem}For{head}" for head in HEADS}
    return {
        "AutoConfig": f"configuration.{stem}Config",
        "AutoModel": f"modeling.{stem}Model",
        **models,
    }


CLASSES = {
    name: made
    for model_type, family in FAMILIES.items()
    if family.heads
    for name, made in make_compact(model_type).items()
}
