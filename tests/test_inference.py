"""Sparse inference has the outputs of the stock model, with every kernel."""

import copy
import pickle
import threading

import numpy as np
import pytest
import tiny
import torch
import transformers
from scipy.sparse import csr_array
from tiny import SIZES, plain_bert
from torch.nn import functional as F

import emmental
from emmental import MaskedBertConfig, storage
from emmental.compact import algebra
from emmental.compact.algebra import Affine
from emmental.inference import backends, build, encoder, sparsify
from emmental.models.families import encoder_of
from emmental.modules.methods import METHODS
from emmental.system.errors import UserError

HEADS = ["", "QuestionAnswering", "SequenceClassification", "TokenClassification"]
SHAPES = [(1, 1), (1, 5), (3, 16), (2, 33), (5, 40)]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Kernels are compiled into a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        build.load_native.cache_clear()
        yield
    build.load_native.cache_clear()


@pytest.fixture(params=["native", "library", "compact"])
def kernel(request):
    if request.param == "native":
        try:
            build.load_native()
        except UserError as error:
            pytest.skip(str(error))
    return request.param


def pruned_bert(head="QuestionAnswering", density=0.15, seed=0, **settings):
    """A model with random masks, biases and LayerNorms."""
    model = plain_bert(head, seed, **(settings | {"initializer_range": 0.3}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
            elif ".encoder." in name or name.startswith("encoder."):
                parameter.mul_(torch.rand(parameter.shape) < density)
    return model


def inputs(batch, length, seed=0, masked=True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 120, (batch, length), generator=generator)
    mask = (torch.rand(batch, length, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    return {"input_ids": ids} | ({"attention_mask": mask} if masked else {})


@torch.inference_mode()
def assert_same(model, sparse, shapes=SHAPES, tolerance=1e-4):
    for number, (batch, length) in enumerate(shapes):
        for masked in (True, False):
            given = inputs(batch, length, number, masked)
            for expected, found in zip(
                model(**given).to_tuple(), sparse(**given).to_tuple(), strict=True
            ):
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 5)


# ------------------------------------------------------------ same outputs


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_outputs(head, kernel, density):
    model = pruned_bert(head, density)
    assert_same(model, sparsify(model, kernel))


def test_multiple_choice(kernel):
    model = pruned_bert("MultipleChoice")
    given = {name: tensor.view(2, 3, 8) for name, tensor in inputs(6, 8).items()}
    with torch.inference_mode():
        found, expected = sparsify(model, kernel)(**given).logits, model(**given).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


OTHERS = [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"num_attention_heads": 1}]
OTHERS += [{"hidden_size": 20, "num_attention_heads": 5}, {"intermediate_size": 7}]
OTHERS += [{"layer_norm_eps": 0.1}, {"num_hidden_layers": 0}]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_other_shapes_and_activations(kernel, settings):
    model = pruned_bert(**settings)
    assert_same(model, sparsify(model, kernel))


@pytest.mark.parametrize("csr_below", [0.0, 0.15, 1.0])
def test_csr_and_dense_agree(csr_below):
    model = pruned_bert()
    for kernel in ("native", "library"):
        sparse = sparsify(model, kernel, csr_below)
        matrices = [matrix for layer in encoder_of(sparse).layers for matrix in layer.matrices()]
        for matrix in matrices:
            density = np.count_nonzero(matrix.values) / (matrix.rows * matrix.columns)
            assert (matrix.starts is not None) == (density < csr_below)
        assert_same(model, sparse)


THRESHOLDS = {"threshold": 0.3, "sigmoied_threshold": 0.6, "l0": 1.0}  # else 0.1


@pytest.mark.parametrize("method", METHODS)
def test_masked_models(method, kernel):
    model = tiny.make(method, "ForSequenceClassification", threshold=THRESHOLDS.get(method, 0.1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = sparsify(model, kernel)
    assert type(sparse) is transformers.BertForSequenceClassification
    assert_same(model, sparse)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_long_batches_go_in_groups(kernel, monkeypatch):
    model = pruned_bert()
    monkeypatch.setattr(encoder, "GROUP_TOKENS", 50)
    assert_same(model, sparsify(model, kernel), [(7, 16), (3, 60), (1, 64)])


def test_a_sequence_without_tokens(kernel):
    # No row is empty, so no bias is folded, which would need a softmax that sums to 1.
    model = pruned_bert(density=0.9)
    given = inputs(2, 6)
    given["attention_mask"][1] = 0
    with torch.inference_mode():
        ours, theirs = sparsify(model, kernel)(**given), model(**given)
    torch.testing.assert_close(ours.start_logits, theirs.start_logits, rtol=1e-4, atol=1e-5)


def test_with_and_without_gradients(kernel):
    model = pruned_bert()
    sparse, given = sparsify(model, kernel), inputs(2, 12)
    expected = model(**given).start_logits
    for context in (torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(sparse(**given).start_logits, expected, rtol=1e-4, atol=1e-5)
    sparse(**given).start_logits.sum().backward()  # reaches the stock head
    assert sparse.qa_outputs.weight.grad is not None


def test_scores_far_apart():
    """Softmax over scores of +-1000 and GELU of large values are those of torch."""
    model = pruned_bert(density=0.5)
    with torch.no_grad():
        for block in model.bert.encoder.layer:
            attention = block.attention.self
            for linear in (attention.query, attention.key, block.intermediate.dense):
                linear.weight.mul_(30)
    # In float32, such scores have an error of 1e-4.
    assert_same(model, sparsify(model, "native"), tolerance=1e-2)


def test_gelu_of_the_kernel():
    x = torch.linspace(-12, 12, 96 * 11).view(1, 96, 11)
    run = backends.Native(1, 96)
    identity = Affine(csr_array(np.eye(11, dtype=np.float32)), np.zeros(11, np.float32))
    identity = run.prepare(identity, sparse=True)

    def gelu(x):
        return run.leave(run.product(identity, run.enter(x), "inner", activation="gelu"))

    assert (gelu(x) - F.gelu(x.double()).float()).abs().max() < 1e-6
    assert gelu(torch.full((1, 96, 11), torch.nan)).isnan().all()


def test_threads():
    """Calls from several Python threads do not disturb each other."""
    model = pruned_bert()
    sparse = sparsify(model, "native")
    with torch.no_grad():
        expected = [model(**inputs(3, 20, seed)).start_logits for seed in range(4)]
    failures = []

    def work(seed):
        with torch.inference_mode():
            for _ in range(20):
                found = sparse(**inputs(3, 20, seed)).start_logits
                if not torch.allclose(found, expected[seed], rtol=1e-4, atol=1e-5):
                    failures.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_several_threads_of_torch_agree():
    model = pruned_bert()
    sparse = sparsify(model, "native")
    try:
        torch.set_num_threads(3)
        assert_same(model, sparse)
    finally:
        torch.set_num_threads(1)


# ------------------------------------------------------------ compaction


def affine(rows, columns, rng):
    weight, bias = (rng.normal(size=size).astype(np.float32) for size in ((rows, columns), rows))
    return Affine(csr_array(weight), bias)


def empty(layer, field, rows=(), columns=()):
    weight = getattr(layer, field).weight.toarray()
    weight[list(rows)] = 0
    weight[:, list(columns)] = 0
    getattr(layer, field).weight = csr_array(weight)


def test_what_compaction_removes():
    rng = np.random.default_rng(0)
    whole = {name: affine(8, 8, rng) for name in ("query", "key", "value", "output")}
    layer = algebra.Layer(
        **whole, first=affine(12, 8, rng), second=affine(8, 12, rng), sizes=[4, 4], sizes_v=[4, 4]
    )
    empty(layer, "value", rows=[0, 1])  # constant values
    empty(layer, "output", columns=[2])  # a value that is not used
    empty(layer, "key", rows=[5])  # the same for all keys
    empty(layer, "query", rows=[6, 7])
    layer.query.bias[6] = 0  # adds nothing; row 7 keeps its bias
    empty(layer, "first", rows=[3])  # a constant neuron
    empty(layer, "second", columns=[0, 11])  # neurons that are not used
    found = algebra.compact(layer, "gelu")
    assert (found.sizes, found.sizes_v) == ([4, 2], [1, 4])
    rows = layer.query.weight.toarray()[[0, 1, 2, 3, 4, 7]]
    assert np.array_equal(found.query.weight.toarray(), rows)
    assert np.array_equal(found.value.bias, layer.value.bias[[3, 4, 5, 6, 7]])
    folded = layer.output.bias + layer.output.weight.toarray()[:, :2] @ layer.value.bias[:2]
    np.testing.assert_allclose(found.output.bias, folded, rtol=1e-5)
    assert found.first.weight.shape == (9, 8) and found.second.weight.shape == (8, 9)
    gelu = F.gelu(torch.tensor(layer.first.bias[3])).item()
    folded = layer.second.bias + layer.second.weight.toarray()[:, 3] * gelu
    np.testing.assert_allclose(found.second.bias, folded, rtol=1e-4)
    assert layer.query.weight.shape == (8, 8)


@pytest.mark.parametrize(
    "dead", ["head", "heads", "scores", "values", "neurons", "inputs", "everything"]
)
def test_compacted_outputs(kernel, dead):
    model = pruned_bert(density=0.9)
    attention, block = model.bert.encoder.layer[0].attention, model.bert.encoder.layer[0]
    with torch.no_grad():
        if dead == "head":
            attention.output.dense.weight[:, 8:16] = 0
        elif dead == "heads":
            attention.output.dense.weight.zero_()
        elif dead == "scores":
            attention.self.key.weight[:16] = 0
            attention.self.query.weight[24:28] = 0
            attention.self.query.bias[24:26] = 0
        elif dead == "values":
            attention.self.value.weight[4:13] = 0
        elif dead == "neurons":
            block.intermediate.dense.weight[10:] = 0
            block.output.dense.weight[:, :7] = 0
        elif dead == "inputs":
            qkv = attention.self.query, attention.self.key, attention.self.value
            for linear in (*qkv, block.intermediate.dense):
                linear.weight[:, 5:30] = 0
        else:
            for linear in model.bert.encoder.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.weight.zero_()
    sparse = sparsify(model, kernel)
    assert_same(model, sparse)
    if kernel == "compact":
        first = sparse.bert.encoder.layer[0]
        heads, neurons = first.attention.self.num_attention_heads, first.output.dense.in_features
        assert heads == {"head": 3, "heads": 0, "everything": 0}.get(dead, 4)
        assert neurons == {"neurons": 8, "everything": 0}.get(dead, 64)
    elif dead in ("head", "heads"):
        assert len(encoder_of(sparse).layers[0].sizes) == (3 if dead == "head" else 0)


def test_a_compacted_model_becomes_sparse():
    model = pruned_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight[:, 8:24] = 0
    compacted = sparsify(model, "compact")
    assert compacted.bert.encoder.layer[0].attention.self.num_attention_heads == 2
    assert_same(model, sparsify(compacted, "native"))
    assert_same(model, sparsify(compacted, "compact"))


def test_compacted_models_train(caplog):
    model = pruned_bert().train()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[:, :40] = 0
    compacted = sparsify(model)
    assert "training mode" in caplog.text and "compaction only" in caplog.text
    assert compacted.training
    assert compacted.bert.encoder.layer[1].intermediate.dense.out_features == 24
    compacted(**inputs(2, 8)).start_logits.sum().backward()
    assert all(p.grad is not None for p in compacted.bert.encoder.parameters())
    assert_same(model.eval(), compacted.eval())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_compaction_only(caplog):
    model = pruned_bert(density=0.05).cuda()
    compacted = sparsify(model)
    assert "CSR does not pay on cuda" in caplog.text
    given = {name: tensor.cuda() for name, tensor in inputs(2, 9).items()}
    ours, theirs = compacted(**given).start_logits, model(**given).start_logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------ results and errors


def test_auto_chooses_by_density():
    sparse, dense = (sparsify(pruned_bert(density=density)) for density in (0.1, 0.6))
    assert isinstance(encoder_of(sparse), encoder.SparseEncoder)
    assert hasattr(encoder_of(dense), "layer")  # compacted: no sparse product pays
    matrices = [matrix for layer in encoder_of(sparse).layers for matrix in layer.matrices()]
    assert all(matrix.starts is not None for matrix in matrices)
    forced = sparsify(pruned_bert(density=0.1), csr_below=0.0)
    assert hasattr(encoder_of(forced), "layer")


def test_a_copy_works_and_cannot_be_saved(tmp_path, kernel):
    model = pruned_bert()
    again = copy.deepcopy(sparsify(model, kernel))
    assert_same(model, again)
    with pytest.raises(ValueError, match="save the model that it was made from"):
        again.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "dense")


def test_eager_attention_and_pickles(kernel):
    model = pruned_bert()
    model.set_attn_implementation("eager")
    sparse = sparsify(model, kernel)
    assert_same(model, sparse)
    del sparse.save_pretrained  # set on this object, it cannot be pickled
    assert_same(model, pickle.loads(pickle.dumps(sparse)))


def test_masked_models_of_other_classes(kernel):
    class Mine(emmental.MaskedBertForQuestionAnswering):
        pass

    torch.manual_seed(0)
    config = MaskedBertConfig(**SIZES, mask_init="uniform", mask_scale=1.0, threshold=0.1)
    for model in (Mine(config), emmental.MaskedBertModel(config, add_pooling_layer=False)):
        assert_same(model.eval(), sparsify(model, kernel))


def test_a_dense_model_gets_a_warning(caplog):
    model = pruned_bert(density=1.0)
    assert_same(model, sparsify(model))
    assert "100% of the encoder's weights remain: sparse inference gains nothing" in caplog.text


def gpt(model):
    return transformers.GPT2Model(
        transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9)
    )


def decoder(model):
    model.config.is_decoder = True
    return model


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})


UNSUPPORTED = {
    "gpt2": (gpt, "knows bert, roberta, .*not GPT2Model"),
    "linear": (lambda model: torch.nn.Linear(2, 2), "not Linear"),
    "half": (lambda model: model.half(), r"float\(\)"),
    "twice": (lambda model: sparsify(model, "library"), "already sparse"),
    "decoder": (decoder, "is_decoder"),
    "quantised": (quantised, "quantisation"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_models(name):
    change, message = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=message):
        sparsify(change(pruned_bert()))


def test_invalid_arguments():
    model = pruned_bert()
    choices = "choose one of auto, native, library, compact"
    with pytest.raises(ValueError, match=f"unknown kernel 'fast': {choices}"):
        sparsify(model, "fast")
    with pytest.raises(ValueError, match=r"density in \[0, 1\]"):
        sparsify(model, csr_below=6)
    with pytest.raises(ValueError, match="training mode.*choose auto or compact"):
        sparsify(model.train(), "native")


def test_unsupported_calls():
    sparse = sparsify(pruned_bert(), "library")
    given = inputs(2, 6)
    causal = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="differs between queries"):
        sparse(given["input_ids"], attention_mask=causal)
    with pytest.raises(ValueError, match=r"batch x length \(2 x 6\)"):
        sparse(given["input_ids"], attention_mask=torch.zeros(2, 1, 6, 6))
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"last hidden states only.*{name}"):
            sparse(**given, **{name: True})
    sparse.bert.encoder.config.output_hidden_states = True
    with pytest.raises(ValueError, match="last hidden states only.*output_hidden_states"):
        sparse(**given)
    sparse.bert.encoder.config.output_hidden_states = False
    with pytest.raises(ValueError, match="cannot be trained"):
        sparse.train()(**given)
    with pytest.raises(ValueError, match="float32 on the CPU"):
        sparse.eval().double()(**given)


