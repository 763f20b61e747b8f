"""Small data and small models that the tests make themselves: no network, nothing from outside."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

import masked_run_squad

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "suite", max_examples=40, derandomize=True, deadline=None, database=None
)
hypothesis.settings.register_profile("long", max_examples=4000, deadline=None, database=None)
hypothesis.settings.load_profile("suite")

NAMES = ["ada", "ben", "cleo", "dan", "eva", "finn", "gus", "hana"]
PLACES = ["oslo", "rome", "lima", "kyoto", "cairo", "paris", "quito", "delhi"]
WORDS = "lives in where does live ? . , the and yes no a is who".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NAMES, *PLACES, *WORDS]


SIZES = {  # sizes of a model
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'-éß漢字"


def _word_pieces(special):
    words = [*special, *NAMES, *PLACES, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return {"vocab": {word: place for place, word in enumerate(dict.fromkeys(words))}}


def _byte_pairs(special):
    """Every byte is a token, and so is each word after a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{word}" for word in (*NAMES, *PLACES, *WORDS)]
    merges = dict.fromkeys((word[:n], word[n]) for word in words for n in range(1, len(word)))
    tokens = dict.fromkeys([*special, *alphabet, *("".join(pair) for pair in merges)])
    return {"vocab": {token: place for place, token in enumerate(tokens)}, "merges": [*merges]}


def _unigrams(special):
    words = {f"▁{word}": -3.0 for word in (*NAMES, *PLACES, *WORDS)}
    letters = dict.fromkeys(["▁", *LETTERS], -9.0)
    return {"vocab": [*{**dict.fromkeys(special, 0.0), **words, **letters}.items()]}


BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TOKENIZERS = {  # model_type: (its class in transformers, its vocabulary)
    "bert": ("BertTokenizerFast", _word_pieces(BERT_TOKENS)),
    "electra": ("ElectraTokenizerFast", _word_pieces(BERT_TOKENS)),
    "distilbert": ("DistilBertTokenizerFast", _word_pieces(BERT_TOKENS)),
    "mpnet": ("MPNetTokenizerFast", _word_pieces([*ROBERTA_TOKENS, "[UNK]"])),
    "roberta": ("RobertaTokenizerFast", _byte_pairs(ROBERTA_TOKENS)),
    "modernbert": ("PreTrainedTokenizerFast", _byte_pairs(BERT_TOKENS)),
    "xlm-roberta": ("XLMRobertaTokenizerFast", _unigrams(ROBERTA_TOKENS)),
    "camembert": ("CamembertTokenizerFast", _unigrams(ROBERTA_TOKENS)),
    "albert": ("AlbertTokenizerFast", _unigrams(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"])),
    "deberta-v2": ("DebertaV2TokenizerFast", _unigrams(BERT_TOKENS)),
}


def tokenizer_of(model_type, **options):
    """A small tokenizer of the class, algorithm and frame that the models of a type have.

    It knows NAMES, PLACES, WORDS and some letters; options are those of its class. The padding id
    is 1 where the model's is.
    """
    name, vocabulary = TOKENIZERS[model_type]
    if model_type != "modernbert":
        return getattr(transformers, name)(**vocabulary, **options)
    backend = Tokenizer(models.BPE(**vocabulary))  # its tokenizer.json alone says what it does
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    frame = {"single": "[CLS] $A [SEP]", "pair": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"}
    ids = [(token, BERT_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(**frame, special_tokens=ids)
    special = {f"{token[1:-1].lower()}_token": token for token in BERT_TOKENS}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)


def make_squad(path, questions=24, seed=0, unanswerable=0):
    """A SQuAD file: 'ada lives in oslo . ben lives in rome .', 'where does ada live ?'."""
    rng = random.Random(seed)
    paragraphs = []
    for number in range(questions):
        names = rng.sample(NAMES, rng.randint(2, 6))
        places = rng.sample(PLACES, len(names))
        context = (
            " . ".join(f"{name} lives in {place}" for name, place in zip(names, places)) + " ."
        )
        asked = rng.randrange(len(names))
        qa = {"id": f"q{number}", "question": f"where does {names[asked]} live ?"}
        if number < unanswerable:
            absent = next(name for name in NAMES if name not in names)
            qa |= {"question": f"where does {absent} live ?", "answers": [], "is_impossible": True}
        else:
            qa["answers"] = [{"text": places[asked], "answer_start": context.index(places[asked])}]
            if unanswerable:
                qa["is_impossible"] = False
        paragraphs.append({"context": context, "qas": [qa]})
    path.write_text(
        json.dumps({"version": "x", "data": [{"title": "people", "paragraphs": paragraphs}]})
    )
    return path


@pytest.fixture(scope="session")
def tiny_config():
    return dict(SIZES)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    vocabulary.write_text(
        "\n".join(VOCABULARY + [f"[unused{i}]" for i in range(120 - len(VOCABULARY))])
    )
    return BertTokenizerFast(str(vocabulary))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, tiny_config, tiny_tokenizer):
    """Folder of a plain BERT with a question-answering head, without dropout."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    torch.manual_seed(0)
    config = BertConfig(
        **tiny_config,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def squad_dir(tmp_path_factory):
    """Folder with train-v1.1.json, dev-v1.1.json and their v2.0 forms."""
    folder = tmp_path_factory.mktemp("squad")
    make_squad(folder / "train-v1.1.json", 24, seed=1)
    make_squad(folder / "dev-v1.1.json", 10, seed=2)
    make_squad(folder / "train-v2.0.json", 24, seed=3, unanswerable=8)
    make_squad(folder / "dev-v2.0.json", 10, seed=4, unanswerable=4)
    return folder


@pytest.fixture
def flags(tmp_path, tiny_bert, squad_dir):
    """The command line of a short run on SQuAD, in the folder `name`; later flags win."""

    def make(name, *more, model=tiny_bert):
        folders = {
            "model_name_or_path": model,
            "data_dir": squad_dir,
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
        }
        return [
            *[word for flag, value in folders.items() for word in (f"--{flag}", str(value))],
            *"--model_type masked_bert --do_lower_case --no_cuda --learning_rate 1e-3".split(),
            *"--max_seq_length 48 --max_query_length 16 --doc_stride 16".split(),
            *"--max_steps 8 --warmup_steps 1 --per_gpu_train_batch_size 5".split(),
            *(word for words in more for word in words.split()),
        ]

    return make


@pytest.fixture
def run(flags, tmp_path):
    """Runs masked_run_squad.py, and returns its folder."""

    def call(name, *more, **options):
        masked_run_squad.main(flags(name, *more, **options))
        return tmp_path / name

    return call


def launch(*words, timeout=300):
    """Run a Python process with these words, on one thread; returns how it ended."""
    command = [sys.executable, *map(str, words)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=one_thread)


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory):
    """Runs commands of masked_run_squad.py, each a list of words, on two processes."""

    def call(*commands):
        file = tmp_path_factory.mktemp("ranks") / "commands.json"
        file.write_text(json.dumps(commands))
        done = launch(Path(__file__).with_name("two_ranks.py"), file)
        assert done.returncode == 0, done.stderr

    return call


@pytest.fixture(params=[1, -1], ids=["line by line", "at the end"])
def unread(request, capsys):
    """Calls a script that prints to a pipe nobody reads, as after `| head -1`: it ends silently."""

    def call(main, *words):
        capsys.readouterr()
        reader, writer = os.pipe()
        os.close(reader)
        with (
            open(writer, "w", buffering=request.param) as stream,
            pytest.MonkeyPatch.context() as p,
        ):
            p.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as stop:
                main([str(word) for word in words])
        assert stop.value.code == 141 and "rror" not in capsys.readouterr().err

    return call
