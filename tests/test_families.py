"""Every family, by its row: its stock classes, its masked classes, and every tool on them."""

import copy
import json
import pickle

import pytest
import tiny
import torch
import transformers
from tiny import CASES, edit, refusal, tokenizer_of
from tiny import model_of as make
from torch import nn

import bertarize
import counts_parameters
import emmental
import masked_run_squad
from emmental.checkpoints.configs import concrete_type, read_config
from emmental.checkpoints.counts import count_layers
from emmental.checkpoints.export import bertarized_state_dict
from emmental.checkpoints.loading import load_masked, load_model
from emmental.checkpoints.tokenizer import load_tokenizer
from emmental.models.families import FAMILIES, HEADS, layers_of
from emmental.modules.masks import masked_layers

LINEARS = {  # nn.Linear of the layers, if not six for each
    "albert": 6, "albert, groups": 24, "deberta-v2": 16, "modernbert": 8,
}  # fmt: skip
# Student and teacher with the same tokens, with other tokens, with tokens of another frame.
PAIRS = [("distilbert", "bert", ""), ("bert", "electra", ""), ("bert", "distilbert", "")]
PAIRS += [("bert", "roberta", "their vocabularies differ")]
LABELS = {
    "QuestionAnswering": {"start_positions": [2, 5, 1], "end_positions": [4, 5, 3]},
    "SequenceClassification": {"labels": [0, 1, 1]},
    "TokenClassification": {"labels": [[0, 1, 1, 0, 1, 0, -100, 1, 0]] * 3},
    "MultipleChoice": {"labels": [1]},
}
every = pytest.mark.parametrize("case", CASES)


def inputs_for(head, **labels):
    """A padded batch of three texts: for multiple choice, one example of three."""
    ids = torch.arange(27).reshape(3, 9) % 70 + 5
    attention = torch.ones_like(ids)
    ids[2, 6:], attention[2, 6:] = 1, 0
    inputs = {"input_ids": ids, "attention_mask": attention}
    if head == "MultipleChoice":
        inputs = {name: values[None] for name, values in inputs.items()}
    return inputs | {name: torch.tensor(values) for name, values in labels.items()}


def outputs(model, head, **options):
    found = model(**inputs_for(head), **options)
    names = ("start_logits", "end_logits", "logits")
    return torch.cat([found[name].flatten() for name in names if name in found])


@pytest.mark.parametrize("head", HEADS)
@every
def test_full_masks_are_the_stock_model(case, head):
    stock, masked = make(case, head).double(), make(case, head, "masked_").double()
    assert type(masked).__name__ == f"Masked{type(stock).__name__}"
    assert getattr(emmental, type(masked).__name__) is type(masked)
    layers = masked_layers(masked)
    assert len(layers) == LINEARS.get(case, 12)
    masked.load_state_dict(stock.state_dict(), strict=False)
    scores = {f"{name}.mask_scores" for name in layers}
    assert masked.state_dict().keys() == stock.state_dict().keys() | scores
    found = [
        model(**inputs_for(head, **LABELS[head]), **options)
        for model, options in ((stock, {}), (masked, {"threshold": 1.0}))
    ]
    torch.testing.assert_close(found[1].to_tuple(), found[0].to_tuple())
    for each in found:
        each.loss.backward()
    embeddings = [module for module in masked.modules() if isinstance(module, nn.Embedding)]
    tables = {id(parameter) for module in embeddings for parameter in module.parameters()}
    theirs = dict(stock.named_parameters())
    for name, parameter in masked.named_parameters():
        frozen = ".embeddings." in name or id(parameter) in tables
        assert parameter.requires_grad != frozen
        if not frozen and name not in scores:
            torch.testing.assert_close(parameter.grad, theirs[name].grad)


@every
def test_a_masked_forward_is_that_of_masked_weights(case):
    masked, stock = make(case, prefix="masked_"), make(case)
    state = masked.state_dict()
    for name in masked_layers(masked):
        scores = state[f"{name}.mask_scores"].normal_()
        kept = scores >= scores.flatten().sort().values[-int(0.3 * scores.numel())]
        state[f"{name}.weight"] = state[f"{name}.weight"] * kept
    stock.load_state_dict({name: state[name] for name in stock.state_dict()})
    expected = outputs(stock, "QuestionAnswering")
    torch.testing.assert_close(outputs(masked, "QuestionAnswering", threshold=0.3), expected)
    assert not torch.allclose(outputs(masked, "QuestionAnswering", threshold=1.0), expected)


