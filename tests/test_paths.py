"""Paths that users give: ~ as a home folder, links, and a folder that another run writes to."""

import os

import pytest
import tiny

import bertarize
import counts_parameters
import masked_run_glue
import masked_run_ner
import masked_run_squad
import paper_tables
import saving_prunebert
from benchmarks import report
from emmental.system.errors import UserError
from emmental.system.files import remove, reserved, write_folder, write_into, write_text
from emmental.training.checkpoint import STATE_FILE, clean_output, remove_old_checkpoints

RUN = (
    "--model_type masked --model_name_or_path=~/a --output_dir ~/b --cache-dir=~ --config_name ~/c"
)
RUN += (
    " --teacher_name_or_path=~/d --resume_from_checkpoint=~/e --tokenizer_name ~/f --data_dir=~/g"
)


@pytest.mark.parametrize("parser, words", [
    (masked_run_squad.get_parser, f"{RUN} --train_file=~/h --predict_file ~/i"),
    (masked_run_glue.get_parser, f"{RUN} --task_name rte"),
    (masked_run_ner.get_parser, RUN),
    (counts_parameters.get_parser, "--serialization_dir=~/a --json ~/b --plot=~/c"),
    (bertarize.get_parser, "--model_name_or_path=~/a --target_model_path ~/b --onnx=~/c"),
    (saving_prunebert.get_parser, "pack ~/a ~/b --base_model=~/c"),
    (saving_prunebert.get_parser, "verify ~/a ~/b --data-dir=~/c --predict_file ~/d"),
    (paper_tables.get_parser, "run squad 10D3 --data_dir=~/a --runs_dir ~/b --teacher=~/c"),
    (paper_tables.get_parser, "plot ~/a --to=~/b --speed ~/c"),
    (paper_tables.get_parser, "figure --to=~/a"),
    (lambda: report.make_parser(""), "--json=~/a"),
])  # fmt: skip
def test_a_tilde_is_a_home_folder_in_every_flag(monkeypatch, parser, words):
    monkeypatch.setenv("HOME", "/home/ada")
    values = vars(parser().parse_args(words.split())).values()
    found = [value for value in values if isinstance(value, str) and "/home/ada" in value]
    assert len(found) == words.count("~") and not any("~" in value for value in found)


def link_to(place):
    """A link beside a place, which may be absent."""
    link = place.with_name(f"link_to_{place.name}")
    link.symlink_to(place.name)
    return link


WRITERS = {
    "folder": lambda path: write_folder(path, lambda folder: write_text(folder / "x", "new")),
    "into": lambda path: write_into(path, lambda folder: write_text(folder / "x", "new")),
    "file": lambda path: write_text(path, "new"),
}


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_link_is_followed_wherever_we_write(tmp_path, kind, is_there):
    place = tmp_path / "elsewhere" / kind
    if is_there:
        WRITERS[kind](place)
        tiny.write(place / "x" if place.is_dir() else place, "old")
    place.parent.mkdir(exist_ok=True)
    link = link_to(place)
    WRITERS[kind](link)
    assert link.is_symlink() and not place.is_symlink()
    assert (place / "x" if place.is_dir() else place).read_text() == "new"
    assert {path.name for path in place.parent.iterdir()} == {place.name, link.name}


def test_the_scripts_follow_links(run, tmp_path):
    links = {name: link_to(tmp_path / name) for name in ("out", "plain", "file", "unpacked")}
    link = run(
        links["out"].name, "--do_train --do_eval --max_steps 2 --warmup_steps 0 --save_steps 1"
    )
    bertarize.main(["--model_name_or_path", str(link), "--target_model_path", str(links["plain"])])
    for words in (("pack", link, links["file"]), ("unpack", links["file"], links["unpacked"])):
        saving_prunebert.main([*map(str, words)])
    assert all(path.is_symlink() for path in links.values())
    assert (tmp_path / "file").is_file() and (tmp_path / "out" / "eval_results.json").is_file()
    assert all((tmp_path / name / "config.json").is_file() for name in ("plain", "unpacked"))
    stored = (tmp_path / "out" / "checkpoint-1").rename(tmp_path / "stored")
    (tmp_path / "out" / "checkpoint-1").symlink_to(stored)
    train = "--do_train --max_steps 2 --warmup_steps 0 --save_steps 1 --save_total_limit 1"
    run(link.name, train, f"--resume_from_checkpoint {link / 'checkpoint-1'}")
    assert not (tmp_path / "out" / "checkpoint-1").is_symlink() and (stored / STATE_FILE).exists()


def test_what_a_link_points_to_is_not_removed(tmp_path):
    folder, file = tmp_path / "folder", tiny.write(tmp_path / "file", "mine")
    folder.mkdir()
    tiny.write(folder / STATE_FILE, "mine")
    out = tmp_path / "out"
    out.mkdir()
    for step in (1, 2):
        (out / f"checkpoint-{step}").symlink_to(folder)
    remove_old_checkpoints(out, 1)
    assert os.listdir(out) == ["checkpoint-2"]
    (out / "eval_results.txt").symlink_to(file)
    clean_output(out, ["eval_results.*"], resumes_in_place=False)
    remove(folder / STATE_FILE)
    assert not os.listdir(out) and folder.is_dir() and file.read_text() == "mine"


def test_a_second_run_in_a_folder_is_refused(run, refused, tmp_path):
    with reserved(tmp_path / "out"):
        for name in ("out", link_to(tmp_path / "out").name):
            said = refused(run, name, "--do_train --max_steps 1 --warmup_steps 0")
            assert "another run writes to" in said and name in said
            assert not any((tmp_path / "out").iterdir())
    assert not (tmp_path / "out").exists()  # as it stayed empty
    out = run("out", "--do_train --max_steps 1 --warmup_steps 0 --save_steps 0")
    with reserved(out), pytest.raises(UserError, match="another run writes to"), reserved(out):
        pass
    assert (out / "model.safetensors").exists()
