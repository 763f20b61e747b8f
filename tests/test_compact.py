"""Compact models have the outputs of the masked models that they are made from."""

import numpy as np
import pytest
import tiny
import torch
import transformers
from tiny import SHORT
from torch import nn
from transformers import AutoModel, BertForQuestionAnswering

import bertarize
import counts_parameters
import emmental
import masked_run_squad
import saving_prunebert
from emmental import CompactBertConfig, CompactBertForQuestionAnswering, MaskedBertConfig
from emmental.checkpoints import onnx_file
from emmental.inference import compacted, sparsify
from emmental.models.families import HEADS, encoder_of
from emmental.modules.masks import masked_layers
from emmental.packing.pack import load_packed
from emmental.system.errors import TrainingError

QA = "QuestionAnswering"
CASES = {  # heads and neurons that are left in the three layers; 4 and 64 are all
    "heads": ([3, 1, 4], [64, 64, 64]),
    "no heads in a layer": ([4, 0, 2], [64, 64, 64]),
    "one neuron": ([4, 4, 4], [1, 64, 1]),
    "no neurons in a layer": ([4, 4, 4], [64, 0, 24]),
    "a layer gone": ([2, 0, 3], [40, 0, 17]),
    "layers gone": ([0, 0, 0], [0, 0, 0]),
    "nothing gone": ([4, 4, 4], [64, 64, 64]),
}


