"""Every setting that a config.json can hold: kept, dropped with a line, or refused before work."""

import pytest
import tiny
import torch
from tiny import refusal, tokenizer_of
from transformers import CONFIG_MAPPING

from emmental.checkpoints.configs import DECODER, DROPPED, FOREIGN, computed_settings, read_config
from emmental.checkpoints.embeddings import base_embeddings
from emmental.checkpoints.loading import load_model
from emmental.checkpoints.tokenizer import load_tokenizer
from emmental.models.families import FAMILIES

HEAD = "SequenceClassification"
KEPT = set(
    """activation attention_bias attention_dropout attention_probs_dropout_prob
    classifier_activation classifier_bias classifier_dropout classifier_dropout_prob
    classifier_pooling dim dropout
    embedding_dropout hidden_act hidden_activation hidden_dropout_prob hidden_dim hidden_size
    initializer_cutoff_factor initializer_range inner_group_num intermediate_size layer_norm_eps
    layer_types local_attention max_position_embeddings max_relative_positions mlp_bias mlp_dropout
    n_heads n_layers norm_bias norm_eps num_attention_heads num_hidden_groups num_hidden_layers
    pad_token_id pooler_dropout pooler_hidden_act pooler_hidden_size pos_att_type
    position_biased_input qa_dropout relative_attention relative_attention_num_buckets
    rope_parameters seq_classif_dropout sinusoidal_pos_embds summary_activation
    summary_last_dropout summary_type summary_use_proj type_vocab_size vocab_size
    id2label label2id problem_type

    _name_or_path architectures bos_token_id cls_token_id decoder_bias deterministic_flash_attn
    dtype eos_token_id legacy model_type return_dict sep_token_id sparse_pred_ignore_index
    sparse_prediction tie_word_embeddings transformers_version use_cache""".split()
)
# Further ones that published models have.
OTHERS = """cls_dropout conv_act conv_kernel_size finetuning_task global_attn_every_n_layers
    global_rope_theta gradient_checkpointing local_rope_theta norm_rel_ebd num_labels
    position_buckets reference_compile share_att_key summary_first_dropout task_specific_params
    tie_encoder_decoder torch_dtype torchscript""".split()
VALUES = {  # of settings that are dropped
    "chunk_size_feed_forward": 16,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "experts_implementation": "grouped_mm",
    "_experts_implementation": "grouped_mm",
    "distributed_config": {"tp_size": 2},
    "_auto_class": "AutoConfig",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_has_its_rule(family, caplog):
    """A setting that is new in transformers fails here: decide what becomes of it."""
    defaults = CONFIG_MAPPING[family]().to_dict()
    assert defaults.keys() <= {*KEPT, *DECODER, *DROPPED, *FOREIGN, "embedding_size"}
    defaults |= dict.fromkeys(OTHERS, "a value")
    assert computed_settings("x", defaults, True).keys() == defaults.keys() - {*DROPPED}
    assert not caplog.records
    for name in FOREIGN:
        assert f"has {name} 'a value', which a {family} does not compute" in refusal(
            computed_settings, "x", defaults | {name: "a value"}, True
        )


@pytest.fixture
def folder(tmp_path):
    """A folder of a model with settings in its config.json."""

    def save(model, **settings):
        tiny.save(model, tmp_path / "model")
        tiny.edit(tmp_path / "model/config.json", **settings)
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("case", [case for case in tiny.CASES if case != "albert, groups"])
def test_what_outputs_do_not_depend_on_is_dropped_and_said(folder, tmp_path, caplog, case):
    model = tiny.model_of(case, HEAD)
    source = folder(model, **{name: VALUES.get(name, True) for name in DROPPED})
    inputs = {name: tiny.INPUTS[name] for name in ("input_ids", "attention_mask")}
    for masked in (False, True):
        caplog.clear()
        loaded = load_model(str(source), HEAD, masked=masked)
        said = [line.partition(" has ")[2] for line in caplog.messages if "is dropped" in line]
        assert [line.partition(" ")[0] for line in said] == [*DROPPED]
        loaded.config.threshold = 1.0
        outputs = loaded(**inputs)
        assert list(outputs) == ["logits"]
        torch.testing.assert_close(outputs.logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
        loaded.save_pretrained(tmp_path / "saved")
        assert not tiny.read(tmp_path / "saved/config.json").keys() & {*DROPPED}
    assert base_embeddings(str(source))
    tokenizer_of(tiny.CASES[case][0]).save_pretrained(source)
    assert load_tokenizer(str(source)).is_fast


@pytest.mark.parametrize("name", [*DECODER, "quantization_config"])
def test_what_makes_another_task_or_model_is_refused(folder, name):
    assert name in refusal(read_config, str(folder(tiny.plain_bert(HEAD), **{name: True})))


def test_labels_that_go_together_are_another_task(folder, caplog):
    """But the model of a training loop of one's own is converted as it is."""
    source = str(folder(tiny.plain_bert(HEAD), problem_type="multi_label_classification"))
    options = {"masked": False, "labels": ["no", "yes"]}
    said = refusal(load_model, source, HEAD, trained=True, **options)
    assert "problem_type multi_label_classification" in said
    assert load_model(source, HEAD, **options).config.problem_type is None
    assert "problem_type multi_label_classification" in caplog.text
    kept = load_model(source, HEAD, masked=False, trained=True)
    assert kept.config.problem_type == "multi_label_classification"


def test_modernbert_says_that_it_has_no_table_of_positions(folder, caplog):
    model = tiny.model_of("modernbert", HEAD)
    source = str(folder(model, position_embedding_type="sans_pos", is_causal=False))
    load_model(source, HEAD, masked=False, trained=True)
    assert not caplog.records
    said = refusal(computed_settings, "x", read_config(source) | {"model_type": "bert"}, True)
    assert "position_embedding_type 'sans_pos', which a bert does not compute" in said


def test_embeddings_of_another_size_are_computed_by_some_families(folder, caplog):
    config = tiny.config_of("deberta-v3")
    config.embedding_size = 16
    model = type(tiny.model_of("deberta-v3", HEAD))(config)
    loaded = load_model(str(folder(model)), HEAD, masked=False, trained=True)
    assert loaded.config.embedding_size == 16 and not caplog.records


@pytest.mark.parametrize("value", ["gelu_x", ["gelu"], 3])
def test_an_unknown_activation_is_named(folder, value):
    source = str(folder(tiny.model_of("distilbert", HEAD), activation=value))
    said = refusal(load_model, source, HEAD, masked=True)
    assert f"config.json has activation {value!r}: give one of gelu, " in said
