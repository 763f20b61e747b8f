"""Training on a GPU through the script's main: precisions, compilation, resume, masks."""

import shutil

import pytest
import torch
from tiny import read, weights

import masked_run_squad
from emmental.checkpoints.loading import load_masked
from emmental.modules import find_masks
from emmental.modules.granularity import GRANULARITIES
from emmental.modules.methods import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
THRESHOLDS = {"sigmoied_threshold": (0, 0.5), "threshold": (-1, 0.0), "l0": (1, 1)}


@pytest.fixture
def train(flags, tmp_path):
    """Trains in the folder `output`, and returns the tensors of its model."""

    def call(output, *more, method="topK"):
        first, last = THRESHOLDS.get(method, (1, 0.3))
        thresholds = f"--initial_threshold {first} --final_threshold {last} --warmup_steps 2"
        steps = f"--do_train --pruning_method {method} --logging_steps 1 --save_steps 4"
        words = flags(output, thresholds, steps, *more)
        if "on a CPU" not in output:
            words.remove("--no_cuda")
        masked_run_squad.main(words)
        return weights(tmp_path / output)

    return call


def assert_near(ours, theirs, tolerance):
    for name, wanted in theirs.items():
        if name.endswith("weight"):  # some biases have a gradient of zero, and move by its rounding
            assert (ours[name] - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.mark.parametrize("method", [name for name in METHODS if name != "l0"])  # its noise differs
def test_gpu_training_is_cpu_training(train, method):
    assert_near(train("gpu", method=method), train("on a CPU", method=method), 0.02)


@pytest.mark.parametrize("granularity", [name for name in GRANULARITIES if name != "weight"])
@pytest.mark.parametrize("method", ["topK", "magnitude", "platon"])
def test_gpu_granularities(train, method, granularity):
    blocks = "" if granularity == "structure" else "--block_rows 8 --block_columns 8"
    flags = f"--granularity {granularity} {blocks}"
    plain = train("gpu", flags, method=method)
    assert_near(plain, train("on a CPU", flags, method=method), 0.02)
    assert_near(train("compiled", "--compile", flags, method=method), plain, 0.2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flag", ["--bf16", "--fp16", "--compile"])
def test_gpu_training_in_every_mode(train, method, flag, tmp_path):
    plain, other = train("plain", method=method), train("other", flag, method=method)
    assert_near(other, plain, 0.2)
    assert read(tmp_path / "other/training_summary.json")["updates"] == 8


@pytest.mark.parametrize("method", METHODS)
def test_gpu_resume_is_exact(train, method, tmp_path):
    whole = train("out", method=method)
    for name in ("model.safetensors", "training_summary.json", "checkpoint-8"):
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train("out", "--resume_from_checkpoint latest", method=method)
    for name, wanted in whole.items():
        assert torch.equal(resumed[name], wanted), (name, (resumed[name] - wanted).abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_gpu_masks_are_cpu_masks(train, method, tmp_path):
    train("out", method=method)
    model = load_masked(str(tmp_path / "out"))
    on_cpu, on_gpu = find_masks(model).by_layer, find_masks(model.cuda()).by_layer
    for name, mask in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), mask)
