"""Scores that start at the magnitudes of the weights."""

import pytest
import tiny
import torch
from torch import nn

from emmental import MaskedBertConfig, MaskedBertModel
from emmental.modules import MaskedLinear, find_masks, masked_layers, swap_linears
from emmental.modules.granularity import GRANULARITIES
from emmental.modules.methods import METHODS

LEARNED = [name for name, method in METHODS.items() if method.scores == "learned"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_loaded_model_starts_with_the_masks_of_magnitude_pruning(granularity, tmp_path):
    tiny.save(tiny.plain_bert(head="", initializer_range=0.5), tmp_path)
    settings = {"mask_init": "magnitude", "mask_scale": 3.0, "granularity": granularity}
    settings |= {"block_rows": 8, "block_columns": 16}
    models = {}
    for method in "topK", "magnitude":
        config = MaskedBertConfig.from_pretrained(tmp_path, pruning_method=method, **settings)
        models[method] = MaskedBertModel.from_pretrained(tmp_path, config=config)
    ours, wanted = (find_masks(model, 0.3).by_layer for model in models.values())
    assert all(torch.equal(ours[name], mask) for name, mask in wanted.items())
    for layer in masked_layers(models["topK"]).holders:
        assert layer.mask_scores.square().mean().sqrt().item() == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("method", LEARNED)
def test_scores_are_the_scaled_weights(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30))
    weight = model[0].weight.detach().clone()
    swap_linears(model, mask_init="magnitude", mask_scale=2.0, pruning_method=method)
    wanted = 2.0 * weight.abs() / weight.square().mean().sqrt()
    wanted -= 0 if method == "topK" else wanted.mean()
    torch.testing.assert_close(model[0].mask_scores.detach(), wanted)


def test_observed_scores_and_half_precision():
    layer = MaskedLinear(
        8, 4, pruning_method="platon", mask_init="magnitude", mask_scale=1.0, dtype=torch.bfloat16
    )
    assert layer.mask_scores.dtype == torch.float32 and (layer.mask_scores >= 0).all()
    assert not layer.mask_uncertainty.any()