def structured(head, heads, neurons, density=0.7, seed=0):
    """A masked model with random masks in which so many heads and neurons are left."""
    torch.manual_seed(seed)
    config = MaskedBertConfig(
        **tiny.SIZES | {"num_hidden_layers": len(heads)},
        pruning_method="threshold",
        threshold=0.0,
        initializer_range=0.3,
    )
    model = getattr(emmental, f"MaskedBertFor{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        for layer in masked_layers(model).values():
            layer.mask_scores.copy_((torch.rand(layer.weight.shape) < density) * 2.0 - 1)
        for block, some, left in zip(encoder_of(model).layer, heads, neurons):
            rows = torch.isin(torch.arange(32) // 8, torch.randperm(4)[some:])
            dead = torch.isin(torch.arange(64), torch.randperm(64)[left:])
            attention = block.attention
            for linear in (attention.self.query, attention.self.key, attention.self.value):
                clear(linear, rows)
            clear(attention.output.dense, (slice(None), rows))
            clear(block.intermediate.dense, dead)
            clear(block.output.dense, (slice(None), dead))
    return model


def clear(linear, places):
    linear.mask_scores[places] = -1
    if linear.mask_scores.max() < 0:  # the floor of the masks would keep some weights
        linear.weight.zero_()


def convert(model, folder, *flags):
    """The folder that bertarize.py makes of a masked model."""
    model.save_pretrained(folder / "run")
    return bertarize.main(["--model_name_or_path", str(folder / "run"), *map(str, flags)])


def inputs(head=QA, batch=3, length=12):
    shape = (batch, 2, length) if head == "MultipleChoice" else (batch, length)
    ids, mask = torch.randint(5, 120, shape), torch.ones(shape, dtype=torch.long)
    mask[..., -1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def assert_same(model, other, head=QA, rtol=1e-4, atol=1e-5):
    for number in range(2):
        given = inputs(head, batch=3 + number, length=12 + number)
        ours, theirs = model(**given), other(**given)
        assert list(ours) == list(theirs)
        for name in ours:
            torch.testing.assert_close(theirs[name].float(), ours[name], rtol=rtol, atol=atol)


def rounded(sizes):
    """Neurons are kept in multiples of 8."""
    return [-(-size // 8) * 8 for size in sizes]


# ------------------------------------------------------------ the same outputs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head", HEADS)
def test_a_folder_has_the_outputs_of_the_masked_model(tmp_path, capsys, head, case):
    heads, neurons = CASES[case]
    masked = structured(head, heads, neurons)
    folder = convert(masked, tmp_path, "--compact")
    assert folder == tmp_path / "compact_run"
    auto_class = getattr(transformers, f"AutoModelFor{head}")
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == f"CompactBertFor{head}" and not model.training
    assert (model.config.layer_heads, model.config.layer_neurons) == (heads, rounded(neurons))
    assert_same(masked, model, head)
    printed = capsys.readouterr().out
    assert printed.count("of the attention: it becomes a bias") == heads.count(0)
    assert printed.count("of the feed-forward part: it becomes a bias") == neurons.count(0)
    assert ("nothing could be dropped" in printed) == (case == "nothing gone")
    before, after = (sum(p.numel() for p in part.parameters()) for part in (dense(model), model))
    assert f"parameters: {before:,} before, {after:,} after" in printed
    assert f"{heads[0]} of 4" in printed and f"{rounded(neurons)[2]} of 64" in printed


def dense(model):
    return tiny.plain_bert(type(model).__name__.partition("For")[2], num_hidden_layers=3)


@pytest.mark.parametrize("seed", range(12))
def test_random_structures(tmp_path, seed):
    rng = np.random.default_rng(seed)
    heads, neurons = rng.integers(0, 5, 3).tolist(), rng.integers(0, 65, 3).tolist()
    masked = structured(QA, heads, neurons, density=rng.random(), seed=seed)
    model = AutoModel.from_pretrained(convert(masked, tmp_path, "--compact"))
    assert type(model) is emmental.CompactBertModel
    assert all(left <= asked for left, asked in zip(model.config.layer_heads, heads))
    given = inputs()
    with torch.no_grad():
        wanted, found = masked.base_model(**given), model(**given)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    """A folder of a compact model, in which one layer has no heads and another no neurons."""
    return convert(structured(QA, [2, 0, 4], [9, 64, 0]), tmp_path, "--compact")


@pytest.fixture
def small(folder):
    return transformers.AutoModelForQuestionAnswering.from_pretrained(folder)


def test_round_trips(small, folder, tmp_path):
    small.save_pretrained(tmp_path / "again")
    again = CompactBertForQuestionAnswering.from_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert_same(small, again, rtol=0, atol=0)
    base = compacted(transformers.BertModel(transformers.BertConfig(**tiny.SIZES)).eval())
    base.save_pretrained(tmp_path / "base")
    assert_same(base, AutoModel.from_pretrained(tmp_path / "base"), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(small, folder, dtype):
    half = transformers.AutoModelForQuestionAnswering.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert_same(small, half, rtol=0.1, atol=0.1)
    assert_same(small, compacted(small).to(dtype), rtol=0.1, atol=0.1)


def test_torch_compile(small):
    assert_same(small, torch.compile(small, backend="eager", fullgraph=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(small, folder):
    given = {name: tensor.cuda() for name, tensor in inputs().items()}
    wanted = small(**{name: tensor.cpu() for name, tensor in given.items()}).start_logits
    half = CompactBertForQuestionAnswering.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    for model in (half, torch.compile(half)):
        found = model(**given).start_logits.float().cpu()
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
    torch.testing.assert_close(
        small.cuda()(**given).start_logits.cpu(), wanted, rtol=1e-3, atol=1e-3
    )


def test_attentions_and_hidden_states(small):
    small.set_attn_implementation("eager")
    outputs = small(**inputs(), output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, n, 12, 12) for n in (2, 0, 4)]
    assert len(outputs.hidden_states) == 4


def test_a_new_compact_model_is_initialised():
    sizes = {"layer_heads": [0, 1], "layer_head_sizes": [0, 8], "layer_neurons": [0, 8]}
    torch.manual_seed(0)
    model = CompactBertForQuestionAnswering(CompactBertConfig(**tiny.SIZES, **sizes))
    first, second = model.bert.encoder.layer
    assert not first.attention.output.dense.bias.any() and not first.output.dense.bias.any()
    assert second.intermediate.dense.weight.shape == (8, 32)
    assert 0.01 < second.intermediate.dense.weight.std() < 0.03
    assert not second.attention.self.query.bias.any()


def test_training(small):
    small.train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    given = inputs() | {"start_positions": torch.tensor([1, 2, 3])}
    given["end_positions"] = given["start_positions"]
    small.gradient_checkpointing_enable()
    losses = []
    for _ in range(8):
        loss = small(**given).loss
        loss.backward()
        assert all(p.grad is not None for p in small.bert.encoder.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ------------------------------------------------------------ other forms, scripts


@pytest.mark.parametrize("kernel", ["native", "library", "compact"])
def test_sparsify(small, kernel):
    assert_same(small, sparsify(small, kernel))


def test_a_second_compaction_changes_nothing(small):
    again = compacted(small)
    assert again.config.layer_heads == small.config.layer_heads
    assert again.config.layer_neurons == small.config.layer_neurons
    assert_same(small, again)


def test_packed_files(small, folder, tmp_path, capsys):
    file = str(tmp_path / "file.packed")
    assert saving_prunebert.main(["pack", str(folder), file, "--bits", "32"]) == 0
    assert saving_prunebert.main(["verify", file, str(folder)]) == 0
    capsys.readouterr()
    assert saving_prunebert.main(["info", file]) == 0
    assert f'emmental.storage.load_packed("{file}")' in capsys.readouterr().out
    assert saving_prunebert.main(["unpack", file, str(tmp_path / "unpacked")]) == 0
    for model in (
        load_packed(file),
        load_packed(file, sparse=True),
        transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "unpacked"),
    ):
        assert_same(small, model)


def test_the_card(folder):
    text = (folder / "README.md").read_text()
    assert "6 heads and 80 neurons" in text and "`run`" in text
    code = (
        text.split("```python\n")[1].split("\n```")[0].replace('"compact_run"', repr(str(folder)))
    )
    space = {}
    exec(code, space)
    assert type(space["model"]) is CompactBertForQuestionAnswering
    weights = [m.weight for m in encoder_of(space["model"]).modules() if isinstance(m, nn.Linear)]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    assert f"{100 * kept / (3 * (4 * 32 * 32 + 2 * 32 * 64)):.1f}% of the weights" in text


@pytest.fixture
def with_tokenizer(folder, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(folder)
    return folder


def squad(squad_dir, out, *flags):
    data = ["--data_dir", squad_dir, "--cache_dir", f"{out}.cache", "--output_dir", out]
    return masked_run_squad.main(
        [*map(str, data), *SHORT, "--do_eval", "--do_lower_case", *map(str, flags)]
    )


def test_the_scripts_evaluate_fine_tune_and_learn_from_a_compact_model(
    with_tokenizer, squad_dir, tmp_path, tiny_bert
):
    model = ["--model_type", "bert", "--model_name_or_path", with_tokenizer]
    found = squad(squad_dir, tmp_path / "eval", *model)
    sparse = squad(squad_dir, tmp_path / "sparse", *model, "--sparse_inference")
    assert sparse["f1"] == found["f1"]
    teacher = ["--teacher_type", "bert", "--teacher_name_or_path", with_tokenizer]
    squad(squad_dir, tmp_path / "tuned", *model, *teacher, "--do_train", "--max_steps", "2")
    tuned = CompactBertForQuestionAnswering.from_pretrained(tmp_path / "tuned")
    assert tuned.config.layer_heads == [2, 0, 4]
    assert "trust_remote_code=True" in (tmp_path / "tuned" / "README.md").read_text()


def test_what_cannot_be(with_tokenizer, refused, tmp_path, squad_dir):
    words = tiny.command(tmp_path, with_tokenizer, squad_dir, "out", "--do_train")
    said = refused(masked_run_squad.main, words)
    assert "is a compact model, without masks: give the type bert" in said
    said = refused(counts_parameters.main, ["--serialization_dir", str(with_tokenizer)])
    assert "is a compact model, without masks: give the fine-pruned checkpoint" in said
    assert "the type" not in said
    words = ["--compact", "--model_name_or_path", str(with_tokenizer)]
    said = refused(bertarize.main, [*words, "--threshold", "0.1"])
    assert "has no masks: leave out --threshold" in said
    absent = str(tmp_path / "absent")
    for flags in [], ["--compact"], ["--onnx", str(tmp_path / "x.onnx")]:
        said = refused(bertarize.main, ["--model_name_or_path", absent, *flags])
        assert "absent is not a folder: give one of a fine-pruned checkpoint" in said
    pack = ["pack", str(with_tokenizer), str(tmp_path / "file"), "--global_topk"]
    assert "has no masks: leave out --global_topk" in refused(saving_prunebert.main, pack)
    wrong = "must give a number from 0 to"
    for name, value, problem in (
        ("layer_heads", [2, 0], f"layer_heads {wrong}"),
        ("layer_neurons", [16, 65, 0], f"layer_neurons {wrong}"),
        ("layer_heads", [1, 0, 4], "does not fit its configuration"),
    ):
        before = tiny.read(with_tokenizer / "config.json")
        tiny.edit(with_tokenizer / "config.json", **{name: value})
        assert problem in refused(bertarize.main, words)
        tiny.edit(with_tokenizer / "config.json", **before)


def test_other_models_have_no_compact_form():
    with pytest.raises(ValueError, match="BertForMaskedLM .bert. has no compact form"):
        compacted(transformers.BertForMaskedLM(transformers.BertConfig(**tiny.SIZES)))


# ------------------------------------------------------------ ONNX


@pytest.mark.parametrize(
    "head, flags", [(QA, ["--compact"]), ("MultipleChoice", ["--compact"]), (QA, [])]
)
def test_onnx(tmp_path, capsys, head, flags):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    masked, file = structured(head, [2, 0, 4], [9, 64, 0]), tmp_path / "model.onnx"
    convert(masked, tmp_path, *flags, "--onnx", file)
    assert str(file) in capsys.readouterr().out
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (2, 33), (5, 64)):
        given = inputs(head, batch, length)
        given["token_type_ids"] = (torch.rand(given["input_ids"].shape) < 0.5).long()
        with torch.no_grad():
            wanted = masked(**given)
        values = {name: tensor.numpy() for name, tensor in given.items()}
        for found, (name, logits) in zip(session.run(list(wanted), values), wanted.items()):
            np.testing.assert_allclose(found, logits.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_onnx_messages(tmp_path, refused, monkeypatch):
    masked, file = structured(QA, [4], [64]), tmp_path / "model.onnx"
    masked.save_pretrained(tmp_path / "run")
    flags = ["--model_name_or_path", str(tmp_path / "run"), "--onnx"]
    assert "is a folder" in refused(bertarize.main, [*flags, str(tmp_path)])
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None)
    message = refused(bertarize.main, [*flags, str(file)])
    assert "needs onnx, onnxruntime, onnxscript: run pip install onnx==" in message
    assert not (tmp_path / "bertarized_run").exists()  # asked for before any work
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: True)

    def fail(*args, **kwargs):
        raise RuntimeError("this operator is unknown\nand so on")

    monkeypatch.setattr(torch.onnx, "export", fail)
    message = refused(bertarize.main, [*flags, str(file)], status=1)
    assert f"cannot write {file}: this operator is unknown" in message and not file.exists()
    assert (tmp_path / "bertarized_run" / "model.safetensors").exists()


def test_an_onnx_file_with_other_outputs_is_not_kept(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = BertForQuestionAnswering(transformers.BertConfig(**tiny.SIZES)).eval()
    export = onnx_file._export

    def export_other(model, path):
        export(model, path)
        with torch.no_grad():
            model.qa_outputs.bias.add_(0.1)

    monkeypatch.setattr(onnx_file, "_export", export_other)
    with pytest.raises(TrainingError, match="start_logits of ONNX Runtime differs from torch"):
        onnx_file.write_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