@pytest.mark.parametrize("head", HEADS)
@every
def test_auto_classes_load_what_was_saved(case, head, tmp_path):
    model = make(case, head, "masked_", threshold=0.4)
    for layer in masked_layers(model).values():
        layer.mask_scores.data.normal_()
    model.save_pretrained(tmp_path)
    again = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.config.model_type.startswith("masked_")
    for each in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(outputs(each, head), outputs(model, head))
        assert each.state_dict().keys() == model.state_dict().keys()
    frozen = [name for name, p in again.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad]


@every
def test_heads_and_neurons(case):
    family = FAMILIES[CASES[case][0]]
    if not family.heads:
        with pytest.raises(ValueError, match="has no matrices of single heads; choose weight or"):
            make(case, prefix="masked_", granularity="structure")
        return
    model = make(case, prefix="masked_", granularity="structure", threshold=0.5)
    scores = [x.mask_scores for x in masked_layers(model).values() if x.mask_scores is not None]
    assert sorted({len(x) for x in scores}) == [4, 64]
    assert len(scores) == 2 * len(layers_of(model))  # one of heads, one of neurons
    for each in scores:
        each.data.normal_()
    for layer in count_layers(model):
        assert (layer.heads, layer.all_heads, layer.neurons, layer.all_neurons) == (2, 4, 32, 64)
    stock = make(case)
    stock.load_state_dict(bertarized_state_dict(model))
    expected = outputs(stock, "QuestionAnswering")
    torch.testing.assert_close(outputs(model, "QuestionAnswering"), expected)


@pytest.fixture
def folder(tmp_path):
    """Write a tiny model of a case with its tokenizer, and return its folder."""

    def write(case, head="QuestionAnswering", **settings):
        tokenizer, path = tokenizer_of(CASES[case][0]), tmp_path / f"model {case}"
        settings = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | settings
        return tiny.save(make(case, head, **settings), path, tokenizer)

    return write


@pytest.fixture
def squad(flags, tmp_path):
    """Run the SQuAD script in the folder `name`, and return its results."""

    def call(name, model, *more):
        short = "--per_gpu_train_batch_size 12 --max_steps 3 --save_steps 2"
        words = flags(name, short, model=model)
        words.remove("--do_lower_case")
        return masked_run_squad.main([*words, *map(str, more)])

    return call


PRUNE = ["--model_type", "masked", "--do_train", "--final_threshold", 0.3, "--initial_warmup", 0]
PRUNE += ["--final_warmup", 1]


@every
def test_from_training_to_a_plain_model(case, folder, squad, tmp_path, caplog, capsys):
    family, source, out = CASES[case][0], folder(case), tmp_path / "out"
    teach = ["--teacher_type", "dense", "--teacher_name_or_path", source, "--alpha_hidden", 1]
    results = squad("out", source, *PRUNE, *teach, "--do_eval")
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert results["remaining_percent_linear"] == pytest.approx(30, abs=0.1)
    recorded = tiny.read(out / "training_args.json")
    assert recorded["model_type"] == f"masked_{family}" and recorded["teacher_type"] == family
    same = ["--resume_from_checkpoint", out / "checkpoint-2", "--model_type", f"masked_{family}"]
    squad("again", source, *PRUNE, *teach, *same, "--teacher_type", family)
    assert tiny.same(out, tmp_path / "again")
    one = load_masked(str(out))

    counts = counts_parameters.main(["--serialization_dir", str(out)])
    assert {m.name for m in counts.matrices} == set(masked_layers(one))
    assert counts.total == sum(x.weight.numel() for x in masked_layers(one).values())
    assert ("serve 2 layers" in capsys.readouterr().out) == (case == "albert")
    plain = bertarize.main(["--model_name_or_path", str(out)])
    stock = transformers.AutoModelForQuestionAnswering.from_pretrained(plain).eval()
    assert type(one).__name__ == f"Masked{type(stock).__name__}"
    found, expected = (outputs(model, "QuestionAnswering") for model in (stock, one))
    torch.testing.assert_close(found, expected)
    evaluated = squad("plain", plain, "--model_type", "dense", "--do_eval")
    assert evaluated["f1"] == results["f1"]
    squad("sparse", out, "--model_type", "masked", "--do_eval", "--sparse_inference")
    expected, *found = (
        (tmp_path / name / "predictions_.json").read_text() for name in ("out", "plain", "sparse")
    )
    assert found == [expected] * 2


