"""Fixtures: small data and models that the tests make themselves, and scripts that run on them.

Nothing comes from the network. tiny.py has what the fixtures are made of.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import tiny
import torch
from tiny import make_squad

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "suite", max_examples=40, derandomize=True, deadline=None, database=None
)
hypothesis.settings.register_profile("long", max_examples=4000, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    return tiny.bert_tokenizer(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.letters_tokenizer()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, tiny_tokenizer):
    """Folder of a plain BERT with a question-answering head, without dropout."""
    model = tiny.plain_bert(**tiny.NO_DROPOUT)
    return tiny.save(model, tmp_path_factory.mktemp("tiny_bert"), tiny_tokenizer)


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
        return tiny.command(tmp_path, model, squad_dir, name, *more)

    return make


@pytest.fixture
def run(flags, tmp_path):
    """Runs masked_run_squad.py, and returns its folder."""
    import masked_run_squad

    def call(name, *more, **options):
        masked_run_squad.main(flags(name, *more, **options))
        return tmp_path / name

    return call


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of data sets for one test alone, apart from those of other tests and of the user."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch):
    """Puts a data set, or a function, in the place of the hub; returns the calls of the hub."""
    import datasets

    def put(data):
        calls, get = [], data if callable(data) else lambda *_, **__: data
        note = lambda *args, **kwargs: calls.append((args, kwargs)) or get(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(datasets, "load_dataset", note)
        return calls

    return put


@pytest.fixture
def refused(capsys):
    """Calls a function that must end with this status and so many lines; returns the lines."""

    def call(function, *args, status=2, lines=1, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args, **options)
        error = capsys.readouterr().err
        said = [line for line in error.splitlines() if "error: " in line]
        assert stop.value.code == status and len(said) == lines, error
        assert "Traceback" not in error and all(len(line) < 600 for line in said), error
        return "\n".join(said)

    return call


def launch(*words, timeout=300, **variables):
    """Run a Python process with these words, on one thread; returns how it ended."""
    command = [sys.executable, *map(str, words)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables)


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory):
    """Runs commands, each a list of words for two_ranks.py, on two processes."""

    def call(*commands):
        file = tmp_path_factory.mktemp("ranks") / "commands.json"
        file.write_text(json.dumps(commands))
        done = launch(Path(__file__).with_name("two_ranks.py"), file)
        assert done.returncode == 0, done.stderr

    return call


@pytest.fixture(params=[1, -1], ids=["line by line", "at the end"])
def unread(request, capsys):
    """Calls a script that prints to an unread pipe, as after `| head -1`, and must end silently."""

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
