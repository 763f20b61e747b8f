"""Malicious or damaged files: a script works or ends in one line, and never executes their code."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_storage import rewritten
from tiny import SHORT
from transformers import BertConfig, BertForQuestionAnswering

import bertarize
import counts_parameters
import masked_run_glue
import masked_run_squad
import saving_prunebert
from emmental import MaskedBertConfig, MaskedBertForQuestionAnswering
from emmental.storage import open_packed, pack

TRAIN = [
    *"--do_train --final_threshold 0.3 --max_steps 4 --warmup_steps 1".split(),
    *"--save_steps 2 --logging_steps 2".split(),
]


@pytest.fixture
def run(tmp_path, tiny_bert, squad_dir):
    def run_squad(*flags, model=tiny_bert):
        masked_run_squad.main(
            [
                "--model_type",
                "masked_bert",
                "--model_name_or_path",
                str(model),
                "--data_dir",
                str(squad_dir),
                "--do_lower_case",
                "--output_dir",
                str(tmp_path / "out"),
                "--cache_dir",
                str(tmp_path / "cache"),
                *SHORT,
                *map(str, flags),
            ]
        )
        return tmp_path / "out"

    return run_squad


@pytest.fixture
def refused(capsys):
    """Call, expect one line and a non-zero exit, and return the line."""

    def call(function, *args, status=2, **kwargs):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args, **kwargs)
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert stop.value.code == status and len(lines) == 1 and len(lines[0]) < 600, lines
        return lines[0]

    return call


@pytest.fixture
def model(tmp_path, tiny_config, tiny_tokenizer):
    """A masked checkpoint, fit for evaluation, counting, bertarizing and packing."""
    torch.manual_seed(0)
    config = MaskedBertConfig(**tiny_config, threshold=0.3, mask_init="uniform", mask_scale=1.0)
    MaskedBertForQuestionAnswering(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


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


PICKLED = {
    "torch": lambda payload, path: torch.save(
        {"bert.embeddings.word_embeddings.weight": payload, "x": torch.zeros(10**6)}, path
    ),
    "old torch": lambda payload, path: torch.save(
        [payload, torch.zeros(10**6)], path, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda payload, path: path.write_bytes(pickle.dumps([payload, bytes(10**6)])),
}
PLACES = [
    *"pytorch_model.bin model.safetensors training_state.pt training_args.bin".split(),
    *"optimizer.pt scheduler.pt".split(),
    *"rng_state.pth tokenizer.json vocab.txt training_args.json config.json files.json".split(),
]


@pytest.mark.parametrize("form", PICKLED)
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_in_a_checkpoint_is_never_executed(run, tmp_path, capsys, form, place):
    """Whatever reads a checkpoint: resuming, evaluating, counting, converting, packing."""
    out = run(*TRAIN)
    folder = out / "checkpoint-2"
    if place == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    if place == "vocab.txt":
        (folder / "tokenizer.json").unlink()
    if place != "files.json":
        (folder / "files.json").unlink()  # else the checksum alone would do
    PICKLED[form](Payload(tmp_path / "owned"), folder / place)
    for act in (
        lambda: run(*TRAIN, "--resume_from_checkpoint", folder),
        lambda: run("--do_eval", "--overwrite_output_dir", model=folder),
        lambda: counts_parameters.main(["--serialization_dir", str(folder)]),
        lambda: bertarize.main(["--model_name_or_path", str(folder)]),
        lambda: saving_prunebert.main(["pack", str(folder), str(tmp_path / "packed")]),
    ):
        try:
            act()
        except SystemExit as stop:
            assert stop.code in (1, 2)
            assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_code_of_a_tokenizer_is_never_fetched(run, model, tmp_path, monkeypatch):
    """transformers would ask at the keyboard whether to run the code of a checkpoint."""
    settings = {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    try:
        run("--do_eval", model=model)
    except SystemExit as stop:
        assert stop.code == 2
    assert not (tmp_path / "owned").exists()


# --- weights and settings ---


def lie(change):
    """A safetensors file whose header says something else than what was written."""

    def damage(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        change(header)
        raw = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])

    return damage


def settings(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def shape_of(tensor, *shape):
    return lie(lambda header: header[tensor].update(shape=list(shape)))


NEST = 200_000
WORDS = "bert.embeddings.word_embeddings.weight"
DAMAGES = {
    "safetensors: header longer than the file": lambda f: (f / "model.safetensors").write_bytes(
        struct.pack("<Q", 2**62) + bytes(2**20)
    ),
    "safetensors: shape beyond its data": (shape_of(WORDS, 10**9, 32)),
    "safetensors: shape that overflows": (shape_of(WORDS, 2**62, 2**62)),
    "safetensors: negative shape": (shape_of(WORDS, -120, 32)),
    "safetensors: shapes of another model": lambda f: save_file(
        load_file(f / "model.safetensors") | {WORDS: torch.zeros(7, 5)},
        f / "model.safetensors",
        {"format": "pt"},
    ),
    "safetensors: offsets outside": lie(lambda h: h[WORDS].update(data_offsets=[0, 2**60])),
    "safetensors: overlapping": lie(
        lambda h: h[WORDS].update(data_offsets=h["qa_outputs.bias"]["data_offsets"])
    ),
    "safetensors: unknown type": lie(lambda h: h[WORDS].update(dtype="F1024")),
    "safetensors: header nested deep": lambda f: (f / "model.safetensors").write_bytes(
        struct.pack("<Q", NEST) + b"[" * NEST + bytes(2**20)
    ),
    "index: no index": lambda f: [
        text("model.safetensors.index.json", "[" * NEST)(f),
        (f / "model.safetensors").unlink(),
    ],
    "torch: no archive at all": lambda f: [
        (f / "model.safetensors").unlink(),
        (f / "pytorch_model.bin").write_bytes(b"PK\3\4" + bytes(2**20)),
    ],
    "config: nested deep": text("config.json", "[" * NEST),
    "config: a list": text("config.json", "[1]"),
    "config: not UTF-8": lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xff"}'),
    "config: words for numbers": settings(hidden_size="wide"),
    "config: null": settings(intermediate_size=None),
    "config: negative": settings(num_hidden_layers=-1),
    "config: no heads": settings(num_attention_heads=0),
    "config: heads that do not divide": settings(num_attention_heads=5),
    "config: unknown activation": settings(hidden_act="__import__('os').getpid()"),
    "config: unknown method": settings(pruning_method="topKK"),
    "config: threshold of text": settings(threshold="much"),
    "config: threshold above all": settings(threshold=3),
    "config: quantised by something": settings(
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    ),
    "config: architectures of text": settings(architectures="BertForQuestionAnswering"),
    "config: labels of text": settings(num_labels="x", id2label=None),
    "config: architectures of numbers": settings(architectures=[1]),
    "config: id2label of nonsense": settings(id2label=[1, 2]),
    "tokenizer: nested deep": text("tokenizer.json", "[" * NEST),
    "tokenizer: empty": text("tokenizer.json", ""),
    "tokenizer: settings of a list": text("tokenizer_config.json", "[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_end_in_one_line(run, refused, model, tmp_path, damage):
    DAMAGES[damage](model)
    readers = {
        "evaluate": lambda: run("--do_eval", model=model),
        "count": lambda: counts_parameters.main(["--serialization_dir", str(model)]),
        "convert": lambda: bertarize.main(["--model_name_or_path", str(model)]),
        "pack": lambda: saving_prunebert.main(["pack", str(model), str(tmp_path / "packed")]),
    }
    blind = {  # what a reader does not look at
        "evaluate": "config: architectures",
        "count": ("tokenizer", "config: id2label"),
        "convert": "tokenizer",
        "pack": "",
    }
    for name, read in readers.items():
        if not damage.startswith(blind[name] or "none"):
            assert str(model) in refused(read), name
    assert not (tmp_path / "packed").exists()


def test_a_state_of_other_weights(run, refused):
    out = run(*TRAIN)
    folder = out / "checkpoint-2"
    (folder / "files.json").unlink()
    resume = [*TRAIN, "--resume_from_checkpoint", folder]
    state = torch.load(folder / "training_state.pt", weights_only=True)
    first = min(state["optimizer"]["state"])
    moments = state["optimizer"]["state"][first]
    for change in (
        lambda: moments.update(exp_avg=torch.zeros(3)),
        lambda: state["optimizer"].update(state={}, param_groups=[]),
        lambda: state.update(mask_generator=torch.zeros(3, dtype=torch.uint8)),
        lambda: state.update(step="many"),
        lambda: state.pop("cutoff"),
    ):
        change()
        torch.save(state, folder / "training_state.pt")
        assert "is damaged" in refused(run, *resume)
        state = torch.load(out / "checkpoint-4" / "training_state.pt", weights_only=True)
        moments = state["optimizer"]["state"][first]


def test_settings_of_the_optimiser_come_from_the_arguments(run):
    out = run(*TRAIN)
    whole = (out / "model.safetensors").read_bytes()
    folder = out / "checkpoint-2"
    (folder / "files.json").unlink()
    state = torch.load(folder / "training_state.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group |= {"peak_lr": 1e3, "betas": "x", "weight_decay": [], "maximize": True}
    torch.save(state, folder / "training_state.pt")
    run(*TRAIN, "--resume_from_checkpoint", folder)
    assert (out / "model.safetensors").read_bytes() == whole


def test_what_is_no_weight_file_is_left_alone(run, model):
    (model / "extra.bin").symlink_to("nowhere")
    (model / "pytorch_model.bin").symlink_to("nowhere")
    (model / "docs.index.json").write_text("[]")
    (model / "folder.bin").mkdir()
    os.mkfifo(model / "pipe.bin")
    run("--do_eval", model=model)


def test_names_in_the_list_of_files_stay_in_the_folder(run, refused, tmp_path):
    folder = run(*TRAIN) / "checkpoint-4"
    listed = json.loads((folder / "files.json").read_text())
    for name in ("../secret", str(tmp_path / "secret")):
        (tmp_path / "secret").write_text("mine")
        (folder / "files.json").write_text(json.dumps(listed | {name: {"bytes": 4, "sha256": "0"}}))
        assert "is missing" in refused(run, *TRAIN, "--resume_from_checkpoint", folder)
    os.mkfifo(folder / "pipe")  # which nobody writes to: opening it would wait for ever
    (folder / "files.json").write_text(json.dumps(listed | {"pipe": {"bytes": 0, "sha256": "0"}}))
    assert "pipe is missing" in refused(run, *TRAIN, "--resume_from_checkpoint", folder)


# --- packed files ---


def change_tensor(**changes):
    return lambda header: header["tensors"][0].update(changes)


LIES = {
    "a shape beyond every memory": change_tensor(shape=[10**7, 10**7]),
    "a negative shape": change_tensor(shape=[-120, 32]),
    "a shape of text": change_tensor(shape="wide"),
    "negative lengths": change_tensor(bytes=-4),
    "an absurd vocabulary": lambda h: h["config"].update(vocab_size=10**12),
    "a class that is none": lambda h: h.update(architecture="os"),
    "a file that climbs out": lambda h: h["files"][0].update(name="../../evil.json"),
    "an absolute file": lambda h: h["files"][0].update(name="/tmp/evil.json"),
    "a file that is no tokenizer's": lambda h: h["files"][0].update(name="pytorch_model.bin"),
    "a config of nonsense": lambda h: h.update(config={"hidden_size": "wide"}),
    "no tensors": lambda h: h.update(tensors=[]),
}  # fmt: skip


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


def squad_file(context="ada lives in oslo .", question="where does ada live ?", **qa):
    qa = {"id": "a", "question": question, "answers": [{"text": "oslo", "answer_start": 13}]} | qa
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": [qa]}]}]}


def answer(text, start):
    return {"answers": [{"text": text, "answer_start": start}]}


SQUAD = {  # name: (a document or raw bytes, what the line says; None: it works)
    "a title of a megabyte, and an error": (
        lambda: {"data": [{"title": "t" * 10**6, "paragraphs": 3}]},
        '"paragraphs" must be a list',
    ),
    "an id of a megabyte, twice": (
        lambda: {"data": squad_file(id="i" * 10**6)["data"] * 2},
        "already belongs to",
    ),
    "nested deep": (lambda: b'{"data": ' + b"[" * NEST, "not JSON"),
    "nested deep, elsewhere": (lambda: b'{"x": ' + b'{"a":' * NEST, "not JSON"),
    "nested deep, and whole": (
        lambda: b'{"data": [{"paragraphs": ' + b"[" * NEST + b"]" * NEST + b"}]}",
        "not JSON",
    ),
    "nothing but blanks": (lambda: b" \n" * 10**6, "not JSON"),
    "something after the end": (
        lambda: json.dumps(squad_file()).encode() + b" {}",
        "is not JSON in UTF-8",
    ),
    "cut off": (lambda: json.dumps(squad_file()).encode()[:-9], "not JSON"),
    "UTF-16": (lambda: json.dumps(squad_file()).encode("utf-16"), "not JSON in UTF-8"),
    "Latin-1": (lambda: b'{"data": "\xe9"}', "not JSON in UTF-8"),
    "NULs": (lambda: b"\0" * 1000, "not JSON"),
    "half a surrogate pair": (lambda: squad_file(context="ada \ud83d"), "half a surrogate pair"),
    "numbers for text": (lambda: squad_file(question=12), "must be a string"),
    "a start of 1e400": (
        lambda: (
            b'{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "a", "question": "b", '
            b'"answers": [{"text": "a", "answer_start": 1e400}]}]}]}]}'
        ),
        "no training question is usable",
    ),
    "a start beyond 64 bits": (
        lambda: squad_file(**answer("oslo", 2**70)),
        "no training question is usable",
    ),
    "a negative start": (
        lambda: squad_file(**answer("oslo", -1)),
        "no training question is usable",
    ),
    "NaN": (lambda: b'{"data": NaN}', "must be a list"),
    "an empty answer": (lambda: squad_file(**answer("", 3)), "no training question is usable"),
    "a blank answer": (lambda: squad_file(**answer("  ", 3)), "no training question is usable"),
    "an empty context": (lambda: squad_file(context=""), "no training question is usable"),
    "an empty question": (lambda: squad_file(question=""), None),
    "a byte order mark": (lambda: b"\xef\xbb\xbf" + json.dumps(squad_file()).encode(), None),
    "beyond the BMP": (lambda: squad_file("\U0001f600 oslo \U0001d4d0", **answer("oslo", 2)), None),
    "from right to left": (
        lambda: squad_file("\u202e\u05e9\u05dc\u05d5\u05dd oslo \u202c", **answer("oslo", 6)),
        None,
    ),
    "zero-width characters": (
        lambda: squad_file("ada\u200b \u200d\ufeff oslo", **answer("oslo", 8)),
        None,
    ),
    "nothing but zero-width characters": (
        lambda: squad_file("\u200b\u200d", **answer("\u200d", 1)),
        None,
    ),
    "combining marks": (lambda: squad_file("o\u0301\u0302slo oslo", **answer("oslo", 7)), None),
    "NULs in a text": (lambda: squad_file("ada \0 oslo \0", **answer("oslo", 6)), None),
    "lone carriage returns in a text": (
        lambda: squad_file("ada\rin\roslo", **answer("oslo", 7)),
        None,
    ),
    "a word of a megabyte": (
        lambda: squad_file("x" * 10**6 + " oslo", **answer("oslo", 10**6 + 1)),
        None,
    ),
}


@pytest.mark.parametrize("case", SQUAD)
def test_hostile_squad_files(run, refused, tmp_path, case):
    make, said = SQUAD[case]
    content = make()
    path = tmp_path / "train.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    flags = [*TRAIN, "--train_file", path]
    if said is None:
        run(*flags)
        assert (tmp_path / "out" / "model.safetensors").exists()
        predicted = run(
            "--do_eval", "--predict_file", path, "--overwrite_output_dir", model=tmp_path / "out"
        )
        predictions = json.loads((predicted / "predictions_.json").read_text())
        context = (
            content["data"][0]["paragraphs"][0]["context"]
            if isinstance(content, dict)
            else "ada lives in oslo ."
        )
        assert predictions["a"] in context
    else:
        assert said in refused(run, *flags, "--evaluate_during_training", "--predict_file", path)
        assert not (tmp_path / "out" / "model.safetensors").exists()


ROWS = "".join(
    f"ada lives in {place} .\t{number % 2}\n"
    for number, place in enumerate(["oslo", "rome", "lima"] * 4)
)
TSV = {  # name: (bytes of train.tsv, what the line says; None: it works)
    "NULs": (b"sentence\tlabel\nada\0 lives\t0\nben\t1\n", None),
    "nothing but NULs": (b"\0" * 4096, "no column sentence"),
    "lone carriage returns as line ends": (
        ("sentence\tlabel\n" + ROWS).replace("\n", "\r").encode(),
        "its lines end in CR alone",
    ),
    "lone carriage returns in a text": (b"sentence\tlabel\nada\rlives\t0\nben\t1\n", None),
    "a carriage return more": (b"sentence\tlabel\nada\r\t0\r\nben\t1\r\n", None),
    "UTF-16": (("sentence\tlabel\n" + ROWS).encode("utf-16"), "is not UTF-8"),
    "Latin-1": (b"sentence\tlabel\nsm\xf8rrebr\xf8d\t0\n", "train.tsv:2: is not UTF-8"),
    "a byte order mark": (b"\xef\xbb\xbf" + ("sentence\tlabel\n" + ROWS).encode(), None),
    "a label of a megabyte": (b"sentence\tlabel\na\t" + b"9" * 10**6 + b"\n", "is not one of"),
    "a million columns": (b"sentence\tlabel" + b"\tx" * 10**6 + b"\n", "holds no examples"),
    "separators of other alphabets": (
        "sentence\tlabel\nada\u2028lives\x0bin\x1coslo\t0\nben\t1\n".encode(),
        None,
    ),
    "too few fields": (b"sentence\tlabel\nada\n", "train.tsv:2: has 1 fields"),
    "nothing": (b"", "is empty"),
    "half a character at the end": (
        b"sentence\tlabel\nada\t0\nben\xe2\x82",
        "train.tsv:3: is not UTF-8",
    ),
    "beyond the BMP, right to left, zero-width": (
        "sentence\tlabel\n\U0001f600 \u202e\u05e9\u200b\t0\nben\t1\n".encode(),
        None,
    ),
}


@pytest.mark.parametrize("case", TSV)
def test_hostile_tsv_files(refused, tmp_path, tiny_bert, case):
    content, said = TSV[case]
    (tmp_path / "train.tsv").write_bytes(content)
    flags = [
        "--model_type",
        "masked_bert",
        "--model_name_or_path",
        str(tiny_bert),
        "--data_dir",
        str(tmp_path),
        "--task_name",
        "sst-2",
        "--output_dir",
        str(tmp_path / "out"),
        "--cache_dir",
        str(tmp_path / "cache"),
        "--max_seq_length",
        "48",
        *TRAIN,
    ]
    if said is None:
        masked_run_glue.main(flags)
        assert (tmp_path / "out" / "model.safetensors").exists()
    else:
        assert said in refused(masked_run_glue.main, flags)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))


def test_a_model_of_numbers_that_are_none_is_not_evaluated(
    run, refused, tmp_path, model, tiny_config, tiny_tokenizer
):
    tensors = load_file(model / "model.safetensors")
    tensors["qa_outputs.weight"] *= torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert "are not finite" in refused(run, "--do_eval", model=model)
    plain = BertForQuestionAnswering(BertConfig(**tiny_config))
    plain.bert.encoder.layer[0].output.dense.weight.data[0, 0] = torch.inf
    plain.save_pretrained(tmp_path / "plain")
    tiny_tokenizer.save_pretrained(tmp_path / "plain")
    assert "cannot be packed" in refused(
        saving_prunebert.main, ["pack", str(tmp_path / "plain"), str(tmp_path / "packed")]
    )
