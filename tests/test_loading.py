"""Checkpoints: plain, masked and of 2020 load with every bit; what does not fit is refused."""

import json
import logging
import shutil

import pytest
import tiny
import torch
import transformers
from tiny import INPUTS, QA, SIZES, batch_for, make, plain_bert, rewrite, weights

import emmental
from emmental import MaskedBertConfig, MaskedBertForQuestionAnswering, MaskedBertModel
from emmental.checkpoints.loading import load_masked, load_model
from emmental.modules import find_masks
from emmental.modules.methods import METHODS
from emmental.system.errors import UserError
from emmental.training.pair import load_teacher

every_method = pytest.mark.parametrize("method", METHODS)
every_head = pytest.mark.parametrize("suffix", tiny.SUFFIXES)


@every_method
@pytest.mark.parametrize(
    "mask_init, scale", [("constant", 0.0), ("constant", 2.5), ("uniform", 0.3), ("kaiming", 0.0)]
)
def test_a_plain_bert_loads_with_fresh_scores(tiny_bert, method, mask_init, scale):
    kwargs = {"pruning_method": method, "mask_init": mask_init, "mask_scale": scale}
    model = MaskedBertForQuestionAnswering.from_pretrained(tiny_bert, **kwargs)
    plain = weights(tiny_bert)
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
    folder.mkdir(exist_ok=True)
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
    wanted = model(**batch_for(suffix))
    model.save_pretrained(tmp_path)
    wanted_config = {"model_type": "masked_bert", "pruning_method": method, "threshold": 0.5}
    assert wanted_config.items() <= tiny.read(tmp_path / "config.json").items()
    auto = getattr(transformers, f"AutoModel{suffix.removeprefix('Model')}")
    for cls in (type(model), auto):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is type(model)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(again.state_dict()[k].equal(v) for k, v in model.state_dict().items())
        got = again(**batch_for(suffix))
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name])


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_stay_float32_in_half_precision(tiny_bert, dtype, method):
    kwargs = {"pruning_method": method, "mask_init": "constant", "mask_scale": 1.2345678}
    model = MaskedBertForQuestionAnswering.from_pretrained(tiny_bert, dtype=dtype, **kwargs).eval()
    for name, parameter in model.named_parameters():
        is_score = name.endswith("mask_scores")
        assert parameter.dtype == (torch.float32 if is_score else dtype), name
        assert not is_score or parameter.eq(torch.tensor(1.2345678)).all()
    loss = model(**batch_for(QA), threshold=0.5).loss
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


@pytest.fixture
def pruned(tmp_path):
    return tiny.save(make(suffix=QA, threshold=0.3), tmp_path / "pruned")


@pytest.fixture
def changed(tmp_path):
    """A copy of a checkpoint whose tensors went through `change`."""
    return lambda folder, change: rewrite(shutil.copytree(folder, tmp_path / "changed"), change)


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
        (["M", "f", "m"], ["m", "M", "F"], [1, 2, 0]),
        (["1", "2.0", "10"], ["10.0", "1.0", "2"], [1, 2, 0]),
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
POOLER = "bert.pooler.dense.weight"


@pytest.mark.parametrize("suffix, change, key", [
    *((QA, change, key) for change in (drop_key, halve_key) for key in (BODY, SCORES)),
    (QA, drop_key, "bert.embeddings.LayerNorm.weight"),
    (QA, drop_key, "qa_outputs.weight"),
    ("ForSequenceClassification", drop_key, POOLER),  # a head that uses it
    ("ForSequenceClassification", halve_key, POOLER),
])  # fmt: skip
def test_gaps_in_a_checkpoint_are_refused(tmp_path, suffix, change, key):
    folder = tiny.save(make(suffix=suffix, threshold=0.3), tmp_path)
    assert key in tiny.refusal(load_masked, str(rewrite(folder, change(key))))


