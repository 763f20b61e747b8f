"""The benchmarks run on tiny sizes and report both sides."""

import contextlib
import importlib
import io
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import torch

import bertarize
from emmental import MaskedBertConfig
from emmental.checkpoints import onnx_file
from emmental.inference import compacted


@pytest.fixture()
def benchmark(tmp_path):

    def run(name, *flags):
        results = tmp_path / "results.json"
        importlib.import_module(name).main([*map(str, flags), "--json", str(results)])
        return json.loads(results.read_text())

    return run


def test_training_step(benchmark, capsys, monkeypatch):
    """Peak memory is measured in this process, which saves importing torch three times."""
    training_step = importlib.import_module("training_step")

    def measure(command, **options):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            training_step.main(command[2:])
        return subprocess.CompletedProcess(command, 0, said.getvalue())

    monkeypatch.setattr(training_step.subprocess, "run", measure)
    flags = "--shapes 2x16 --layers 1 --hidden 64 --repeats 2 --warmup 1 --device cpu"
    found = benchmark("training_step", *flags.split(), "--methods", "topK", "l0")
    found = found["shapes"]["2 x 16"]
    assert list(found) == ["topK", "l0"]
    phases = {"cut-offs", "forward", "backward", "optimiser", "step", "evaluation"}
    for result in found.values():
        assert set(result["dense"]) == set(result["masked"]) == phases
        assert result["step_ratio"] > 0 and result["evaluation_ratio"] > 0
        weights = 12 * 64 * 64
        allowed = result["memory"]["allowed"] * 2**20 - 4 * weights  # one masked copy
        assert allowed in (weights * 17, weights * 20)
        assert result["memory"]["dense"] > 100
    assert "step/dense" in capsys.readouterr().out
    flags += " --methods topK --granularity structure"
    found = benchmark("training_step", *flags.split())
    assert found["granularity"] == "structure"
    allowed = found["shapes"]["2 x 16"]["topK"]["memory"]["allowed"] * 2**20
    assert allowed == 4 * 5 * 64 * 64 + 17 * (1 + 4 * 64)  # one head, and neurons


@pytest.mark.parametrize(
    "family, kernels",
    [("distilbert", "native library"), ("mpnet", "compact"), ("modernbert", "dense")],
)
def test_families(benchmark, family, kernels):
    size = f"--family {family} --layers 1 --hidden 64 --repeats 1".split()
    flags = "--shapes 2x16 --warmup 0 --device cpu --methods topK --no_memory".split()
    found = benchmark("training_step", *size, *flags)
    assert found["family"] == family and found["shapes"]["2 x 16"]["topK"]["step_ratio"] > 0
    flags = "--densities 0.1 --batches 2 --lengths 16 --without compiled int8".split()
    (row,) = benchmark("inference", *size, *flags)["rows"]
    assert round(row["left"], 1) == 0.1 and row["difference"] < 1e-5
    assert row["kernels"] in kernels.split()


@pytest.mark.parametrize("task", ["squad", "sst-2"])
def test_features(benchmark, tiny_bert, squad_dir, tmp_path, monkeypatch, capsys, task):
    if task == "squad":
        folder = shutil.copytree(squad_dir, tmp_path / "squad")
        monkeypatch.setattr(importlib.import_module("features").Squad, "length", 64)
    else:
        folder = tmp_path
        for split in ("train", "dev"):
            tiny.write_split(folder / f"{split}.tsv", "sst-2", 12, seed=0)
        monkeypatch.setattr(importlib.import_module("features").Glue, "length", 32)
    flags = ["--data_dir", folder, "--model", tiny_bert, "--slice", 6, "--slices", 2]
    flags += ["--epoch_examples", 8, "--batch", 4]
    found = benchmark("features", task, *flags)
    assert found["features"]["same_ids"] == found["features"]["features"] > 0
    ours, fixed = found["epoch"]["ours"], found["epoch"]["fixed length"]
    assert ours["updates"] == fixed["updates"] == 2
    assert 0 < ours["tokens"] < fixed["tokens"] == 8 * (64 if task == "squad" else 32)
    metric = "f1" if task == "squad" else "acc"
    assert 0 <= ours[metric] and 0 <= fixed[metric]


