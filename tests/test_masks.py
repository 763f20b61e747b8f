"""Masks in scope: right in anybody's loop, found once in a block, and never stale."""

import contextlib
import copy
import functools
import io
import pickle
import threading
import types

import accelerate
import peft
import pytest
import tiny
import torch
import torch.distributed.fsdp
import transformers
from tiny import IDS, INPUTS, LAYER, QA
from torch import nn
from torch.nn.utils import prune

from emmental import MaskedBertForQuestionAnswering, MaskedBertModel
from emmental.checkpoints.export import bertarized_config, bertarized_state_dict
from emmental.modules import MaskedLinear, count, find_masks, masked, masked_layers, masks
from emmental.modules.granularity import GRANULARITIES, Weight
from emmental.modules.methods import METHODS
from emmental.training.optim import build_optimizer

scores_or_weights = pytest.mark.parametrize("method", ["topK", "magnitude"])
every_method = pytest.mark.parametrize("method", METHODS)
NO_ADAPTER = "adapter.*bertarize.py first"
NO_SHARDS = "offloaded or sharded.*bertarize.py first"


def make(method="topK", suffix="Model", **settings):
    return tiny.make(method, suffix, **({"threshold": 0.5} | settings))


def plain_output(model):
    """What the plain model with W * M in place of W computes now."""
    plain = transformers.BertModel(bertarized_config(model.config)).eval()
    plain.load_state_dict(bertarized_state_dict(copy.deepcopy(model).eval()))
    return plain.to(model.dtype)(**INPUTS).last_hidden_state


@pytest.fixture
def finds(monkeypatch):
    """How often masks of a model have been found."""
    calls, find = [], masks.find_masks
    note = lambda *args, **kwargs: calls.append(1) or find(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(masks, "find_masks", note)
    return calls


def assert_refused(model, said):
    with pytest.raises(ValueError, match=said):
        model(**INPUTS)
    with pytest.raises(ValueError, match=said), masked(model):
        pass


def run(model, **options):
    return model(**INPUTS, **options)[0]


def loss_of(model, **options):
    return run(model, **options)[..., 0].sum()


def gradients(model, loss):
    loss(model).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# --- blocks ---


@every_method
def test_a_block_finds_masks_once_and_keeps_the_masked_weights(method, finds):
    model = make(method)
    wanted = plain_output(model)
    with masked(model) as found, torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(model), wanted)
        layer = model.get_submodule(LAYER)
        assert layer.in_force.mask is found.by_layer[LAYER]
        assert torch.equal(layer.in_force.masked_weight, layer.weight * layer.in_force.mask)
    assert len(finds) == 1 and layer.in_force is None
    with torch.no_grad():
        torch.testing.assert_close(run(model), wanted)
    assert len(finds) == 2 and layer.in_force is None


def test_blocks_nest_and_end_with_an_error():
    model = make()
    outputs = {v: run(model, threshold=v) for v in (0.5, 0.2)}
    with masked(model, 0.5):
        with masked(model, 0.2), pytest.raises(ZeroDivisionError):
            assert torch.equal(run(model), outputs[0.2])
            raise ZeroDivisionError
        assert torch.equal(run(model), outputs[0.5])
        assert torch.equal(model(**INPUTS, threshold=0.5).last_hidden_state, outputs[0.5])
        with pytest.raises(ValueError, match="threshold=0.2 inside a block masked at 0.5"):
            model(**INPUTS, threshold=0.2)
    assert all(layer.in_force is None for layer in masked_layers(model).values())


@every_method
def test_a_block_in_training_gives_the_gradients_of_its_masks(method):
    model = make(method).train()
    with masked(model, generator=torch.Generator().manual_seed(3)) as found:
        for name, layer in masked_layers(model).items():
            assert layer.in_force.mask is found.by_layer[name]
        losses = [loss_of(model) for _ in range(2)]
    assert torch.equal(*losses)  # the same sample of l0
    sampled = [loss_of(model) for _ in range(2)]
    assert torch.equal(*sampled) == (method != "l0")
    losses[0].backward()  # outside: the graph holds the masks
    assert model.get_submodule(LAYER).weight.grad.abs().sum() > 0


# --- never stale ---


def in_place(model):
    with torch.no_grad():
        for layer in masked_layers(model).values():
            if layer.mask_scores is None:
                layer.weight.copy_(layer.weight.roll(1, 0))
            else:
                layer.mask_scores.neg_()


