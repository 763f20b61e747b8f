"""The methods whose scores are observed, `sensitivity` and `platon`."""

import numpy as np
import pytest
import torch
import transformers
from tiny import TOGETHER, edit, read, same, weights

import bertarize
import counts_parameters
import masked_run_squad
from emmental import MaskedBertForQuestionAnswering, storage
from emmental.checkpoints.loading import load_masked
from emmental.data import squad_features, squad_read
from emmental.modules import MaskedLinear, find_masks, masked_layers, observe_scores
from emmental.modules.methods import METHODS

OBSERVED = [name for name, method in METHODS.items() if method.scores == "observed"]
STATE = ".mask_scores", ".mask_uncertainty"


@pytest.fixture
def flags(flags):
    """The command line of a run with observed scores."""

    def make(name, *more, method="platon", **options):
        train = f"--do_train --pruning_method {method} --final_threshold 0.3"
        return flags(name, train, *more, **options)

    return make


def tensors_of(folder, *ends):
    return {name: value for name, value in weights(folder).items() if name.endswith(ends)}


def observe(layer, grad, scale=1.0, skipped=False):
    layer.mask_scores.grad = torch.tensor(grad, dtype=torch.float32) * scale
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    scaler.scale(torch.zeros(()))
    observe_scores(masked_layers(layer), scaler, skipped)
    assert layer.mask_scores.grad is None


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_scores_are_those_of_the_paper(scale):
    random, mean, uncertainty = np.random.default_rng(0), np.zeros((20, 30)), np.zeros((20, 30))
    betas = {"importance_beta": 0.7, "uncertainty_beta": 0.9}
    layers = {
        "sensitivity": MaskedLinear(30, 20, pruning_method="sensitivity", importance_beta=0.7),
        "platon": MaskedLinear(30, 20, pruning_method="platon", **betas),
    }
    for _ in range(7):
        grad = random.normal(size=mean.shape)
        importance = abs(grad)
        mean = 0.7 * mean + 0.3 * importance
        uncertainty = 0.9 * uncertainty + 0.1 * abs(importance - mean)
        for layer in layers.values():
            observe(layer, grad, scale)
    for method, expected in ("sensitivity", mean), ("platon", mean * uncertainty):
        layer = layers[method]
        np.testing.assert_allclose(layer.source.detach().numpy(), expected, rtol=1e-5, atol=1e-9)
        mask = find_masks(layer, 0.25).by_layer[""].numpy()
        assert mask.sum() == 150 and expected[mask].min() > expected[~mask].max()


@pytest.mark.parametrize("method", OBSERVED)
def test_an_update_that_the_scaler_skips_is_not_observed(method):
    layer = MaskedLinear(3, 2, pruning_method=method)
    observe(layer, [[1.0, 2, 3], [4, 5, 6]])
    before = layer.source.detach().clone()
    observe(layer, [[1.0, 2, 3], [4, 5, torch.inf]], skipped=True)
    assert torch.equal(layer.source, before) and before.isfinite().all() and (before > 0).all()


def test_layers_that_share_their_scores_observe_an_update_once():
    model = torch.nn.ModuleList(MaskedLinear(3, 2, pruning_method="sensitivity") for _ in range(2))
    model[1].mask_scores = model[0].mask_scores
    model[0].mask_scores.grad = torch.ones(2, 3)
    observe_scores(masked_layers(model), torch.amp.GradScaler("cpu", enabled=False), False)
    torch.testing.assert_close(model[0].mask_scores.detach(), torch.full((2, 3), 0.15))


@pytest.mark.parametrize("method", OBSERVED)
def test_ties_go_to_the_first_weights(method):
    layer = MaskedLinear(5, 4, pruning_method=method)  # nothing is observed yet
    for _ in range(3):
        assert find_masks(layer, 0.35).by_layer[""].flatten().tolist() == [True] * 7 + [False] * 13
        observe(layer, torch.ones(4, 5).numpy())


