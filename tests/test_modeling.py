"""MaskedBert* against the stock classes; loading and saving."""

import copy
import inspect
import io
import json
import logging
import pickle
import shutil

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import IDS, INPUTS, NO_DROPOUT, QA, SIZES, SUFFIXES, make, plain_bert
from torch import nn
from transformers.utils import output_capturing

import emmental
from emmental import MaskedBertConfig, MaskedBertForQuestionAnswering, MaskedBertModel
from emmental.checkpoints.loading import load_masked, load_model
from emmental.modules import find_masks, masked, masked_layers
from emmental.modules.methods import METHODS
from emmental.system.errors import UserError
from emmental.training.pair import load_teacher

LABELS = {
    QA: {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 4, 4])},
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1])},
    "ForTokenClassification": {"labels": IDS % 2},
    "ForMultipleChoice": {"labels": torch.tensor([2])},
}
every_method = pytest.mark.parametrize("method", METHODS)
every_head = pytest.mark.parametrize("suffix", SUFFIXES)


def make_inputs(suffix):
    inputs = {k: v[None] for k, v in INPUTS.items()} if suffix == "ForMultipleChoice" else INPUTS
    return inputs | LABELS.get(suffix, {})


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
    given = make_inputs(suffix) | {"output_hidden_states": True, "output_attentions": False}
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


@every_method
def test_outputs_are_those_of_the_masked_weights(method):
    masked = make(method, QA)
    stock = plain_bert()
    out = masked(**INPUTS, threshold=0.4)
    state = {key: value for key, value in masked.state_dict().items() if ".mask_" not in key}
    for name, layer in masked_layers(masked).items():
        s, w = layer.mask_scores, layer.weight
        values = {"magnitude": lambda: w.abs(), "platon": lambda: s * layer.mask_uncertainty}
        values = values.get(method, lambda: s)()
        masks = {
            "threshold": lambda: s > 0.4,
            "sigmoied_threshold": lambda: torch.sigmoid(s) > 0.4,
            "l0": lambda: (torch.sigmoid(s) * 1.2 - 0.1).clamp(0, 1),
        }
        largest = lambda: values >= values.flatten().sort().values[-int(0.4 * w.numel())]  # noqa: B023, E731
        state[f"{name}.weight"] = w * masks.get(method, largest)()
    stock.load_state_dict(state)
    torch.testing.assert_close(out.start_logits, stock(**INPUTS).start_logits)
    assert masked(**INPUTS, threshold=0.4, return_dict=False)[0].equal(out.start_logits)


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


@pytest.mark.parametrize("wrong", [{"pruning_method": "topk"}, {"mask_init": "normal"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match="choose one of"):
        make(**wrong)


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


def gradients(model, loss):
    model.zero_grad()
    torch.manual_seed(5)
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["topK", "l0"])
def test_gradient_checkpointing_changes_no_gradient(method):
    def loss(model):
        return model(**make_inputs("ForQuestionAnswering"), threshold=0.5).loss

    model = make(method, QA).train()
    plain = gradients(model, loss)
    model.gradient_checkpointing_enable()
    assert model.base_model.encoder.layer[0].gradient_checkpointing
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, plain[name], msg=name)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_masks_survive_a_change_of_dtype(method, dtype):
    model = make(method)
    wanted = model(**INPUTS, threshold=0.5).last_hidden_state
    got = model.to(dtype)(**INPUTS, threshold=0.5).last_hidden_state
    assert got.dtype == dtype
    close = 1e-5 if dtype == torch.float64 else 0.15
    assert (got.float() - wanted).norm() < close * wanted.norm()


@every_method
def test_copies_stand_alone(method):
    model = make(method)
    wanted = model(**INPUTS, threshold=0.5).last_hidden_state
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(stream, weights_only=False))
    for name, p in model.named_parameters():
        p.data = p.data.neg()
    for other in copies:
        assert other(**INPUTS, threshold=0.5).last_hidden_state.equal(wanted)


