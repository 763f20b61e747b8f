"""Cased and uncased: what the folder of a tokenizer says, what the flag says, what is saved."""

import json

import pytest
import torch
from tiny import SIZES, TOKENIZERS, VOCABULARY, edit, tokenizer_of
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

import bertarize
import masked_run_squad
from emmental.checkpoints.tokenizer import load_tokenizer, put_spaces_before_words
from emmental.packing.pack import pack, unpack
from emmental.system.errors import UserError

WORDS = [*VOCABULARY, "Ada", "cafe", "café"]


def fast(folder, lower):
    """The tokenizer of a folder with a vocab.txt."""
    return BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=lower)


def settings(**values):
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(values))


def file(lower, **values):
    """A tokenizer.json alone, or with a tokenizer_config.json of these values."""

    def write(folder):
        fast(folder, lower).backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").unlink()
        if values:
            settings(**values)(folder)

    return write


def generic(folder):
    """A tokenizer whose class does not know `do_lower_case`."""
    names = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    backend = fast(folder, False).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


FOLDERS = {  # name: (files, whether they declare lower-casing; None: they do not say)
    "vocab.txt": (lambda folder: None, None),
    "settings without a word": (settings(model_max_length=64), None),
    "settings of null": (settings(do_lower_case=None), None),
    "cased settings": (settings(do_lower_case=False), False),
    "uncased settings": (settings(do_lower_case=True), True),
    "cased file": (file(False), False),
    "uncased file": (file(True), True),
    "uncased file, settings without a word": (file(True, model_max_length=64), True),
    "uncased file, cased settings": (file(True, do_lower_case=False), False),
    "saved cased": (lambda folder: fast(folder, False).save_pretrained(folder), False),
    "saved uncased": (lambda folder: fast(folder, True).save_pretrained(folder), True),
    "another class": (generic, False),
}


@pytest.fixture
def model(tmp_path):
    """Write the folder of a BERT whose tokenizer's files are those of `FOLDERS`."""

    def write(name):
        torch.manual_seed(0)
        folder = tmp_path / "model"
        BertForQuestionAnswering(BertConfig(**SIZES)).save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(WORDS))
        FOLDERS[name][0](folder)
        return folder

    return write


@pytest.fixture
def run(flags, caplog):
    """Run the SQuAD script, and return what it says of the tokenizer."""

    def run_squad(model, *more, model_type="bert"):
        caplog.clear()
        words = flags(
            "out", f"--model_type {model_type} --overwrite_output_dir --warmup_steps 0", model=model
        )
        words.remove("--do_lower_case")
        masked_run_squad.main([*words, *more])
        said = [line for line in caplog.messages if line.startswith("tokenizer: ")]
        wins = [line for line in caplog.messages if "--do_lower_case wins" in line]
        assert len(said) == 1
        return said[0].removeprefix("tokenizer: "), len(wins)

    return run_squad


def is_uncased(tokenizer):
    tokens = tokenizer.tokenize("Ada café")
    assert tokens in (["ada", "cafe"], ["Ada", "café"])
    return tokens == ["ada", "cafe"]


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_folder_decides_and_then_the_flag(model, tmp_path, name, flag):
    tokenizer = load_tokenizer(str(model(name)), flag)
    assert is_uncased(tokenizer) == (flag or FOLDERS[name][1] is True)
    tokenizer.save_pretrained(tmp_path / "saved")  # as every run and conversion does
    assert is_uncased(load_tokenizer(str(tmp_path / "saved"))) == is_uncased(tokenizer)
    assert is_uncased(AutoTokenizer.from_pretrained(tmp_path / "saved")) == is_uncased(tokenizer)


@pytest.mark.parametrize("name", ["vocab.txt", "cased file", "uncased settings", "another class"])
def test_a_run_says_how_it_tokenises_and_who_wins(model, run, name):
    folder, declared = model(name), FOLDERS[name][1]
    assert run(folder, "--do_eval") == ("uncased" if declared else "cased", 0)
    assert run(folder, "--do_eval", "--do_lower_case") == ("uncased", declared is False)