FOREIGN = {  # what a checkpoint may hold that the model does not compute
    "position_embedding_type": "relative_key",
    "layer_norm_type": "no_norm",
    "normalization_type": "no_norm",
    "gelu_patch": True,
    "pruned_heads": {"0": [1]},
    "embedding_size": 16,
    "per_layer_config": {"0": {"intermediate_size": 32}},
    "auto_map": {"AutoModel": "modeling_x.XModel"},
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
def holding(changed):
    """A copy of a checkpoint with further settings, or further weights."""

    def write(checkpoint, things):
        tensors = {name: value for name, value in things.items() if torch.is_tensor(value)}
        folder = changed(checkpoint, lambda state: state | tensors)
        settings = {name: value for name, value in things.items() if name not in tensors}
        tiny.edit(folder / "config.json", **settings)
        return folder

    return write


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_model_does_not_compute_is_refused_or_said(
    tiny_bert, pruned, holding, tmp_path, caplog, name
):
    folder = holding(tiny_bert, {name: FOREIGN[name]})
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
        load_masked(str(holding(pruned, {name: FOREIGN[name]})))


def test_extra_weights_of_a_base_model_are_said(tmp_path, caplog):
    extra = {"encoder.layer.0.adapter.weight": torch.zeros(4)}  # without the prefix of a head
    load_qa(rewrite(tiny.save(plain_bert(head=""), tmp_path), lambda state: state | extra))
    (line,) = warned(caplog)
    assert "encoder.layer.0.adapter.weight" in line


def test_harmless_extras_pass(tiny_bert, pruned, holding, caplog):
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
    folder = holding(tiny_bert, harmless)
    model = load_qa(folder, masked=False, trained=True)
    assert model(**INPUTS).start_logits.shape == INPUTS["input_ids"].shape
    load_qa(folder)
    load_qa(pruned, trained=True)
    assert not warned(caplog)
    load_qa(pruned, trained=True, pruning_method="magnitude")  # it leaves the scores
    (line,) = warned(caplog)
    assert "pruning_method magnitude contradicts topK" in line
    tiny.edit(pruned / "config.json", model_type="bert")
    with pytest.raises(UserError, match="mask_scores"):  # the dense weights are not the model
        load_qa(pruned, masked=False, trained=True)


def test_loading_refuses_the_wrong_kind(tiny_bert, pruned, changed, tmp_path):
    bare = changed(pruned, lambda state: {k: v for k, v in state.items() if "mask" not in k})
    old, unknown = tmp_path / "old", tmp_path / "unknown"
    write_2020_checkpoint(old)
    write_2020_checkpoint(unknown, pruning_method="topk", threshold=0.5)
    for load, checkpoint, options, said in (
        (load_qa, tmp_path / "nowhere", {}, "no usable checkpoint"),
        (load_qa, pruned, {"masked": False}, "masked_bert"),
        (load_qa, tiny_bert, {"trained": True}, "without masks"),
        (load_masked, tiny_bert, {}, "without masks"),
        (load_masked, bare, {}, "scores"),
        (load_masked, old, {}, "does not record the threshold"),
        (load_masked, old, {"threshold": 15}, "fraction"),
        (load_masked, unknown, {}, "topk"),
        (load_masked, unknown, {"pruning_method": "l0", "global_topk": True}, "global_topk"),
    ):
        assert said in tiny.refusal(load, str(checkpoint), **options)


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{", b"not a model"])
@pytest.mark.parametrize("size, said", [(0, "cannot load|cannot hold"), (2**20, "cannot load")])
def test_broken_files_are_refused(pruned, content, size, said):
    (pruned / "model.safetensors").write_bytes(content + bytes(size))
    with pytest.raises(UserError, match=said):
        load_masked(str(pruned))


def test_load_masked_reads_the_config_and_warns_of_a_contradiction(pruned, caplog):
    model = load_masked(str(pruned))
    assert not model.training and model.config.threshold == 0.3
    for name, mask in find_masks(model).by_layer.items():
        assert mask.sum() == int(0.3 * model.get_submodule(name).weight.numel())
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        model = load_masked(str(pruned), pruning_method="topK", threshold=0.6)
    mask = find_masks(model).by_layer["bert.encoder.layer.0.output.dense"]
    assert mask.sum() == int(0.6 * 32 * 64)
    assert [r.getMessage() for r in caplog.records if "contradicts" in r.getMessage()]
    assert "threshold" in caplog.text and "pruning_method" not in caplog.text


@pytest.mark.parametrize("given", [{}, {"mask_init": "constant", "mask_scale": 2.197}])
def test_training_keeps_scores_or_starts_them_afresh(pruned, caplog, given):
    saved = weights(pruned)
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


@every_head
def test_what_a_checkpoint_lacks_is_initialised_and_nothing_else(tiny_bert, tmp_path, suffix):
    """transformers uses the inner model's class; a stock class would not initialize the scores."""
    masked_class = getattr(emmental, f"MaskedBert{suffix}")
    plain = weights(tiny_bert)
    for seed in range(3):
        torch.manual_seed(seed)
        junk = [torch.full((64, 32), torch.nan) for _ in range(50)]  # what freed memory may hold
        del junk
        model = masked_class.from_pretrained(tiny_bert, mask_init="constant", mask_scale=1.5)
        state = model.state_dict()
        for name, value in state.items():
            if name.endswith("mask_scores"):
                assert value.eq(1.5).all(), name
            key = name if suffix != "Model" else f"bert.{name}"
            if key in plain and ".encoder." in f".{key}":
                assert value.equal(plain[key]), name
