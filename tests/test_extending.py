"""What a new family touches: its own row and classes, and nothing else."""

import pytest
import torch
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
from emmental.errors import UserError
from emmental.families import Family, MaskedHead, MaskedModel
from emmental.inference import sparsify
from emmental.loading import load_masked

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
                *"--alpha_hidden 0.5".split(),
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
