"""Parts of the loop that no run of a script shows."""

import pytest
import torch
from transformers import BertForQuestionAnswering

from emmental import MaskedBertConfig, MaskedBertForQuestionAnswering
from emmental.training.passes import halve_linears
from emmental.training.settings import Precision


@pytest.mark.parametrize("masked", [False, True])
def test_a_teacher_in_half_precision_says_the_same(tiny_bert, tiny_config, masked):
    if masked:
        torch.manual_seed(0)
        config = MaskedBertConfig(**tiny_config, mask_init="uniform", mask_scale=1.0, threshold=0.3)
        teacher = MaskedBertForQuestionAnswering(config).eval()
    else:
        teacher = BertForQuestionAnswering.from_pretrained(tiny_bert).eval()
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = teacher(input_ids=ids).start_logits
        halve_linears(teacher, Precision(torch.bfloat16))
        after = teacher(input_ids=ids).start_logits
    assert torch.equal(before, after)
    assert teacher.qa_outputs.weight.dtype == torch.bfloat16
    assert teacher.bert.embeddings.LayerNorm.weight.dtype == torch.float32
    if masked:
        assert teacher.bert.encoder.layer[0].output.dense.mask_scores.dtype == torch.float32


def test_a_teacher_in_full_precision_is_left_as_it_is(tiny_bert):
    teacher = BertForQuestionAnswering.from_pretrained(tiny_bert)
    halve_linears(teacher, Precision())
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
