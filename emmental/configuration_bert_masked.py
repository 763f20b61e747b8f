"""Configuration of a BERT with masked linear layers."""

from transformers import BertConfig


class MaskedBertConfig(BertConfig):
    """A `BertConfig` with the settings of the masks.

    pruning_method: the name of one of `emmental.modules.methods.METHODS`.
    mask_init, mask_scale: the initial scores, see `MaskedLinear`.
    importance_beta, uncertainty_beta: weights of the past in the running means of observed scores.
    threshold: the last threshold that was used: a fraction in [0, 1], for the method `threshold` a
        cut on the scores. None if unknown, as in checkpoints of the 2020 code.
    global_topk: whether all matrices are ranked together.
    granularity: what one score stands for, a name in `emmental.modules.granularity.GRANULARITIES`.
    block_rows, block_columns: the size of a block, for granularities with blocks.
    """

    model_type = "masked_bert"

    pruning_method: str = "topK"
    mask_init: str = "constant"
    mask_scale: float | int = 0.0
    importance_beta: float = 0.85
    uncertainty_beta: float = 0.95
    threshold: float | int | None = None
    global_topk: bool = False
    granularity: str = "weight"
    block_rows: int = 32
    block_columns: int = 32


MASK_FIELDS = (
    "pruning_method", "mask_init", "mask_scale", "importance_beta", "uncertainty_beta", "threshold",
    "global_topk", "granularity", "block_rows", "block_columns",
)  # fmt: skip
