"""A cut vocabulary: the same pieces and outputs on its corpus, under ids that fit everywhere."""

import json

import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import bertarize
from emmental.checkpoints.corpus import batches_of, corpus_files
from emmental.checkpoints.loading import load_plain
from emmental.checkpoints.tokenizer import load_tokenizer
from emmental.checkpoints.vocabulary import cut_vocabulary
from emmental.packing.pack import load_packed, pack, unpack

TEXTS = ["ada lives in oslo .", "Where does ben live?", "ben is who, in oslo", "ߐ ada漢x no"]
OTHER = ["kyoto and delhi , the", "gus lives in cairo"]
KINDS = {case: kind for case, (kind, _) in tiny.CASES.items() if "," not in case}


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    return file


def saved(folder, case, prefix="", tokenizer=None, **settings):
    """The folder of a model with its tokenizer; it has three rows that no piece needs."""
    tokenizer = tokenizer or tiny.tokenizer_of(KINDS[case])
    model = tiny.model_of(case, prefix=prefix, vocab_size=len(tokenizer) + 3, **settings)
    return tiny.save(model, folder, tokenizer)


def convert(folder, corpus, *more):
    words = ["--model_name_or_path", folder, "--keep_vocabulary_of", corpus, *more]
    return bertarize.main([str(word) for word in words])


@torch.no_grad()
def outputs(model, tokenizer, texts=TEXTS):
    inputs = tokenizer(texts, texts[::-1], padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in inputs if name != "token_type_ids"}
    return torch.stack(model(**inputs)[:2])


def same_pieces(whole, cut, texts):
    return [whole.tokenize(text) for text in texts] == [cut.tokenize(text) for text in texts]


@pytest.mark.parametrize("case", KINDS)
def test_pieces_and_outputs_stay_on_the_corpus(tmp_path, corpus, capsys, case):
    folder = saved(tmp_path / "whole", case)
    target = convert(folder, corpus)
    one, two = load_plain(str(folder)), load_plain(str(target))
    whole, cut = load_tokenizer(str(folder)), load_tokenizer(str(target))
    rows = [model.config.vocab_size for model in (one, two)]
    said = f"{rows[1]:,} of {rows[0]:,} pieces remain, {rows[0] - rows[1]:,} went"
    assert said in capsys.readouterr().out
    assert rows[0] == len(whole) + 3 and rows[1] == len(cut) < len(whole)
    assert rows[1] == len(two.get_input_embeddings().weight)
    words = [word for text in TEXTS for word in text.split()]
    assert same_pieces(whole, cut, [*TEXTS, *words, *(f" {word}" for word in words)])
    assert torch.equal(outputs(one, whole), outputs(two, cut))
    for text in OTHER:  # in smaller pieces
        ids = [tokenizer(text)["input_ids"] for tokenizer in (whole, cut)]
        assert whole.decode(ids[0]) == cut.decode(ids[1]) and len(ids[0]) < len(ids[1])
    loaded = transformers.AutoTokenizer.from_pretrained(target)
    assert loaded(TEXTS)["input_ids"] == cut(TEXTS)["input_ids"]


@pytest.mark.parametrize("case", ["bert", "roberta", "xlm-roberta"])
def test_compact_packed_and_onnx_models_take_a_cut_vocabulary(tmp_path, corpus, case):
    masks = {"pruning_method": "magnitude", "threshold": 0.3}
    folder = saved(tmp_path / "whole", case, "masked_", **masks, num_hidden_layers=1)
    file = tmp_path / "model.onnx"
    more = ["--onnx", file, "--int8"] if case == "roberta" else []
    target = convert(folder, corpus, "--compact", *more)
    assert not more or file.with_name("model_int8.onnx").exists()
    whole, cut = (load_tokenizer(str(path)) for path in (folder, target))
    wanted = outputs(load_plain(str(folder)), whole)
    torch.testing.assert_close(outputs(load_plain(str(target)), cut), wanted)
    pack(str(target), str(tmp_path / "packed"), bits=32)
    torch.testing.assert_close(outputs(load_packed(str(tmp_path / "packed")), cut), wanted)
    unpack(str(tmp_path / "packed"), str(tmp_path / "unpacked"))
    assert load_tokenizer(str(tmp_path / "unpacked")).get_vocab() == cut.get_vocab()


