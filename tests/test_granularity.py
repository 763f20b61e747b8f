"""Blocks, heads and neurons: one score for many weights, also in several matrices."""

import copy
import math
import pickle

import numpy as np
import pytest
import tiny
import torch
import transformers
from tiny import IDS, QA
from torch import nn

from emmental import MaskedBertForQuestionAnswering
from emmental.checkpoints.counts import count_layers, remaining_weights
from emmental.checkpoints.export import bertarized_config, bertarized_state_dict
from emmental.inference import sparsify
from emmental.losses import regularization
from emmental.models.families import FAMILIES, Family
from emmental.modules import MaskedLinear, count, find_masks, masked, masked_layers, observe_scores
from emmental.modules.granularity import Columns, Rows
from emmental.modules.masks import MaskInForce, Masks, in_force
from emmental.modules.methods import METHODS

UNITS = ["block", "structure", "hybrid"]
HEADS = [f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
NEURONS = ["intermediate.dense", "output.dense"]
THRESHOLDS = {"sigmoied_threshold": 0.5, "threshold": 0.0, "l0": None}  # else 0.4


def make(granularity, method="topK", suffix="Model", **settings):
    """A masked BERT with biases, without which pruned heads and neurons would have none."""
    sizes = {"granularity": granularity, "block_rows": 8, "block_columns": 16, "mask_scale": 2.0}
    settings = sizes | {"threshold": THRESHOLDS.get(method, 0.4)} | settings
    model = tiny.make(method, suffix, **{"seed": 11} | settings)  # of which all layers keep a head
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
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
    by_matrices = {}
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
            by_matrices[keys] = values, size
    return by_matrices


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


def whole_masks(model):
    """The masks in the shapes of the weights."""
    masks = find_masks(model).by_layer
    return {
        name: layer.granularity.expand(masks[name], layer.weight.shape).expand(layer.weight.shape)
        for name, layer in masked_layers(model).items()
    }


CASES = [(m, False) for m in METHODS] + [(m, True) for m in METHODS if METHODS[m].ranks_together]


@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize("method, together", CASES)
def test_masks_and_counts(granularity, method, together):
    threshold = 0.4 if together else THRESHOLDS.get(method, 0.4)
    model = make(granularity, method, global_topk=together, threshold=threshold)
    wanted, masks = wanted_masks(model, granularity), whole_masks(model)
    counts = remaining_weights(model)
    assert masks.keys() == wanted.keys() and len(masks) == 12
    for matrix, (name, mask) in zip(counts.matrices, masks.items(), strict=True):
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
    model = make("structure", suffix=QA, global_topk=together)
    scores = {k: v.shape for k, v in model.state_dict().items() if k.endswith("mask_scores")}
    assert scores == {
        f"bert.encoder.layer.{n}.{name}.mask_scores": (size,)
        for n in (0, 1)
        for name, size in (("attention.self.query", 4), ("intermediate.dense", 64))
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
    masks = find_masks(model).by_layer
    weights, gates, state = {}, {}, {}
    for name, layer in masked_layers(model).items():
        mask = masks[name]
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
@pytest.mark.parametrize("method", METHODS)
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
        with masked(model, generator=torch.Generator().manual_seed(3)) as masks:
            model(IDS).last_hidden_state[..., 0].sum().backward()
        for names in (HEADS, NEURONS):
            first, *others = (masks.by_layer[f"encoder.layer.0.{name}"] for name in names)
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
    model = make(granularity, suffix=QA)
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
        assert (layer.all_heads, layer.all_neurons) == (4, 64)
        assert layer.total == tiny.LINEARS // 2
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
    keep = torch.ones(4 if kind == "heads" else 64, dtype=torch.bool)
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


def test_a_family_that_does_not_say_where_its_heads_are(monkeypatch):
    family = Family(encoder="encoder", layers="encoder.layer")
    monkeypatch.setitem(FAMILIES, "bert", family)
    for granularity, kind in (("structure", "heads"), ("hybrid", "neurons")):
        with pytest.raises(
            ValueError, match=f"{granularity}: bert has no matrices of single {kind}"
        ):
            make(granularity)
    assert count_layers(make("block")) == []
    assert find_masks(make("block")).by_layer["encoder.layer.0.output.dense"].shape == (4, 4)


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