def behind_autograd(model):
    for name, parameter in model.named_parameters():
        parameter.data.copy_(-parameter.data if "scores" in name else parameter.data.roll(1, 0))


def moving_average(model):
    torch.manual_seed(9)
    for parameter in model.parameters():
        parameter.data.lerp_(torch.randn_like(parameter), 0.5)


def load_state(model, **kwargs):
    torch.manual_seed(8)
    values = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(values, **kwargs)


def two_steps(model, optimizer):
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_by(optimizer, **options):
    return lambda model: two_steps(model, functools.partial(optimizer, **options))


CHANGES = {
    "in place": in_place,
    "through .data": behind_autograd,
    "moving average": moving_average,
    "load_state_dict": load_state,
    "load_state_dict, assign": functools.partial(load_state, assign=True),
    "double": lambda model: model.double(),
    "SGD": trained_by(torch.optim.SGD, lr=0.5),
    "fused AdamW": trained_by(torch.optim.AdamW, lr=0.1, fused=True),
    "foreach AdamW": trained_by(torch.optim.AdamW, lr=0.1, foreach=True),
    "build_optimizer": lambda model: two_steps(
        model, lambda _: build_optimizer(model, 1e-2, 1e-1, 0.0, 1e-8)
    ),
}


@scores_or_weights
@pytest.mark.parametrize("training", [False, True], ids=["changed in eval", "changed in train"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_forward_uses_stale_masks(method, change, training):
    model = make(method)
    before = run(model)
    with masked(model), torch.no_grad():
        model(**INPUTS)
    change(model.train(training))
    for mode in (True, False):
        after = model.train(mode)(**INPUTS).last_hidden_state
        torch.testing.assert_close(after, plain_output(model))
        assert not torch.allclose(after, before.to(after.dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_follow_the_device():
    model = make()
    wanted = run(model)
    got = model.cuda()(**{k: v.cuda() for k, v in INPUTS.items()}).last_hidden_state
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_a_stock_loop_moves_the_masks():
    model = make().train()  # the threshold is the configuration's
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    first = find_masks(model).by_layer[LAYER]
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(run(model), plain_output(model))
    last = find_masks(model).by_layer[LAYER]
    assert first.sum() == last.sum() and not torch.equal(first, last)


def test_a_stock_loop_with_thresholds_in_its_calls(tmp_path):
    model = make(threshold=None).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    first = find_masks(model, 0.4).by_layer[LAYER]
    for threshold in (0.8, 0.6, 0.4):
        loss_of(model, threshold=threshold).backward()
        optimizer.step()
        optimizer.zero_grad()
    last = find_masks(model).by_layer[LAYER]  # at the threshold of the last call
    assert first.sum() == last.sum() and not torch.equal(first, last)
    wanted = run(model.eval())
    torch.testing.assert_close(wanted, plain_output(model))
    model.save_pretrained(tmp_path)
    again = MaskedBertModel.from_pretrained(tmp_path).eval()
    assert again.config.threshold == 0.4
    assert torch.equal(again(**INPUTS).last_hidden_state, wanted)


@scores_or_weights
def test_weights_swapped_with_their_moving_average(method):
    model = make(method)
    torch.manual_seed(9)
    own = {name: parameter.clone() for name, parameter in model.named_parameters()}
    averages = {name: torch.randn_like(value) for name, value in own.items()}
    outputs = []
    for values in (own, averages, own):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(values[name])
        with masked(model), torch.no_grad():
            outputs.append(run(model))
        torch.testing.assert_close(outputs[-1], plain_output(model))
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1])


@scores_or_weights
def test_pruning_of_torch(method):
    model, same = make(method), make(method)
    with masked(model), torch.no_grad():
        before = run(model)
    layer, plain = model.get_submodule(LAYER), same.get_submodule(LAYER)
    prune.l1_unstructured(layer, "weight", 0.9)
    for change in (lambda: None, lambda: layer.weight_orig.data.mul_(2)):
        change()
        plain.weight.data.copy_(layer.weight_orig * layer.weight_mask)
        wanted = run(same)
        assert not torch.allclose(wanted, before)
        torch.testing.assert_close(run(model), wanted)
        with masked(model), torch.no_grad():
            torch.testing.assert_close(run(model), wanted)
    prune.remove(layer, "weight")
    torch.testing.assert_close(run(model), wanted)


def test_averaged_models():
    model = make()
    averaged = torch.optim.swa_utils.AveragedModel(model)  # before any forward
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        with masked(model):
            model(**INPUTS)
        averaged.update_parameters(model)
    assert not torch.equal(
        averaged.module.get_submodule(LAYER).mask_scores, model.get_submodule(LAYER).mask_scores
    )
    torch.testing.assert_close(averaged(**INPUTS).last_hidden_state, plain_output(averaged.module))


@every_method
def test_copies_are_in_no_block(method):
    model = make(method)
    stream = io.BytesIO()
    with masked(model, 0.5), torch.no_grad():
        model(**INPUTS)
        torch.save(model, stream)
        stream.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        copies.append(torch.load(stream, weights_only=False))
    own = {"weight", "bias", "mask_scores", *METHODS[method].state}
    assert {key.rpartition(".")[2] for key in model.state_dict()} <= own
    for other in copies:
        in_place(other)
        torch.testing.assert_close(run(other), plain_output(other))


# --- clients ---


GRAPHS = "open `with masked.model.:` around it, or convert the model with bertarize.py first"


def traced(model):
    model.config.return_dict = False
    return torch.jit.trace(model, example_kwarg_inputs=dict(INPUTS), strict=False)


def exported(model, **settings):
    return torch.export.export(model, (), dict(INPUTS), **settings).module()


TRACES = {"trace": traced, "export": exported, "strict": functools.partial(exported, strict=True)}


@pytest.mark.parametrize("method, grad", [("topK", True), ("l0", False)])
@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
def test_traces_and_exports_in_a_block(trace, method, grad):
    model = make(method, QA)
    wanted = run(model)
    with masked(model), torch.set_grad_enabled(grad):
        got = trace(model)(**INPUTS)  # the first forward of the block
        torch.testing.assert_close(got[0] if isinstance(got, tuple) else got.start_logits, wanted)
        torch.testing.assert_close(model(**INPUTS)[0], wanted)  # it left no trace in the model


@pytest.mark.parametrize("method", ["topK", "l0"])
@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
def test_traces_and_exports_elsewhere_are_refused(trace, method):
    model = make(method)
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=GRAPHS):
        trace(model)
    with masked(model.train()), pytest.raises(Exception, match="call model.eval.. first"):
        trace(model)
    assert all(layer.in_force is None for layer in masked_layers(model).values())


def test_the_old_exporter_of_onnx_gives_the_threshold_by_position():
    model = make(suffix=QA)
    ids = (IDS, *(None,) * 6)  # all arguments of the stock forward
    given = model(*ids, 0.2).start_logits
    assert torch.equal(given, model(IDS, threshold=0.2).start_logits)
    assert torch.equal(given, model(*ids, None).start_logits)


def counting(compiles):
    return lambda graph, inputs: compiles.append(graph) or graph.forward


@pytest.mark.parametrize("method, train", [("sigmoied_threshold", True), ("l0", False)])
@pytest.mark.parametrize("form", ["block", "call", "config"])
def test_compile_under_a_moving_threshold(form, method, train):
    model = make(method, QA).train(train)
    compiles = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting(compiles))
    for step in range(12):
        threshold = 1 - 0.08 * step
        with torch.set_grad_enabled(train), contextlib.ExitStack() as stack:
            if form == "block":
                stack.enter_context(masked(model, threshold))
            elif form == "config":
                model.config.threshold = threshold
            given = {"threshold": threshold} if form == "call" else {}
            torch.manual_seed(step)  # for the masks of l0
            got = compiled(**INPUTS, **given).start_logits
            torch.manual_seed(step)
            torch.testing.assert_close(got, model(**INPUTS, **given).start_logits)
        assert model.config.threshold == threshold
        if train:
            got.sum().backward()
        for parameter in model.parameters():
            parameter.data.mul_(1.01)
    assert 0 < len(compiles) <= 2


