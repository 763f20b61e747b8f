"""What others do with masked models: trace, compile, checkpoint, wrap, offload and shard them."""

import contextlib
import copy
import functools
import threading

import accelerate
import peft
import pytest
import tiny
import torch
import torch.distributed.fsdp
import transformers
from test_masks import in_place, loss_of, make, run, scores_or_weights, two_steps
from tiny import IDS, INPUTS, LAYER, QA
from torch import nn

from emmental import MaskedBertForQuestionAnswering, MaskedBertModel
from emmental.checkpoints.export import bertarized_config, bertarized_state_dict
from emmental.modules import MaskedLinear, find_masks, masked, masked_layers

NO_ADAPTER = "adapter.*bertarize.py first"
NO_SHARDS = "offloaded or sharded.*bertarize.py first"
ONE_LAYER = {"num_hidden_layers": 1}  # is traced in half the time


def assert_refused(model, said):
    with pytest.raises(ValueError, match=said):
        model(**INPUTS)
    with pytest.raises(ValueError, match=said), masked(model):
        pass


def gradients(model, loss):
    loss(model).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# --- traces and compilation ---

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
    model = make(method, QA, **ONE_LAYER)
    wanted = run(model)
    with masked(model), torch.set_grad_enabled(grad):
        got = trace(model)(**INPUTS)  # the first forward of the block
        torch.testing.assert_close(got[0] if isinstance(got, tuple) else got.start_logits, wanted)
        torch.testing.assert_close(model(**INPUTS)[0], wanted)  # it left no trace in the model


@pytest.mark.parametrize("method", ["topK", "l0"])
@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
def test_traces_and_exports_elsewhere_are_refused(trace, method):
    model = make(method, **ONE_LAYER)
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
    model = make(method, QA, **ONE_LAYER).train(train)
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
    model = make(**ONE_LAYER).train(grad)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for threshold in (0.2, 0.3, 0.4):
        with masked(model, threshold), torch.set_grad_enabled(grad):
            wanted = run(model)
            got = compiled(**INPUTS).last_hidden_state
            torch.testing.assert_close(got, wanted)
            if grad:
                scores = model.encoder.layer[0].output.dense.mask_scores
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
        gradients = torch.func.grad(loss)(parameters)
        run(model).pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


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
    results = []
    for checkpointing in (False, True):
        model = make(method).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            # Else a reentrant checkpoint has no input with a gradient.
            model.embeddings.requires_grad_(True)
        grads = gradients(model, loss)
        results.append({name: x for name, x in grads.items() if "embeddings" not in name})
    torch.testing.assert_close(results[1], results[0])
    copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="no mask"):  # what was kept is for the backward alone
        model.eval().get_submodule(LAYER)(torch.zeros(1, 64))


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
