"""The cache of examples and features of SQuAD and GLUE: reused, never stale, done without."""

import os
import time

import pytest
from tiny import (
    WINDOWS,
    document,
    examples_of,
    good_document,
    letters_tokenizer,
    qa,
    tokenizer_of,
    write,
)

from emmental.data import glue, squad_features, squad_read
from emmental.data.cache import content_hash
from emmental.data.glue_tasks import custom_task

LONG = "ada lives in oslo and ben lives in rome . who lives in cairo , and where does dan live ?"
PAIRS = [("ada lives in oslo .", "where does ada live ?"), (LONG, "no"), ("who ?", LONG)]


class Squad:
    module = squad_features
    sizes = WINDOWS | {"training": True}

    def tokenizer(self, *words):
        return letters_tokenizer(words) if words else letters_tokenizer()

    def read(self, folder, content=None, **options):
        return examples_of(folder, content or good_document(), **options)

    def changes(self):
        answer, context, question = good_document(), good_document(), good_document()
        first = answer["data"][0]["paragraphs"][0]["qas"][0]
        first["answers"][0] = {"text": "Norman", "answer_start": 13}
        context["data"][0]["paragraphs"][1]["context"] += "!"
        question["data"][0]["paragraphs"][1]["qas"][0]["question"] += "?"
        sizes = [{"max_seq_length": 25}, {"doc_stride": 6}, {"max_query_length": 5}]
        return [*({"content": x} for x in (answer, context, question)), *sizes, {"training": False}]

    def many(self):
        contexts = [f"{n} a region in France {LONG}"[: 20 + 7 * n] for n in range(15)]
        asked = ((c, [qa(f"{n}-{k}", c, c[:9]) for k in range(3)]) for n, c in enumerate(contexts))
        return document(*asked)


class Glue:
    module = glue
    sizes = {"max_seq_length": 16}

    def tokenizer(self, *words):
        tokenizer = tokenizer_of("bert")
        tokenizer.backend_tokenizer.add_tokens(list(words))
        return tokenizer

    def read(self, folder, content=None, **options):
        rows = content or [(*pair, n % 2) for n, pair in enumerate(PAIRS)]
        write(folder / "train.tsv", "a\tb\ty\n" + "".join(f"{a}\t{b}\t{y}\n" for a, b, y in rows))
        task = custom_task("01", ("a", "b"), "y")
        return glue.read_examples(task, folder, "train", **options)

    def changes(self):
        (first, second), *others = PAIRS
        others = [(*pair, 1 - n % 2) for n, pair in enumerate(others)]
        rows = [(first, second, 1), (first, f"{second} !", 0), (f"x {first}", second, 0)]
        return [*({"content": [row, *others]} for row in rows), {"max_seq_length": 17}]

    def many(self):
        return [(f"x {LONG[:n]}".strip(), LONG[n:].strip(), n % 2) for n in range(30)]


@pytest.fixture(params=[Squad(), Glue()], ids=["squad", "glue"])
def data(request):
    return request.param


@pytest.fixture
def build(data, tmp_path, cache, monkeypatch):
    """Reads and builds; returns the features, and how often the builder has run for them."""
    calls, featurize = [], data.module._featurize
    counted = lambda *args, **options: calls.append(1) or featurize(*args, **options)  # noqa: E731
    monkeypatch.setattr(data.module, "_featurize", counted)

    def call(content=None, cache_dir=None, tokenizer=None, folder=tmp_path, **options):
        before = len(calls)
        examples = data.read(folder, content, cache_dir=cache_dir)
        options = data.sizes | options
        found = data.module.build_features(examples, tokenizer or data.tokenizer(), **options)
        return found, len(calls) - before

    return call


def files(cache):
    """The Arrow files of features that a cache holds; beside them are those of examples."""
    return sorted(cache.rglob("cache-*.arrow"))


def test_the_cache_is_reused_and_never_stale(data, build, tmp_path, cache, monkeypatch):
    first, runs = build()
    assert runs == 1 and len(files(cache)) == 1
    for same in ({}, {"tokenizer": data.tokenizer()}):
        again, runs = build(**same)
        assert runs == 0 and again[:] == first[:]
    assert build(overwrite_cache=True)[1] == 1
    assert build(cache_dir=str(tmp_path / "elsewhere"))[1] == 1
    changes = [*data.changes(), {"tokenizer": data.tokenizer("norman", "cairo")}]
    for change in changes:
        assert [build(**change)[1] for _ in range(2)] == [1, 0], change
    monkeypatch.setattr(data.module, "VERSION", data.module.VERSION + 1)
    assert build()[1] == 1
    assert len(files(cache)) == 2 + len(changes)


def test_the_cache_goes_by_content_alone(build, data, tmp_path, cache):
    """Not by the name of the file, nor by what differs between processes."""
    (tmp_path / "two").mkdir()
    assert [build(folder=folder)[1] for folder in (tmp_path, tmp_path / "two")] == [1, 0]
    assert len(files(cache)) == 1
    if data.module is squad_features:
        key = content_hash("squad", squad_read.VERSION, False, True, tmp_path / "squad.json")
        assert data.read(tmp_path)._fingerprint == key


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
def test_a_damaged_cache_is_done_without(build, cache, caplog, damage):
    wanted = build()[0][:]
    (arrow,) = files(cache)
    content = arrow.read_bytes()
    half = content[: len(content) // 2]
    arrow.write_bytes({"truncate": half, "garbage": b"garbage", "empty": b""}[damage])
    found, runs = build()
    assert found[:] == wanted and runs == 1 and "cannot use the cache" in caplog.text
    assert build(overwrite_cache=True)[1] == 1
    found, runs = build()
    assert found[:] == wanted and runs == 0


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_examples_are_read_again(data, tmp_path, cache, damage, caplog):
    wanted = data.read(tmp_path)[:]
    (path,) = cache.rglob("*.arrow")
    path.unlink() if damage is None else path.write_bytes(damage)
    for _ in range(2):
        assert data.read(tmp_path)[:] == wanted
    assert "cache" not in caplog.text


def test_an_unwritable_cache(build, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    wanted = build()[0][:]
    for _ in range(2):
        assert build(cache_dir=str(tmp_path / "file"))[0][:] == wanted
    assert caplog.text.count("continuing without the cache") == 2


def test_leftovers_of_killed_processes_are_removed_after_a_day(build, data, tmp_path, cache):
    data.read(tmp_path)
    place, now = cache / "emmental", time.time()
    for name, hours in {"old": 25, "new": 23}.items():
        folder = place / f".writing-{name}"
        (folder / "new").mkdir(parents=True)
        (folder / "new" / "x.arrow").write_text("half")
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (now, now - hours * 3600))
    (place / ".writing-busy").mkdir()
    (place / ".writing-busy" / "x.arrow").write_text("growing")
    os.utime(place / ".writing-busy", (0, 0))
    (place / "tmpold_0abc").write_text("not ours")
    os.utime(place / "tmpold_0abc", (0, 0))
    build()
    left = {path.name for path in place.iterdir() if path.suffix != ".arrow"}
    assert left == {".writing-new", ".writing-busy", "tmpold_0abc"}


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(data, build):
    other = data.tokenizer()
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=300)
    before = other.backend_tokenizer.to_str()
    assert build(tokenizer=other, overwrite_cache=True)[0][:] == build(overwrite_cache=True)[0][:]
    assert other.backend_tokenizer.to_str() == before
