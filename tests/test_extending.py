"""What a new method, family or task touches: its class or its row, and nothing else."""

import importlib
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import launch
from tiny import NAMES, PLACES, read, same, scalars, tokenizer_of, write

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
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
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
    blocks = re.findall(r"```python\n(.*?)```", PAGE.partition("## A granularity")[0], re.S)
    assert "class SteadyMovement" in blocks[-1]
    script = tmp_path / "steady.py"
    script.write_text("\n".join([*blocks, METHOD]), encoding="utf-8")
    train = "--do_train --max_steps 6 --mask_scores_learning_rate 0.1 --logging_steps 3"
    words = flags("out", train)
    done = launch(script, tmp_path, *words, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]


def summaries(rows, seed):
    """Rows of a text, a summary, and grades that depend on the two words of the summary."""
    rng = random.Random(seed)
    yield "text", "summary", "content", "wording"
    for _ in range(rows):
        name, place = rng.randrange(8), rng.randrange(8)
        yield f"{NAMES[name]} lives in oslo .", f"{NAMES[name]} {PLACES[place]}", name + 0.5, -place


def test_a_class_makes_a_task(tmp_path, tiny_bert, monkeypatch, refused):
    """The page's task learns, also of a teacher; it resumes and predicts; its model is served."""
    block = re.findall(r"```python\n(.*?)```", PAGE.partition("## A task")[2], re.S)[0]
    write(tmp_path / "summaries_of_page.py", block)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("summaries_of_page")
    for seed, split in enumerate(("train", "dev", "test")):
        rows = [row[: 2 if split == "test" else 4] for row in summaries(48, seed)]
        write(tmp_path / f"{split}.tsv", "".join("\t".join(map(str, x)) + "\n" for x in rows))

    def run(name, *more, model=tiny_bert):
        flags = f"--data_dir {tmp_path} --cache_dir {tmp_path / 'cache'} --max_seq_length 16"
        flags += f" --model_name_or_path {model} --output_dir {tmp_path / name} --no_cuda "
        return module.main([*flags.split(), *" ".join(more).split()])

    train = "--do_train --logging_steps 4 --per_gpu_train_batch_size 16 --learning_rate 3e-3"
    dense = "--model_type dense"
    results = run("dense", dense, train, "--max_steps 60 --do_eval --save_steps 0")
    assert results["pearson_content"] > 0.8 and results["pearson_wording"] > 0.8
    teacher = tmp_path / "dense"
    prune = f"--model_type masked --max_steps 8 --save_steps 4 --final_threshold 0.5 {train}"
    prune += f" --teacher_type dense --teacher_name_or_path {teacher} --alpha_distil 1 --alpha_ce 1"
    results = run("whole", prune, "--do_eval --do_predict", model=teacher)
    whole = tmp_path / "whole"
    assert scalars(whole)["loss/distil"][8] > 0
    run("again", prune, f"--resume_from_checkpoint {whole / 'checkpoint-4'}", model=teacher)
    assert same(whole, tmp_path / "again")
    alone = run("alone", "--model_type masked --do_eval", model=whole)
    assert alone == {name: results[name] for name in alone}

    header, *rows = (whole / "predictions.tsv").read_text().splitlines()
    assert header == "index\tcontent\twording" and len(rows) == 48
    plain = bertarize.main(["--model_name_or_path", str(whole)])
    serve = transformers.pipeline("text-classification", model=str(plain), top_k=None)
    pair = (tmp_path / "test.tsv").read_text().splitlines()[1].split("\t")
    served = {row["label"]: row["score"] for row in serve(dict(zip(("text", "text_pair"), pair)))}
    index, *grades = rows[0].split("\t")
    assert index == "0" and [served[name] for name in ("content", "wording")] == pytest.approx(
        [*map(float, grades)], abs=1e-4
    )
    write(tmp_path / "dev.tsv", "text\tsummary\tcontent\twording\na\tb\t1\tgood\n")
    said = refused(run, "bad", dense, "--do_eval", model=teacher)
    assert "dev.tsv:2: the label 'good' is not a finite number" in said