@pytest.mark.parametrize("case", ["bert", "deberta-v2"])
def test_ids_that_move_are_right_everywhere(tmp_path, corpus, case):
    """Special tokens behind the words; an added token; padding and truncation in the file."""
    kind, vocabulary, special = tiny.TOKENIZERS[KINDS[case]]
    vocabulary = vocabulary(special)["vocab"]
    names = [*(vocabulary if case == "bert" else dict(vocabulary))]
    names = [*names[len(special) :], *special]
    options = {"vocab": {name: n for n, name in enumerate(names)}}
    if case != "bert":
        options = {"vocab": [(name, dict(vocabulary)[name]) for name in names]}
        options["unk_id"] = names.index("[UNK]")
    tokenizer = getattr(transformers, kind)(**options)
    tokenizer.add_tokens(["<user>"])
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, pad_token="[PAD]")
    tokenizer.backend_tokenizer.enable_truncation(4)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "sep")}
    folder = saved(tmp_path / "whole", case, tokenizer=tokenizer, **ids)
    target = convert(folder, corpus)
    cut = load_tokenizer(str(target))
    config = tiny.read(target / "config.json")
    assert cut.pad_token_id != ids["pad_token_id"] and cut.unk_token_id == cut.vocab["[UNK]"]
    assert config["pad_token_id"] == cut.pad_token_id == cut.vocab["[PAD]"]
    tokens = cut("ada <user> ߐ").tokens()
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "<user>" in tokens
    assert max(cut.vocab.values()) == cut.vocab["<user>"] == len(cut) - 1
    content = tiny.read(target / "tokenizer.json")
    assert content["padding"] is None or content["padding"]["pad_id"] == cut.pad_token_id
    one, two = load_plain(str(folder)), load_plain(str(target))
    assert torch.equal(outputs(one, load_tokenizer(str(folder))), outputs(two, cut))


def test_shared_embeddings_stay_shared(tmp_path, corpus):
    folder = saved(tmp_path / "whole", "bert")
    model, tokenizer = load_plain(str(folder)), load_tokenizer(str(folder))
    embeddings = model.get_input_embeddings()
    model.decoder = torch.nn.Linear(32, len(embeddings.weight), bias=False)
    model.decoder.weight = embeddings.weight
    cut = cut_vocabulary(model, tokenizer, [corpus])
    assert model.decoder.weight is embeddings.weight and len(embeddings.weight) == len(cut)


