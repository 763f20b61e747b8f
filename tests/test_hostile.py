"""Malicious or damaged files: a script works or ends in one line, and never executes their code."""

import json
import os
import pickle
import shutil
import struct

import pytest
import tiny
import torch
from test_storage import rewritten
from tiny import edit, read, rewrite

import bertarize
import counts_parameters
import masked_run_glue
import masked_run_squad
import saving_prunebert
from emmental.packing.format import open_packed
from emmental.packing.pack import pack

TRAIN = "--do_train --final_threshold 0.3 --max_steps 4 --warmup_steps 1 --save_steps 2"
TRAIN += " --logging_steps 2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bert, squad_dir):
    folder = tmp_path_factory.mktemp("trained")
    masked_run_squad.main(tiny.command(folder, tiny_bert, squad_dir, "out", TRAIN))
    return folder / "out"


@pytest.fixture
def out(trained, tmp_path):
    """A finished run with the checkpoints 2 and 4, and no checksums that alone would do."""
    for checkpoint in shutil.copytree(trained, tmp_path / "out").glob("checkpoint-*"):
        (checkpoint / "files.json").rename(checkpoint.parent / f"files of {checkpoint.name}")
    return tmp_path / "out"


@pytest.fixture
def model(tmp_path, tiny_tokenizer):
    """A masked checkpoint, fit for evaluation, counting, bertarizing and packing."""
    return tiny.save(tiny.make(suffix=tiny.QA, threshold=0.3), tmp_path / "model", tiny_tokenizer)


@pytest.fixture
def readers(run, tmp_path):
    """What reads a checkpoint: evaluating, counting, converting and packing."""

    def make(folder):
        file = str(tmp_path / "packed")
        return {
            "evaluate": lambda: run("out", "--do_eval --overwrite_output_dir", model=folder),
            "count": lambda: counts_parameters.main(["--serialization_dir", str(folder)]),
            "convert": lambda: bertarize.main(["--model_name_or_path", str(folder)]),
            "pack": lambda: saving_prunebert.main(["pack", str(folder), file]),
        }

    return make


# --- pickles ---


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_the_payload_is_one(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "owned"))).close()
    assert (tmp_path / "owned").exists()


def torch_pickle(payload, path):
    name = "bert.embeddings.word_embeddings.weight"
    torch.save({name: payload, "x": torch.zeros(10**6)}, path)


def old_torch_pickle(payload, path):
    torch.save([payload, torch.zeros(10**6)], path, _use_new_zipfile_serialization=False)


def plain_pickle(payload, path):
    path.write_bytes(pickle.dumps([payload, bytes(10**6)]))


PLACES = """pytorch_model.bin model.safetensors training_state.pt training_args.bin optimizer.pt
    scheduler.pt rng_state.pth tokenizer.json vocab.txt training_args.json config.json files.json"""


@pytest.mark.parametrize("form", [torch_pickle, old_torch_pickle, plain_pickle])
@pytest.mark.parametrize("place", PLACES.split())
def test_a_pickle_in_a_checkpoint_is_never_executed(
    run, out, readers, tmp_path, capsys, form, place
):
    """Whatever reads a checkpoint: resuming, and the readers."""
    folder = out / "checkpoint-2"
    hides = {"pytorch_model.bin": "model.safetensors", "vocab.txt": "tokenizer.json"}
    if place in hides:
        (folder / hides[place]).unlink()
    form(Payload(tmp_path / "owned"), folder / place)
    resume = lambda: run("out", TRAIN, f"--resume_from_checkpoint {folder}")  # noqa: E731
    for act in (resume, *readers(folder).values()):
        try:
            act()
        except SystemExit as stop:
            assert stop.code in (1, 2)
            assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_code_of_a_tokenizer_is_never_fetched(run, model, tmp_path, monkeypatch):
    """transformers would ask at the keyboard whether to run the code of a checkpoint."""
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil"] * 2}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    try:
        run("out", "--do_eval", model=model)
    except SystemExit as stop:
        assert stop.code == 2
    assert not (tmp_path / "owned").exists()


