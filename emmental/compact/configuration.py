"""Configurations of models whose layers differ in their heads and neurons.

The folder of a compact model has a copy of this file and of `modeling.py`, so that it loads without
this package: `AutoModel.from_pretrained(folder, trust_remote_code=True)`. Therefore torch and
transformers are all that the two files import.
"""

from dataclasses import dataclass, field

import transformers

BERT_PARTS = {
    "layers": "encoder.layer",
    "heads": [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ],
    "neurons": ["intermediate.dense", "output.dense"],
}


@dataclass
class CompactSettings:
    """What remains of each layer. The other sizes are those of the whole model.

    layer_heads: heads. layer_head_sizes: rows of query, key and value per head. layer_neurons:
        neurons of the feed-forward part. Each is a list with one number per layer; None means all.
    layer_head_indices: which heads remain, where attention adds a bias per head that all layers
        share (MPNet); else None.
    layer_parts: the names of layers, heads and neurons in the stock model, as in `Family`.
    """

    layer_heads: list[int] | None = None
    layer_head_sizes: list[int] | None = None
    layer_neurons: list[int] | None = None
    layer_head_indices: list[list[int]] | None = None
    layer_parts: dict = field(default_factory=BERT_PARTS.copy)


def __getattr__(name: str) -> type:
    """`CompactBertConfig`, the compact configuration of `BertConfig`, and so on: made when used."""
    stock = getattr(transformers, name.removeprefix("Compact"), None)
    if not name.startswith("Compact") or stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attributes = {
        "__module__": __name__,
        "__doc__": f"A `{stock.__name__}` with what remains of each layer: see `CompactSettings`.",
        "model_type": f"compact_{stock.model_type}",
        "_auto_class": "AutoConfig",
    }
    globals()[name] = type(name, (CompactSettings, stock), attributes)
    return globals()[name]
