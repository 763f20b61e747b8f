"""The embeddings of a model, which fine-pruning leaves as they were in the base model."""

import hashlib

from torch import Tensor

from ..models.families import family_of, is_masked, prefix_of
from .configs import read_config
from .loading import load_model


def base_embeddings(base_model: str) -> dict[str, Tensor]:
    """The embeddings of any model, by their names in a model with a head. Raises UserError."""
    model = load_model(base_model, "", masked=is_masked(read_config(base_model)["model_type"]))
    embeddings = model.get_submodule(family_of(model.config).embeddings).state_dict()
    return {f"{prefix_of(type(model))}{name}": tensor for name, tensor in embeddings.items()}


def digest_of(embeddings: dict[str, Tensor]) -> str:
    """A digest of tensors and their names, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(embeddings):
        digest.update(name.encode())
        digest.update(embeddings[name].detach().float().contiguous().numpy())
    return digest.hexdigest()
