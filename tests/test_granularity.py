"""Blocks, heads and neurons: one score for many weights, also in several matrices."""

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import bertarize
import counts_parameters
import masked_run_squad
from emmental import MaskedBertConfig, MaskedBertForQuestionAnswering, MaskedBertModel
from emmental.checkpoints.counts import count_layers, remaining_weights
from emmental.checkpoints.export import bertarized_config, bertarized_state_dict
from emmental.inference import sparsify
from emmental.losses import regularization
from emmental.models.families import FAMILIES, Family
from emmental.modules import MaskedLinear, count, find_masks, masked, masked_layers
from emmental.modules.granularity import GRANULARITIES, Block, Columns, Rows
from emmental.modules.masks import MaskInForce, Masks, in_force
from emmental.modules.methods import METHODS
from emmental.training.passes import observe_scores

ROOT = Path(__file__).parent.parent
UNITS = ["block", "structure", "hybrid"]
SIZE = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)
BLOCKS = {"block_rows": 8, "block_columns": 16}
IDS = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))
HEADS = [f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
NEURONS = ["intermediate.dense", "output.dense"]
THRESHOLDS = {"sigmoied_threshold": 0.5, "threshold": 0.0, "l0": None}


def make(granularity, method="topK", cls=MaskedBertModel, **values):
    torch.manual_seed(1)
    settings = {"mask_init": "uniform", "mask_scale": 2.0, "initializer_range": 0.2} | BLOCKS
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings |= {"threshold": THRESHOLDS.get(method, 0.4), "pruning_method": method}
    model = cls(MaskedBertConfig(**SIZE, granularity=granularity, **settings | values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # else pruned heads and neurons would have no bias
                parameter.normal_()
    if METHODS[method].scores == "observed":
        for layer in masked_layers(model).values():
            if layer.mask_scores is not None:
                layer.mask_scores.data.uniform_(0, 1)
                for name in METHODS[method].state:
                    layer.get_buffer(name).uniform_(0, 1)
    return model


def structures(granularity):
    """The groups of matrices of a layer with shared scores, and the others."""
    groups = {"structure": [HEADS, NEURONS], "hybrid": [NEURONS]}.get(granularity, [])
    return groups, [name for name in HEADS + NEURONS if not any(name in g for g in groups)]


def tile(values, name, shape, granularity):
    """The values of scores at each weight of a matrix, by NumPy."""
    rows, columns = shape
    if granularity == "block" or (granularity == "hybrid" and name in HEADS):
        return np.kron(values, np.ones((8, 16), values.dtype))
    size = 8 if name in HEADS else 1
    whole = np.repeat(values, size)
    is_read = name == (HEADS if name in HEADS else NEURONS)[-1]
    return np.tile(whole, (rows, 1)) if is_read else np.tile(whole[:, None], (1, columns))


def total(matrix, name, granularity):
    """The inverse: sums over the weights of each score."""
    rows, columns = matrix.shape
    if granularity == "block" or (granularity == "hybrid" and name in HEADS):
        return matrix.reshape(rows // 8, 8, columns // 16, 16).sum((1, 3))
    is_read = name == (HEADS if name in HEADS else NEURONS)[-1]
    whole = matrix.sum(0 if is_read else 1)
    return whole.reshape(-1, 8).sum(1) if name in HEADS else whole


def ranked(model, granularity):
    """What each method ranks, and how many weights it stands for: {names of matrices: ...}."""
    groups, alone = structures(granularity)
    found = {}
    for n, layer in enumerate(model.encoder.layer):
        for names in [*groups, *([name] for name in alone)]:
            linears = [layer.get_submodule(name) for name in names]
            weights = [linear.weight.detach().double().numpy() for linear in linears]
            size = sum(
                w.size / total(w, x, granularity).size for w, x in zip(weights, names, strict=True)
            )
            first = linears[0]
            if first.mask_scores is None:
                squares = sum(total(w**2, x, granularity) for w, x in zip(weights, names))
                values = np.sqrt(squares / size)
            else:
                values = first.mask_scores.detach().double().numpy()
            if model.config.pruning_method == "platon":
                values = values * first.mask_uncertainty.double().numpy()
            assert all(linear.mask_scores is None for linear in linears[1:])
            keys = tuple(f"encoder.layer.{n}.{name}" for name in names)
            found[keys] = values, size
    return found


def wanted_masks(model, granularity):
    """The masks by their definitions."""
    config, values = model.config, ranked(model, granularity)
    method, v = config.pruning_method, config.threshold
    masks = {}
    if config.global_topk:
        scores = np.concatenate([s.ravel() for s, _ in values.values()])
        sizes = np.concatenate([np.full(s.size, size) for s, size in values.values()])
        order = np.argsort(-scores)
        fits = np.cumsum(sizes[order]) <= int(v * sizes.sum())
        cut = scores[order][fits].min()
    for keys, (scores, _) in values.items():
        least = int(0.005 * scores.size) + 1
        cuts = np.sort(scores, axis=None)[::-1]
        if config.global_topk:
            mask = scores >= min(cut, cuts[least - 1])
        elif method == "sigmoied_threshold":
            mask = scores > min(math.log(v / (1 - v)), np.nextafter(cuts[least - 1], -9))
        elif method == "threshold":
            mask = scores > min(v, np.nextafter(cuts[least - 1], -9))
        elif method == "l0":
            mask = np.clip(1.2 / (1 + np.exp(-scores)) - 0.1, 0, 1)
        else:
            mask = scores >= cuts[int(v * scores.size) - 1]
        masks |= dict.fromkeys(keys, mask)
    return masks


def found_masks(model):
    found = find_masks(model).by_layer
    return {
        name: layer.granularity.expand(found[name], layer.weight.shape).expand(layer.weight.shape)
        for name, layer in masked_layers(model).items()
    }


CASES = [(m, False) for m in METHODS] + [(m, True) for m in METHODS if METHODS[m].ranks_together]


@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize("method, together", CASES)
def test_masks_and_counts(granularity, method, together):
    threshold = 0.4 if together else THRESHOLDS.get(method, 0.4)
    model = make(granularity, method, global_topk=together, threshold=threshold)
    wanted, found = wanted_masks(model, granularity), found_masks(model)
    counts = remaining_weights(model)
    assert found.keys() == wanted.keys() and len(found) == 12
    for matrix, (name, mask) in zip(counts.matrices, found.items(), strict=True):
        short = name.split(".", 3)[3]
        full = tile(wanted[name], short, mask.shape, granularity)
        np.testing.assert_allclose(mask.numpy(), full, rtol=1e-5, atol=1e-6)
        assert (matrix.name, matrix.remaining) == (name, np.count_nonzero(full))
        assert matrix.total == full.size
    if together:
        assert counts.remaining <= int(0.4 * counts.total) < counts.remaining + 4 * 8 * 32 + 1
    assert count(find_masks(model)).overall == counts.remaining / counts.total


@pytest.mark.parametrize("together", [False, True])
def test_one_key_for_a_shared_score(together, tmp_path):
    """The first of its matrices holds it; there is nothing else to save."""
    model = make("structure", cls=MaskedBertForQuestionAnswering, global_topk=together)
    scores = {k: v.shape for k, v in model.state_dict().items() if k.endswith("mask_scores")}
    assert scores == {
        f"bert.encoder.layer.{n}.{name}.mask_scores": (size,)
        for n in (0, 1)
        for name, size in (("attention.self.query", 4), ("intermediate.dense", 48))
    }
    model.save_pretrained(tmp_path)
    again, info = MaskedBertForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for other in (again.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).start_logits, model(IDS).start_logits)
        with torch.no_grad():
            other.bert.encoder.layer[0].intermediate.dense.mask_scores.neg_()
        assert not torch.equal(other(IDS).start_logits, model(IDS).start_logits)
        masks = find_masks(other).by_layer
        same = [masks[f"bert.encoder.layer.0.{name}"] for name in NEURONS]
        assert same[0] is same[1]
    half = MaskedBertForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.bert.encoder.layer[0].attention.self.query.mask_scores.dtype == torch.float32


# --- gradients ---


def explicit(model, granularity):
    """The model with W * M written out over leaves W and M; returns output, Ws and Ms.

    The columns that read a head or neuron have its M; its rows are whole.
    """
    plain = transformers.BertModel(bertarized_config(model.config)).eval()
    found = find_masks(model).by_layer
    weights, gates, state = {}, {}, {}
    for name, layer in masked_layers(model).items():
        mask = found[name]
        gate = gates.setdefault(layer.owner, mask.to(layer.weight.dtype).requires_grad_())
        weights[name] = layer.weight.detach().clone().requires_grad_()
        short = name.split(".", 3)[3]
        places = tile(
            np.arange(gate.numel()).reshape(gate.shape), short, layer.weight.shape, granularity
        )
        full = gate.flatten()[torch.from_numpy(places).long()]
        is_gate = not any(short in names[:-1] for names in structures(granularity)[0])
        state[f"{name}.weight"] = weights[name] * (full if is_gate else 1)
    rest = {
        k: v.detach()
        for k, v in model.state_dict().items()
        if k not in state and "mask_" not in k.rpartition(".")[2]
    }
    output = torch.func.functional_call(plain, state | rest, (IDS,)).last_hidden_state
    return output, weights, gates


@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize("method", ["topK", "sigmoied_threshold", "magnitude", "l0"])
def test_gradients_are_those_of_the_written_product(granularity, method):
    model = make(granularity, method).double()
    wanted, weights, gates = explicit(model, granularity)
    output = model(IDS).last_hidden_state
    torch.testing.assert_close(output, wanted)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).double()
    (output * direction).sum().backward()
    (wanted * direction).sum().backward()
    for name, layer in masked_layers(model).items():
        torch.testing.assert_close(layer.weight.grad, weights[name].grad, msg=name)
        if layer.mask_scores is not None:
            gate = gates[layer.owner]
            straight = gate.grad
            if granularity != "block" and name.endswith("intermediate.dense") and method != "l0":
                assert straight[gate == 0].abs().min() > 0  # closed gates have a gradient
            if method == "l0":
                s = layer.mask_scores.detach().sigmoid()
                straight = straight * s * (1 - s) * 1.2 * ((gate > 0) & (gate < 1))
            torch.testing.assert_close(layer.mask_scores.grad, straight)


@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize("method", ["sensitivity", "platon"])
def test_the_importance_of_a_structure_is_that_of_its_mask(granularity, method):
    model = make(granularity, method, threshold=1.0)
    layers = masked_layers(model).items()
    before = {n: x.mask_scores.clone() for n, x in layers if x.mask_scores is not None}
    wanted, _, gates = explicit(model, granularity)
    wanted[..., 0].sum().backward()
    model(IDS).last_hidden_state[..., 0].sum().backward()
    observe_scores(masked_layers(model), torch.amp.GradScaler("cpu", enabled=False), False)
    sizes = {keys[0]: size for keys, (_, size) in ranked(model, granularity).items()}
    for name, old in before.items():
        layer = model.get_submodule(name)
        importance = gates[layer.owner].grad.abs() / sizes[name] ** 0.5
        torch.testing.assert_close(
            layer.mask_scores.detach(), 0.85 * old + 0.15 * importance, rtol=1e-4, atol=1e-7
        )
        assert layer.mask_scores.grad is None


@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize("mode, method", [("l1", "sigmoied_threshold"), ("l0", "l0")])
def test_a_penalty_counts_in_every_matrix(granularity, mode, method):
    """As if every weight had its own copy of its score: lambda keeps its meaning."""
    model = make(granularity, method)
    shift = 2 / 3 * math.log(0.1 / 1.1) if mode == "l0" else 0.0
    values, slopes = [], {}
    for keys, (scores, _) in ranked(model, granularity).items():
        for key in keys:
            short = key.split(".", 3)[3]
            shape = model.get_submodule(key).weight.shape
            gates = 1 / (1 + np.exp(shift - tile(scores, short, shape, granularity)))
            values.append(gates.mean())
            slope = total(gates * (1 - gates) / gates.size / 12, short, granularity)
            slopes[keys[0]] = slopes.get(keys[0], 0) + slope
    penalty = regularization(model, mode)
    penalty.backward()
    assert penalty.item() == pytest.approx(np.mean(values), rel=1e-5)
    for name, slope in slopes.items():
        grad = model.get_submodule(name).mask_scores.grad
        np.testing.assert_allclose(grad.numpy(), slope, rtol=1e-4, atol=1e-9)


def test_a_sample_of_l0_is_shared():
    gradients = []
    for checkpointing in (False, True):
        model = make("structure", "l0").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with masked(model, generator=torch.Generator().manual_seed(3)) as found:
            model(IDS).last_hidden_state[..., 0].sum().backward()
        for names in (HEADS, NEURONS):
            first, *others = (found.by_layer[f"encoder.layer.0.{name}"] for name in names)
            assert all(other is first for other in others)
        gradients.append(model.encoder.layer[0].intermediate.dense.mask_scores.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_equal_layers_share_compiled_code():
    model = make("structure").train()
    compiles = []
    torch._dynamo.reset()
    for layer in model.encoder.layer:
        layer.compile(backend=lambda graph, inputs: compiles.append(graph) or graph.forward)
    plain = make("structure").train()
    for threshold in (1.0, 0.7, 0.4):
        outputs = [x(IDS, threshold=threshold).last_hidden_state for x in (model, plain)]
        torch.testing.assert_close(*outputs)
        outputs[0].sum().backward()
    assert 0 < len(compiles) <= 2
    assert model.encoder.layer[1].output.dense.weight.grad.abs().sum() > 0


# --- random masks, bertarized ---


def random_masks(model, granularity, seed):
    """Random masks of all owners, among them layers without heads and with one neuron."""
    random = np.random.default_rng(seed)
    layers, by_owner = masked_layers(model), {}
    for name, layer in layers.items():
        shape = layer.granularity.shape(layer.weight.shape)
        mask = torch.from_numpy(random.random(tuple(shape)) < random.random())
        choice = random.integers(4)
        if choice == 0:
            mask[:] = False
        elif choice == 1:
            mask[:] = False
            mask.view(-1)[random.integers(mask.numel())] = True
        by_owner.setdefault(layer.owner, mask)
    sizes = {name: layer.weights_per_score for name, layer in layers.items()}
    return Masks({name: by_owner[layer.owner] for name, layer in layers.items()}, sizes)


@pytest.mark.parametrize("granularity", ["weight", *UNITS])
@pytest.mark.parametrize("seed", range(12))
def test_bertarized_models_equal_masked_ones(granularity, seed):
    model = make(granularity, cls=MaskedBertForQuestionAnswering)
    masks = random_masks(model, granularity, seed)
    layers = list(masked_layers(model).values())
    forced = [MaskInForce(mask, 0.5, False, True) for mask in masks.by_layer.values()]
    with in_force(layers, forced), torch.no_grad():
        wanted = model(IDS).start_logits
    plain = transformers.BertForQuestionAnswering(bertarized_config(model.config)).eval()
    state = bertarized_state_dict(model, masks)
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).start_logits, wanted, rtol=1e-4, atol=1e-4)

    values = [count_of(state, n) for n in (0, 1)]
    for layer, (heads, neurons, weights) in zip(count_layers(model, masks), values, strict=True):
        assert (layer.heads, layer.neurons, layer.remaining) == (heads, neurons, weights)
        assert (layer.all_heads, layer.all_neurons) == (4, 48)
        assert layer.total == 4 * 32 * 32 + 2 * 32 * 48
    with torch.no_grad():  # compaction drops the same
        sparse = sparsify(plain, kernel="library")(IDS).start_logits
    torch.testing.assert_close(sparse, wanted, rtol=1e-3, atol=1e-3)


def count_of(state, n):
    """Heads, neurons and weights of a layer that are not zero."""
    value, output, first, second = (
        state[f"bert.encoder.layer.{n}.{name}.weight"].numpy() != 0
        for name in (*HEADS[2:], *NEURONS)
    )
    heads = (value.any(1) & output.any(0)).reshape(4, 8).any(1).sum()
    weights = [
        np.count_nonzero(state[f"bert.encoder.layer.{n}.{name}.weight"].numpy())
        for name in HEADS + NEURONS
    ]
    return heads, (first.any(1) & second.any(0)).sum(), sum(weights)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_what_is_pruned_adds_nothing(kind):
    """Its biases do not matter: a head or neuron without weights can be dropped."""
    model = make("structure", threshold=1.0)
    masks = find_masks(model)
    layer = model.encoder.layer[0]
    names = HEADS if kind == "heads" else NEURONS
    keep = torch.ones(4 if kind == "heads" else 48, dtype=torch.bool)
    keep[1] = False
    for name in names:
        masks.by_layer[f"encoder.layer.0.{name}"] = keep
    forced = [MaskInForce(mask, 1.0, False, False) for mask in masks.by_layer.values()]
    outputs = []
    for shift in (0.0, 3.0):
        with torch.no_grad():
            for name in names[:-1]:
                bias = layer.get_submodule(name).bias
                bias[slice(8, 16) if kind == "heads" else slice(1, 2)] += shift
            with in_force(list(masked_layers(model).values()), forced):
                outputs.append(model(IDS).last_hidden_state)
    torch.testing.assert_close(*outputs)


# --- the scripts ---

FLAGS = {
    "topK": "--pruning_method topK --final_threshold 0.5",
    "topK, global": "--pruning_method topK --final_threshold 0.5 --global_topk",
    "magnitude": "--pruning_method magnitude --final_threshold 0.5",
    "magnitude, global": "--pruning_method magnitude --final_threshold 0.5 --global_topk",
    "threshold": "--pruning_method threshold --initial_threshold -0.2 --final_threshold 0.0",
    "soft": "--pruning_method sigmoied_threshold --initial_threshold 0 --final_threshold 0.5 "
    "--regularization l1 --target_remaining 0.5",
    "l0": "--pruning_method l0 --initial_threshold 1 --final_threshold 1 --regularization l0 "
    "--final_lambda 10",
    "sensitivity, global": "--pruning_method sensitivity --final_threshold 0.5 --global_topk",
    "platon": "--pruning_method platon --final_threshold 0.5",
}
SMALL = "--block_rows 8 --block_columns 16"


def granular(granularity):
    return f"--granularity {granularity} " + SMALL * (granularity in ("block", "hybrid"))


@pytest.fixture
def flags(flags):
    """The command line of a run whose scores start at random."""

    def make(name, *more, train=True, **options):
        own = "--mask_init uniform --mask_scale 0.1 --mask_scores_learning_rate 3e-2"
        return flags(name, own + " --do_train" * train, *more, **options)

    return make


@pytest.fixture
def refused(flags, tmp_path, capsys):
    """Runs the script, expects status 2, and returns the one line that it printed."""

    def call(*more, **options):
        with pytest.raises(SystemExit) as stop:
            masked_run_squad.main(flags("refused", *more, **options))
        said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert stop.value.code == 2 and len(said) == 1, said
        assert not (tmp_path / "refused" / "model.safetensors").exists()
        return said[0]

    return call


def read(folder, file="config.json"):
    return json.loads((folder / file).read_text())


@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize("method", FLAGS)
def test_training_counting_and_bertarizing(method, granularity, run, tmp_path, capsys):
    out = run("out", FLAGS[method], granular(granularity), "--do_eval --save_steps 4")
    config, results = read(out), read(out, "eval_results.json")
    assert config["granularity"] == results["granularity"] == granularity
    if granularity != "structure":
        assert (config["block_rows"], config["block_columns"]) == (8, 16)
    first, last = (load_file(x / "model.safetensors") for x in (out / "checkpoint-4", out))
    for name in last:
        if name.endswith("mask_scores"):
            assert not torch.equal(first[name], last[name])

    counts = counts_parameters.main(
        ["--serialization_dir", str(out), "--json", str(tmp_path / "counts.json")]
    )
    written, said = read(tmp_path, "counts.json"), capsys.readouterr().out
    assert counts.linear_percent == pytest.approx(results["remaining_percent_linear"])
    assert f"granularity {granularity}" in said and written["granularity"] == granularity
    assert sum(layer["remaining"] for layer in written["layers"]) == counts.remaining
    for layer in written["layers"]:
        assert f"{layer['heads']} of 4" in said and f"{layer['neurons']} of 64" in said
    if "topK" in method or "magnitude" in method or "sensitivity" in method:
        floors = sum(m.remaining for m in counts.matrices if m.floored) / counts.total
        assert counts.linear_percent - 100 * floors <= 50 < counts.linear_percent + 100 / 24 + 1e-6
    if method in ("topK", "magnitude", "platon"):
        assert counts.linear_percent == 50

    bertarize.main(["--model_name_or_path", str(out), "--target_model_path", f"{tmp_path}/plain"])
    assert not {"granularity", "block_rows", "block_columns"} & read(tmp_path / "plain").keys()
    plain = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "plain").eval()
    model = MaskedBertForQuestionAnswering.from_pretrained(out).eval()
    torch.testing.assert_close(plain(IDS).start_logits, model(IDS).start_logits)

    again = run("again", "--do_eval", FLAGS[method].split(" --reg")[0], model=out, train=False)
    for key in ("f1", "remaining_percent", "granularity"):
        assert read(again, "eval_results.json")[key] == results[key]