@pytest.mark.parametrize("more", [[], ["--do_lower_case"]])
def test_what_is_made_of_a_run_tokenises_as_it_did(model, run, tmp_path, more):
    train = "--do_train --max_steps 1 --final_threshold 0.5".split()
    casing = run(model("vocab.txt"), *train, *more, model_type="masked_bert")[0]
    assert casing == ("uncased" if more else "cased")
    out = tmp_path / "out"
    assert run(out, "--do_eval", model_type="masked_bert") == (casing, 0)
    plain = bertarize.main(["--model_name_or_path", str(out)])
    pack(str(out), str(tmp_path / "packed"))
    unpack(str(tmp_path / "packed"), str(tmp_path / "unpacked"))
    for folder in (plain, tmp_path / "unpacked"):
        assert run(folder, "--do_eval") == (casing, 0)


@pytest.mark.parametrize("name, said", [("cased file", "is cased"), ("vocab.txt", "")])
def test_a_teacher_of_another_casing_is_warned_of(model, run, tmp_path, caplog, name, said):
    teach = ["--teacher_type", "bert", "--teacher_name_or_path", str(model(name))]
    run(tmp_path / "model", "--do_train", "--max_steps", "1", "--do_lower_case", *teach)
    warned = [line for line in caplog.messages if "unlike the tokenizer in use" in line]
    assert len(warned) == bool(said) and said in "".join(warned)


def test_a_vocabulary_without_a_model_type_is_of_bert(model, run, tmp_path):
    folder = model("vocab.txt")
    edit(folder / "config.json", "model_type")
    assert run(folder, "--do_eval", "--do_lower_case") == ("uncased", 0)
    tokens = load_tokenizer(str(folder), True)("Ada lives in Rome").tokens()
    assert tokens == ["[CLS]", "ada", "lives", "in", "rome", "[SEP]"]
    train = "--do_train --max_steps 1 --final_threshold 0.5".split()
    run(folder, *train, model_type="masked_bert")
    (folder / "config.json").unlink()  # a folder of a tokenizer alone
    assert load_tokenizer(str(folder)).cls_token == "[CLS]"
    (folder / "vocab.txt").unlink()
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(str(folder))


def never_behind_a_space(backend):
    """SentencePiece without a space before the text, as in Gemma's vocabulary (mmBERT)."""
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")


def bytes_of_pieces(backend):
    """Bytes of what an expression splits."""
    split = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]+|\s+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])


@pytest.mark.parametrize(
    "kind, change",
    [*((kind, None) for kind in TOKENIZERS), ("modernbert", bytes_of_pieces)]
    + [("xlm-roberta", never_behind_a_space)],
)
def test_words_are_what_they_are_in_a_text(tmp_path, kind, change):
    tokenizer = tokenizer_of(kind)
    if change:
        change(tokenizer.backend_tokenizer)
        names = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("pad", "unk")}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names)
    put_spaces_before_words(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    text = "ada lives in oslo's (rome) ."
    for one in tokenizer, AutoTokenizer.from_pretrained(tmp_path):
        words = one(text.split(), is_split_into_words=True)
        assert words.input_ids == one(text).input_ids
        assert one(["oslo"], is_split_into_words=True).input_ids == one("oslo").input_ids
        assert one.tokenize("ada lives")[-1].strip("Ġ▁") == "lives"


def test_a_vocabulary_of_bytes_without_a_tokenizer_json(tmp_path):
    RobertaConfig().save_pretrained(tmp_path)
    tokenizer, texts = tokenizer_of("roberta"), ("where does Ada live ?", "Ada  lives in oslo 😀")
    tokenizer.backend_tokenizer.model.save(str(tmp_path))  # vocab.json and merges.txt
    assert load_tokenizer(str(tmp_path))(*texts).input_ids == tokenizer(*texts).input_ids


@pytest.mark.parametrize("file", ["sentencepiece.bpe.model", "spiece.model", "spm.model"])
def test_says_what_reads_a_sentencepiece_model(tmp_path, monkeypatch, file):
    monkeypatch.setattr("emmental.checkpoints.tokenizer.is_sentencepiece_available", lambda: False)
    RobertaConfig(model_type="xlm-roberta").save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError, match=f"{file}, run `pip install sentencepiece protobuf`"):
        load_tokenizer(str(tmp_path))
    tokenizer_of("xlm-roberta").save_pretrained(tmp_path)  # its tokenizer.json wins
    assert load_tokenizer(str(tmp_path)).tokenize("ada lives") == ["▁ada", "▁lives"]