# --- weights and settings ---


def lie(tensor=None, **changes):
    """A safetensors file whose header says something else than what was written."""

    def damage(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        if tensor:
            changes["data_offsets"] = header[tensor]["data_offsets"]
        header[WORDS] |= changes
        raw = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])

    return damage


def settings(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


def content(name, value, instead_of=None):
    """Other bytes in a file, which may take the place of another file."""

    def damage(folder):
        if instead_of:
            (folder / instead_of).unlink()
        (folder / name).write_bytes(value)

    return damage


NEST = b"[" * 200_000
WORDS = "bert.embeddings.word_embeddings.weight"
WEIGHTS = "model.safetensors"
BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}
DAMAGES = {
    "safetensors: header beyond the file": content(
        WEIGHTS, struct.pack("<Q", 2**62) + bytes(2**20)
    ),
    "safetensors: shape beyond its data": lie(shape=[10**9, 32]),
    "safetensors: shape that overflows": lie(shape=[2**62, 2**62]),
    "safetensors: negative shape": lie(shape=[-120, 32]),
    "safetensors: shapes of another model": lambda folder: rewrite(
        folder, lambda tensors: tensors | {WORDS: torch.zeros(7, 5)}
    ),
    "safetensors: offsets outside": lie(data_offsets=[0, 2**60]),
    "safetensors: overlapping": lie("qa_outputs.bias"),
    "safetensors: unknown type": lie(dtype="F1024"),
    "safetensors: header nested deep": content(
        WEIGHTS, struct.pack("<Q", len(NEST)) + NEST + bytes(2**20)
    ),
    "index: no index": content("model.safetensors.index.json", NEST, instead_of=WEIGHTS),
    "torch: no archive": content("pytorch_model.bin", b"PK\3\4" + bytes(2**20), WEIGHTS),
    "config: nested deep": content("config.json", NEST),
    "config: a list": content("config.json", b"[1]"),
    "config: not UTF-8": content("config.json", b'{"model_type": "\xff"}'),
    "config: words for numbers": settings(hidden_size="wide"),
    "config: null": settings(intermediate_size=None),
    "config: negative": settings(num_hidden_layers=-1),
    "config: no heads": settings(num_attention_heads=0),
    "config: heads that do not divide": settings(num_attention_heads=5),
    "config: unknown activation": settings(hidden_act="__import__('os').getpid()"),
    "config: unknown method": settings(pruning_method="topKK"),
    "config: threshold of text": settings(threshold="much"),
    "config: threshold above all": settings(threshold=3),
    "config: quantised by something": settings(quantization_config=BITS),
    "config: architectures of text": settings(architectures="BertForQuestionAnswering"),
    "config: labels of text": settings(num_labels="x", id2label=None),
    "config: architectures of numbers": settings(architectures=[1]),
    "config: id2label of nonsense": settings(id2label=[1, 2]),
    "tokenizer: nested deep": content("tokenizer.json", NEST),
    "tokenizer: empty": content("tokenizer.json", b""),
    "tokenizer: settings of a list": content("tokenizer_config.json", b"[]"),
}
BLIND = {  # what a reader does not look at
    "evaluate": "config: architectures",
    "count": ("tokenizer", "config: id2label"),
    "convert": "tokenizer",
    "pack": "nothing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_end_in_one_line(readers, refused, model, tmp_path, damage):
    DAMAGES[damage](model)
    for name, reader in readers(model).items():
        if not damage.startswith(BLIND[name]):
            assert str(model) in refused(reader), name
    assert not (tmp_path / "packed").exists()


def test_a_state_of_other_weights(run, refused, out):
    file = out / "checkpoint-2" / "training_state.pt"
    for change in (
        lambda state, moments: moments.update(exp_avg=torch.zeros(3)),
        lambda state, _: state["optimizer"].update(state={}, param_groups=[]),
        lambda state, _: state.update(mask_generator=torch.zeros(3, dtype=torch.uint8)),
        lambda state, _: state.update(step="many"),
        lambda state, _: state.pop("cutoff"),
    ):
        state = torch.load(out / "checkpoint-4" / file.name, weights_only=True)
        change(state, state["optimizer"]["state"][min(state["optimizer"]["state"])])
        torch.save(state, file)
        resume = f"--resume_from_checkpoint {file.parent}"
        assert "is damaged" in refused(run, "out", TRAIN, resume)


def test_settings_of_the_optimiser_come_from_the_arguments(run, out, trained):
    file = out / "checkpoint-2" / "training_state.pt"
    state = torch.load(file, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group |= {"peak_lr": 1e3, "betas": "x", "weight_decay": [], "maximize": True}
    torch.save(state, file)
    assert tiny.same(run("out", TRAIN, f"--resume_from_checkpoint {file.parent}"), trained)


def test_what_is_no_weight_file_is_left_alone(run, model):
    (model / "extra.bin").symlink_to("nowhere")
    (model / "pytorch_model.bin").symlink_to("nowhere")
    (model / "docs.index.json").write_text("[]")
    (model / "folder.bin").mkdir()
    os.mkfifo(model / "pipe.bin")
    run("out", "--do_eval", model=model)


def test_names_in_the_list_of_files_stay_in_the_folder(run, refused, out, tmp_path):
    folder = out / "checkpoint-4"
    listed = read(out / "files of checkpoint-4")
    (tmp_path / "secret").write_text("mine")
    os.mkfifo(folder / "pipe")  # which nobody writes to: opening it would wait for ever
    for name, size in ("../secret", 4), (str(tmp_path / "secret"), 4), ("pipe", 0):
        entry = {name: {"bytes": size, "sha256": "0"}}
        (folder / "files.json").write_text(json.dumps(listed | entry))
        said = refused(run, "out", TRAIN, f"--resume_from_checkpoint {folder}")
        assert f"{name} is missing" in said


# --- packed files ---


def change_tensor(**changes):
    return lambda header: header["tensors"][0].update(changes)


def change_file(name):
    return lambda header: header["files"][0].update(name=name)


LIES = {
    "a shape beyond every memory": change_tensor(shape=[10**7, 10**7]),
    "a negative shape": change_tensor(shape=[-120, 32]),
    "a shape of text": change_tensor(shape="wide"),
    "negative lengths": change_tensor(bytes=-4),
    "an absurd vocabulary": lambda header: header["config"].update(vocab_size=10**12),
    "a class that is none": lambda header: header.update(architecture="os"),
    "a file that climbs out": change_file("../../evil.json"),
    "an absolute file": change_file("/tmp/evil.json"),
    "a file that is no tokenizer's": change_file("pytorch_model.bin"),
    "a config of nonsense": lambda header: header.update(config={"hidden_size": "wide"}),
    "no tensors": lambda header: header.update(tensors=[]),
}


@pytest.mark.parametrize("change", LIES)
def test_packed_files_that_lie_are_refused(model, refused, tmp_path, change):
    file = tmp_path / "model.packed"
    pack(str(model), str(file))
    open_packed(str(file))
    file = rewritten(file, tmp_path / "lying.packed", LIES[change])
    for verb in (["info", file], ["unpack", file, tmp_path / "unpacked"], ["verify", file, model]):
        assert str(file) in refused(saving_prunebert.main, list(map(str, verb)))
    assert not (tmp_path / "unpacked").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.packed", "lying.packed"}
    assert not (tmp_path.parent / "evil.json").exists()


# --- data ---


def squad_file(context="ada lives in oslo .", text="oslo", start=13, **qa):
    answers = [{"text": text, "answer_start": start}]
    qa = {"id": "a", "question": "where does ada live ?", "answers": answers} | qa
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": [qa]}]}]}


PLAIN = json.dumps(squad_file()).encode()
HUGE = b'{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "a", "question": "b", '
HUGE += b'"answers": [{"text": "a", "answer_start": 1e400}]}]}]}]}'
UNUSABLE = "no training question is usable"
WORKS = None
SQUAD = {  # name: (a document or raw bytes, what the line says)
    "empty": (b"", "JSON"),
    "a list": (b"[]", "data"),
    "no questions": ({"data": []}, "no question"),
    "no paragraphs": ({"data": [{"title": "t"}]}, "paragraphs"),
    "no context": ({"data": [{"title": "t", "paragraphs": [{"qas": []}]}]}, "context"),
    "a title of a megabyte": (
        {"data": [{"title": "t" * 10**6, "paragraphs": 3}]}, '"paragraphs" must be a list'
    ),
    "an id of a megabyte, twice": (
        {"data": squad_file(id="i" * 10**6)["data"] * 2}, "already belongs to"
    ),
    "nested deep": (b'{"data": ' + NEST, "not JSON"),
    "nested deep, elsewhere": (b'{"x": ' + b'{"a":' * len(NEST), "not JSON"),
    "nested deep, and whole": (
        b'{"data": [{"paragraphs": ' + NEST + b"]" * len(NEST) + b"}]}", "not JSON"
    ),
    "nothing but blanks": (b" \n" * 10**6, "not JSON"),
    "something after the end": (PLAIN + b" {}", "is not JSON in UTF-8"),
    "cut off": (PLAIN[:-9], "not JSON"),
    "UTF-16": (PLAIN.decode().encode("utf-16"), "not JSON in UTF-8"),
    "Latin-1": (b'{"data": "\xe9"}', "not JSON in UTF-8"),
    "NULs": (b"\0" * 1000, "not JSON"),
    "half a surrogate pair": (squad_file("ada \ud83d"), "half a surrogate pair"),
    "numbers for text": (squad_file(question=12), "must be a string"),
    "a start of 1e400": (HUGE, UNUSABLE),
    "a start beyond 64 bits": (squad_file(start=2**70), UNUSABLE),
    "a negative start": (squad_file(start=-1), UNUSABLE),
    "NaN": (b'{"data": NaN}', "must be a list"),
    "an empty answer": (squad_file(text="", start=3), UNUSABLE),
    "a blank answer": (squad_file(text="  ", start=3), UNUSABLE),
    "an empty context": (squad_file(""), UNUSABLE),
    "an empty question": (squad_file(question=""), WORKS),
    "a byte order mark": (b"\xef\xbb\xbf" + PLAIN, WORKS),
    "beyond the BMP": (squad_file("\U0001f600 oslo \U0001d4d0", start=2), WORKS),
    "right to left": (squad_file("\u202e\u05e9\u05dc\u05d5\u05dd oslo \u202c", start=6), WORKS),
    "zero-width characters": (squad_file("ada\u200b \u200d\ufeff oslo", start=8), WORKS),
    "nothing but zero-width": (squad_file("\u200b\u200d", "\u200d", 1), WORKS),
    "combining marks": (squad_file("o\u0301\u0302slo oslo", start=7), WORKS),
    "NULs in a text": (squad_file("ada \0 oslo \0", start=6), WORKS),
    "lone carriage returns in a text": (squad_file("ada\rin\roslo", start=7), WORKS),
    "a word of a megabyte": (squad_file("x" * 10**6 + " oslo", start=10**6 + 1), WORKS),
}  # fmt: skip


@pytest.mark.parametrize("case", SQUAD)
def test_hostile_squad_files(run, refused, tmp_path, case):
    document, said = SQUAD[case]
    path, trained = tiny.write(tmp_path / "train.json", document), tmp_path / "out"
    flags = TRAIN, f"--train_file {path}"
    if said is WORKS:
        run("out", *flags)
        evaluate = f"--do_eval --predict_file {path}"
        predictions = read(run("again", evaluate, model=trained) / "predictions_.json")
        document = document if isinstance(document, dict) else squad_file()
        assert predictions["a"] in document["data"][0]["paragraphs"][0]["context"]
    else:
        more = f"--evaluate_during_training --predict_file {path}"
        message = refused(run, "out", *flags, more)
        assert said in message and (said is UNUSABLE or "train.json" in message)
    assert (trained / "model.safetensors").exists() == (said is WORKS)


PLACED = ["oslo", "rome", "lima"] * 4
ROWS = "".join(f"ada lives in {place} .\t{n % 2}\n" for n, place in enumerate(PLACED))
HEADER = b"sentence\tlabel\n"
TSV = {  # name: (bytes of train.tsv, what the line says)
    "NULs": (HEADER + b"ada\0 lives\t0\nben\t1\n", WORKS),
    "nothing but NULs": (b"\0" * 4096, "no column sentence"),
    "lone carriage returns as line ends": (
        HEADER.replace(b"\n", b"\r") + ROWS.replace("\n", "\r").encode(),
        "its lines end in CR alone",
    ),
    "lone carriage returns in a text": (HEADER + b"ada\rlives\t0\nben\t1\n", WORKS),
    "a carriage return more": (HEADER + b"ada\r\t0\r\nben\t1\r\n", WORKS),
    "UTF-16": (("sentence\tlabel\n" + ROWS).encode("utf-16"), "is not UTF-8"),
    "Latin-1": (HEADER + b"sm\xf8rrebr\xf8d\t0\n", "train.tsv:2: is not UTF-8"),
    "a byte order mark": (b"\xef\xbb\xbf" + HEADER + ROWS.encode(), WORKS),
    "a label of a megabyte": (HEADER + b"a\t" + b"9" * 10**6 + b"\n", "is not one of"),
    "a million columns": (b"sentence\tlabel" + b"\tx" * 10**6 + b"\n", "holds no examples"),
    "separators of other alphabets": (
        HEADER + "ada\u2028lives\x0bin\x1coslo\t0\nben\t1\n".encode(),
        WORKS,
    ),
    "too few fields": (HEADER + b"ada\n", "train.tsv:2: has 1 fields"),
    "nothing": (b"", "is empty"),
    "half a character at the end": (HEADER + b"ada\t0\nben\xe2\x82", "train.tsv:3: is not UTF-8"),
    "beyond the BMP, right to left, zero-width": (
        HEADER + "\U0001f600 \u202e\u05e9\u200b\t0\nben\t1\n".encode(),
        WORKS,
    ),
}


@pytest.mark.parametrize("case", TSV)
def test_hostile_tsv_files(refused, tmp_path, tiny_bert, case):
    content, said = TSV[case]
    (tmp_path / "train.tsv").write_bytes(content)
    words = tiny.command(tmp_path, tiny_bert, tmp_path, "out", TRAIN, "--task_name sst-2")
    for name in ("--max_query_length", "--doc_stride"):  # SQuAD's
        del words[words.index(name) : words.index(name) + 2]
    if said is WORKS:
        masked_run_glue.main(words)
    else:
        assert said in refused(masked_run_glue.main, words)
    assert (tmp_path / "out" / "model.safetensors").exists() == (said is WORKS)


def test_a_model_of_numbers_that_are_none_is_not_evaluated(
    run, refused, tmp_path, model, tiny_tokenizer
):
    rewrite(model, lambda x: x | {"qa_outputs.weight": x["qa_outputs.weight"] * torch.nan})
    assert "are not finite" in refused(run, "out", "--do_eval", model=model)
    plain = tiny.plain_bert()
    plain.bert.encoder.layer[0].output.dense.weight.data[0, 0] = torch.inf
    folder = tiny.save(plain, tmp_path / "plain", tiny_tokenizer)
    words = ["pack", str(folder), str(tmp_path / "packed")]
    assert "cannot be packed" in refused(saving_prunebert.main, words)