@pytest.mark.parametrize("method", ["soft", "magnitude, global", "platon", "l0"])
def test_resume_is_exact(method, run):
    more = (FLAGS[method], granular("hybrid"), "--save_steps 4 --gradient_accumulation_steps 2")
    whole = run("whole", *more)
    again = run("again", *more, f"--resume_from_checkpoint {whole / 'checkpoint-4'}")
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_a_resumed_run_has_the_same_granularity(run, refused, capsys):
    whole = run("whole", granular("block"), "--save_steps 4")
    resume = f"--resume_from_checkpoint {whole / 'checkpoint-4'}"
    assert "--granularity was block and is None" in refused(resume)
    said = refused("--granularity block --block_rows 8 --block_columns 8", resume)
    assert "block_columns 8 contradicts 16 of the checkpoint" in said


def test_two_ranks_have_the_same_scores(run, flags, tmp_path, on_two_ranks):
    more = (FLAGS["topK, global"], granular("structure"), "--adam_epsilon 1e-4")
    one = run("one", *more, "--per_gpu_train_batch_size 10")
    on_two_ranks(flags("two", *more, "--check_ranks"))
    two = load_file(tmp_path / "two" / "model.safetensors")
    for name, value in load_file(one / "model.safetensors").items():
        if name.endswith("mask_scores"):
            torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_checkpoints_from_before_granularities(run, capsys):
    whole = run("whole", "--save_steps 4")
    folder = whole / "checkpoint-4"
    (folder / "files.json").unlink()
    for file in folder / "config.json", folder / "training_args.json":
        values = json.loads(file.read_text())
        names = {"granularity", "block_rows", "block_columns"}
        file.write_text(json.dumps({k: v for k, v in values.items() if k not in names}))
    counts_parameters.main(["--serialization_dir", str(folder)])
    assert "granularity weight" in capsys.readouterr().out
    again = run("again", "--save_steps 4", f"--resume_from_checkpoint {folder}")
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_training_goes_on_with_the_granularity_of_the_checkpoint(run, refused, caplog):
    first = run("first", granular("hybrid"))
    still = "--max_steps 1 --warmup_steps 0 --mask_scores_learning_rate 1e-12 "
    more = run("more", still, model=first)
    assert (read(more)["granularity"], read(more)["block_columns"]) == ("hybrid", 16)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, more))
    for name in before:
        if name.endswith("mask_scores"):
            torch.testing.assert_close(before[name], after[name])
    other = run("other", still, "--pruning_method l0 --mask_scale 0.01", model=first)
    assert "the scores start fresh" in caplog.text and read(other)["granularity"] == "hybrid"
    scores = [v for k, v in load_file(other / "model.safetensors").items() if "mask_scores" in k]
    assert len(scores) == 10 and all(0 < x.abs().max() <= 0.011 for x in scores)
    for words, said in (
        ("--granularity structure", "granularity structure contradicts hybrid of the checkpoint"),
        ("--granularity weight", "convert it with bertarize.py and start from the result"),
        ("--granularity hybrid --block_rows 4", "block_rows 4 contradicts 8 of the checkpoint"),
        ("--granularity block --pruning_method l0", "granularity block contradicts hybrid"),
    ):
        assert said in refused(words, model=first)
    assert "contradicts" in refused("--granularity weight --do_eval", model=first, train=False)


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "--granularity blocks",
            "'blocks' is not one of weight, block, structure, hybrid; did you",
        ),
        ("--block_rows 8", "--block_rows and --block_columns need --granularity block or hybrid"),
        ("--granularity structure --block_columns 8", "need --granularity block or hybrid: add it"),
        ("--granularity block --block_rows 0", "--block_rows: must be at least 1, got 0"),
        (
            "--granularity block --block_rows 5 --block_columns 8",
            "layer.0.attention.self.query: blocks of 5 x 8 do not divide a matrix of 32 x 32 "
            "weights: block_rows can be 1, 2, 4, 8, 16, 32, and block_columns 1, 2, 4, 8, 16, 32",
        ),
        ("--granularity hybrid --block_columns 64", "blocks of 32 x 64 do not divide a matrix"),
        ("--granularity structure --mask_init kaiming", "--mask_init kaiming needs a matrix of"),
        ("--mask_init magnitude --mask_scale 0", "--mask_init magnitude needs a --mask_scale"),
        (
            f"--granularity structure {FLAGS['soft']} --target_remaining 0.1",
            f"--target_remaining 0.1: {1088 / 8192:.4f} of the weights remain at least",
        ),
    ],
)
def test_what_does_not_fit(words, said, refused):
    assert said in refused(words)


