"""docs/library.md: the loop of that page prunes a sentence encoder, which keeps its pooling."""

import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

import bertarize
import counts_parameters
import saving_prunebert
from emmental import MaskedBertModel
from emmental.checkpoints.loading import load_masked
from emmental.modules import count, find_masks

PAGE = (Path(__file__).parent.parent / "docs" / "library.md").read_text()
LOOP = re.search(r"```python\n(.*?)```", PAGE.partition("## Sentence encoders")[2], re.S)[1]
TEXTS = ["ada lives in oslo", "where does ben live ?", "ben lives in rome"]


@pytest.fixture
def encoder(tmp_path, tiny_tokenizer, monkeypatch):
    """The folder runs/encoder: a tiny BERT, the mean of its tokens, of length 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny.save(tiny.plain_bert(""), tmp_path / "bert", tiny_tokenizer)
    modules = [Transformer(str(tmp_path / "bert")), Pooling(32, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained("runs/encoder")
    return tmp_path / "runs" / "encoder"


@pytest.fixture
def pruned(encoder):
    space = {"batches": [TEXTS] * 12}
    exec(LOOP, space)
    assert torch.isfinite(space["loss"])
    return encoder.with_name("pruned")


def convert(folder, *more):
    return str(bertarize.main(["--model_name_or_path", str(folder), *more]))


def embed(folder, **options):
    encoder = SentenceTransformer(str(folder), device="cpu", **options)
    return torch.from_numpy(encoder.encode(TEXTS))


def test_the_page_prunes_a_sentence_encoder(pruned, tmp_path, refused):
    masked = load_masked(str(pruned))
    assert count(find_masks(masked)).overall == pytest.approx(0.15, abs=0.01)
    counts_parameters.main(["--serialization_dir", str(pruned)])
    wanted = embed(pruned)
    torch.testing.assert_close(wanted.norm(dim=1), torch.ones(3))
    corpus = tiny.write(tmp_path / "corpus.txt", "\n".join(TEXTS))
    forms = {"bertarized": [], "compact": ["--compact"]}
    forms["cut"] = ["--target_model_path", "cut", "--keep_vocabulary_of", str(corpus)]
    for form, flags in forms.items():
        for _ in range(2):  # again over the first one
            folder = convert(pruned, *flags)
        assert Path(folder, "1_Pooling", "config.json").exists(), form
        torch.testing.assert_close(embed(folder), wanted, rtol=1e-4, atol=1e-5)
    words = ["pack", str(pruned), str(tmp_path / "packed")]
    assert "not a base model" in refused(saving_prunebert.main, words)


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_without_a_pooler_gets_none(encoder, masked):
    if masked:
        settings = {"pruning_method": "magnitude", "threshold": 0.5}
        MaskedBertModel.from_pretrained("runs/encoder", **settings).save_pretrained("runs/encoder")
    tiny.rewrite(encoder, lambda state: {k: v for k, v in state.items() if "pooler" not in k})
    for flags in (["--compact"], [] if masked else ["--keep_vocabulary_of", "bert/config.json"]):
        folder = convert(encoder, *flags)
        assert not any("pooler" in name for name in tiny.weights(Path(folder)))
        assert embed(folder).shape == (3, 32)


def test_other_files_of_a_target_are_safe(encoder, refused):
    target = encoder.with_name("compact_encoder")
    (target / "1_Pooling").mkdir(parents=True)
    assert "holds other files (1_Pooling)" in refused(convert, encoder, "--compact")
    shutil.rmtree(target)
    convert(encoder, "--compact")
    (target / "notes.txt").touch()
    assert "holds other files (notes.txt)" in refused(convert, encoder, "--compact")
    tiny.edit(encoder / "config.json", architectures=["BertForMaskedLM"])
    words = ["--compact", "--target_model_path", "new"]
    assert "not a masked-LM head" in refused(convert, encoder, *words)