@pytest.mark.parametrize("method", OBSERVED)
def test_scores_are_observed_from_the_whole_updates_gradient(
    method, run, tmp_path, tiny_bert, squad_dir, tiny_tokenizer
):
    # All data in each update, and weights that stay: the importance I is the same three times.
    still = "--initial_threshold 1 --final_threshold 1 --max_steps 3 --learning_rate 1e-12"
    betas = "--importance_beta 0.6" + " --uncertainty_beta 0.8" * (method == "platon")
    still += " --warmup_steps 0 --max_grad_norm 1e-3 " + betas
    run("whole", still, "--per_gpu_train_batch_size 24", method=method)
    run("parts", still, "--gradient_accumulation_steps 5", method=method)

    file, sizes = squad_dir / "train-v1.1.json", {"max_seq_length": 48, "doc_stride": 16}
    examples = squad_read.read_examples(file, False, cache_dir=str(tmp_path / "other"))
    features = squad_features.build_features(
        examples, tiny_tokenizer, max_query_length=16, training=True, **sizes
    )
    plain = transformers.BertForQuestionAnswering.from_pretrained(tiny_bert).eval()
    batch = squad_features.collate(list(features), 0)
    out = plain(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    masked_run_squad.span_loss(masked_run_squad.span_logits(out, batch), batch).backward()
    # J = (1 - .6^t) I; |I - J| = .6^t I; U = .2 (.8^2 * .6 + .8 * .6^2 + .6^3) I
    expected = {"mask_scores": 1 - 0.6**3}
    if method == "platon":
        expected["mask_uncertainty"] = 0.2 * (0.64 * 0.6 + 0.8 * 0.36 + 0.216)
    for name in "whole", "parts":
        found = tensors_of(tmp_path / name, *STATE)
        assert len(found) == 12 * len(expected)
        for key, values in found.items():  # neither clipped nor scaled
            layer, _, kind = key.rpartition(".")
            weight = plain.get_parameter(f"{layer}.weight")
            importance = (weight * weight.grad).abs().detach()
            torch.testing.assert_close(values, expected[kind] * importance, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("ranked", ["", TOGETHER])
@pytest.mark.parametrize("method", OBSERVED)
def test_observed_scores_resume_bit_for_bit_and_have_no_moments(method, ranked, run, refused):
    more = (
        f"--gradient_accumulation_steps 2 --save_steps 4 --do_eval --importance_beta 0.9 {ranked}"
    )
    whole = run("whole", more, method=method)
    stopped = f"--resume_from_checkpoint {whole / 'checkpoint-4'}"
    again = run("again", more, stopped, method=method)
    assert same(whole, again)
    middle = tensors_of(whole / "checkpoint-4", *STATE)
    for name, value in tensors_of(whole, *STATE).items():
        assert (value > 0).any() and not torch.equal(value, middle[name])
    config = read(whole / "config.json")
    settings = {"importance_beta": 0.9} | ({"uncertainty_beta": 0.95} if method == "platon" else {})
    assert {name: value for name, value in config.items() if name.endswith("_beta")} == settings
    state = torch.load(whole / "checkpoint-4" / "training_state.pt", weights_only=True)
    groups = [group["name"] for group in state["optimizer"]["param_groups"]]
    assert groups == ["weights", "no_decay"]
    other = "--importance_beta 0.8 --overwrite_output_dir"
    said = refused(run, "again", more, stopped, other, method=method)
    assert "--importance_beta was 0.9 and is 0.8" in said

    counts = counts_parameters.main(["--serialization_dir", str(whole)])
    results = read(whole / "eval_results.json")
    assert results["pruning_method"] == method
    assert counts.linear_percent == pytest.approx(results["remaining_percent_linear"])
    if ranked:
        assert counts.remaining == int(0.3 * counts.total)
    else:
        assert all(m.remaining == int(0.3 * m.total) for m in counts.matrices)


def test_observed_scores_are_equal_on_two_ranks(run, flags, tmp_path, on_two_ranks):
    one = run("one", "--per_gpu_train_batch_size 10")
    on_two_ranks(flags("two", "--check_ranks"))
    two = tensors_of(tmp_path / "two", *STATE)
    for name, value in tensors_of(one, *STATE).items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_a_platon_checkpoint_is_converted_packed_and_loaded_again(run, tmp_path):
    out = run("out", "--global_topk")
    plain = tmp_path / "plain"
    bertarize.main(["--model_name_or_path", str(out), "--target_model_path", str(plain)])
    values = read(plain / "config.json")
    assert not values.keys() & {"importance_beta", "uncertainty_beta", "pruning_method"}
    assert not tensors_of(plain, *STATE)
    storage.pack(str(out), str(tmp_path / "file"))
    storage.unpack(str(tmp_path / "file"), str(tmp_path / "unpacked"))
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    masked = load_masked(str(out))(ids).start_logits
    for folder, error in (plain, 1e-5), (tmp_path / "unpacked", 0.1):  # packing rounds
        dense = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
        torch.testing.assert_close(dense(ids).start_logits, masked, rtol=error, atol=error)
    half = MaskedBertForQuestionAnswering.from_pretrained(out, dtype=torch.bfloat16)
    layer = half.bert.encoder.layer[0].output.dense
    assert layer.weight.dtype == torch.bfloat16 and layer.mask_uncertainty.dtype == torch.float32
    assert find_masks(half).cutoff == find_masks(load_masked(str(out))).cutoff


def test_other_methods_and_platon_read_each_others_checkpoints(run, refused, caplog):
    evaluate = "--do_eval --final_threshold 0.2"
    platon, other = run("platon", "--importance_beta 0.5"), run("other", method="topK")
    words = ["--serialization_dir", str(other), "--pruning_method", "platon"]
    said = refused(counts_parameters.main, words)
    assert "holds no scores for pruning_method platon" in said
    words = ["--serialization_dir", str(platon), "--pruning_method", "sensitivity"]
    counts = counts_parameters.main(words)
    assert all(m.remaining == int(0.3 * m.total) for m in counts.matrices)
    assert not tensors_of(run("topk", evaluate, method="topK", model=platon), ".mask_uncertainty")

    caplog.clear()  # fresh scores: neither the learned ones nor what memory held
    still = "--max_steps 1 --learning_rate 1e-12 --initial_threshold 1 --final_threshold 1"
    fresh, stock = run("fresh", still, model=other), run("stock", still)
    assert "the scores start fresh" in caplog.text
    for folder in fresh, stock:
        scores = tensors_of(folder, ".mask_scores")
        for name, value in tensors_of(folder, ".mask_uncertainty").items():
            mean = scores[name.replace("uncertainty", "scores")]
            torch.testing.assert_close(value, 0.05 / 0.15 * 0.85 * mean)

    more = run("more", still, model=platon)  # goes on from the means and betas of the checkpoint
    assert read(more / "config.json")["importance_beta"] == 0.5
    before = tensors_of(platon, ".mask_uncertainty")
    for name, value in tensors_of(more, ".mask_uncertainty").items():
        assert (value >= 0.949 * before[name]).all()


def test_a_checkpoint_from_before_the_betas_is_resumed(run):
    whole = run("whole", "--save_steps 4", method="platon")
    folder = whole / "checkpoint-4"
    (folder / "files.json").unlink()
    betas = {"importance_beta", "uncertainty_beta"}
    for file in folder / "config.json", folder / "training_args.json":
        assert {name for name in read(file) if name.endswith("_beta")} == betas
        edit(file, *betas)
    again = run("again", "--save_steps 4", f"--resume_from_checkpoint {folder}", method="platon")
    assert same(whole, again)


@pytest.mark.parametrize("words, said", [
    ("--regularization l1 --final_lambda 1", "--regularization needs learned scores"),
    ("--importance_beta 1", "must be above 0 and below 1, got 1"),
    ("--uncertainty_beta 0", "must be above 0 and below 1, got 0"),
    ("--final_threshold 2", "--final_threshold is a fraction"),
])  # fmt: skip
def test_what_does_not_go_with_observed_scores(words, said, run, refused):
    assert said in refused(run, "out", words)


@pytest.mark.parametrize(
    "method, idle",
    [("platon", []), ("sensitivity", ["uncertainty"]), ("topK", ["importance", "uncertainty"])],
)
def test_betas_without_effect(method, idle, run, caplog):
    betas = "--importance_beta 0.8 --uncertainty_beta 0.9"
    run("out", betas, "--max_steps 1 --warmup_steps 0", method=method)
    warned = {f"{beta}_beta" for beta in ("importance", "uncertainty")}
    warned = {beta for beta in warned if f"--{beta}: no effect without --pruning" in caplog.text}
    assert warned == {f"{beta}_beta" for beta in idle}
