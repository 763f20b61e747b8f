"""Compact models of every family with heads and neurons, and folders that load anywhere."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from tiny import assert_same, padded_batch

import bertarize
import emmental
from emmental import storage
from emmental.checkpoints.loading import load_model
from emmental.checkpoints.onnx_file import write_onnx
from emmental.checkpoints.tokenizer import fit_to_model
from emmental.inference import compacted, sparsify
from emmental.models.families import FAMILIES, HEADS, layers_of

ROWS = [row for row, family in FAMILIES.items() if family.heads]
KINDS = ("distilbert", "mpnet", "albert", "deberta-v2")  # of attention
LAYERS = 3


def emptied(row, seed=0, head="SequenceClassification", prefix="", **settings):
    """A model in which random heads and neurons of each layer are empty, often all of them."""
    rng = np.random.default_rng(seed)
    tokenizer = tiny.tokenizer_of(row)
    names = ("pad", "bos", "eos")
    settings |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    settings |= {"vocab_size": len(tokenizer), "num_hidden_layers": LAYERS}
    model = tiny.model_of(row, head, prefix, seed, max_position_embeddings=48, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        for layer in layers_of(model):
            empty_some(model, layer, FAMILIES[row], rng)
    return model


def empty_some(model, layer, family, rng):
    *_, value, output = (layer.get_submodule(name) for name in family.heads if "pos_" not in name)
    heads = model.config.num_attention_heads
    size = output.in_features // heads
    for head in rng.permutation(heads)[rng.integers(0, heads + 1) :]:
        rows = slice(head * size, (head + 1) * size)
        if rng.random() < 0.5:
            output.weight[:, rows] = 0
        else:
            value.weight[rows] = 0
    first, second = (layer.get_submodule(name) for name in family.neurons)
    remaining = rng.choice([0, 1, rng.integers(2, first.out_features + 1)])
    dead = rng.permutation(first.out_features)[remaining:]
    if rng.random() < 0.5:
        first.weight[dead] = 0
    else:
        second.weight[:, dead] = 0


@pytest.fixture(params=ROWS)
def row(request):
    return request.param


@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_those_of_the_model(row, seed):
    model = emptied(row, seed)
    small = compacted(model)
    assert type(small).__name__ == f"Compact{type(model).__name__}"
    assert_same(model, small)
    again = compacted(small)
    assert again.config.layer_heads == small.config.layer_heads
    assert_same(model, again)
    assert_same(model, sparsify(small))


@pytest.mark.parametrize("head", ["", *HEADS])
def test_every_head_has_a_compact_class(row, head):
    model_class = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    config = emptied(row).config
    model = model_class.from_config(config).eval()
    small = compacted(model)
    assert getattr(emmental, type(small).__name__) is type(small)
    assert_same(model, small)


def test_a_run_becomes_a_folder_that_trains_and_packs(row, tmp_path, capsys):
    """From masks of heads and neurons, by bertarize.py, to a packed file and back."""
    settings = {"granularity": "structure", "threshold": 0.4, "mask_init": "uniform"}
    masked = emptied(row, 1, prefix="masked_", mask_scale=1.0, **settings)
    tiny.save(masked, tmp_path / "run", tiny.tokenizer_of(row))
    folder = bertarize.main(["--model_name_or_path", str(tmp_path / "run"), "--compact"])
    assert "nothing could be dropped" not in capsys.readouterr().out
    auto = transformers.AutoModelForSequenceClassification
    small, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert_same(masked, small)
    storage.pack(str(folder), str(tmp_path / "file"), 32)
    assert_same(masked, storage.load_packed(str(tmp_path / "file")), 1e-4)
    half = auto.from_pretrained(folder, dtype=torch.bfloat16)
    assert_same(small, half, 0.2)
    if small.supports_gradient_checkpointing:
        small.gradient_checkpointing_enable()
    small.train()
    small(**padded_batch(small), labels=torch.tensor([0, 1, 1])).loss.backward()
    trained = [parameter for parameter in small.parameters() if parameter.grad is not None]
    torch.optim.AdamW(trained).step()
    small.eval().save_pretrained(tmp_path / "tuned")
    assert_same(small, auto.from_pretrained(tmp_path / "tuned"), 0.0)


@pytest.mark.parametrize("kind", ["distilbert", "mpnet"])
def test_compile(kind):
    small = compacted(emptied(kind, 3))
    assert 0 in small.config.layer_heads
    assert_same(small, torch.compile(small, backend="eager"))


@pytest.mark.parametrize("kind", ["mpnet", "albert", "deberta-v2"])  # BERT's kind: test_compact.py
def test_onnx(kind, tmp_path):
    small = compacted(emptied(kind, 3))
    assert 0 in small.config.layer_heads or 0 in small.config.layer_neurons
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    write_onnx(small, tmp_path / "model.onnx")  # which compares the outputs
    serve(small, kind, tmp_path / "model.onnx")


def serve(model, vocabulary, file):
    """ONNX Runtime takes what a tokenizer gives, as it is saved beside the model."""
    import onnxruntime

    tokenizer = tiny.tokenizer_of(vocabulary)
    fit_to_model(tokenizer, model)
    pair = tokenizer("where does ada live ?", "ada lives in oslo .", return_tensors="pt")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    logits, *_ = session.run(None, {name: tensor.numpy() for name, tensor in pair.items()})
    with torch.no_grad():
        wanted = model(**pair)[0]
    torch.testing.assert_close(torch.from_numpy(logits), wanted, atol=1e-4, rtol=1e-4)


def test_a_bias_of_positions_keeps_its_heads():
    """MPNet adds one bias for each head, which all layers share."""
    model = emptied("mpnet", 0)
    with torch.no_grad():
        model.mpnet.encoder.relative_attention_bias.weight.mul_(20)
        for number, layer in enumerate(layers_of(model)):
            attention = layer.attention.attn
            torch.nn.init.normal_(attention.v.weight)
            torch.nn.init.normal_(attention.o.weight)
            attention.o.weight[:, 8 * number : 8 * number + 8] = 0
    small = compacted(model)
    assert small.config.layer_head_indices == [[1, 2, 3], [0, 2, 3], [0, 1, 3]]
    assert_same(model, small)


def test_wrong_sizes_are_refused(row):
    small = compacted(emptied(row))
    small.config.layer_neurons = [65] * len(small.config.layer_neurons)
    with pytest.raises(ValueError, match="layer_neurons must give a number from 0 to 64 for each"):
        type(small)(small.config)


def test_a_family_without_heads_has_no_compact_form():
    with pytest.raises(ValueError, match="ModernBertForSequenceClassification .modernbert. has no"):
        compacted(tiny.model_of("modernbert", "SequenceClassification"))


# ------------------------------------------------------------ folders that load anywhere

ELSEWHERE = """
import sys
import torch, transformers
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

