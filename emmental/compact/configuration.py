"""Configuration of a BERT whose layers differ in their heads and neurons."""

from transformers import BertConfig


class CompactBertConfig(BertConfig):
    """A `BertConfig` with what is left of each layer. The other sizes are those of the whole BERT.

    layer_heads: heads. layer_head_sizes: rows of query, key and value per head. layer_neurons:
    neurons of the feed-forward part. Each is a list with one number per layer; None means all.
    Raises ValueError for other numbers.
    """

    model_type = "compact_bert"

    layer_heads: list[int] | None = None
    layer_head_sizes: list[int] | None = None
    layer_neurons: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        whole = {
            "layer_heads": self.num_attention_heads,
            "layer_head_sizes": self.hidden_size // max(1, self.num_attention_heads),
            "layer_neurons": self.intermediate_size,
        }
        for name, most in whole.items():
            if getattr(self, name) is None:
                setattr(self, name, [most] * self.num_hidden_layers)
            left = getattr(self, name)
            if len(left) != self.num_hidden_layers or not all(0 <= size <= most for size in left):
                raise ValueError(
                    f"{name} must give a number from 0 to {most} for each of the "
                    f"{self.num_hidden_layers} layers, not {left}"
                )
