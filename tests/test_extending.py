"""What a new method or family touches: its class or its row, and nothing else."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import launch
from tiny import read, tokenizer_of

import bertarize
import counts_parameters
import masked_run_squad
from emmental import storage
from emmental.checkpoints.configs import read_config
from emmental.inference import sparsify
from emmental.models.families import FAMILIES, Family
from emmental.models.masked import make_masked
from emmental.system.errors import UserError

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
    assert read(out / "config.json")["model_type"] == "masked_ernie"
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


ROOT = Path(__file__).parent.parent
METHOD = """
import contextlib, io, json, sys
from pathlib import Path

from safetensors.torch import load_file

import bertarize, counts_parameters, masked_run_squad
from emmental import storage

flags, out = sys.argv[2:], Path(sys.argv[1])
flags += "--pruning_method steady --initial_threshold 0 --final_threshold 0.5".split()
flags += "--regularization squares --final_lambda 30 --score_memory 0.8 --save_steps 3".split()

help = io.StringIO()
with contextlib.redirect_stdout(help), contextlib.suppress(SystemExit):
    masked_run_squad.main(["--help"])
assert "--score_memory" in help.getvalue()
assert "steady: weight of the past in the mean score (0.9 if not given)" in " ".join(
    help.getvalue().split()
)

masked_run_squad.main([*flags, "--output_dir", str(out / "whole")])
resume = ["--resume_from_checkpoint", str(out / "whole/checkpoint-3")]
masked_run_squad.main([*flags, "--output_dir", str(out / "again"), *resume])
whole, again = (load_file(out / name / "model.safetensors") for name in ("whole", "again"))
assert whole.keys() == again.keys() and all((whole[n] == again[n]).all() for n in whole)
saved = load_file(out / "whole/checkpoint-3/model.safetensors")
for end in ".mask_mean", ".mask_crossings":
    tensors = [name for name in whole if name.endswith(end)]
    assert len(tensors) == 12
    assert any((whole[name] != saved[name]).any() for name in tensors), end
config = json.loads((out / "whole/config.json").read_text())
assert config["score_memory"] == 0.8 and config["pruning_method"] == "steady"

counts = counts_parameters.main(["--serialization_dir", str(out / "whole")])
means = [tensor for name, tensor in whole.items() if name.endswith(".mask_mean")]
kept = sum(int((tensor > 0).sum()) for tensor in means)
assert 0 < kept < sum(tensor.numel() for tensor in means)
assert sum(matrix.remaining for matrix in counts.matrices) == kept
folder = bertarize.main(["--model_name_or_path", str(out / "whole")])
plain = load_file(Path(folder) / "model.safetensors")
assert not [name for name in plain if "mask_" in name]
assert "score_memory" not in json.loads((Path(folder) / "config.json").read_text())
storage.pack(str(out / "whole"), str(out / "packed"), 32)
packed = storage.load_packed(str(out / "packed")).state_dict()
assert all((packed[name] == value).all() for name, value in plain.items())
"""


def test_a_class_makes_a_method(tmp_path, flags):
    """The page's method with a setting, state, penalty and gradient, in a process of its own."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page.partition("## A granularity")[0], re.S)
    assert "class SteadyMovement" in blocks[-1]
    script = tmp_path / "steady.py"
    script.write_text("\n".join([*blocks, METHOD]), encoding="utf-8")
    train = "--do_train --max_steps 6 --mask_scores_learning_rate 0.1 --logging_steps 3"
    words = flags("out", train)
    done = launch(script, tmp_path, *words, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
