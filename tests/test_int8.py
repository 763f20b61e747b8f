"""int8 ONNX files: written beside the float32 file, and evaluated by the scripts."""

import numpy as np
import pytest
import tiny
import torch
from tiny import SHORT

import bertarize
import masked_run_squad
from emmental.checkpoints.loading import load_model
from emmental.checkpoints.onnx_file import write_onnx
from emmental.inference import int8
from emmental.inference.onnx_model import OnnxModel
from emmental.system.errors import UserError

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_bert, squad_dir):
    """A short run with heads and neurons, its compact folder, and its ONNX files."""
    folder = tmp_path_factory.mktemp("int8")
    words = "--do_train --granularity structure --final_threshold 0.5"
    masked_run_squad.main(tiny.command(folder, tiny_bert, squad_dir, "run", words))
    words = f"--model_name_or_path {folder / 'run'} --compact --onnx {folder / 'x.onnx'} --int8"
    bertarize.main(words.split())
    return folder


@pytest.fixture
def small(folders):
    folder = str(folders / "compact_run")
    return load_model(folder, "QuestionAnswering", masked=False, trained=True)


def evaluate(folders, squad_dir, name, *words):
    data = f"--data_dir {squad_dir} --cache_dir {folders / 'cache'} --output_dir {folders / name}"
    model = f"--model_type dense --model_name_or_path {folders / 'compact_run'} --do_lower_case"
    return masked_run_squad.main([*f"{data} {model} --do_eval --no_cuda".split(), *SHORT, *words])


def test_the_file_is_smaller_and_nearly_the_same(folders):
    import onnxruntime

    exact, rounded = (
        onnxruntime.InferenceSession(folders / f"x{end}.onnx") for end in ("", "_int8")
    )
    sizes = [(folders / f"x{end}.onnx").stat().st_size for end in ("", "_int8")]
    assert sizes[1] < sizes[0]
    ids = np.arange(5, 37)[None]
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    given["token_type_ids"] = np.zeros_like(ids)
    for output, other in zip(exact.run(None, given), rounded.run(None, given), strict=True):
        assert 0 < np.abs(output - other).max() < 0.2 * np.abs(output).max()


def test_the_scripts_evaluate_the_files(folders, squad_dir):
    """The float32 file has the predictions of torch; the int8 one has the task's metric."""
    wanted = evaluate(folders, squad_dir, "torch")
    assert evaluate(folders, squad_dir, "onnx", "--onnx_file", str(folders / "x.onnx")) == wanted
    predictions = [tiny.read(folders / name / "predictions_.json") for name in ("torch", "onnx")]
    assert predictions[0] == predictions[1]
    results = evaluate(folders, squad_dir, "int8", "--onnx_file", str(folders / "x_int8.onnx"))
    assert abs(results["f1"] - wanted["f1"]) < 20


@pytest.mark.parametrize(
    "machine, flags, preset",
    [
        ("x86_64", "fpu avx2 avx512f avx512_vnni", "avx512_vnni"),
        ("x86_64", "fpu avx2 avx_vnni", "avx512_vnni"),
        ("x86_64", "fpu avx2 avx512f", "avx512"),
        ("x86_64", "fpu avx2", "avx2"),
        ("aarch64", "", "arm64"),
    ],
)
def test_the_preset_of_a_cpu(monkeypatch, machine, flags, preset):
    monkeypatch.setattr(int8.platform, "machine", lambda: machine)
    monkeypatch.setattr(int8.Path, "read_text", lambda path: f"flags : {flags}\n")
    assert int8.preset_of_this_cpu() == preset


def test_without_vnni_weights_have_seven_bits(folders, small, tmp_path):
    """Sums of products of 8 bits saturate there."""
    onnx = pytest.importorskip("onnx")

    largest = {}
    for preset in int8.PRESETS:
        (tmp_path / "x.onnx").write_bytes((folders / "x.onnx").read_bytes())
        int8.write_int8(small, tmp_path / "x.onnx", preset)
        graph = onnx.load(tmp_path / "x_int8.onnx").graph
        weights = [onnx.numpy_helper.to_array(x) for x in graph.initializer if x.data_type == 3]
        largest[preset] = max(int(np.abs(x.astype(int)).max()) for x in weights if x.size > 1)
    assert largest == {"avx2": 64, "avx512": 64, "avx512_vnni": 127, "arm64": 127}


def test_outputs_that_change_are_warned_of(folders, small, tmp_path, monkeypatch, caplog):

    (tmp_path / "x.onnx").write_bytes((folders / "x.onnx").read_bytes())
    monkeypatch.setattr(int8, "DEVIATION", 1e-6)
    int8.write_int8(small, tmp_path / "x.onnx", "avx2")
    assert "outputs differ from float32 by" in caplog.text and "--onnx_file" in caplog.text


def test_what_cannot_be(folders, squad_dir, tmp_path, refused):
    def said(*words):
        return refused(evaluate, folders, squad_dir, "refused", *words)

    assert "does not exist: bertarize.py --onnx writes one" in said("--onnx_file", "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert "cannot be read" in said("--onnx_file", str(tmp_path / "bad.onnx"))
    for flag in "--sparse_inference", "--eval_all_checkpoints":
        assert "--onnx_file evaluates one file" in said("--onnx_file", "x.onnx", flag)
    words = ["--model_name_or_path", str(folders / "run"), "--int8"]
    assert "--int8 needs an ONNX file: give --onnx FILE, too" in refused(bertarize.main, words)


def test_a_file_of_another_model_is_refused(folders, small, tmp_path):
    classifier = tiny.model_of("bert", "SequenceClassification")
    write_onnx(classifier, tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"has the outputs logits \[2, 2\].* of another task"):
        OnnxModel(tmp_path / "x.onnx", small)
    classifier.classifier = torch.nn.Linear(32, 5)
    with pytest.raises(UserError, match=r"logits \[2, 5\]: .* of other labels"):
        OnnxModel(tmp_path / "x.onnx", classifier)
    model = tiny.model_of("mpnet", "QuestionAnswering")
    with pytest.raises(UserError, match="takes token_type_ids, which MPNetForQuestionAnswering"):
        OnnxModel(folders / "x.onnx", model)
