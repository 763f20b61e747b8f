"""After training, for every family: packed files, sparse inference, compaction, cards."""

import logging

import pytest
import tiny
import torch
import transformers
from test_compact_families import serve
from tiny import assert_same, config_of, model_of, padded_batch, tokenizer_of
from transformers import AutoTokenizer

import saving_prunebert
from emmental import storage
from emmental.checkpoints.counts import plain_percents
from emmental.checkpoints.onnx_file import write_onnx
from emmental.inference import sparsify
from emmental.inference.encoder import SparseEncoder
from emmental.models.families import FAMILIES, HEADS, encoder_of, family_of, layers_of, prefix_of
from emmental.packing.format import write_packed
from emmental.system.errors import UserError

HIDDEN, NEURONS = 32, 48
NATIVE = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"]
FEED_FORWARD = ["mpnet", "albert", "deberta-v2"]
SPECIAL = ("pad", "bos", "eos", "cls", "sep")


def settings_of(row, **settings):
    """What fits the tokenizer of a family, and an odd number of neurons."""
    tokenizer = tokenizer_of(row)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    sizes = {"intermediate_size": NEURONS, "hidden_dim": NEURONS, "vocab_size": len(tokenizer)}
    return sizes | ids | {"max_position_embeddings": 48} | settings


@torch.no_grad()
def build(row, head="QuestionAnswering", density=0.2, seed=0, **settings):
    """A plain model with random zeros; a head and half of the neurons of layer 0 are empty, and all
    heads and neurons of layer 1. Its padding id matters for positions.
    """
    model = model_of(row, head, seed=seed, **settings_of(row, **settings))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    for parameter in encoder_of(model).parameters():
        if parameter.dim() == 2:
            parameter.mul_(torch.rand(parameter.shape) < density)
    family = family_of(model.config)
    for layer, share in zip(layers_of(model), (4, 1)):
        for names in (family.heads, family.neurons):
            if names:
                weight = layer.get_submodule(names[-1]).weight
                weight[:, : weight.shape[1] // share] = 0
        if family.neurons:  # neurons whose activation is constant
            layer.get_submodule(family.neurons[0]).weight[-NEURONS // 3 :] = 0
    return model


def save_masked(row, folder, head="QuestionAnswering"):
    """A masked model of one layer, saved with its tokenizer."""
    masks = {"mask_init": "uniform", "mask_scale": 4.0, "threshold": 0.2, "num_hidden_layers": 1}
    model = model_of(row, head, "masked_", **settings_of(row, **masks))
    tiny.save(model, folder, tokenizer_of(row))
    return model


# --- packed files ---


@pytest.mark.parametrize("row", FAMILIES)
def test_packed_files(row, tmp_path):
    masked, file = save_masked(row, tmp_path / "in"), str(tmp_path / "file")
    packed = storage.pack(str(tmp_path / "in"), file, 32)
    stock = type(masked).__name__.removeprefix("Masked")
    assert packed.header["architecture"] == stock
    assert packed.header["config"]["model_type"] == row
    assert_same(masked, storage.load_packed(file, sparse=True))
    assert_same(masked, storage.unpack(file, str(tmp_path / "out")), 0.0)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert type(model) is getattr(transformers, stock)
    assert_same(masked, model.eval(), 0.0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"A plain `{stock}`" in card and f"from transformers import {stock}" in card
    tokenizers = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "in"))
    pair = "who lives in oslo ?", "Ada lives in oslo . ben lives in rome ."
    ours, theirs = (tokenizer(*pair).input_ids for tokenizer in tokenizers)
    assert ours == theirs


@pytest.mark.parametrize("row", ["roberta", "electra", "distilbert", "albert", "modernbert"])
def test_embeddings_of_a_base_model_are_left_out(row, tmp_path):
    masked, file = save_masked(row, tmp_path / "in"), str(tmp_path / "file")
    stock = getattr(transformers, type(masked).__name__.removeprefix("Masked"))
    base = stock(config_of(row, **settings_of(row, num_hidden_layers=1)))
    own = {n: x for n, x in masked.state_dict().items() if n.startswith(prefix_of(stock))}
    assert own and base.load_state_dict(own, strict=False).unexpected_keys == []
    base.save_pretrained(tmp_path / "base")
    packed = storage.pack(str(tmp_path / "in"), file, 8, str(tmp_path / "base"))
    names = {entry["name"] for entry in packed.header["tensors"]}
    assert names == set(base.state_dict()) - set(own)  # shared matrices are there once
    assert saving_prunebert.main(["verify", file, str(tmp_path / "in")]) == 0
    loaded = storage.load_packed(file)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in own.items())
    assert_same(masked, loaded, 0.3)


@pytest.mark.parametrize("head", HEADS[1:])
def test_packed_heads(head, tmp_path):
    masked, file = save_masked("distilbert", tmp_path / "in", head), str(tmp_path / "file")
    storage.pack(str(tmp_path / "in"), file, 32)
    assert_same(masked, storage.load_packed(file), 0.0)
    assert_same(masked, storage.load_packed(file, sparse=True))


