"""docs/library.md: the Trainer of that page fine-prunes, and its folder goes into the scripts."""

import re
from pathlib import Path

import pytest
import tiny
import torch
import transformers

import bertarize
from emmental import MaskedBertForSequenceClassification
from emmental.modules import count, find_masks, masked_layers, observe_scores
from emmental.modules.masks import UNOBSERVED
from emmental.modules.methods import METHODS

PAGE = (Path(__file__).parent.parent / "docs" / "library.md").read_text()
CODE, USE = re.findall(r"```python\n(.*?)```", PAGE.partition("## `Trainer`")[2], re.S)[:2]
OBSERVED = [name for name, method in METHODS.items() if method.scores == "observed"]


@pytest.fixture
def page(tmp_path, tiny_tokenizer, monkeypatch):
    """Runs the code of the page for 40 updates on sentences whose first name is their label."""
    monkeypatch.chdir(tmp_path)
    dense = transformers.BertForSequenceClassification(transformers.BertConfig(**tiny.SIZES))
    dense.save_pretrained("runs/dense")
    texts = [f"{name} lives in oslo" for name in ("ada", "ben") for _ in range(16)]
    rows = [tiny_tokenizer(text) | {"labels": n // 16} for n, text in enumerate(texts)]
    space = {"train_set": rows, "tokenizer": tiny_tokenizer}
    exec(CODE, space)

    def run(use=USE, **settings):
        use = use.replace("max_steps=3000, warmup_steps=300", "max_steps=40, warmup_steps=4")
        use = use.replace(
            "learning_rate=3e-4", 'learning_rate=3e-3, report_to="none", use_cpu=True'
        )
        exec(use, space)
        return space["trainer"]

    return run


def test_the_page_fine_prunes_with_platon(page, tmp_path):
    trainer = page()
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert losses and torch.isfinite(torch.tensor(losses)).all()
    model = MaskedBertForSequenceClassification.from_pretrained("runs/pruned")
    assert model.config.threshold == pytest.approx(0.1)
    for layer in masked_layers(model).values():
        assert layer.mask_scores.min() >= 0 and layer.mask_scores.max() > 0
        assert layer.mask_uncertainty.max() > 0
    assert count(find_masks(model)).overall == pytest.approx(0.1, abs=0.01)
    names = [group["name"] for group in trainer.optimizer.param_groups]
    assert names == ["weights", "no_decay"]  # observed scores are in no group
    folder = bertarize.main(["--model_name_or_path", "runs/pruned"])
    assert (tmp_path / folder / "model.safetensors").exists()


def test_the_page_learns_the_scores_of_movement(page):
    trainer = page(USE.replace('"platon"', '"topK"'))
    assert [group["name"] for group in trainer.optimizer.param_groups][0] == "scores"
    layers = masked_layers(trainer.model)
    assert all(layer.mask_scores.unique().numel() > 2 for layer in layers.values())


@pytest.mark.parametrize("method", OBSERVED)
def test_scores_that_nothing_observes_are_said(method):
    """In a loop without the call, the masks would keep the first rows for ever."""
    model = tiny.make(method, "ForSequenceClassification").train()
    batch = tiny.batch_for("ForSequenceClassification")
    with pytest.raises(ValueError, match=r"call emmental.modules.observe_scores\(model\) after"):
        for _ in range(UNOBSERVED + 1):
            model(**batch, threshold=0.5)
    observe_after(model, batch)
    model(**batch, threshold=0.5)


def observe_after(model, batch):
    masked_layers(model).holders[0].unobserved = 0
    model(**batch, threshold=0.5).loss.backward()
    observe_scores(model)
    assert all(layer.mask_scores.grad is None for layer in masked_layers(model).values())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.scores])
@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "float"])
def test_masks_stay_in_another_precision(method, change):
    model = tiny.make(method, mask_init="uniform", mask_scale=1.0).eval()
    for layer in masked_layers(model).values():  # closer together than half precision tells apart
        layer.mask_scores.data.mul_(1e-3).add_(1.0)
        for name in layer.method.state:
            layer.get_buffer(name).fill_(1.0)
    before = find_masks(model, 0.3).by_layer
    layers = masked_layers(model).values()
    for layer in layers:
        layer.mask_scores.grad = torch.ones_like(layer.mask_scores)
    getattr(model, change)()
    after = find_masks(model, 0.3).by_layer
    assert all(torch.equal(before[name] > 0, after[name] > 0) for name in before)
    dtype = torch.float64 if change == "double" else torch.float32
    assert all(layer.mask_scores.dtype == dtype for layer in layers)
    assert all(layer.mask_scores.grad.dtype == dtype for layer in layers)
