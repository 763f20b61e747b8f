"""Configuration of a BERT with masked linear layers."""

from transformers import BertConfig


class MaskedBertConfig(BertConfig):
    """A `BertConfig` with the settings of the masks.

    pruning_method: topK, threshold, sigmoied_threshold, magnitude or l0.
    mask_init, mask_scale: the initial scores, see `MaskedLinear`.
    threshold: the last threshold that was used: a fraction in [0, 1], for the method `threshold` a
        cut on the scores. None if unknown, as in checkpoints of the 2020 code.
    global_topk: whether all matrices are ranked together.
    """

    model_type = "masked_bert"

    pruning_method: str = "topK"
    mask_init: str = "constant"
    mask_scale: float | int = 0.0
    threshold: float | int | None = None
    global_topk: bool = False


MASK_FIELDS = ("pruning_method", "mask_init", "mask_scale", "threshold", "global_topk")