def test_storage(benchmark, tiny_tokenizer, tmp_path):
    pruned = tiny.make(suffix=tiny.QA, threshold=0.1)
    model = str(tiny.save(pruned, tmp_path / "model", tiny_tokenizer))
    rows = benchmark("storage", "--remaining", "--model", model)[model]
    sizes = [rows[f"ours, {bits} bits"]["MB"] for bits in (32, 16, 8, 6, 5, 4)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] < rows["torch.save, CSR"]["MB"]
    dense = sum(
        parameter.numel()
        for name, parameter in pruned.named_parameters()
        if "embeddings" not in name and "mask_scores" not in name
    )
    assert rows["dense float32"]["MB"] * 1e6 == 4 * dense


def test_inference(benchmark, tmp_path, capsys):
    tiny.save(tiny.make(suffix="ForSequenceClassification", threshold=0.1), tmp_path / "model")
    flags = "--layers 1 --hidden 64 --densities 0.1 1 --batches 2 --lengths 16 --repeats 2"
    flags = [*flags.split(), "--without", "compiled", "--models", tmp_path / "model"]
    results = benchmark("inference", *flags)
    rows = results["rows"]
    assert [row["model"] for row in rows] == ["random 10%", "random 100%", str(tmp_path / "model")]
    assert [round(row["left"], 1) for row in rows] == [0.1, 1.0, 0.1]
    for row in rows:
        assert row["gain"] > 0 and 0 < row["dense"] and 0 < row["int8"] and 0 < row["ours"]
        assert row["difference"] < 1e-5 < row["int8 difference"]
    sparse = rows[0]
    if sparse["kernels"] != "compact":  # 12 matrices of 64 x 64, and attention
        bound = sparse["bound"] * results["dense multiply-adds per second"] / (2 * 16)
        assert bound == pytest.approx(rows[0]["left"] * 12 * 64 * 64 + 2 * 16 * 64, rel=0.01)
    said = capsys.readouterr().out
    assert all(("no gain: " + row["model"] in said) == (row["gain"] < 1.05) for row in rows)


def test_compact_models(benchmark, capsys):
    runtimes, lefts = ["eager", "sparse"], ["50/30", "0/7"]
    flags = "--layers 1 --hidden 128 --batches 1 2 --lengths 16 --repeats 2".split()
    rows = benchmark("compact", *flags, "--runtimes", *runtimes, "--left", *lefts)["rows"]
    keys = [(row["runtime"], row["batch"], row["model"]) for row in rows]
    assert keys == list(itertools.product(runtimes, (1, 2), lefts))
    for row in rows:
        assert row["difference"] < 1e-5 and min(row["gain"], row["dense"], row["compact"]) > 0
        heads, neurons = {"50/30": (1, 160), "0/7": (0, 40)}[row["model"]]  # of 2 and 512
        dense, small = (cost(*left, 16) + 16 * 128 * 2 for left in ((2, 512), (heads, neurons)))
        assert row["promised"] == pytest.approx(dense / small)
    last = capsys.readouterr().out.splitlines()[-1]
    low = [row for row in rows if row["gain"] < 0.9 * row["promised"]]
    assert last.startswith("below 0.9 of the promised gain: ") and last.count(" x 16 (") == len(low)


def cost(heads, neurons, length, hidden=128):
    """Multiply-adds of a layer: query, key, value, output; scores and values; feed-forward."""
    return length * (4 * hidden + 2 * length) * 64 * heads + 2 * length * hidden * neurons


def test_compact_models_in_onnx_runtime():
    pytest.importorskip("onnxruntime")
    compact, report = map(importlib.import_module, ("compact", "report"))
    model = compacted(report.structured_bert(50, 30, **report.size_of("bert", 1, 128)))
    side = compact.onnx(model)
    for ids in torch.randint(1000, (1, 16)), torch.randint(1000, (2, 9)):
        assert report.difference(side(ids), compact.eager(model)(ids)) < 1e-5


