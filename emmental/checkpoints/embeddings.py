"""The embeddings of a model, which fine-pruning leaves as they were in the base model."""

import hashlib
import inspect

import torch
from torch import Tensor

from ..models.families import FAMILIES, class_of, prefix_of, stock_type
from ..system.errors import UserError, first_line
from .configs import bare_config, read_config


def base_embeddings(base_model: str) -> dict[str, Tensor]:
    """The embeddings of any model, by their names in a model with a head. Raises UserError."""
    recorded = read_config(base_model)
    model_type = stock_type(recorded["model_type"])
    model_class = class_of(model_type)
    has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    options = {"add_pooling_layer": False} if has_pooler else {}
    try:
        options["config"] = bare_config(model_type, recorded)
        model = model_class.from_pretrained(base_model, dtype=torch.float32, **options)
    except Exception as error:  # broken files raise the errors of three libraries
        raise UserError(f"cannot load the base model {base_model}: {first_line(error)}") from error
    embeddings = model.get_submodule(FAMILIES[model_type].embeddings).state_dict()
    return {f"{prefix_of(model_class)}{name}": tensor for name, tensor in embeddings.items()}


def digest_of(embeddings: dict[str, Tensor]) -> str:
    """A digest of tensors and their names, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(embeddings):
        digest.update(name.encode())
        digest.update(embeddings[name].detach().float().contiguous().numpy())
    return digest.hexdigest()