def test_blocks_fit_all_matrices(tmp_path, tiny_config, tiny_tokenizer, refused):
    """The sizes named divide every matrix, not only the one that does not fit."""
    config = transformers.BertConfig(**tiny_config | {"intermediate_size": 24})
    transformers.BertForQuestionAnswering(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    said = refused(
        "--granularity block --block_rows 16 --block_columns 8", model=tmp_path / "model"
    )
    assert "layer.0.intermediate.dense: blocks of 16 x 8 do not divide a matrix of 24 x 32" in said
    assert said.endswith("block_rows can be 1, 2, 4, 8, and block_columns 1, 2, 4, 8")


@pytest.mark.parametrize("values", [{"granularity": "rows"}, {"block_rows": 0}, {"block_rows": 7}])
def test_a_configuration_that_is_wrong(values, run, tmp_path, capsys):
    out = run("out", granular("block"))
    (out / "config.json").write_text(json.dumps(read(out) | values))
    with pytest.raises(SystemExit) as stop:
        counts_parameters.main(["--serialization_dir", str(out)])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "cannot load" in said and "--" not in said
    assert str(*values.values()) in said


def test_layers_without_heads_are_legal_and_said(run, caplog, capsys, tmp_path):
    out = run("out", "--granularity structure --final_threshold 0.2 --do_eval")
    assert "--final_threshold 0.2 keeps none of the 4 heads of each layer" in caplog.text
    assert "no heads remain in layer 0, 1: there, the attention only adds a bias" in caplog.text
    counts_parameters.main(["--serialization_dir", str(out)])
    assert capsys.readouterr().out.count("0 of 4") == 2
    for flag in "", "--sparse_inference":
        caplog.clear()
        again = run("again", "--do_eval", flag, model=out, train=False)
        assert "no heads remain in layer 0, 1" in caplog.text
        assert read(again, "eval_results.json")["f1"] == read(out, "eval_results.json")["f1"]


def test_a_family_that_does_not_say_where_its_heads_are(monkeypatch):
    family = Family(encoder="encoder", layers="encoder.layer")
    monkeypatch.setitem(FAMILIES, "bert", family)
    for granularity, kind in (("structure", "heads"), ("hybrid", "neurons")):
        with pytest.raises(
            ValueError, match=f"{granularity}: bert has no matrices of single {kind}"
        ):
            make(granularity)
    assert count_layers(make("block")) == []
    assert find_masks(make("block")).by_layer["encoder.layer.0.output.dense"].shape == (4, 3)


def test_the_granularity_of_a_layer_alone():
    with pytest.raises(ValueError, match="unknown granularity 'rows': choose one of weight, block"):
        MaskedLinear(8, 8, granularity="rows")
    with pytest.raises(ValueError, match="blocks of 32 x 32 do not divide a matrix of 8 x 64"):
        MaskedLinear(64, 8, granularity="block")
    assert MaskedLinear(64, 96, granularity="block").mask_scores.shape == (3, 2)
    first = MaskedLinear(4, 6, pruning_method="magnitude", granularity=Rows(6))
    second = MaskedLinear(6, 4, pruning_method="magnitude", granularity=Columns(6), scores_of=first)
    x = torch.randn(3, 4)
    norms = first.weight.square().sum(1) + second.weight.square().sum(0)
    keep = norms >= norms.sort().values[-2]
    hidden = first(x, threshold=0.34)
    torch.testing.assert_close(hidden, nn.functional.linear(x, first.weight, first.bias))
    torch.testing.assert_close(first.expand(keep), keep[:, None])
    torch.testing.assert_close(
        second(hidden, threshold=0.34),
        nn.functional.linear(hidden, second.weight * keep, second.bias),
    )


def test_a_granularity_of_ones_own_in_the_scripts(monkeypatch, run):
    class Strips(Block):
        name = "strips"

        def sized(self, rows, columns):
            return type(self)(1, 16)

    monkeypatch.setitem(GRANULARITIES, "strips", Strips())
    out = run("out", "--granularity strips --final_threshold 0.5")
    assert read(out)["granularity"] == "strips"
    scores = load_file(out / "model.safetensors")
    assert scores["bert.encoder.layer.0.output.dense.mask_scores"].shape == (32, 4)