for row in sys.argv[1:]:
    trusted = {"trust_remote_code": True}
    model = AutoModelForSequenceClassification.from_pretrained(row, **trusted).eval()
    ids = torch.arange(5, 17)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, torch.load(f"{row}/logits.pt"))
    base = AutoModel.from_pretrained(row, **trusted)
    assert type(base).__name__ == type(model).__name__.partition("For")[0] + "Model"
    tokenizer = AutoTokenizer.from_pretrained(row, **trusted)
    classify = pipeline("text-classification", row, **trusted)
    assert classify("ada lives in oslo")[0]["label"] in model.config.id2label.values()
    model.save_pretrained(f"{row}/again")
    again = AutoModelForSequenceClassification.from_pretrained(f"{row}/again", **trusted).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, torch.load(f"{row}/logits.pt"))
    print(row, "loaded")
assert "emmental" not in sys.modules
"""


def compact_folder(row, folder):
    small = compacted(emptied(row))
    tiny.save(small, folder, tiny.tokenizer_of(row))
    with torch.no_grad():
        torch.save(small(input_ids=torch.arange(5, 17)[None]).logits, folder / "logits.pt")
    return small


def test_folders_load_without_this_package(tmp_path, monkeypatch):
    for row in KINDS:
        compact_folder(row, tmp_path / row)
        assert (tmp_path / row / "modeling.py").exists()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = [sys.executable, "-c", ELSEWHERE, *KINDS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{row} loaded" for row in KINDS]


def test_with_this_package_no_code_of_a_folder_runs(tmp_path):
    small = compact_folder("roberta", tmp_path)
    for name in ("modeling.py", "configuration.py"):
        (tmp_path / name).write_text("raise RuntimeError('code of the folder ran')\n")
    auto = transformers.AutoModelForSequenceClassification
    for trusted in ({}, {"trust_remote_code": True}):
        assert_same(small, auto.from_pretrained(tmp_path, **trusted))


def test_code_of_another_version_is_said(tmp_path, caplog):
    compact_folder("bert", tmp_path)
    options = {"masked": False, "trained": True}
    load_model(str(tmp_path), "SequenceClassification", **options)
    assert "another version" not in caplog.text
    with (tmp_path / "modeling.py").open("a") as file:
        file.write("# changed\n")
    load_model(str(tmp_path), "SequenceClassification", **options)
    assert "modeling.py is of another version: the code of this package is used" in caplog.text


def test_the_code_of_a_folder_is_that_of_the_package(tmp_path):
    compact_folder("bert", tmp_path)
    for name in ("modeling.py", "configuration.py"):
        text = (tmp_path / name).read_text()
        assert text == (Path(emmental.__file__).parent / "compact" / name).read_text()
        modules = re.findall(r"^(?:import|from) (\S+)", text, re.M)
        packages = {module.partition(".")[0] for module in modules}
        assert packages <= {"dataclasses", "re", "torch", "transformers", ""}  # "": each other