def test_compile_of_a_layer_under_a_moving_threshold():
    layer, compiles = MaskedLinear(8, 6, pruning_method="sigmoied_threshold"), []
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counting(compiles))
    for step in range(12):
        compiled(torch.ones(2, 8), threshold=0.05 * step)
    assert 0 < len(compiles) <= 3


@pytest.mark.parametrize("grad", [False, True])
def test_a_full_graph_needs_a_block(grad):
    model = make().train(grad)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for threshold in (0.2, 0.3, 0.4):
        with masked(model, threshold), torch.set_grad_enabled(grad):
            wanted = run(model)
            got = compiled(**INPUTS).last_hidden_state
            torch.testing.assert_close(got, wanted)
            if grad:
                scores = model.get_submodule(LAYER).mask_scores
                first, second = (torch.autograd.grad(x.sum(), scores)[0] for x in (got, wanted))
                torch.testing.assert_close(first, second)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=GRAPHS):
        compiled(**INPUTS)


def test_gradients_of_functions():
    model = make("l0")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        out = torch.func.functional_call(model, parameters, (), dict(INPUTS))
        return out.last_hidden_state.pow(2).mean()

    with masked(model):
        found = torch.func.grad(loss)(parameters)
        run(model).pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, msg=name)


@pytest.mark.parametrize("in_block", [False, True])
def test_gradient_checkpointing_sees_the_same_sample(in_block):
    found = []
    for checkpointing in (False, True):
        model = make("l0", QA).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        with masked(model, 0.5) if in_block else torch.enable_grad():
            found.append(gradients(model, lambda model: run(model).pow(2).sum()))
    torch.testing.assert_close(found[1], found[0])
    with pytest.raises(RuntimeError, match="no mask"):  # what was kept is for the backward alone
        model.eval().bert.get_submodule(LAYER)(torch.zeros(1, 64))