# --- from_pretrained ---


@every_method
@pytest.mark.parametrize(
    "mask_init, scale", [("constant", 0.0), ("constant", 2.5), ("uniform", 0.3), ("kaiming", 0.0)]
)
def test_a_plain_bert_loads_with_fresh_scores(tiny_bert, method, mask_init, scale):
    kwargs = {"pruning_method": method, "mask_init": mask_init, "mask_scale": scale}
    model = MaskedBertForQuestionAnswering.from_pretrained(tiny_bert, **kwargs)
    plain = load_file(tiny_bert / "model.safetensors")
    state = model.state_dict()
    scores = {key for key in state if key.endswith("mask_scores")}
    more = {key for key in state if key.endswith(METHODS[method].state)}  # begins at 0
    assert state.keys() - scores - more == plain.keys()
    assert not any(state[key].any() for key in more)
    assert all(state[key].equal(value) for key, value in plain.items())
    assert len(scores) == (0 if method == "magnitude" else 12)
    for key in scores:
        values = state[key]
        assert values.shape == state[key.replace("mask_scores", "weight")].shape
        if mask_init == "constant":
            assert values.eq(scale).all()
        else:
            bound = scale if mask_init == "uniform" else values.shape[1] ** -0.5
            assert 0.97 * bound < values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu" and parameter.isfinite().all()
        assert parameter.requires_grad == ("embeddings." not in name)
    assert isinstance(model.config, MaskedBertConfig) and model.config.pruning_method == method


def test_random_scores_obey_the_seed_and_differ_between_matrices(tiny_bert):
    def load(seed):
        torch.manual_seed(seed)
        options = {"mask_init": "uniform", "mask_scale": 1.0}
        model = MaskedBertForQuestionAnswering.from_pretrained(tiny_bert, **options)
        layer = model.bert.encoder.layer[0].attention.self
        return layer.query.mask_scores, layer.key.mask_scores

    (a, b), (c, _), (d, _) = load(1), load(1), load(2)
    assert a.equal(c) and not a.equal(b) and not a.equal(d)


def write_2020_checkpoint(folder, method="topK", **config):
    """What the code of 2020 saved: pickled tensors, a pooler that no head uses, few fields."""
    model = make(method, QA)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["bert.embeddings.position_ids"] = torch.arange(64)[None]
    state["bert.pooler.dense.weight"] = torch.randn(32, 32)
    state["bert.pooler.dense.bias"] = torch.randn(32)
    torch.save(state, folder / "pytorch_model.bin")
    values = {"architectures": ["MaskedBertForQuestionAnswering"], "model_type": "masked_bert"}
    values |= {"mask_init": "constant", "mask_scale": 0.0, "pruning_method": method}
    values |= {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
    values |= {"hidden_act": "gelu", "initializer_range": 0.02, "layer_norm_eps": 1e-12}
    values |= {"pad_token_id": 0, "type_vocab_size": 2} | SIZES | config
    (folder / "config.json").write_text(json.dumps(values))
    return state


@pytest.mark.parametrize("load", ["from_pretrained", "auto", "load_model", "load_masked"])
@every_method
def test_a_checkpoint_of_2020_keeps_its_scores(tmp_path, method, load):
    saved = write_2020_checkpoint(tmp_path, method)
    model = {
        "from_pretrained": MaskedBertForQuestionAnswering.from_pretrained,
        "auto": transformers.AutoModelForQuestionAnswering.from_pretrained,
        "load_model": lambda folder: load_model(
            folder, "QuestionAnswering", masked=True, trained=True, threshold=0.5
        ),
        "load_masked": lambda folder: load_masked(folder, threshold=0.5),
    }[load](str(tmp_path))
    state = model.state_dict()
    assert type(model) is MaskedBertForQuestionAnswering
    assert set(saved) - set(state) == {
        "bert.embeddings.position_ids", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    assert all(state[key].equal(saved[key]) for key in state)
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


def test_a_masked_head_loads_into_the_base_model(tmp_path):
    saved = write_2020_checkpoint(tmp_path)
    state = MaskedBertModel.from_pretrained(tmp_path).state_dict()
    assert all(state[key].equal(saved[f"bert.{key}"]) for key in state)


@every_head
@every_method
def test_round_trip(tmp_path, suffix, method):
    model = make(method, suffix, threshold=0.5)
    wanted = model(**make_inputs(suffix))
    model.save_pretrained(tmp_path)
    wanted_config = {"model_type": "masked_bert", "pruning_method": method, "threshold": 0.5}
    assert wanted_config.items() <= tiny.read(tmp_path / "config.json").items()
    auto = getattr(transformers, f"AutoModel{suffix.removeprefix('Model')}")
    for cls in (type(model), auto):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is type(model)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(again.state_dict()[k].equal(v) for k, v in model.state_dict().items())
        got = again(**make_inputs(suffix))
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name])


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_stay_float32_in_half_precision(tiny_bert, dtype, method):
    kwargs = {"pruning_method": method, "mask_init": "constant", "mask_scale": 1.2345678}
    model = MaskedBertForQuestionAnswering.from_pretrained(tiny_bert, dtype=dtype, **kwargs).eval()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("mask_scores") else dtype), name
        if name.endswith("mask_scores"):
            assert parameter.eq(torch.tensor(1.2345678)).all()
    loss = model(**make_inputs("ForQuestionAnswering"), threshold=0.5).loss
    loss.backward()
    query = model.bert.encoder.layer[0].attention.self.query
    assert loss.isfinite() and query.weight.grad.dtype == dtype
    assert method == "magnitude" or query.mask_scores.grad.dtype == torch.float32


