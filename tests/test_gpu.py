"""Training on a GPU through the script's main: precisions, compilation, resume, masks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import masked_run_squad
from emmental.checkpoints.loading import load_masked
from emmental.modules import find_masks
from emmental.modules.granularity import GRANULARITIES
from emmental.modules.methods import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
THRESHOLDS = {"sigmoied_threshold": (0, 0.5), "threshold": (-1, 0.0), "l0": (1, 1)}


@pytest.fixture
def run(tmp_path, tiny_bert, squad_dir):
    def train(output, *flags, method="topK"):
        first, last = THRESHOLDS.get(method, (1, 0.3))
        masked_run_squad.main(
            [
                *f"--model_type masked_bert --model_name_or_path {tiny_bert}".split(),
                *f"--data_dir {squad_dir} --output_dir {tmp_path / output}".split(),
                *f"--cache_dir {tmp_path / 'cache'} --do_train --do_lower_case".split(),
                *"--max_seq_length 48 --max_query_length 16 --doc_stride 16".split(),
                *"--max_steps 8 --warmup_steps 2 --learning_rate 1e-3 --logging_steps 1".split(),
                *f"--initial_threshold {first} --final_threshold {last}".split(),
                *f"--pruning_method {method} --save_steps 4".split(),
                *flags,
            ]
        )
        return load_file(tmp_path / output / "model.safetensors")

    return train


def assert_near(ours, theirs, tolerance):
    for name, wanted in theirs.items():
        if name.endswith("weight"):  # some biases have a gradient of zero, and move by its rounding
            assert (ours[name] - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.mark.parametrize("method", [name for name in METHODS if name != "l0"])  # its noise differs
def test_gpu_training_is_cpu_training(run, method):
    assert_near(run("gpu", method=method), run("cpu", "--no_cuda", method=method), 0.02)


@pytest.mark.parametrize("granularity", [name for name in GRANULARITIES if name != "weight"])
@pytest.mark.parametrize("method", ["topK", "magnitude", "platon"])
def test_gpu_granularities(run, method, granularity):
    blocks = "" if granularity == "structure" else "--block_rows 8 --block_columns 8"
    flags = f"--granularity {granularity} {blocks}".split()
    plain = run("gpu", *flags, method=method)
    assert_near(plain, run("cpu", "--no_cuda", *flags, method=method), 0.02)
    assert_near(run("compiled", "--compile", *flags, method=method), plain, 0.2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flag", ["--bf16", "--fp16", "--compile"])
def test_gpu_training_in_every_mode(run, method, flag, tmp_path):
    plain, other = run("plain", method=method), run("other", flag, method=method)
    assert_near(other, plain, 0.2)
    summary = json.loads((tmp_path / "other/training_summary.json").read_text())
    assert summary["updates"] == 8


@pytest.mark.parametrize("method", METHODS)
def test_gpu_resume_is_exact(run, method, tmp_path):
    whole = run("out", method=method)
    for name in ("model.safetensors", "training_summary.json", "checkpoint-8"):
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = run("out", "--resume_from_checkpoint", "latest", method=method)
    for name, wanted in whole.items():
        assert torch.equal(resumed[name], wanted), (name, (resumed[name] - wanted).abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_gpu_masks_are_cpu_masks(run, method, tmp_path):
    run("out", method=method)
    model = load_masked(str(tmp_path / "out"))
    on_cpu, on_gpu = find_masks(model).by_layer, find_masks(model.cuda()).by_layer
    for name, mask in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), mask)
