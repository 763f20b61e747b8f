"""Kernels are compiled once, into a cache, and done without where that cannot be."""

import os

import pytest
from test_inference import assert_same, pruned_bert

from emmental.inference import backends, build, sparsify
from emmental.models.families import encoder_of


@pytest.fixture(autouse=True)
def fresh_build(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load_native.cache_clear()
    yield tmp_path / "cache" / "emmental"
    build.load_native.cache_clear()


def test_the_kernels_are_compiled_once(fresh_build, monkeypatch):
    build.load_native()
    (built,) = fresh_build.iterdir()
    build.load_native.cache_clear()
    commands, run = [], build._run
    note = lambda command: commands.append(command) or run(command)  # noqa: E731
    monkeypatch.setattr(build, "_run", note)
    build.load_native()
    assert commands and not any("-o" in command for command in commands)
    assert [built] == list(fresh_build.iterdir())


def test_damaged_kernels_are_compiled_again(fresh_build):
    build.load_native()
    (built,) = fresh_build.iterdir()
    built.unlink()  # this process still has the old file open
    built.write_bytes(b"no library")
    build.load_native.cache_clear()
    model = pruned_bert()
    assert_same(model, sparsify(model, "native"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(locked))
    model = pruned_bert()
    assert_same(model, sparsify(model, "native"))


def test_a_cache_folder_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = pruned_bert()
    assert_same(model, sparsify(model))


def test_no_home(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", nowhere)
    model = pruned_bert()
    assert_same(model, sparsify(model))


@pytest.mark.parametrize("compiler", ["missing", "failing"])
def test_without_a_compiler(monkeypatch, caplog, compiler):
    if compiler == "missing":
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CXX", "false")
    model = pruned_bert()
    reason = "no C.. compiler|false failed"
    with pytest.raises(ValueError, match=f"kernel 'native' cannot be used: .*({reason})"):
        sparsify(model, "native")
    sparse = sparsify(model)
    assert "using torch's CSR product" in caplog.text
    assert encoder_of(sparse).backend is backends.Library
    assert_same(model, sparse)