def generic(model, pre_tokenizer=None, **special):
    """A tokenizer of these pieces alone."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def cut_to(tmp_path, tokenizer, text):
    """The tokenizer of a BERT with this one, cut to a text."""
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    folder = saved(tmp_path / "whole", "bert", tokenizer=tokenizer)
    return load_tokenizer(str(convert(folder, tmp_path / "text.txt")))


def test_a_word_that_was_unknown_stays_unknown(tmp_path):
    """Without "ab", which no text is split into, "abc" would become "a" and "##bc"."""
    pieces = ["[PAD]", "[UNK]", "a", "ab", "##b", "##bc", "x", "xyz"]
    model = models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = generic(model, unk_token="[UNK]", pad_token="[PAD]")
    cut = cut_to(tmp_path, tokenizer, f"abc xbc {'ab' * 5000}")
    assert cut.tokenize("abc xbc") == ["[UNK]", "x", "##bc"]
    assert "ab" in cut.vocab and "xyz" not in cut.vocab


def test_merges_stay_with_their_parts(tmp_path):
    merges = [("l", "o"), ("o", "w"), ("lo", "w"), ("h", "e"), ("he", "r"), ("low", "e")]
    merges += [("l", "ow"), ("lowe", "r"), ("low", "her")]
    pieces = dict.fromkeys(["[PAD]", *"lowher", *(a + b for a, b in merges)])
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, merges)
    cut = cut_to(tmp_path, generic(model, pad_token="[PAD]"), "lower")
    assert {*cut.vocab} == {"[PAD]", *"lowher", "lo", "ow", "low", "lowe", "lower"}
    remaining = json.loads(cut.backend_tokenizer.to_str())["model"]["merges"]
    assert remaining == [[*merges[n]] for n in (0, 1, 2, 5, 6, 7)]
    assert cut.tokenize("lowher") == ["low", "h", "e", "r"]


@pytest.mark.parametrize("fallback", [False, True])
def test_unknown_characters_cost_what_they_did(tmp_path, fallback):
    """They cost 10 more than "rare". Without it, "ab" and an unknown character would be better."""
    scores = {"<unk>": 0.0, "a": -14.0, "bߐ": -14.0, "ab": -2.0, "b": -2.0, "bb": -9.0}
    scores |= {f"<0x{n:02X}>": -6.0 for n in range(256)} | {"rare": -20.0}
    model = models.Unigram([*scores.items()], unk_id=0, byte_fallback=fallback)
    cut = cut_to(tmp_path, generic(model, unk_token="<unk>"), "abߐ ab")
    assert cut.tokenize("abߐ") == ["a", "bߐ"] and "bb" not in cut.vocab
    assert cut.tokenize("ߐ") == (["<0xDF>", "<0x90>"] if fallback else ["ߐ"])
    assert len([piece for piece in cut.vocab if piece.startswith("<0x")]) == 256


def test_the_texts_of_a_corpus(tmp_path):
    tiny.write(tmp_path / "a.json", {"data": [{"context": "One two", "ids": [1, None, "x\ud800"]}]})
    tiny.write(tmp_path / "b.jsonl", '{"text": "three\\u2028four"}\n\n"five"\n')
    tiny.write(tmp_path / "c.json", '{"text": "six"}\n{"text": "seven"}')
    (tmp_path / "tables").mkdir()
    tiny.write(tmp_path / "tables" / "d.csv", 'text,label\n"It said ""no""\nand left",0\n')
    tiny.write(tmp_path / "tables" / "e.tsv", "\ufeffit's \"good\t1\n")
    tiny.write(tmp_path / ".hidden", b"\xff")
    texts = {text for batch in batches_of(corpus_files([str(tmp_path)])) for text in batch}
    assert {"One two", "x", "three\u2028four", "five", "six", "seven", " seven"} <= texts
    assert {'It said "no"\nand left', "text,label", "it's \"good", "it's \"good\t1"} <= texts


def test_bad_input_is_refused_in_one_line(tmp_path, corpus, refused, caplog):
    folder = saved(tmp_path / "whole", "bert")
    files = {"empty": " \n", "bytes": b"\x80\x81", "null": b"a\0b", "bad.json": "{"}
    for name, content in files.items():
        files[name] = tiny.write(tmp_path / name, content)
    said = {name: refused(convert, folder, file) for name, file in files.items()}
    assert "there is no text in" in said.pop("empty")
    assert all("cannot be read as text" in line for line in said.values())
    assert "does not exist" in refused(convert, folder, tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    assert "there is no file" in refused(convert, folder, tmp_path / "folder")
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(convert, folder, corpus)
    words = models.WordLevel({"[PAD]": 0, "[UNK]": 1, "ada": 2}, unk_token="[UNK]")
    tiny.save(generic(words, unk_token="[UNK]"), folder)
    said = refused(convert, folder, corpus)
    assert "WordLevel tokenizer cannot be cut, only WordPiece, BPE, Unigram" in said
    tiny.save(tiny.tokenizer_of("bert"), folder)
    tiny.save(tiny.model_of("bert", vocab_size=20), folder)
    assert "more pieces than the model has embeddings" in refused(convert, folder, corpus)
    assert not (tmp_path / "bertarized_whole").exists()