@pytest.mark.parametrize("source", ["safetensors", "2020"])
def test_trained_scores_are_not_rounded_in_half_precision(tmp_path, source):
    if source == "2020":
        saved = write_2020_checkpoint(tmp_path)
    else:
        model = make(suffix=QA)
        model.save_pretrained(tmp_path)
        saved = model.state_dict()
    model = MaskedBertForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, value in model.state_dict().items():
        assert value.equal(saved[key] if key.endswith("mask_scores") else saved[key].bfloat16())


def test_auto_config_and_tokenizer(tiny_bert, tmp_path):
    MaskedBertConfig(**SIZES, threshold=0.1, global_topk=True).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny_bert / "tokenizer.json").read_bytes())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MaskedBertConfig
    assert (config.threshold, config.global_topk) == (0.1, True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast and tokenizer("ada lives").input_ids


# --- loading refuses what does not fit ---


def load_qa(folder, **kwargs):
    return load_model(str(folder), "QuestionAnswering", **{"masked": True} | kwargs)


def rewrite(source, target, change):
    """A copy of the checkpoint `source` whose state dict went through `change`."""
    target.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / file).exists():
            (target / file).write_bytes((source / file).read_bytes())
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture
def pruned(tmp_path):
    return tiny.save(make(suffix=QA, threshold=0.3), tmp_path / "pruned")


def test_load_model_of_a_plain_bert(tiny_bert):
    model = load_qa(tiny_bert, pruning_method="l0", mask_init="constant", mask_scale=2.197)
    plain = load_qa(tiny_bert, masked=False, trained=True)
    assert not model.training and model.dtype == torch.float32
    assert model.bert.encoder.layer[1].output.dense.mask_scores.eq(2.197).all()
    assert type(plain) is transformers.BertForQuestionAnswering
    assert all(model.state_dict()[key].equal(value) for key, value in plain.state_dict().items())


def test_load_model_of_another_head(tiny_bert):
    model = load_model(str(tiny_bert), "SequenceClassification", masked=True, labels=3)
    assert model.classifier.weight.shape == (3, 32)
    said = "is for QuestionAnswering: give a model with a trained SequenceClassification head"
    with pytest.raises(UserError, match=said):
        load_model(str(tiny_bert), "SequenceClassification", masked=False, trained=True)


