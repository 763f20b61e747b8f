"""MaskedBert* against the stock classes."""

import inspect

import pytest
import torch
import transformers
from tiny import INPUTS, NO_DROPOUT, SIZES, SUFFIXES, batch_for, make
from torch import nn
from transformers.utils import output_capturing

import emmental
from emmental import MaskedBertConfig, MaskedBertModel
from emmental.modules import masked, masked_layers
from emmental.modules.methods import METHODS

every_method = pytest.mark.parametrize("method", METHODS)
every_head = pytest.mark.parametrize("suffix", SUFFIXES)


def class_of(suffix, masked=True):
    name = f"Bert{suffix}"
    return getattr(emmental, f"Masked{name}") if masked else getattr(transformers, name)


def encoder_linears(model):
    return {n: m for n, m in model.named_modules() if "encoder." in n and isinstance(m, nn.Linear)}


# --- the model is the stock one ---


@every_head
def test_six_linears_per_layer_are_masked_and_keys_are_stock(suffix):
    stock = class_of(suffix, masked=False)(transformers.BertConfig(**SIZES))
    masked = class_of(suffix)(MaskedBertConfig(**SIZES))
    names = set(encoder_linears(stock))
    assert set(masked_layers(masked)) == names and len(names) == 12
    scores = {f"{name}.mask_scores" for name in names}
    assert set(masked.state_dict()) == set(stock.state_dict()) | scores
    frozen = {n for n, p in masked.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in masked.named_parameters() if "embeddings." in n} and frozen


FULL = {"threshold": -9.0, "sigmoied_threshold": 0.0}  # else 1


@pytest.mark.parametrize("method", [name for name in METHODS if name != "l0"])
@every_head
def test_full_masks_are_the_stock_model(tmp_path, suffix, method):
    built = output_capturing._CAN_RECORD_REGISTRY  # classes that can return hidden states
    built.pop(str(MaskedBertModel), None)
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **NO_DROPOUT, initializer_range=0.2)
    stock = class_of(suffix, masked=False)(config).train()
    stock.save_pretrained(tmp_path)
    masked = class_of(suffix).from_pretrained(tmp_path, pruning_method=method).train()
    given = batch_for(suffix) | {"output_hidden_states": True, "output_attentions": False}
    outputs = [stock(**given), masked(**given, threshold=FULL.get(method, 1.0))]
    assert outputs[0].keys() == outputs[1].keys()
    for name, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][name], value, msg=name)
    for out in outputs:
        if suffix == "Model":
            (out.last_hidden_state.pow(2).sum() + out.pooler_output.sum()).backward()
        else:
            out.loss.backward()
    compared = dict(masked.named_parameters())
    for name, parameter in stock.named_parameters():
        if "embeddings." in name:
            assert compared[name].grad is None
        else:
            torch.testing.assert_close(compared[name].grad, parameter.grad, msg=name)
    for name in masked_layers(masked) if method != "magnitude" else ():
        torch.testing.assert_close(
            compared[f"{name}.mask_scores"].grad,
            compared[f"{name}.weight"].grad * compared[f"{name}.weight"].detach(),
        )


def test_the_threshold_has_one_home(tmp_path):
    with pytest.raises(ValueError, match="threshold"):
        make()(**INPUTS)
    model = make(threshold=0.3)
    assert model(**INPUTS).last_hidden_state.equal(model(**INPUTS, threshold=0.3).last_hidden_state)
    model(**INPUTS, threshold=0.6)
    assert model(**INPUTS).last_hidden_state.equal(model(**INPUTS, threshold=0.6).last_hidden_state)
    assert model.config.threshold == 0.6
    with masked(model, 0.2):
        wanted = model(**INPUTS).last_hidden_state
    model.save_pretrained(tmp_path)  # as it was last used
    again = MaskedBertModel.from_pretrained(tmp_path).eval()
    assert again.config.threshold == 0.2 and again(**INPUTS).last_hidden_state.equal(wanted)
    assert make("l0")(**INPUTS).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("suffix", SUFFIXES[:2])
def test_eager_and_sdpa_agree(tiny_bert, suffix):
    cls = class_of(suffix)
    eager, sdpa = (
        cls.from_pretrained(tiny_bert, attn_implementation=name).eval()
        for name in ("eager", "sdpa")
    )
    assert eager.config._attn_implementation != sdpa.config._attn_implementation
    first, second = (model(**INPUTS, threshold=0.5)[0] for model in (eager, sdpa))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_masks_survive_a_change_of_dtype(method, dtype):
    model = make(method)
    wanted = model(**INPUTS, threshold=0.5).last_hidden_state
    got = model.to(dtype)(**INPUTS, threshold=0.5).last_hidden_state
    assert got.dtype == dtype
    close = 1e-5 if dtype == torch.float64 else 0.15
    assert (got.float() - wanted).norm() < close * wanted.norm()


# --- one encoder, and the stock signature ---


@every_head
def test_the_signature_is_the_stock_one_and_threshold(suffix):
    stock = inspect.signature(class_of(suffix, masked=False).forward).parameters
    ours = inspect.signature(class_of(suffix).forward).parameters
    assert [name for name in ours if name != "threshold"] == list(stock)
    assert ours["threshold"].default is None
    assert ours["threshold"].kind is inspect.Parameter.KEYWORD_ONLY
    model = make(suffix=suffix, threshold=0.4)
    inputs = batch_for(suffix, labels=False)
    wanted = model(**inputs)[0]
    in_order = model(*inputs.values(), return_dict=False)  # of the stock model
    assert type(in_order) is tuple and in_order[0].equal(wanted)
    embeds = model.base_model.embeddings.word_embeddings(inputs.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **inputs)[0], wanted)


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_a_head_builds_one_encoder(suffix, monkeypatch):
    built = []
    encoder = transformers.models.bert.modeling_bert.BertEncoder
    init = encoder.__init__
    monkeypatch.setattr(encoder, "__init__", lambda *args: built.append(1) or init(*args))
    model = make(suffix=suffix)
    assert len(built) == 1 and type(model.bert) is MaskedBertModel
