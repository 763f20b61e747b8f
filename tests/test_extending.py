"""What a new method and a new family touch: their own class or row, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertModel,
    DistilBertTokenizerFast,
)

import bertarize
import counts_parameters
import masked_run_squad
from emmental import families, storage
from emmental.data import squad
from emmental.errors import UserError
from emmental.families import Family, MaskedHead, MaskedModel
from emmental.inference import sparsify
from emmental.loading import load_masked
from emmental.modules.methods import METHODS, TopK
from emmental.training import passes

ROOT = Path(__file__).parent.parent


class Sensitivity(TopK):
    """Ranks weights by a running mean of |W dL/dW|, which is observed."""

    name, title = "sensitivity", "sensitivity"
    scores = "observed"

    def observe(self, layer, grad):
        layer.mask_scores.lerp_(grad.abs(), 0.15)


@pytest.fixture
def sensitivity(monkeypatch):
    monkeypatch.setitem(METHODS, "sensitivity", Sensitivity())


def flags(tmp_path, tiny_bert, squad_dir, name, *more):
    return [
        "--model_type",
        "masked_bert",
        "--model_name_or_path",
        str(tiny_bert),
        "--data_dir",
        str(squad_dir),
        "--output_dir",
        str(tmp_path / name),
        "--cache_dir",
        str(tmp_path / "cache"),
        *"--pruning_method sensitivity --do_train --do_lower_case".split(),
        *"--max_seq_length 48 --max_query_length 16 --doc_stride 16".split(),
        *"--final_threshold 0.3 --max_steps 8 --warmup_steps 1 --learning_rate 1e-3".split(),
        *"--no_cuda".split(),
        *more,
    ]


def scores_of(folder):
    return {
        name: value
        for name, value in load_file(folder / "model.safetensors").items()
        if "mask_scores" in name
    }


def test_observed_scores_are_running_means_of_the_whole_updates_gradient(
    sensitivity, tmp_path, tiny_bert, squad_dir, tiny_tokenizer
):
    for name, *batch in ("whole", "24"), ("parts", "5", "--gradient_accumulation_steps", "5"):
        masked_run_squad.main(
            flags(
                tmp_path,
                tiny_bert,
                squad_dir,
                name,
                "--max_steps",
                "1",
                "--warmup_steps",
                "0",
                "--initial_threshold",
                "1",
                "--final_threshold",
                "1",
                "--max_grad_norm",
                "1e-3",
                "--per_gpu_train_batch_size",
                *batch,
            )
        )
    examples = squad.read_examples(
        squad_dir / "train-v1.1.json", False, cache_dir=str(tmp_path / "other")
    )
    features = squad.build_features(
        examples,
        tiny_tokenizer,
        max_seq_length=48,
        doc_stride=16,
        max_query_length=16,
        training=True,
    )
    plain = transformers.BertForQuestionAnswering.from_pretrained(tiny_bert).eval()
    batch = squad.collate(list(features), 0)
    assert len(features) == 24
    out = plain(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    masked_run_squad.span_loss(masked_run_squad.span_logits(out, batch), batch).backward()
    for name in "whole", "parts":
        found = scores_of(tmp_path / name)
        assert len(found) == 12
        for key, scores in found.items():  # neither clipped nor scaled
            weight = plain.get_parameter(key.replace("mask_scores", "weight"))
            torch.testing.assert_close(
                scores, 0.15 * (weight * weight.grad).abs().detach(), rtol=1e-4, atol=1e-7
            )


def test_observed_scores_resume_bit_for_bit_and_have_no_moments(
    sensitivity, tmp_path, tiny_bert, squad_dir
):
    common = (tmp_path, tiny_bert, squad_dir)
    more = (
        "--per_gpu_train_batch_size",
        "3",
        "--gradient_accumulation_steps",
        "2",
        "--save_steps",
        "4",
        "--do_eval",
    )
    masked_run_squad.main(flags(*common, "whole", *more))
    masked_run_squad.main(
        flags(
            *common,
            "again",
            *more,
            "--resume_from_checkpoint",
            str(tmp_path / "whole" / "checkpoint-4"),
        )
    )
    whole, again = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")
    )
    assert whole == again
    state = torch.load(tmp_path / "whole" / "checkpoint-4" / "training_state.pt", weights_only=True)
    assert [group["name"] for group in state["optimizer"]["param_groups"]] == [
        "weights",
        "no_decay",
    ]
    results = json.loads((tmp_path / "whole" / "eval_results.json").read_text())
    assert (
        results["pruning_method"] == "sensitivity"
        and 29.5 < results["remaining_percent_linear"] <= 30
    )
    assert counts_parameters.main(
        ["--serialization_dir", str(tmp_path / "whole")]
    ).linear_percent == pytest.approx(results["remaining_percent_linear"])
    assert load_masked(str(tmp_path / "whole")).config.threshold == 0.3


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import masked_run_squad
from test_extending import METHODS, Sensitivity
METHODS["sensitivity"] = Sensitivity()
masked_run_squad.main(sys.argv[1:])
"""


def test_observed_scores_are_equal_on_two_ranks(sensitivity, tmp_path, tiny_bert, squad_dir):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    masked_run_squad.main(
        flags(tmp_path, tiny_bert, squad_dir, "one", "--per_gpu_train_batch_size", "10")
    )
    launcher = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    two = flags(
        tmp_path, tiny_bert, squad_dir, "two", "--per_gpu_train_batch_size", "5", "--check_ranks"
    )
    done = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), *two],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (scores_of(tmp_path / name) for name in ("one", "two"))
    for name, scores in one.items():
        torch.testing.assert_close(two[name], scores, rtol=1e-3, atol=1e-6, msg=name)