MNLI = ["contradiction", "entailment", "neutral"]


@pytest.mark.parametrize(
    "names, theirs, order",
    [
        (["no", "maybe", "yes"], ["Yes", "No", "Maybe"], [1, 2, 0]),
        (MNLI, ["entailment", "neutral", "contradiction"], [2, 0, 1]),  # the hub's data set
        (MNLI, ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [0, 2, 1]),  # many models of the hub
    ],
)
def test_the_labels_of_a_teacher_take_the_order_of_the_student(
    tmp_path, tiny_tokenizer, names, theirs, order
):
    head = "SequenceClassification"
    student, stored = (plain_bert(head, id2label=dict(enumerate(x))) for x in (names, theirs))
    stored.save_pretrained(tmp_path)
    options = {"masked": False, "student": student, "tokenizer": tiny_tokenizer}
    teacher = load_teacher(str(tmp_path), head, **options)
    assert list(teacher.config.id2label.values()) == names
    torch.testing.assert_close(teacher(**INPUTS).logits, stored(**INPUTS).logits[:, order])


def drop_key(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def halve_key(key):
    return lambda state: state | {key: state[key][:8].clone()}


BODY = "bert.encoder.layer.1.output.dense.weight"
SCORES = "bert.encoder.layer.1.output.dense.mask_scores"


@pytest.mark.parametrize("change, key", [
    *((change, key) for change in (drop_key, halve_key) for key in (BODY, SCORES)),
    (drop_key, "bert.embeddings.LayerNorm.weight"),
    (drop_key, "qa_outputs.weight"),
])  # fmt: skip
def test_gaps_in_a_checkpoint_are_refused(pruned, tmp_path, change, key):
    with pytest.raises(UserError, match=key):
        load_masked(str(rewrite(pruned, tmp_path / "broken", change(key))))


FOREIGN = {  # what a checkpoint may hold that the model does not compute
    "position_embedding_type": "relative_key",
    "layer_norm_type": "no_norm",
    "normalization_type": "no_norm",
    "gelu_patch": True,
    "pruned_heads": {"0": [1]},
    "embedding_size": 16,
    "num_hidden_layers": 1,
    "bert.encoder.layer.2.output.dense.weight": torch.zeros(32, 64),
    "bert.encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(127, 8),
    "bert.encoder.layer.0.output.adapter.down.weight": torch.zeros(4, 32),
    "bert.embeddings.projection.weight": torch.zeros(32, 32),
    "bert.prompts": torch.zeros(4, 32),
    "qa_outputs.norm.weight": torch.zeros(32),
}


def warned(caplog):
    """What the code itself says; transformers' own reports are off in the scripts."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("emmental")]


@pytest.fixture
def holding(tmp_path):
    """A copy of a checkpoint with a further setting, or further weights."""

    def write(source, *things):
        weights = {name: value for name, value in things if torch.is_tensor(value)}
        folder = rewrite(source, tmp_path / "holding", lambda state: state | weights)
        settings = {name: value for name, value in things if not torch.is_tensor(value)}
        tiny.edit(folder / "config.json", **settings)
        return folder

    return write


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_model_does_not_compute_is_refused_or_said(
    tiny_bert, pruned, holding, tmp_path, caplog, name
):
    folder = holding(tiny_bert, (name, FOREIGN[name]))
    said = "encoder.layer.1" if name == "num_hidden_layers" else name
    with pytest.raises(UserError, match=said):
        load_qa(folder, masked=False, trained=True)
    assert not warned(caplog)
    load_qa(folder).save_pretrained(tmp_path / "trained")
    (line,) = warned(caplog)
    assert said in line and "training goes on" in line
    caplog.clear()
    load_qa(tmp_path / "trained", trained=True, threshold=0.5)  # its settings are those computed
    assert not warned(caplog)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=said):
        load_masked(str(holding(pruned, (name, FOREIGN[name]))))


def test_extra_weights_of_a_base_model_are_said(tmp_path, caplog):
    plain_bert(head="").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")  # without the prefix of a model with a head
    state["encoder.layer.0.adapter.weight"] = torch.zeros(4)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    load_qa(tmp_path)
    (line,) = warned(caplog)
    assert "encoder.layer.0.adapter.weight" in line


def test_harmless_extras_pass(tiny_bert, pruned, holding, tmp_path, caplog):
    harmless = {
        "bert.embeddings.position_ids": torch.arange(64)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 64, dtype=torch.long),
        "bert.pooler.dense.weight": torch.zeros(32, 32),
        "cls.predictions.bias": torch.zeros(120),
        "cls.seq_relationship.weight": torch.zeros(2, 32),
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "pruned_heads": {},
        "layer_norm_type": "layer_norm",
        "embedding_size": 32,
        "return_dict": False,
    }
    model = load_qa(holding(tiny_bert, *harmless.items()), masked=False, trained=True)
    assert model(**INPUTS).start_logits.shape == INPUTS["input_ids"].shape
    load_qa(tmp_path / "holding")
    load_qa(pruned, trained=True)
    assert not warned(caplog)
    load_qa(pruned, trained=True, pruning_method="magnitude")  # it leaves the scores
    (line,) = warned(caplog)
    assert "pruning_method magnitude contradicts topK" in line
    tiny.edit(pruned / "config.json", model_type="bert")
    with pytest.raises(UserError, match="mask_scores"):  # the dense weights are not the model
        load_qa(pruned, masked=False, trained=True)


@pytest.mark.parametrize("change", [drop_key, halve_key])
def test_a_head_that_uses_the_pooler_needs_it(tmp_path, change):
    whole = make(suffix="ForSequenceClassification", threshold=0.3)
    whole, key = tiny.save(whole, tmp_path / "whole"), "bert.pooler.dense.weight"
    with pytest.raises(UserError, match=key):
        load_masked(str(rewrite(whole, tmp_path / "broken", change(key))))


def test_loading_refuses_the_wrong_kind(tiny_bert, pruned, tmp_path):
    without = lambda state: {k: v for k, v in state.items() if "mask" not in k}  # noqa: E731
    bare = rewrite(pruned, tmp_path / "bare", without)
    for load, said in (
        (lambda: load_qa(tmp_path / "nowhere"), "no usable checkpoint"),
        (lambda: load_qa(pruned, masked=False), "masked_bert"),
        (lambda: load_qa(tiny_bert, trained=True), "without masks"),
        (lambda: load_masked(str(tiny_bert)), "without masks"),
        (lambda: load_masked(str(bare)), "scores"),
    ):
        with pytest.raises(UserError, match=said):
            load()


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{", b"not a model"])
@pytest.mark.parametrize("size, said", [(0, "cannot load|cannot hold"), (2**20, "cannot load")])
def test_broken_files_are_refused(pruned, content, size, said):
    (pruned / "model.safetensors").write_bytes(content + bytes(size))
    with pytest.raises(UserError, match=said):
        load_masked(str(pruned))


class Exploit:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.was_run = True",))


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    import builtins

    write_2020_checkpoint(tmp_path)
    content = {"qa_outputs.weight": Exploit(), "padding": torch.zeros(10**6)}
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load"):
        load_qa(tmp_path)
    assert not hasattr(builtins, "was_run")


def test_load_masked_reads_the_config(pruned, caplog):
    model = load_masked(str(pruned))
    assert not model.training and model.config.threshold == 0.3
    for name, mask in find_masks(model).by_layer.items():
        assert mask.sum() == int(0.3 * model.get_submodule(name).weight.numel())
    assert not caplog.records


def test_load_masked_warns_of_a_contradiction(pruned, caplog):
    with caplog.at_level(logging.WARNING):
        model = load_masked(str(pruned), pruning_method="topK", threshold=0.6)
    mask = find_masks(model).by_layer["bert.encoder.layer.0.output.dense"]
    assert mask.sum() == int(0.6 * 32 * 64)
    assert [r.getMessage() for r in caplog.records if "contradicts" in r.getMessage()]
    assert "threshold" in caplog.text and "pruning_method" not in caplog.text


@pytest.mark.parametrize("given", [{}, {"mask_init": "constant", "mask_scale": 2.197}])
def test_training_keeps_scores_or_starts_them_afresh(pruned, caplog, given):
    saved = load_file(pruned / "model.safetensors")
    kept = load_qa(pruned, pruning_method="topK", threshold=None, **given)
    assert all(kept.state_dict()[key].equal(value) for key, value in saved.items())
    assert (kept.config.mask_init, kept.config.mask_scale) == ("uniform", 1.0)
    no_effect = "the checkpoint's scores are kept; {} has no effect"
    assert warned(caplog) == [no_effect.format(name) for name in given]
    caplog.clear()
    fresh = load_qa(pruned, pruning_method="l0", threshold=None, **given)
    assert warned(caplog) == [
        "pruning_method l0 contradicts topK of the checkpoint, and is used; the scores start fresh"
    ]
    scale = given.get("mask_scale", 0.0)
    assert (fresh.config.mask_init, fresh.config.mask_scale) == ("constant", scale)
    for key, value in fresh.state_dict().items():
        assert value.equal(torch.full_like(value, scale) if "mask" in key else saved[key])
    counted = load_masked(str(pruned), pruning_method="sigmoied_threshold").state_dict()
    assert counted[SCORES].equal(saved[SCORES])


def test_load_masked_needs_a_threshold(tmp_path):
    write_2020_checkpoint(tmp_path)
    with pytest.raises(UserError, match="does not record the threshold"):
        load_masked(str(tmp_path))
    with pytest.raises(UserError, match="fraction"):
        load_masked(str(tmp_path), threshold=15)


def test_load_masked_refuses_unknown_values(tmp_path):
    write_2020_checkpoint(tmp_path, pruning_method="topk", threshold=0.5)
    with pytest.raises(UserError, match="topk"):
        load_masked(str(tmp_path))
    with pytest.raises(UserError, match="global_topk"):
        load_masked(str(tmp_path), pruning_method="l0", global_topk=True)


# --- one encoder, and the stock signature ---


@every_head
def test_the_signature_is_the_stock_one_and_threshold(suffix):
    stock = inspect.signature(class_of(suffix, masked=False).forward).parameters
    ours = inspect.signature(class_of(suffix).forward).parameters
    assert [name for name in ours if name != "threshold"] == list(stock)
    assert ours["threshold"].default is None
    assert ours["threshold"].kind is inspect.Parameter.KEYWORD_ONLY
    model = make(suffix=suffix, threshold=0.4)
    inputs = {name: value for name, value in make_inputs(suffix).items() if name in INPUTS}
    wanted = model(**inputs)[0]
    found = model(*inputs.values())[0]  # in the order of the stock model
    torch.testing.assert_close(found, wanted)
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


@every_head
def test_what_a_checkpoint_lacks_is_initialised_and_nothing_else(tiny_bert, tmp_path, suffix):
    """transformers uses the inner model's class; a stock class would not initialize the scores."""
    cls = class_of(suffix)
    plain = load_file(tiny_bert / "model.safetensors")
    for seed in range(3):
        torch.manual_seed(seed)
        junk = [torch.full((64, 32), torch.nan) for _ in range(50)]  # what freed memory may hold
        del junk
        model = cls.from_pretrained(tiny_bert, mask_init="constant", mask_scale=1.5)
        state = model.state_dict()
        for name, value in state.items():
            if name.endswith("mask_scores"):
                assert value.eq(1.5).all(), name
            key = name if suffix != "Model" else f"bert.{name}"
            if key in plain and ".encoder." in f".{key}":
                assert value.equal(plain[key]), name
