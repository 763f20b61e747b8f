"""Packed files: round trips, the command line, and errors."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig

import bertarize
import emmental
import saving_prunebert
from emmental import storage
from emmental.models.families import HEADS
from emmental.modules import find_masks, masked_layers
from emmental.modules.methods import METHODS
from emmental.packing.format import write_packed
from emmental.system import files
from emmental.system.errors import UserError

ROOT = Path(__file__).parent.parent
THRESHOLDS = {"threshold": 2.0, "sigmoied_threshold": 0.9}  # else 0.2


def save_masked(folder, tokenizer, method="topK", head="QuestionAnswering", base=None, **settings):
    settings |= {"mask_scale": 4.0, "threshold": THRESHOLDS.get(method, 0.2)}
    model = tiny.make(method, f"For{head}", seed=3, **settings)
    if base is not None:
        model.bert.embeddings.load_state_dict(base.bert.embeddings.state_dict())
    tiny.save(model, folder, tokenizer)
    return model


def prunebert(*words):
    return saving_prunebert.main([str(word) for word in words])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("masked")
    save_masked(folder, tiny_tokenizer)
    return folder


def outputs(model):
    ids = torch.arange(5, 25)[None]
    if "MultipleChoice" in type(model).__name__:
        ids = ids[None].expand(1, 2, -1)
    with torch.no_grad():
        return torch.cat([t.reshape(-1).float() for t in model(input_ids=ids).to_tuple()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
def test_32_bits_are_exact(tmp_path, tiny_tokenizer, method, head):
    masked = save_masked(tmp_path / "in", tiny_tokenizer, method, head)
    storage.pack(str(tmp_path / "in"), str(tmp_path / "file"), 32)
    model = storage.load_packed(str(tmp_path / "file"))
    assert type(model) is getattr(transformers, f"BertFor{head}") and not model.training
    assert torch.equal(outputs(model), outputs(masked))
    masks = find_masks(masked).by_layer
    for name, layer in masked_layers(masked).items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, (layer.weight * masks[name]).detach() + 0.0)
        assert 0 < weight.count_nonzero() < layer.weight.numel()


@pytest.mark.parametrize("bits", [2, 4, 6, 8, 16])
def test_masks_are_exact_at_any_precision(tmp_path, checkpoint, bits):
    storage.pack(str(checkpoint), str(tmp_path / "file"), bits)
    assert storage.compare(str(tmp_path / "file"), str(checkpoint)) == []
    exact = storage.load_plain(str(checkpoint)).state_dict()
    state = storage.load_packed(str(tmp_path / "file")).state_dict()
    for name, tensor in exact.items():
        if tensor.dim() == 2:
            assert torch.equal(state[name] != 0, tensor != 0), name
    error = sum((state[n] - t).square().sum() for n, t in exact.items())
    error /= sum(t.square().sum() for t in exact.values())
    assert error < {2: 0.2, 4: 0.02, 6: 2e-3, 8: 1e-4, 16: 1e-6}[bits]


def test_bertarized_and_masked_checkpoints_pack_alike(tmp_path, checkpoint):
    plain = bertarize.main(
        ["--model_name_or_path", str(checkpoint), "--target_model_path", str(tmp_path / "plain")]
    )
    a = storage.pack(str(checkpoint), str(tmp_path / "a"))
    b = storage.pack(str(plain), str(tmp_path / "b"))
    assert a.header["tensors"] == b.header["tensors"]


def test_compare_finds_differences(tmp_path, checkpoint):
    storage.pack(str(checkpoint), str(tmp_path / "file"))
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    model = emmental.MaskedBertForQuestionAnswering.from_pretrained(other)
    with torch.no_grad():
        layer = masked_layers(model)["bert.encoder.layer.0.attention.self.query"]
        layer.mask_scores[:] = layer.mask_scores.flip(0)
        model.qa_outputs.weight[0, 0] += 0.5
    model.save_pretrained(other)
    problems = storage.compare(str(tmp_path / "file"), str(other))
    assert len(problems) == 2
    assert "query.weight has another mask" in problems[0]
    assert "qa_outputs.weight exceeds the error bound" in problems[1]
    assert saving_prunebert.main(["verify", str(tmp_path / "file"), str(other)]) == 1


def test_unpack_writes_a_normal_folder(tmp_path, checkpoint, capsys):
    file, folder = str(tmp_path / "file"), tmp_path / "sub" / "folder"
    assert saving_prunebert.main(["pack", str(checkpoint), file]) == 0
    assert saving_prunebert.main(["unpack", file, str(folder)]) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == set(
        "README.md config.json model.safetensors tokenizer.json tokenizer_config.json".split()
    )
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    assert type(model).__name__ == "BertForQuestionAnswering"
    packed = storage.load_packed(file).state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, packed[name])
    ours, theirs = map(AutoTokenizer.from_pretrained, (folder, checkpoint))
    assert ours.get_vocab() == theirs.get_vocab()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "bert" and "pruning_method" not in config


def test_info_adds_up(tmp_path, checkpoint, capsys):
    file = str(tmp_path / "file")
    saving_prunebert.main(["pack", str(checkpoint), file, "--bits", "6"])
    saving_prunebert.main(["info", file, "--json", str(tmp_path / "info.json")])
    said = capsys.readouterr().out
    assert "bert.encoder.layer.0.attention.self.query.weight" in said
    assert "19.92%" in said  # int(0.2 * 1024) of 1024
    assert "independently" in said  # what a file smaller than the entropy beside it makes use of
    assert "entropy" in said and "packing saves nothing" not in said
    found = json.loads((tmp_path / "info.json").read_text())
    totals = found["totals"]
    body, embeddings = totals["encoder and head"], totals["embeddings"]
    model = storage.load_packed(file)
    assert totals["file"]["packed"] == (tmp_path / "file").stat().st_size
    assert sum(row["bytes"] for row in found["rows"]) == embeddings["packed"] + body["packed"]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embedded = sum(size for name, size in sizes.items() if ".embeddings." in name)
    assert embeddings["dense"] == 4 * embedded
    assert embeddings["dense"] + body["dense"] == 4 * sum(sizes.values())
    assert body["entropy"] < body["dense"]


# --- base models ---


@pytest.fixture()
def based(tmp_path, tiny_bert, tiny_tokenizer):
    base = AutoModelForQuestionAnswering.from_pretrained(tiny_bert)
    save_masked(tmp_path / "based", tiny_tokenizer, base=base)
    return tmp_path / "based"


def test_embeddings_of_a_base_model_are_left_out(tmp_path, based, tiny_bert):
    file = tmp_path / "file"
    whole = storage.pack(str(based), str(tmp_path / "whole"))
    packed = storage.pack(str(based), str(file), base_model=str(tiny_bert))
    assert not any("embeddings" in entry["name"] for entry in packed.header["tensors"])
    assert file.stat().st_size < whole.path.stat().st_size
    state = storage.load_packed(str(file)).state_dict()
    for name, tensor in load_file(tiny_bert / "model.safetensors").items():
        if name.startswith("bert.embeddings."):
            assert torch.equal(state[name], tensor)
    assert storage.compare(str(file), str(based)) == []


def test_a_base_model_may_move(tmp_path, based, tiny_bert):
    shutil.copytree(tiny_bert, tmp_path / "base")
    storage.pack(str(based), str(tmp_path / "file"), base_model=str(tmp_path / "base"))
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(UserError, match="base"):
        storage.load_packed(str(tmp_path / "file"))
    assert storage.load_packed(str(tmp_path / "file"), str(tmp_path / "moved"))


def test_base_models_that_do_not_match_are_refused(tmp_path, checkpoint, based, tiny_bert):
    with pytest.raises(UserError, match="not those of"):
        storage.pack(str(checkpoint), str(tmp_path / "file"), base_model=str(tiny_bert))
    assert not (tmp_path / "file").exists()
    storage.pack(str(based), str(tmp_path / "file"), base_model=str(tiny_bert))
    with pytest.raises(UserError, match="was packed without"):
        storage.load_packed(str(tmp_path / "file"), str(checkpoint))


# --- errors ---


@pytest.fixture(scope="module")
def packed(tmp_path_factory, checkpoint):
    file = tmp_path_factory.mktemp("packed") / "file"
    storage.pack(str(checkpoint), str(file))
    return file


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_files_are_refused(tmp_path, packed, refused, share):
    content = packed.read_bytes()
    (tmp_path / "cut").write_bytes(content[: int(share * len(content))])
    said = refused(prunebert, "unpack", tmp_path / "cut", tmp_path / "out")
    assert "truncated" in said or "not a packed model" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_every_flipped_bit_is_found(tmp_path, packed):
    content = packed.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*range(40), *rng.integers(0, len(content), 60).tolist(), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "flipped").write_bytes(damaged)
        with pytest.raises(UserError):
            storage.load_packed(str(tmp_path / "flipped"))
            for _ in storage.open_packed(str(tmp_path / "flipped")).streams("files"):
                pass


def test_extra_bytes_at_the_end_are_refused(tmp_path, packed, refused):
    (tmp_path / "long").write_bytes(packed.read_bytes() + b"x")
    assert "damaged" in refused(prunebert, "info", tmp_path / "long")


def test_newer_versions_are_refused(tmp_path, packed, refused):
    content = bytearray(packed.read_bytes())
    content[8] = 2
    (tmp_path / "newer").write_bytes(content)
    assert "version 2" in refused(prunebert, "info", tmp_path / "newer")


def rewritten(packed, target, change):
    """A file with a changed header and correct checksums."""
    opened = storage.open_packed(str(packed))
    header = json.loads(json.dumps(opened.header))
    change(header)
    write_packed(target, header, [packed.read_bytes()[opened.start :]])
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(architecture="os.system"),
        lambda header: header.update(bits=9),
        lambda header: header.pop("tensors"),
        lambda header: header["config"].update(hidden_size=10**9),
        lambda header: header["config"].update(vocab_size="many"),
        lambda header: header["tensors"].pop(),
        lambda header: header["tensors"][0].update(shape=[10**6, 10**6]),
        lambda header: header["tensors"][0].update(bytes=-4),
        lambda header: header["files"][0].update(name="../outside"),
    ],
    ids=range(9),
)
def test_forged_headers_are_refused(tmp_path, packed, refused, change):
    file = rewritten(packed, tmp_path / "forged", change)
    refused(prunebert, "unpack", file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["forged"]


def test_wrong_paths_are_refused(tmp_path, packed, checkpoint, refused):
    target, nothing, blocked = tmp_path / "file", tmp_path / "nothing", tmp_path / "no"
    blocked.write_text("")
    for words, status, said in (
        (["info", checkpoint / "config.json"], 2, "not a packed model"),
        (["info", nothing], 2, "cannot read"),
        (["pack", nothing, target], 2, "no usable checkpoint"),
        (["pack", checkpoint, tmp_path], 2, "is a folder"),
        (["pack", checkpoint, blocked / "file"], 1, "cannot write"),
        (["unpack", packed, checkpoint], 2, "already"),
        (["pack", checkpoint, target, "--bits", "9"], 2, "--bits"),
    ):
        assert said in refused(prunebert, *words, status=status)
    assert list(tmp_path.iterdir()) == [blocked]


def test_another_head_or_size_is_refused(tmp_path, packed, tiny_tokenizer, refused):
    save_masked(tmp_path / "other", tiny_tokenizer, head="TokenClassification")
    said = refused(prunebert, "verify", packed, tmp_path / "other")
    assert "BertForQuestionAnswering" in said and "BertForTokenClassification" in said
    tiny.save(tiny.plain_bert(head=""), tmp_path / "headless", tiny_tokenizer)
    assert "head" in refused(prunebert, "pack", tmp_path / "headless", tmp_path / "file")
    save_masked(tmp_path / "smaller", tiny_tokenizer, num_hidden_layers=1)
    assert "different sizes" in refused(prunebert, "verify", packed, tmp_path / "smaller")


def test_a_model_without_a_tokenizer_packs_without(tmp_path, checkpoint, refused, caplog):
    bare, file = tmp_path / "bare", str(tmp_path / "file")
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))
    saving_prunebert.main(["pack", str(bare), file])
    assert f"{bare} has no tokenizer: none is written" in caplog.messages
    assert storage.open_packed(file).header["files"] == []
    plain = storage.load_plain(str(bare)).state_dict()
    assert storage.load_packed(file).state_dict().keys() == plain.keys()
    saving_prunebert.main(["info", file])
    assert saving_prunebert.main(["verify", file, str(bare)]) == 0
    saving_prunebert.main(["unpack", file, str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    assert "has no tokenizer" in refused(prunebert, "verify", file, bare, "--data_dir", tmp_path)


@pytest.mark.parametrize("act", ["pack", "bertarize"])
def test_a_damaged_tokenizer_is_not_taken_for_none(tmp_path, checkpoint, capsys, act):
    shutil.copytree(checkpoint, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        if act == "pack":
            saving_prunebert.main(["pack", str(tmp_path / "damaged"), str(tmp_path / "file")])
        else:
            bertarize.main(["--model_name_or_path", str(tmp_path / "damaged")])
    assert str(tmp_path / "damaged") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_models_without_a_head_of_a_task_are_refused(tmp_path, refused, name):
    getattr(transformers, name)(BertConfig(**tiny.SIZES)).save_pretrained(tmp_path / "model")
    said = refused(prunebert, "pack", tmp_path / "model", tmp_path / "file")
    assert name in said and all(head in said for head in HEADS)


def test_weights_that_are_not_finite_are_refused(tmp_path, checkpoint, refused):
    shutil.copytree(checkpoint, tmp_path / "nan")
    model = emmental.MaskedBertForQuestionAnswering.from_pretrained(tmp_path / "nan")
    with torch.no_grad():
        model.qa_outputs.bias[0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    assert "qa_outputs.bias" in refused(prunebert, "pack", tmp_path / "nan", tmp_path / "file")


def test_a_dense_model_packs_and_gains_nothing(tmp_path, tiny_bert, capsys):
    saving_prunebert.main(["pack", str(tiny_bert), str(tmp_path / "file")])
    saving_prunebert.main(["info", str(tmp_path / "file")])
    assert "packing saves nothing" in capsys.readouterr().out
    assert saving_prunebert.main(["verify", str(tmp_path / "file"), str(tiny_bert)]) == 0


def test_an_old_file_survives_a_failed_pack(tmp_path, packed, checkpoint, monkeypatch, refused):
    shutil.copy(packed, tmp_path / "file")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    said = refused(prunebert, "pack", checkpoint, tmp_path / "file", "--bits", "4", status=1)
    assert "No space left" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == packed.read_bytes()


def test_verify_evaluates_as_the_run_did(tmp_path, tiny_bert, refused, capsys):
    for split in ("train", "dev"):
        rows = "".join(f"ada lives in {x} .\t{x}\n" for x in ("oslo", "rome") * 3)
        (tmp_path / f"{split}.tsv").write_text("review\tstars\n" + rows)
    run, file = str(tmp_path / "run"), str(tmp_path / "file")
    data = ["--data_dir", str(tmp_path)]
    flags = f"--task_name custom --text_column review --label_column stars --output_dir {run} "
    flags += f"--model_name_or_path {tiny_bert} --model_type masked --do_train --do_eval "
    flags += f"--cache_dir {tmp_path} --max_seq_length 64 --max_steps 3 --warmup_steps 0"
    results = importlib.import_module("masked_run_glue").main([*flags.split(), *data])
    saving_prunebert.main(["pack", run, file, "--bits", "32"])
    capsys.readouterr()
    assert saving_prunebert.main(["verify", file, run, *data]) == 0
    expected = f"{results['acc']:.4g}"
    assert f"acc: {expected} checkpoint, {expected} packed" in capsys.readouterr().out
    for damaged in ("{", "[1]"):
        (tmp_path / "run" / "training_args.json").write_text(damaged)
        assert "training_args.json is damaged" in refused(prunebert, "verify", file, run, *data)


def test_verify_evaluates_both(tmp_path, tiny_tokenizer, squad_dir, capsys):
    save_masked(tmp_path / "in", tiny_tokenizer)
    saving_prunebert.main(["pack", str(tmp_path / "in"), str(tmp_path / "file"), "--bits", "32"])
    capsys.readouterr()
    command = ["verify", str(tmp_path / "file"), str(tmp_path / "in")]
    command += ["--data_dir", str(squad_dir), "--max_seq_length", "64"]
    assert saving_prunebert.main(command) == 0
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert set(said) == {"exact", "f1"}
    for name in ("exact", "f1"):
        before, after = said[name].split(", ")
        assert before.split()[0] == after.split()[0]


TAGGED, ASKED = {"max_seq_length": 64, "tag_file": "x"}, "is a classifier of an unknown task"


@pytest.mark.parametrize("head, trained, flags, said", [
    ("SequenceClassification", None, "", f"{ASKED}: give its --task_name"),
    ("SequenceClassification", None, "--task_name sst-2", "must hold exactly one file dev.tsv"),
    ("SequenceClassification", TAGGED, "", None),
    ("SequenceClassification", TAGGED | {"task_name": "stance"}, "", None),
    ("TokenClassification", TAGGED, "", None),
    ("TokenClassification", None, "", None),
    ("QuestionAnswering", TAGGED, "", None),
    ("QuestionAnswering", None, "", "dev-v1.1.json"),
])  # fmt: skip
def test_verify_knows_the_task_by_the_head(
    tmp_path, tiny_tokenizer, refused, capsys, head, trained, flags, said
):
    """None: a task of one's own script, whose metrics are not compared."""
    folder, file = tmp_path / "plain", tmp_path / "file"
    tiny.save(tiny.plain_bert(head), folder, tiny_tokenizer)
    if trained:
        tiny.write(folder / "training_args.json", trained)
    storage.pack(str(folder), str(file))
    words = "verify", file, folder, "--data_dir", tmp_path, *flags.split()
    capsys.readouterr()
    if said:
        assert said in refused(prunebert, *words)
    else:
        assert prunebert(*words) == 0
        printed = capsys.readouterr().out
        assert "all masks are equal" in printed and "metrics are not compared" in printed


def test_a_failed_evaluation_is_reported_in_one_line(packed, checkpoint, refused):
    said = refused(prunebert, "verify", packed, checkpoint, "--data_dir", "nowhere")
    assert "nowhere" in said


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads((ROOT / "Saving_PruneBERT.ipynb").read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), "Saving_PruneBERT.ipynb", "exec"), names)
    assert names["differences"] == []
    dense = 4 * sum(p.numel() for p in names["model"].parameters())
    assert (tmp_path / "prunebert.packed").stat().st_size < 1e6 < dense
    assert (tmp_path / "prunebert.png").stat().st_size > 5000
    assert len(names["rows"]) == 24
