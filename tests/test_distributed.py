"""Two processes under torchrun do what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--model_type", "masked_bert", "--do_lower_case", "--do_train", "--do_eval", "--max_seq_length", "48",
    "--max_steps", "8", "--warmup_steps", "1", "--save_steps", "0", "--logging_steps", "2", "--adam_epsilon", "1e-4",
]  # fmt: skip
SQUAD = ["--max_query_length", "16", "--doc_stride", "16"]
METHODS = {
    "topK": ["--pruning_method", "topK", "--final_threshold", "0.3", "--gradient_accumulation_steps", "2"],
    "l0": ["--pruning_method", "l0", "--initial_threshold", "1", "--final_threshold", "1", "--mask_scale", "2.197",
           "--regularization", "l0", "--final_lambda", "10"],
}  # fmt: skip


def run(launcher, output, cache, model, data, *flags, script="masked_run_squad.py"):
    command = [
        *launcher, str(ROOT / script), *FLAGS, *flags, "--output_dir", str(output),
        "--cache_dir", str(cache), "--model_name_or_path", str(model), "--data_dir", str(data),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_reach_the_weights_of_one(method, tmp_path, tiny_bert, squad_dir):
    # 24 questions in batches of 5: the last batch of an epoch is uneven, and one rank has no part in some.
    common = (tmp_path / "cache", tiny_bert, squad_dir, *SQUAD, *METHODS[method])
    run([sys.executable], tmp_path / "one", *common, "--per_gpu_train_batch_size", "10")
    done = run(TORCHRUN, tmp_path / "two", *common, "--per_gpu_train_batch_size", "5")
    assert done.stdout.count("everything lies in") == 1  # rank 0 alone speaks
    assert "Warning" not in done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    results = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    assert results[0] == pytest.approx(results[1])
    predictions = [json.loads((tmp_path / name / "predictions_.json").read_text()) for name in ("one", "two")]
    assert predictions[0] == predictions[1]


def test_two_processes_on_a_glue_task(tmp_path, tiny_bert):
    rows = [f"ada lives in {place} .\t{number % 2}\n" for number, place in enumerate(["oslo", "rome", "lima"] * 7)]
    for split in "train", "dev":
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    (tmp_path / "test.tsv").write_text("index\tsentence\n" + "".join(f"{n}\tben lives in rome .\n" for n in range(7)))
    common = (tmp_path / "cache", tiny_bert, tmp_path, "--task_name", "sst-2", "--do_predict", *METHODS["topK"])
    run([sys.executable], tmp_path / "one", *common, "--per_gpu_train_batch_size", "10", script="masked_run_glue.py")
    run(TORCHRUN, tmp_path / "two", *common, "--per_gpu_train_batch_size", "5", script="masked_run_glue.py")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    results = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    assert results[0].pop("entropy") == pytest.approx(results[1].pop("entropy"), rel=1e-4)
    assert results[0] == results[1]
    assert (tmp_path / "one" / "SST-2.tsv").read_text() == (tmp_path / "two" / "SST-2.tsv").read_text()


def test_errors_of_two_processes_are_said_once(tmp_path, tiny_bert, squad_dir):
    with pytest.raises(AssertionError) as failed:
        run(TORCHRUN, tmp_path / "out", tmp_path / "cache", tiny_bert, squad_dir, *SQUAD, "--train_file", "absent.json")
    assert str(failed.value).count("error: --train_file") == 1
    (tmp_path / "broken.json").write_text("{}")  # found by rank 0 alone, while the other waits for its features
    with pytest.raises(AssertionError) as failed:
        run(TORCHRUN, tmp_path / "out", tmp_path / "cache", tiny_bert, squad_dir, *SQUAD, "--train_file", tmp_path / "broken.json")
    said = str(failed.value)
    assert said.count('"data" is missing') == 1 and "gloo" not in said and 'masked_run_squad.py", line' not in said