def test_observed_gradients_are_unscaled_and_finite(sensitivity):
    torch.manual_seed(0)
    from emmental.modules import MaskedLinear

    layer = MaskedLinear(3, 2, pruning_method="sensitivity")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    layer.mask_scores.grad = torch.full((2, 3), -8.0)
    passes.observe_scores(layer, scaler)
    torch.testing.assert_close(layer.mask_scores.detach(), torch.full((2, 3), 0.15 * 2))
    assert layer.mask_scores.grad is None
    layer.mask_scores.grad = torch.full((2, 3), torch.inf)  # an update that the scaler skips
    passes.observe_scores(layer, scaler)
    assert layer.mask_scores.isfinite().all() and layer.mask_scores.grad is None


# --- another family ---


class MaskedDistilBertConfig(DistilBertConfig):
    model_type = "masked_distilbert"
    pruning_method: str = "topK"
    mask_init: str = "constant"
    mask_scale: float | int = 0.0
    threshold: float | int | None = None
    global_topk: bool = False


class MaskedDistilBertModel(MaskedModel, DistilBertModel):
    config_class = MaskedDistilBertConfig


class MaskedDistilBertForQuestionAnswering(MaskedHead, DistilBertForQuestionAnswering):
    config_class = MaskedDistilBertConfig
    masked_base = MaskedDistilBertModel


AutoConfig.register("masked_distilbert", MaskedDistilBertConfig)
AutoModelForQuestionAnswering.register(MaskedDistilBertConfig, MaskedDistilBertForQuestionAnswering)


@pytest.fixture
def distilbert(monkeypatch, tmp_path, tiny_tokenizer):
    """Folder of a tiny DistilBERT, whose family is known while the test runs."""
    monkeypatch.setitem(
        families.FAMILIES, "distilbert", Family(encoder="transformer", layers="transformer.layer")
    )
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=120,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        qa_dropout=0.0,
        initializer_range=0.2,
    )
    DistilBertForQuestionAnswering(config).save_pretrained(tmp_path / "distilbert")
    DistilBertTokenizerFast(vocab=tiny_tokenizer.get_vocab()).save_pretrained(
        tmp_path / "distilbert"
    )
    return tmp_path / "distilbert"


def test_a_row_for_another_family(distilbert, tmp_path, squad_dir, capsys):
    run = [
        "--model_name_or_path",
        str(distilbert),
        "--data_dir",
        str(squad_dir),
        "--cache_dir",
        str(tmp_path / "cache"),
        *"--do_lower_case --max_seq_length 48 --max_query_length 16 --doc_stride 16".split(),
        *"--no_cuda".split(),
    ]
    dense = masked_run_squad.main(
        [*run, "--model_type", "distilbert", "--output_dir", str(tmp_path / "dense"), "--do_eval"]
    )
    train = ["--do_train", "--do_eval", "--max_steps", "2", "--learning_rate", "1e-3"]
    for name, threshold in ("full", "1"), ("out", "0.3"):
        results = masked_run_squad.main(
            [
                *run,
                *train,
                "--model_type",
                "masked_distilbert",
                "--output_dir",
                str(tmp_path / name),
                "--weight_decay",
                "0.1",
                "--initial_threshold",
                threshold,
                "--final_threshold",
                threshold,
                "--teacher_type",
                "distilbert",
                "--teacher_name_or_path",
                str(distilbert),
            ]
        )
    assert 0 <= dense["f1"] <= 100 and results["remaining_percent_linear"] == pytest.approx(
        30, abs=0.1
    )
    before, after = (
        load_file(folder / "model.safetensors") for folder in (distilbert, tmp_path / "out")
    )
    linears = {
        f"distilbert.transformer.layer.{n}.{part}"
        for n in (0, 1)
        for part in (
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        )
    }
    assert after.keys() - before.keys() == {f"{name}.mask_scores" for name in linears}
    for name, value in before.items():
        assert torch.equal(after[name], value) == (".embeddings." in name), (
            name
        )  # frozen, and nothing else

    counts = counts_parameters.main(["--serialization_dir", str(tmp_path / "out")])
    assert {m.name for m in counts.matrices} == linears
    assert counts.encoder_others == 2 * (4 * 32 + 64 + 32 + 4 * 32)
    bertarize.main(
        [
            "--model_name_or_path",
            str(tmp_path / "out"),
            "--target_model_path",
            str(tmp_path / "plain"),
        ]
    )
    plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "plain").eval()
    masked = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    assert (
        type(plain) is DistilBertForQuestionAnswering
        and type(masked) is MaskedDistilBertForQuestionAnswering
    )
    ids = torch.randint(5, 50, (2, 9))
    torch.testing.assert_close(plain(ids).start_logits, masked(ids).start_logits)

    with pytest.raises(ValueError, match="sparse inference knows BERT"):
        sparsify(plain)
    with pytest.raises(UserError, match="of type masked_distilbert: packed files hold BERT only"):
        storage.pack(str(tmp_path / "out"), str(tmp_path / "file"))


def test_without_its_row_a_family_is_refused(tmp_path):
    DistilBertConfig(dim=32).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="of type 'distilbert'; these scripts take bert"):
        load_masked(str(tmp_path))