def test_traces_and_exports(kernel):
    sparse = sparsify(pruned_bert(), kernel)
    given = inputs(2, 6)
    traces = [
        lambda: torch.jit.trace(sparse, example_kwarg_inputs=dict(given), strict=False),
        lambda: torch.export.export(sparse, (), dict(given)).module(),
        lambda: torch.export.export(sparse, (), dict(given), strict=True).module(),
    ]
    sparse.config.return_dict = False
    for trace in traces:
        if kernel == "compact":  # plain Linears
            torch.testing.assert_close(trace()(**given)[0], sparse(**given)[0])
        else:
            with pytest.raises(Exception, match="traced or exported: take the bertarized model"):
                trace()


# ------------------------------------------------------------ packed files


@pytest.mark.parametrize("bits", [8, 32])
def test_packed_files(tiny_tokenizer, tmp_path, monkeypatch, bits):
    model = pruned_bert(density=0.1)
    tiny.save(model, tmp_path / "model", tiny_tokenizer)
    storage.pack(str(tmp_path / "model"), str(tmp_path / "packed"), bits)
    dense = storage.load_packed(str(tmp_path / "packed"))
    monkeypatch.setattr(csr_array, "toarray", lambda self: pytest.fail("a matrix was made dense"))
    sparse = storage.load_packed(str(tmp_path / "packed"), sparse=True)
    assert isinstance(encoder_of(sparse), encoder.SparseEncoder)
    assert sparse.config.num_hidden_layers == dense.config.num_hidden_layers == 2
    assert not sparse.training and sparse.bert.pooler is None
    assert_same(dense, sparse)
    if bits == 32:
        assert_same(model, sparse)
