"""Counts and bertarized models against masks written out."""

import json

import pytest
import torch
import transformers
from torch import nn

import emmental
from emmental import MaskedBertConfig, MaskedBertForQuestionAnswering, MaskedBertModel
from emmental.export import bertarized_config, bertarized_state_dict, remaining_weights
from emmental.modules import find_masks, masked_layers
from emmental.modules.masks import Masks

SUFFIXES = [
    "Model",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMultipleChoice",
]
CASES = [  # method, threshold, global_topk
    ("topK", 0.3, False),
    ("threshold", 0.2, False),
    ("sigmoied_threshold", 0.55, False),
    ("magnitude", 0.3, False),
    ("l0", None, False),
    ("topK", 0.3, True),
    ("threshold", 0.3, True),
    ("magnitude", 0.3, True),
]


def make_model(
    tiny_config, method, threshold, global_topk=False, suffix="ForQuestionAnswering", **kwargs
):
    torch.manual_seed(3)
    config = MaskedBertConfig(
        **tiny_config,
        pruning_method=method,
        threshold=threshold,
        global_topk=global_topk,
        **{"mask_init": "uniform", "mask_scale": 4.0, "initializer_range": 0.2} | kwargs,
    )
    return getattr(emmental, f"MaskedBert{suffix}")(config).eval()


def plain_masks(model, method, threshold, global_topk):
    """Masks of distinct scores, from sorts and comparisons."""
    layers = masked_layers(model)
    values = {
        n: (m.weight.abs() if method == "magnitude" else m.mask_scores).detach()
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
    return {
        n: (v >= (together if global_topk else keep(v.flatten()))).float()
        for n, v in values.items()
    }


@pytest.mark.parametrize("method, threshold, global_topk", CASES)
def test_counts(tiny_config, method, threshold, global_topk):
    model = make_model(tiny_config, method, threshold, global_topk)
    masks = plain_masks(model, method, threshold, global_topk)
    report = remaining_weights(model)
    assert {m.name: (m.remaining, m.total) for m in report.matrices} == {
        name: (int(mask.count_nonzero()), mask.numel()) for name, mask in masks.items()
    }
    kept, total = (
        sum(int(m.count_nonzero()) for m in masks.values()),
        sum(m.numel() for m in masks.values()),
    )
    others = 2 * (
        4 * 32 + 64 + 32 + 4 * 32
    )  # per layer: biases of q, k, v, o, in, out, and two LayerNorms
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


def test_the_floor_is_reported_where_it_bites(tiny_config):
    model = make_model(tiny_config, "threshold", 5.0)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.mask_scores.add_(100)
    floored = {m.name: m.floored for m in remaining_weights(model).matrices}
    assert not floored.pop("bert.encoder.layer.0.output.dense") and all(floored.values())
    model = make_model(tiny_config, "topK", 0.0059)  # the count of the floor, asked for
    assert not any(m.floored for m in remaining_weights(model).matrices)


@pytest.mark.parametrize("method, threshold, global_topk", CASES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bertarized_models_are_stock_and_equal(
    tiny_config, tmp_path, suffix, method, threshold, global_topk
):
    model = make_model(tiny_config, method, threshold, global_topk, suffix)
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


def test_bertarized_config_is_a_plain_bert(tiny_config, tmp_path):
    config = MaskedBertConfig(
        **tiny_config, threshold=0.2, global_topk=True, mask_scale=2.0, num_labels=3
    )
    config.architectures = ["MaskedBertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    plain = bertarized_config(MaskedBertConfig.from_pretrained(tmp_path))
    assert type(plain) is transformers.BertConfig
    plain.save_pretrained(tmp_path / "plain")
    values = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (
        values["model_type"] == "bert"
        and values["hidden_size"] == 32
        and values["vocab_size"] == 120
    )
    assert (
        not {"pruning_method", "mask_init", "mask_scale", "threshold", "global_topk"}
        & values.keys()
    )
    assert "Masked" not in json.dumps(values)
    assert plain.num_labels == 3


@pytest.mark.parametrize("export", [remaining_weights, bertarized_state_dict])
def test_export_needs_a_threshold_and_masks(tiny_config, export):
    with pytest.raises(ValueError, match="threshold"):
        export(make_model(tiny_config, "topK", None))
    with pytest.raises(ValueError, match="no masked layers"):
        export(nn.Linear(2, 2))


def test_sampled_masks_of_l0_are_not_baked(tiny_config):
    model = make_model(tiny_config, "l0", None)
    wanted = bertarized_state_dict(model)
    got = bertarized_state_dict(model.train())
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_export_takes_any_module(tiny_config):
    model = nn.Sequential(MaskedBertForQuestionAnswering(MaskedBertConfig(**tiny_config)))
    assert (
        bertarized_state_dict(model, find_masks(model, 0.25))[
            "0.bert.encoder.layer.0.output.dense.weight"
        ].count_nonzero()
        == 32 * 64 // 4
    )


@pytest.mark.parametrize("method", ["topK", "l0"])
def test_export_keeps_the_dtype(tiny_config, tmp_path, method):
    make_model(tiny_config, method, 0.3).save_pretrained(tmp_path)
    model = MaskedBertForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in bertarized_state_dict(model).values()} == {torch.bfloat16}
