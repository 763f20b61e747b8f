"""The data of `make demo` has SQuAD's format, is fair, and is the same for the same seed."""

import sys
from pathlib import Path

import pytest
from conftest import launch
from transformers import AutoTokenizer, BertForQuestionAnswering

import masked_run_squad
from emmental.data.squad_features import drop_misaligned
from emmental.data.squad_read import read_examples
from emmental.training.checks import check_common_arguments

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))
import run_demo  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("demo") for _ in range(2)]
    for folder in folders:
        small = ["--output_dir", str(folder), "--paragraphs", "40", "--pretraining_steps", "2"]
        done = launch(DEMO / "make_data.py", *small)
        assert done.returncode == 0, done.stderr
    return folders


def test_same_seed_same_files(made):
    for name in ("train.json", "dev.json", "bert/model.safetensors", "bert/tokenizer.json"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


def test_answers_are_aligned_and_cannot_be_memorised(made):
    train, dev = (read_examples(made[0] / f"{name}.json", False) for name in ("train", "dev"))
    for examples in (train, dev):
        kept, skipped = drop_misaligned(examples)
        assert not skipped and len(kept) == len(examples)
    texts = [text.split() for text in train["context"]]
    people = {" ".join(words) for text in texts for words in zip(text, text[1:])}
    questions = zip(dev["question"], dev["answers"])
    asked = [answers["text"][0] for question, answers in questions if question.startswith("Who")]
    assert asked and not people & set(asked)  # train.json has none of them


def test_the_model_and_its_tokenizer_load_and_fit(made):
    model = BertForQuestionAnswering.from_pretrained(made[0] / "bert")
    tokenizer = AutoTokenizer.from_pretrained(made[0] / "bert")
    assert model.config.vocab_size == len(tokenizer)
    for question in read_examples(made[0] / "dev.json", False)["question"]:
        assert tokenizer.unk_token_id not in tokenizer(question)["input_ids"]


@pytest.mark.parametrize("method", run_demo.METHODS)
def test_the_commands_of_the_demo_are_valid(method, tmp_path):
    flags = [run_demo.PRUNE, run_demo.METHODS[method], run_demo.COMMON]
    flags = " ".join(flags).split()
    flags += ["--model_name_or_path", "bert", "--output_dir", str(tmp_path / "out")]
    parser = masked_run_squad.get_parser()
    assert check_common_arguments(parser.parse_args(flags)) == []
