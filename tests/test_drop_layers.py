"""results/drop_layers.py keeps layers of a dense model, which the scripts then distil."""

import pytest
import tiny
import torch
from transformers import BertForQuestionAnswering

from emmental import CompactBertConfig, CompactBertForQuestionAnswering
from results import drop_layers


@pytest.fixture
def source(tiny_tokenizer, tmp_path):
    model = tiny.plain_bert(num_hidden_layers=5, initializer_range=0.3)
    return tiny.save(model, tmp_path / "dense", tiny_tokenizer)


@pytest.mark.parametrize("flags, kept", [("", (0, 2, 4)), ("--keep 3 1", (1, 3))])
@torch.no_grad()
def test_the_kept_layers_compute_as_before(source, tmp_path, flags, kept):
    drop_layers.main([str(source), str(tmp_path / "small"), *flags.split()])
    state = BertForQuestionAnswering.from_pretrained(source).state_dict()
    stock = tiny.plain_bert(num_hidden_layers=len(kept))
    own = {}
    for name in stock.state_dict():
        start, _, rest = name.partition("encoder.layer.")
        number, _, rest = rest.partition(".")
        own[name] = state[f"{start}encoder.layer.{kept[int(number)]}.{rest}" if number else name]
    stock.load_state_dict(own)
    folder = tmp_path / "small"
    small, info = BertForQuestionAnswering.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and small.config.num_hidden_layers == len(kept)
    ids = torch.randint(5, 120, (2, 9))
    torch.testing.assert_close(small(ids).start_logits, stock(ids).start_logits, rtol=0, atol=0)


def test_the_scripts_distil_it(source, tmp_path, run):
    drop_layers.main([str(source), str(tmp_path / "small")])
    teacher = f"--teacher_type bert --teacher_name_or_path {source} --alpha_ce 0.1"
    flags = "--model_type bert --do_train --do_eval --alpha_distil 0.9"
    folder = run("tuned", flags, teacher, model=tmp_path / "small")
    before, after = map(BertForQuestionAnswering.from_pretrained, (tmp_path / "small", folder))
    assert len(after.bert.encoder.layer) == 3
    weights = [model.bert.encoder.layer[2].output.dense.weight for model in (before, after)]
    assert not torch.equal(*weights)


def test_refusals(source, tmp_path, refused):
    compact = CompactBertForQuestionAnswering(CompactBertConfig(**tiny.SIZES))
    compact.save_pretrained(tmp_path / "compact")
    for flags, said in (
        ([source, tmp_path / "small", "--keep", 0, 5], "has the layers 0 to 4"),
        ([source, tmp_path / "small", "--keep", -1], "has the layers 0 to 4"),
        ([source, source], "exists: choose another folder"),
        ([tmp_path / "compact", tmp_path / "small"], "is a compact model: give a plain one"),
        ([tmp_path / "nowhere", tmp_path / "small"], "no usable checkpoint at"),
    ):
        assert said in refused(drop_layers.main, [str(flag) for flag in flags])
    assert not (tmp_path / "small").exists()