def test_the_configuration_asks_for_gradient_checkpointing():
    model = make(suffix=QA, gradient_checkpointing=True)
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, place):
        ids = (torch.arange(10) * (place + 3)) % 50 + 5
        labels = {"start_positions": place % 7, "end_positions": 8, "unused": 1}
        return {"input_ids": ids, "attention_mask": torch.ones(10), **labels}


def test_the_trainer_of_transformers(tmp_path):
    model = make("topK", QA, threshold=0.3)
    before = find_masks(model).by_layer
    options = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.05}
    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no"}
    options |= quiet | {"use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **options)
    transformers.Trainer(model=model, args=arguments, train_dataset=Pairs()).train()
    after = find_masks(model).by_layer
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(before)  # scores were trained, and the masks with them
    model.eval().save_pretrained(tmp_path / "model")
    again = MaskedBertForQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    assert again.config.threshold == 0.3
    assert torch.equal(again(**INPUTS).start_logits, run(model))


# --- granularity ---


class Block(Weight):
    """One score for a block of 2 x 2 weights."""

    name = "2x2"

    def shape(self, weight_shape):
        return torch.Size(size // 2 for size in weight_shape)

    def expand(self, mask, weight_shape):
        return mask.repeat_interleave(2, 0).repeat_interleave(2, 1)

    def reduce(self, gradient):
        rows, columns = gradient.shape
        return gradient.reshape(rows // 2, 2, columns // 2, 2).sum((1, 3))

    def rank(self, weight):
        return self.reduce(weight**2).sqrt()


class Rows(Weight):
    """One score per row."""

    name = "rows"

    def shape(self, weight_shape):
        return torch.Size([weight_shape[0]])

    def expand(self, mask, weight_shape):
        return mask[:, None].expand(weight_shape)

    def reduce(self, gradient):
        return gradient.sum(1)


class Columns(Rows):
    name = "columns"

    def shape(self, weight_shape):
        return torch.Size([weight_shape[1]])

    def expand(self, mask, weight_shape):
        return mask.expand(weight_shape)

    def reduce(self, gradient):
        return gradient.sum(0)


@pytest.fixture
def granularities(monkeypatch):
    for granularity in (Block(), Rows(), Columns()):
        monkeypatch.setitem(GRANULARITIES, granularity.name, granularity)


@every_method
def test_blocks_of_weights(method, granularities):
    torch.manual_seed(3)
    layer = tiny.observed(MaskedLinear(8, 6, True, "uniform", 2.0, method, "2x2"))
    x = torch.randn(5, 8)
    found = find_masks(layer, 0.4)
    mask = found.by_layer[""]
    assert mask.shape == (3, 4) and found.sizes == {"": 4}
    whole = torch.kron(mask.float(), torch.ones(2, 2))
    if layer.method.counts([mask], 0.4):  # it knows how many it keeps
        assert mask.sum() == int(0.4 * 12)
    if method == "magnitude":
        norms = layer.weight.detach().unflatten(1, (4, 2)).unflatten(0, (3, 2)).norm(dim=(1, 3))
        assert torch.equal(mask, norms >= norms.flatten().sort().values[-int(0.4 * 12)])
    counts = count(found)
    assert counts.remaining[""] == int(whole.count_nonzero()) and counts.total[""] == 48
    effective = (layer.weight * whole).detach().requires_grad_()
    nn.functional.linear(x, effective).sum().backward()
    layer.eval()(x, threshold=0.4).sum().backward()
    torch.testing.assert_close(layer.weight.grad, effective.grad * whole)
    if method not in ("magnitude", "l0"):  # straight through
        blocks = (effective.grad * layer.weight.detach()).reshape(3, 2, 4, 2).sum((1, 3))
        torch.testing.assert_close(layer.mask_scores.grad, blocks)


@pytest.mark.parametrize("method", ["topK", "sigmoied_threshold", "l0"])
def test_one_score_for_a_row_and_a_column(method, granularities):
    """One score for a neuron: a row of one matrix and a column of the next."""
    torch.manual_seed(3)
    model = nn.Sequential(
        MaskedLinear(4, 10, True, "uniform", 2.0, method, "rows"),
        MaskedLinear(10, 3, True, "uniform", 2.0, method, "columns"),
        MaskedLinear(3, 3, True, "uniform", 2.0, method),
    )
    model[1].mask_scores = model[0].mask_scores
    found = find_masks(model.eval(), 0.5)
    mask = found.by_layer["0"].float()
    assert found.by_layer["1"] is found.by_layer["0"] and found.sizes == {"0": 4, "1": 3, "2": 1}
    assert count(found).remaining == {
        "0": 4 * int(mask.count_nonzero()),
        "1": 3 * int(mask.count_nonzero()),
        "2": int(found.by_layer["2"].count_nonzero()),
    }
    x = torch.randn(5, 4)
    with masked(model, 0.5):
        out = model[1](model[0](x))
        (gradient,) = torch.autograd.grad(out.sum(), model[0].mask_scores)
    gate = mask.clone().requires_grad_()
    first, second = ((layer.weight.detach(), layer.bias.detach()) for layer in model[:2])
    hidden = nn.functional.linear(x, first[0] * gate[:, None], first[1])
    wanted = nn.functional.linear(hidden, second[0] * gate, second[1])
    torch.testing.assert_close(out, wanted)
    (straight,) = torch.autograd.grad(wanted.sum(), gate)
    if method == "l0":
        sigmoid = model[0].mask_scores.detach().sigmoid()
        straight = straight * sigmoid * (1 - sigmoid) * 1.2 * ((mask > 0) & (mask < 1))
    torch.testing.assert_close(gradient, straight)

    if method == "topK":  # ten neurons of seven weights, and nine weights alone: half of all 79
        model.config = types.SimpleNamespace(global_topk=True)
        together = find_masks(model, 0.5)
        kept = sum(count(together).remaining.values())
        scores = [(s, 7) for s in model[0].mask_scores.tolist()]
        scores += [(s, 1) for s in model[2].mask_scores.flatten().tolist()]
        total, wanted = 0, 0
        for _, weights in sorted(scores, reverse=True):
            total += weights
            if total > int(0.5 * 79):
                break
            wanted = total
        assert kept == wanted


# --- what others do with the classes ---


def test_threads_each_find_their_masks():
    model = make()
    wanted = {v: run(model, threshold=v) for v in (0.5, 0.2)}
    errors = []

    def work(threshold):
        try:
            for _ in range(10):
                assert torch.equal(run(model, threshold=threshold), wanted[threshold])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(threshold,)) for threshold in (0.5, 0.2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(layer.in_force is None for layer in masked_layers(model).values())


def two_forwards(model):
    torch.manual_seed(5)
    return sum(loss_of(model, threshold=v) for v in (0.5, 0.2))


def backward_after_the_block(model):
    model(**INPUTS)
    in_place(model)
    torch.manual_seed(5)
    with masked(model, 0.4):
        return loss_of(model)


def evaluation_between(model):
    torch.manual_seed(5)
    out = loss_of(model)
    model.eval()(**INPUTS, threshold=0.2)
    model.train()
    return out


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["topK", "l0", "magnitude"])
@pytest.mark.parametrize("loss", [two_forwards, backward_after_the_block, evaluation_between])
def test_what_is_recomputed_uses_the_masks_of_its_forward(loss, method, reentrant):
    found = []
    for checkpointing in (False, True):
        model = make(method).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            # Else a reentrant checkpoint has no input with a gradient.
            model.embeddings.requires_grad_(True)
        own = gradients(model, loss)
        found.append({name: x for name, x in own.items() if "embeddings" not in name})
    torch.testing.assert_close(found[1], found[0])
    copy.deepcopy(model)


def test_kept_products_follow_the_weights_in_a_block():
    model = make()
    other = {n: x.roll(1, 0) for n, x in model.state_dict().items() if "mask_scores" not in n}
    with masked(model), torch.no_grad():
        model(**INPUTS)
        functional = torch.func.functional_call(model, other, (), dict(INPUTS)).last_hidden_state
        before = run(model)
        model.load_state_dict(other, strict=False)
        after = run(model)
        torch.testing.assert_close(after, functional)
        assert not torch.allclose(after, before)
        model.train()
        model.get_submodule(LAYER).weight.data.mul_(2)
        model.eval()
        doubled = run(model)
    with masked(model), torch.no_grad():
        torch.testing.assert_close(run(model), doubled)


def test_wrappers_have_the_configuration_of_their_model():
    model = make(global_topk=True)
    wrapper = nn.DataParallel(model)
    inner, outer = find_masks(model, 0.3), find_masks(wrapper, 0.3)
    torch.testing.assert_close(
        outer.by_layer, {f"module.{name}": mask for name, mask in inner.by_layer.items()}
    )
    with masked(wrapper, 0.3):
        assert model.config.threshold == 0.3


def test_evaluation_in_a_block_of_training_takes_no_samples():
    model = make("l0")
    wanted = run(model)
    with masked(model.train()):
        sampled = run(model)
        torch.testing.assert_close(run(model.eval()), wanted)
        assert torch.equal(run(model.train()), sampled)


def test_a_nested_block_leaves_the_threshold_of_the_outer():
    model = make()
    with masked(model, 0.5):
        with masked(model, 0.2):
            assert model.config.threshold == 0.2
        assert model.config.threshold == 0.5


# --- PEFT, offloading, sharding ---


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
@scores_or_weights
def test_adapters_over_masked_layers_are_refused(method, targets):
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(make(method, QA), config)
    assert_refused(model, NO_ADAPTER)


def test_adapters_elsewhere_are_merged():
    masked_model = make(suffix=QA)
    bertarized = transformers.BertForQuestionAnswering(bertarized_config(masked_model.config))
    bertarized.load_state_dict(bertarized_state_dict(masked_model))
    for model, targets in [(bertarized.eval(), ["query", "value"]), (masked_model, ["qa_outputs"])]:
        before = run(model)
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
        wanted = run(model)
        merged = model.merge_and_unload()(**INPUTS).start_logits
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged, before, atol=1e-3)


CPU, PLACES = torch.device("cpu"), {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}
OFFLOADS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, CPU),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, PLACES, main_device="cpu", offload_dir=folder
    ),
    "from_pretrained": lambda model, folder: MaskedBertModel.from_pretrained(
        tiny.save(model, folder / "saved"), device_map=PLACES, offload_folder=folder
    ),
}