def test_embeddings_of_another_family_are_refused(tmp_path):
    save_masked("roberta", tmp_path / "in")
    save_masked("camembert", tmp_path / "same names")
    save_masked("distilbert", tmp_path / "base")
    for base in ("base", "same names"):
        with pytest.raises(UserError, match="embeddings of .* are not those of"):
            storage.pack(str(tmp_path / "in"), str(tmp_path / "f"), 8, str(tmp_path / base))


@pytest.mark.parametrize("architecture, model_type", [
    ("BertForQuestionAnswering", "roberta"),
    ("RobertaForMaskedLM", "roberta"),
    ("GPT2ForQuestionAnswering", "gpt2"),
    ("MaskedRobertaForQuestionAnswering", "masked_roberta"),
    ("CompactRobertaForQuestionAnswering", "compact_roberta"),
    ("CompactBertForQuestionAnswering", "bert"),
    ("AutoModelForQuestionAnswering", "roberta"),
])  # fmt: skip
def test_a_class_that_is_not_of_its_family_is_refused(tmp_path, architecture, model_type):
    config = {"model_type": model_type}
    header = {"architecture": architecture, "config": config, "files": [], "tensors": []}
    write_packed(tmp_path / "file", header, [])
    with pytest.raises(UserError, match="invalid header"):
        storage.open_packed(str(tmp_path / "file"))


# --- sparse inference ---


@pytest.mark.parametrize("row", FAMILIES)
def test_sparsify(row, caplog):
    caplog.set_level(logging.WARNING)
    model = build(row)
    for kernel in ("auto", "native", "library", "compact"):
        caplog.clear()
        if row not in NATIVE and kernel in ("native", "library"):
            said = f"no sparse kernels for {row} layers; choose auto"
            with pytest.raises(ValueError, match=said):
                sparsify(model, kernel)
            continue
        sparse = sparsify(model, kernel)
        assert_same(model, sparse)
        is_sparse = isinstance(encoder_of(sparse), SparseEncoder)
        assert is_sparse == (row in NATIVE and kernel != "compact")
        said = [message for message in caplog.messages if "gains nothing" not in message]
        if row in NATIVE:
            assert said == []
        else:
            does = "compaction only" if row in FEED_FORWARD else "computes dense"
            assert len(said) == 1 and f"no sparse kernels for {row} layers: {does}" in said[0]


@pytest.mark.parametrize("row", [*NATIVE, *FEED_FORWARD])
def test_what_compaction_drops(row):
    """Heads and neurons; a layer can lose all of them."""
    model, family = build(row, density=0.9), FAMILIES[row]
    small = sparsify(model, "compact")
    assert_same(model, small)
    first, *last = layers_of(small)
    ends = family.heads[-1], family.neurons[-1]
    assert [first.get_submodule(name).in_features for name in ends] == [24, 24]
    for layer in last:
        assert [layer.get_submodule(name).in_features for name in ends] == [0, 0]
    small.train()(**padded_batch(model)).start_logits.sum().backward()


@pytest.mark.parametrize("head", HEADS[1:])
def test_heads(head):
    for row in FAMILIES:
        model = build(row, head)
        assert_same(model, sparsify(model, "library" if row in NATIVE else "auto"))


@pytest.mark.parametrize("row", FAMILIES)
def test_masked_models(row, tmp_path):
    masked = save_masked(row, tmp_path / "in")
    sparse = sparsify(masked)
    assert type(sparse).__name__ == type(masked).__name__.removeprefix("Masked")
    assert_same(masked, sparse)
    with pytest.raises(ValueError, match="cannot be saved"):
        sparse.save_pretrained(tmp_path / "out")


def test_other_activations_and_norms():
    for row, settings in (
        ("distilbert", {"activation": "relu"}),
        ("roberta", {"hidden_act": "silu", "layer_norm_eps": 0.1}),
    ):
        model = build(row, **settings)
        for kernel in ("auto", "library", "compact"):
            assert_same(model, sparsify(model, kernel))


def test_an_onnx_file_is_right_where_there_are_tokens(tmp_path):
    """Some windows of 16 hold only padding, which ONNX Runtime computes otherwise than torch."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build("modernbert", local_attention=16)
    write_onnx(model, tmp_path / "model.onnx")
    serve(model, "bert", tmp_path / "model.onnx")  # a tokenizer with token types


@pytest.mark.parametrize("row", ["roberta", "distilbert"])
def test_a_layer_that_is_not_of_linears_is_refused(row):
    model = build(row)
    layers_of(model)[0].set_submodule(FAMILIES[row].heads[0], torch.nn.Bilinear(2, 2, 2))
    with pytest.raises(ValueError, match="Bilinear instead of nn.Linear"):
        sparsify(model)


def test_percentages_of_the_card():
    for row in FAMILIES:
        assert 5 < plain_percents(build(row))[0] < 25
