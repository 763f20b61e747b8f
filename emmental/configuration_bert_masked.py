"""Configuration of a BERT with masked linear layers."""

from transformers import BertConfig


class MaskedBertConfig(BertConfig):
    """A `BertConfig` that also says how the encoder's linear layers are masked.

    pruning_method: topK, threshold, sigmoied_threshold, magnitude or l0.
    mask_init, mask_scale: initialisation of the scores, see `MaskedLinear`.
    threshold: the threshold that the model was last trained at, None while it is unknown (as in
        checkpoints of the 2020 code): a fraction in [0, 1], but for `threshold` a cut on the scores.
    global_topk: whether all matrices are ranked together.
    """

    model_type = "masked_bert"

    pruning_method: str = "topK"
    mask_init: str = "constant"
    mask_scale: float | int = 0.0
    threshold: float | int | None = None
    global_topk: bool = False


MASK_FIELDS = ("pruning_method", "mask_init", "mask_scale", "threshold", "global_topk")