@scores_or_weights
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offloaded_weights_are_refused(offload, method, tmp_path):
    model = offload(make(method), tmp_path)
    assert_refused(model, NO_SHARDS)


def test_a_model_on_one_device_is_dispatched(tmp_path):
    wanted = make()(**INPUTS).last_hidden_state
    model = accelerate.dispatch_model(make(), {"": "cpu"}, force_hooks=True)
    torch.testing.assert_close(run(model), wanted)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@scores_or_weights
def test_weights_sharded_by_layer_are_refused(method, one_process):
    model = make(method)
    for layer in model.encoder.layer:
        torch.distributed.fsdp.fully_shard(layer, mesh=one_process)
    torch.distributed.fsdp.fully_shard(model, mesh=one_process)
    assert_refused(model, NO_SHARDS)


@scores_or_weights
def test_weights_sharded_as_a_whole_train(method, one_process):
    """FSDP gathers them before the forward, which then finds its masks."""
    models = make(method).train(), make(method).train()
    torch.distributed.fsdp.fully_shard(models[1], mesh=one_process)
    for model in models:
        two_steps(model, functools.partial(torch.optim.SGD, lr=1.0))
    for name, parameter in models[1].named_parameters():
        whole = parameter.full_tensor().detach()
        torch.testing.assert_close(whole, models[0].get_parameter(name).detach(), msg=name)