def test_compact_models_of_checkpoints(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None)
    folders = [str(tmp_path / name) for name in ("structure", "hybrid", "compact", "fewer")]
    sizes = {"threshold": 0.5, "block_rows": 8, "block_columns": 8}
    for name in folders[:2]:
        model = tiny.make(suffix="ForSequenceClassification", granularity=Path(name).name, **sizes)
        tiny.save(model, name)
    words = ["--compact", "--model_name_or_path", folders[0], "--target_model_path", folders[2]]
    bertarize.main(words)
    for name, layers in (folders[3], 1), (tmp_path / "dense", 2):
        tiny.save(tiny.plain_bert("SequenceClassification", num_hidden_layers=layers), name)
    capsys.readouterr()
    flags = ["--dense", tmp_path / "dense", "--batches", 3, "--lengths", 12, "--repeats", 2]
    flags += ["--dtype", "bf16", "--runtimes", "eager", "onnx", "sparse", "--models", *folders]
    found = benchmark("compact", *flags)
    assert found["dense"] == str(tmp_path / "dense") and found["dtype"] == "bf16"
    assert [row["model"] for row in found["rows"]] == folders
    assert {row["runtime"] for row in found["rows"]} == {"eager"}
    structure, hybrid, compact, fewer = (row["promised"] for row in found["rows"])
    assert 1 < hybrid < structure == compact and 1.5 < fewer < 2  # embeddings cost nothing
    assert all(row["difference"] < 0.05 for row in found["rows"])
    said = capsys.readouterr().out
    assert "onnx is left out: it is measured" in said and "sparse is left out" in said
    benchmark("compact", *flags, "--dtype", "float32")
    assert "onnx is left out: writing ONNX needs onnx, onnx" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_scale(benchmark, monkeypatch):
    scale = importlib.import_module("scale")
    large = scale.large

    def small(layers, method):
        size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        monkeypatch.setattr(
            scale, "MaskedBertConfig", lambda **values: MaskedBertConfig(**values | size)
        )
        return large(layers, method)

    monkeypatch.setattr(scale, "large", small)
    found = benchmark("scale", "--questions", 300, "--layers", 2, "--repeats", 1)
    (data,) = found["data"]
    assert data["features"] == 300 and data["bytes"] > 30_000
    assert data["held"] > 0 and data["resident"] > 0
    assert [row["method"] for row in found["masks"]] == list(scale.THRESHOLDS)
    for row in found["masks"]:
        assert row["weights"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)
        assert row["ours"] > 0 and row["sorting"] > 0
    packing = found["packing"]
    assert packing["remaining"] == pytest.approx(10, abs=0.1)
    assert 0 < packing["entropy"] < packing["packed"] < packing["dense"]


@pytest.mark.parametrize("flags, said", [
    ("inference --hidden 100", "--hidden: 100 is not a multiple of 64"),
    ("inference --lengths 600", "512 tokens at most"),
    ("inference --models nowhere", "nowhere"),
    ("inference --densities 6", "not a fraction"),
    ("inference --batches 0", "at least 1"),
    ("inference --family mpnet --hidden 64 --layers 1 --lengths 8 --csr_below 0.2",
     "no sparse kernels for mpnet"),
    ("compact --hidden 100", "--hidden: 100 is not a multiple of 64"),
    ("compact --lengths 600 --hidden 64 --layers 1", "512 tokens at most"),
    ("compact --models nowhere --dense nowhere", "nowhere"),
    ("compact --models a", "go together"),
    ("compact --left 75", "'75' is not HEADS/NEURONS in percent, such as 75/60"),
    ("compact --left 75/101", "such as 75/60"),
    ("compact --dtype bf16 --runtimes onnx", "none of them can be measured here"),
])  # fmt: skip
def test_speed_benchmarks_refuse(refused, flags, said):
    name, *flags = flags.split()
    assert said in refused(importlib.import_module(name).main, flags)


def test_compact_models_of_another_family_are_refused(tmp_path, refused):
    tiny.save(tiny.model_of("modernbert"), tmp_path)
    words = ["--models", str(tmp_path), "--dense", str(tmp_path), "--lengths", "16"]
    said = refused(importlib.import_module("compact").main, words)
    assert "ModernBertForQuestionAnswering (modernbert) has no compact form" in said