def test_two_processes_reach_the_weights_of_one(folder, flags, tmp_path, on_two_ranks):
    short = " ".join(map(str, PRUNE)) + " --max_steps 3 --check_ranks --adam_epsilon 1e-4"
    commands, names = [], {case: f"two {number}" for number, case in enumerate(CASES)}
    for case, name in names.items():
        source = folder(case)
        for run, batch in (name, 5), (f"one {name}", 10):
            words = flags(run, f"{short} --per_gpu_train_batch_size {batch}", model=source)
            words.remove("--do_lower_case")
            commands.append(words)
        masked_run_squad.main(commands.pop())
    on_two_ranks(*commands)
    for case, name in names.items():
        one, two = (load_masked(str(tmp_path / x)).state_dict() for x in (f"one {name}", name))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=f"{case}: {key}")


@every
def test_outputs_in_the_order_of_the_labels(case, folder, caplog):
    head, names = "SequenceClassification", {0: "far", 1: "near"}
    source = str(folder(case, head, id2label=names, label2id={"far": 0, "near": 1}))
    asked = (("far", "near"), ("near", "far"), ("good", "bad"))
    same, swapped, fresh = (load_model(source, head, masked=False, labels=x) for x in asked)
    expected = outputs(same, head)
    torch.testing.assert_close(outputs(swapped, head).reshape(-1, 2).flip(1).flatten(), expected)
    assert "the head of" in caplog.text and not torch.allclose(outputs(fresh, head), expected)
    for name, value in same.base_model.state_dict().items():
        assert torch.equal(fresh.base_model.state_dict()[name], value), name


@pytest.mark.parametrize("student, teacher, problem", PAIRS)
def test_a_teacher_of_another_family(student, teacher, problem, folder, squad, refused):
    teach = ["--teacher_type", "dense", "--teacher_name_or_path", folder(teacher)]
    if not problem:
        squad("out", folder(student), *PRUNE, *teach)
        return
    assert problem in refused(squad, "out", folder(student), *PRUNE, *teach)


@every
def test_lower_case_is_for_word_pieces(case, folder, squad, caplog):
    source = folder(case)
    squad("out", source, "--model_type", "dense", "--do_eval", "--do_lower_case")
    tokenizer = tokenizer_of(CASES[case][0], do_lower_case=True)
    can = tokenizer("ADA").input_ids == tokenizer("ada").input_ids
    assert f"tokenizer: {'uncased' if can else 'cased'}" in caplog.messages
    assert ("cased tokens: --do_lower_case has no effect" in caplog.text) != can


@every
def test_a_family_that_was_not_asked_for(case, folder):
    family, source = CASES[case][0], str(folder(case))
    assert concrete_type("masked", source) == concrete_type(f"masked_{family}", source)
    assert concrete_type("dense", source) == family
    other = next(name for name in FAMILIES if name != family)
    said = refusal(concrete_type, f"masked_{other}", source)
    assert f"is of type masked_{family}, not masked_{other}: give that type, or masked," in said
    said = refusal(concrete_type, other, source)
    assert f"is of type {family}, not {other}: give that type, or dense," in said
    assert "give a model with a trained TokenClassification head" in refusal(
        load_model, source, "TokenClassification", masked=False, trained=True
    )
    said = refusal(concrete_type, other, str(folder(case, prefix="masked_")))
    assert f"is of type masked_{family}, not {other}: give that type, or masked," in said


@every
def test_a_checkpoint_without_a_tokenizer_is_refused(case, folder):
    make(case).save_pretrained(folder(case).parent / "bare")
    said = refusal(load_tokenizer, str(folder(case).parent / "bare"))
    assert "no usable tokenizer at" in said and "there is no vocabulary" in said


@pytest.mark.parametrize("model_type", ["gpt2", "vit", "t5", "masked_gpt2"])
def test_a_family_without_a_row(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    said = refusal(read_config, str(tmp_path))
    assert f"of type {model_type!r} in its config.json; these scripts take bert, roberta" in said


def test_only_a_bert_may_leave_out_its_type(folder):
    """As the first published ones do."""
    for case in ("bert", "roberta"):
        path = folder(case) / "config.json"
        edit(path, "model_type")
    assert read_config(str(path.parent.parent / "model bert"))["model_type"] == "bert"
    assert "is of type 'None' in its config.json" in refusal(read_config, str(path.parent))


@pytest.mark.parametrize("name", ["is_decoder", "is_encoder_decoder", "add_cross_attention"])
def test_a_decoder_is_refused(name, folder):
    path = folder("bert") / "config.json"
    edit(path, **{name: True})
    assert f"is a decoder ({name} in its config.json)" in refusal(read_config, str(path.parent))
    edit(path, **{name: False})
    read_config(str(path.parent))
