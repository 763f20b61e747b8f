"""Counts and bertarized models against masks written out."""

import json

import pytest
import tiny
import torch
import transformers
from tiny import QA, SIZES, SUFFIXES
from torch import nn

from emmental import MaskedBertConfig, MaskedBertForQuestionAnswering, MaskedBertModel
from emmental.checkpoints.counts import remaining_weights
from emmental.checkpoints.export import bertarized_config, bertarized_state_dict
from emmental.modules import find_masks, masked_layers
from emmental.modules.masks import Masks
from emmental.modules.methods import METHODS

THRESHOLDS = {"threshold": 0.2, "sigmoied_threshold": 0.55, "l0": None}  # else 0.3
CASES = [(name, THRESHOLDS.get(name, 0.3), False) for name in METHODS]
CASES += [(name, 0.3, True) for name, method in METHODS.items() if method.ranks_together]


def make_model(method, threshold, global_topk=False, suffix=QA):
    settings = {"threshold": threshold, "global_topk": global_topk, "mask_scale": 4.0}
    return tiny.make(method, suffix, seed=3, **settings)


def plain_masks(model, method, threshold, global_topk):
    """Masks of distinct scores, from sorts and comparisons."""
    layers = masked_layers(model)
    values = {
        n: (m.weight.abs() if method == "magnitude" else m.mask_scores).detach()
        * (m.mask_uncertainty if method == "platon" else 1)
        for n, m in layers.items()
    }
    if method == "l0":
        return {n: (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1) for n, v in values.items()}
    if method == "sigmoied_threshold":
        return {n: (torch.sigmoid(v) > threshold).float() for n, v in values.items()}
    if method == "threshold" and not global_topk:
        return {n: (v > threshold).float() for n, v in values.items()}

    def keep(flat):
        return flat.sort(descending=True).values[int(threshold * flat.numel()) - 1]

    together = keep(torch.cat([v.flatten() for v in values.values()]))
    cuts = {n: together if global_topk else keep(v.flatten()) for n, v in values.items()}
    return {n: (v >= cuts[n]).float() for n, v in values.items()}


@pytest.mark.parametrize("method, threshold, global_topk", CASES)
def test_counts(method, threshold, global_topk):
    model = make_model(method, threshold, global_topk)
    masks = plain_masks(model, method, threshold, global_topk)
    report = remaining_weights(model)
    wanted = {name: (int(mask.count_nonzero()), mask.numel()) for name, mask in masks.items()}
    assert {m.name: (m.remaining, m.total) for m in report.matrices} == wanted
    kept, total = map(sum, zip(*wanted.values()))
    # Per layer: biases of q, k, v, o, in, out, and two LayerNorms.
    others = 2 * (4 * 32 + 64 + 32 + 4 * 32)
    assert 0 < kept < total
    assert report.encoder_others == others
    assert report.linear_percent == pytest.approx(100 * kept / total)
    assert report.published_percent == pytest.approx(100 * (kept + others) / (total + others))
    values = json.loads(json.dumps(report.as_dict()))
    assert (values["remaining"], values["total"]) == (kept, total) and len(values["matrices"]) == 12


@pytest.mark.parametrize(
    "topk, linear, published", [(0.1, 10.0, 10.1), (0.03, 3.0, 3.1), (1.0, 100.0, 100.0)]
)
def test_published_percentages_of_bert_base(topk, linear, published):
    with torch.device("meta"):
        model = MaskedBertModel(MaskedBertConfig())
    sizes = {name: layer.weight.numel() for name, layer in masked_layers(model).items()}
    masks = {name: torch.arange(n) < int(topk * n) for name, n in sizes.items()}
    report = remaining_weights(model, Masks(masks, dict.fromkeys(masks, 1)))
    assert sum(m.total for m in report.matrices) == 12 * (4 * 768**2 + 2 * 768 * 3072) == 84_934_656
    assert report.encoder_others == 12 * (4 * 768 + 3072 + 768 + 4 * 768)
    assert round(report.linear_percent, 1) == linear
    assert round(report.published_percent, 1) == published


def test_the_floor_is_reported_where_it_bites():
    model = make_model("threshold", 5.0)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.mask_scores.add_(100)
    floored = {m.name: m.floored for m in remaining_weights(model).matrices}
    assert not floored.pop("bert.encoder.layer.0.output.dense") and all(floored.values())
    model = make_model("topK", 0.0059)  # the count of the floor, asked for
    assert not any(m.floored for m in remaining_weights(model).matrices)


@pytest.mark.parametrize("method, threshold, global_topk", CASES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bertarized_models_are_stock_and_equal(tmp_path, suffix, method, threshold, global_topk):
    model = make_model(method, threshold, global_topk, suffix)
    ids = torch.randint(5, 120, (1, 3, 10) if suffix == "ForMultipleChoice" else (3, 10))
    with torch.no_grad():
        wanted = model(ids)
        masks = plain_masks(model, method, threshold, global_topk)
        state = bertarized_state_dict(model)
        plain = getattr(transformers, f"Bert{suffix}")(bertarized_config(model.config)).eval()
        plain.load_state_dict(state, strict=True)
        got = plain(ids)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        mask = masks.get(key.removesuffix(".weight"), torch.ones(()))
        torch.testing.assert_close(value, (parameters[key] * mask).detach())


def test_bertarized_config_is_a_plain_bert(tmp_path):
    pruning = {"threshold": 0.2, "global_topk": True, "mask_scale": 2.0}
    config = MaskedBertConfig(**SIZES, **pruning, num_labels=3)
    config.architectures = ["MaskedBertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    plain = bertarized_config(MaskedBertConfig.from_pretrained(tmp_path))
    assert type(plain) is transformers.BertConfig
    plain.save_pretrained(tmp_path / "plain")
    values = tiny.read(tmp_path / "plain" / "config.json")
    assert {"model_type": "bert", "hidden_size": 32, "vocab_size": 120}.items() <= values.items()
    assert not {"pruning_method", "mask_init", *pruning} & values.keys()
    assert "Masked" not in json.dumps(values)
    assert plain.num_labels == 3


@pytest.mark.parametrize("export", [remaining_weights, bertarized_state_dict])
def test_export_needs_a_threshold_and_masks(export):
    with pytest.raises(ValueError, match="threshold"):
        export(make_model("topK", None))
    with pytest.raises(ValueError, match="no masked layers"):
        export(nn.Linear(2, 2))


def test_sampled_masks_of_l0_are_not_baked():
    model = make_model("l0", None)
    wanted = bertarized_state_dict(model)
    got = bertarized_state_dict(model.train())
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_export_takes_any_module():
    model = nn.Sequential(MaskedBertForQuestionAnswering(MaskedBertConfig(**SIZES)))
    state = bertarized_state_dict(model, find_masks(model, 0.25))
    matrix = state["0.bert.encoder.layer.0.output.dense.weight"]
    assert matrix.count_nonzero() == 32 * 64 // 4


@pytest.mark.parametrize("method", ["topK", "l0"])
def test_export_keeps_the_dtype(tmp_path, method):
    make_model(method, 0.3).save_pretrained(tmp_path)
    model = MaskedBertForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in bertarized_state_dict(model).values()} == {torch.bfloat16}
