"""What a new family touches: its own row, and nothing else."""

import json

import pytest
import torch
import transformers
from conftest import tokenizer_of

import bertarize
import counts_parameters
import masked_run_squad
from emmental import storage
from emmental.configs import read_config
from emmental.errors import UserError
from emmental.families import FAMILIES, Family
from emmental.inference import sparsify
from emmental.modeling_masked import make_masked

ERNIE = Family(encoder="encoder", layers="encoder.layer")  # as short as a row can be


def test_a_row_makes_a_family(monkeypatch, flags, tmp_path, caplog):
    tokenizer, source = tokenizer_of("bert"), tmp_path / "ernie"
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config = transformers.ErnieConfig(vocab_size=len(tokenizer), **sizes)
    torch.manual_seed(0)
    transformers.ErnieForQuestionAnswering(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    with pytest.raises(
        UserError, match="of type 'ernie' in its config.json; these scripts take bert"
    ):
        read_config(str(source))

    monkeypatch.setitem(FAMILIES, "ernie", ERNIE)
    assert "MaskedErnieForQuestionAnswering" in make_masked("ernie")
    prune = "--do_train --do_eval --max_steps 2 --final_threshold 0.3 --initial_threshold 0.3"
    for model_type in "masked", "masked_ernie":
        out = tmp_path / model_type
        masked_run_squad.main(flags(model_type, prune, f"--model_type {model_type}", model=source))
    assert json.loads((out / "config.json").read_text())["model_type"] == "masked_ernie"
    masked = transformers.AutoModelForQuestionAnswering.from_pretrained(out).eval()
    assert type(masked).__name__ == "MaskedErnieForQuestionAnswering"

    counts = counts_parameters.main(["--serialization_dir", str(out)])
    assert len(counts.matrices) == 12 and counts.linear_percent == pytest.approx(30, abs=0.1)
    folder = bertarize.main(["--model_name_or_path", str(out)])
    plain = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    assert type(plain) is transformers.ErnieForQuestionAnswering
    ids = torch.randint(5, 50, (2, 9))
    torch.testing.assert_close(plain(ids).start_logits, masked(ids).start_logits)

    assert torch.equal(sparsify(plain)(ids).start_logits, plain(ids).start_logits)
    assert "no sparse kernels for ernie layers: computes dense" in caplog.text
    storage.pack(str(out), str(tmp_path / "file"), 32)
    packed = storage.load_packed(str(tmp_path / "file"))
    assert torch.equal(packed(ids).start_logits, plain(ids).start_logits)
