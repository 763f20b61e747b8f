"""Granularities in the scripts: training, counting, converting, resuming, and refusals."""

import pytest
import tiny
import torch
import transformers
from tiny import IDS, RUNS, TARGETS, TOGETHER, edit, read, same, weights

import bertarize
import counts_parameters
from emmental import MaskedBertForQuestionAnswering
from emmental.modules.granularity import GRANULARITIES, Block

HALF = "--final_threshold 0.5"
SOFT = f"{TARGETS['soft to a target']} {HALF} --target_remaining 0.5"
SENSITIVITY = f"{RUNS['sensitivity']} {TOGETHER}"
FLAGS = RUNS | {"sigmoied_threshold": SOFT, "global sensitivity": SENSITIVITY}
FLAGS = {name: f"{flags} {HALF}" for name, flags in FLAGS.items() if name != "sensitivity"}
FLAGS |= {name: RUNS[name] for name in ("threshold", "l0")}
BLOCKS = "--granularity block --block_rows 8 --block_columns 16"
UNITS = {  # flags of each
    "block": BLOCKS,
    "structure": "--granularity structure",
    "hybrid": BLOCKS.replace("block ", "hybrid ", 1),
}


@pytest.fixture
def flags(flags):
    """The command line of a run whose scores start at random."""

    def make(name, *more, train=True, **options):
        start = "--mask_init uniform --mask_scale 0.1 --mask_scores_learning_rate 3e-2"
        return flags(name, start + " --do_train" * train, *more, **options)

    return make


@pytest.fixture
def says(run, refused, tmp_path):
    """The one line with which the script refuses these flags."""

    def call(*more, **options):
        said = refused(run, "refused", *more, **options)
        assert not (tmp_path / "refused" / "model.safetensors").exists()
        return said

    return call


def config_of(folder):
    return read(folder / "config.json")


def scores_of(folder):
    return {key: value for key, value in weights(folder).items() if key.endswith("mask_scores")}


@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize("method", FLAGS)
def test_training_counting_and_bertarizing(method, granularity, run, tmp_path, capsys):
    out = run("out", FLAGS[method], UNITS[granularity], "--do_eval --save_steps 4")
    config, results = config_of(out), read(out / "eval_results.json")
    assert config["granularity"] == results["granularity"] == granularity
    if granularity != "structure":
        assert (config["block_rows"], config["block_columns"]) == (8, 16)
    first, last = scores_of(out / "checkpoint-4"), scores_of(out)
    assert not any(torch.equal(first[name], scores) for name, scores in last.items())

    file = tmp_path / "counts.json"
    counts = counts_parameters.main(["--serialization_dir", str(out), "--json", str(file)])
    written, said = read(file), capsys.readouterr().out
    assert counts.linear_percent == pytest.approx(results["remaining_percent_linear"])
    assert f"granularity {granularity}" in said and written["granularity"] == granularity
    assert ("(floor): the least" in said) == any(matrix.floored for matrix in counts.matrices)
    assert sum(layer["remaining"] for layer in written["layers"]) == counts.remaining
    for layer in written["layers"]:
        assert f"{layer['heads']} of 4" in said and f"{layer['neurons']} of 64" in said
    if "topK" in method or "magnitude" in method or "sensitivity" in method:
        floors = sum(m.remaining for m in counts.matrices if m.floored) / counts.total
        assert counts.linear_percent - 100 * floors <= 50 < counts.linear_percent + 100 / 24 + 1e-6
    if method in ("topK", "magnitude", "platon"):
        assert counts.linear_percent == 50

    bertarize.main(["--model_name_or_path", str(out), "--target_model_path", f"{tmp_path}/plain"])
    assert (
        not {"granularity", "block_rows", "block_columns"}
        & read(tmp_path / "plain" / "config.json").keys()
    )
    plain = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "plain").eval()
    model = MaskedBertForQuestionAnswering.from_pretrained(out).eval()
    torch.testing.assert_close(plain(IDS).start_logits, model(IDS).start_logits)

    again = run("again", "--do_eval", FLAGS[method].split(" --reg")[0], model=out, train=False)
    for key in ("f1", "remaining_percent", "granularity"):
        assert read(again / "eval_results.json")[key] == results[key]


@pytest.mark.parametrize("method", ["sigmoied_threshold", "global magnitude", "platon", "l0"])
def test_resume_is_exact(method, run):
    more = (FLAGS[method], UNITS["hybrid"], "--save_steps 4 --gradient_accumulation_steps 2")
    whole = run("whole", *more)
    again = run("again", *more, f"--resume_from_checkpoint {whole / 'checkpoint-4'}")
    assert same(whole, again)


def test_a_resumed_run_has_the_same_granularity(run, says):
    whole = run("whole", UNITS["block"], "--save_steps 4")
    resume = f"--resume_from_checkpoint {whole / 'checkpoint-4'}"
    assert "--granularity was block and is None" in says(resume)
    said = says("--granularity block --block_rows 8 --block_columns 8", resume)
    assert "block_columns 8 contradicts 16 of the checkpoint" in said


def test_two_ranks_have_the_same_scores(run, flags, tmp_path, on_two_ranks):
    more = (FLAGS["global topK"], UNITS["structure"], "--adam_epsilon 1e-4")
    one = run("one", *more, "--per_gpu_train_batch_size 10")
    on_two_ranks(flags("two", *more, "--check_ranks"))
    two = scores_of(tmp_path / "two")
    torch.testing.assert_close(two, scores_of(one), rtol=1e-2, atol=1e-3)


def test_checkpoints_from_before_granularities(run, capsys):
    whole = run("whole", "--save_steps 4")
    folder = whole / "checkpoint-4"
    (folder / "files.json").unlink()
    for name in "config.json", "training_args.json":
        edit(folder / name, "granularity", "block_rows", "block_columns")
    counts_parameters.main(["--serialization_dir", str(folder)])
    assert "granularity weight" in capsys.readouterr().out
    again = run("again", "--save_steps 4", f"--resume_from_checkpoint {folder}")
    assert same(whole, again)


def test_training_goes_on_with_the_granularity_of_the_checkpoint(run, says, caplog):
    first = run("first", UNITS["hybrid"])
    still = "--max_steps 1 --warmup_steps 0 --mask_scores_learning_rate 1e-12 "
    more = run("more", still, model=first)
    assert {"granularity": "hybrid", "block_columns": 16}.items() <= config_of(more).items()
    torch.testing.assert_close(scores_of(more), scores_of(first))
    other = run("other", still, "--pruning_method l0 --mask_scale 0.01", model=first)
    assert "the scores start fresh" in caplog.text and config_of(other)["granularity"] == "hybrid"
    scores = scores_of(other).values()
    assert len(scores) == 10 and all(0 < x.abs().max() <= 0.011 for x in scores)
    for words, said in (
        ("--granularity structure", "granularity structure contradicts hybrid of the checkpoint"),
        ("--granularity weight", "convert it with bertarize.py and start from the result"),
        ("--granularity hybrid --block_rows 4", "block_rows 4 contradicts 8 of the checkpoint"),
        ("--granularity block --pruning_method l0", "granularity block contradicts hybrid"),
    ):
        assert said in says(words, model=first)
    assert "contradicts" in says("--granularity weight --do_eval", model=first, train=False)


@pytest.mark.parametrize("words, said", [
    ("--granularity blocks", "'blocks' is not one of weight, block, structure, hybrid; did you"),
    ("--block_rows 8", "--block_rows and --block_columns need --granularity block or hybrid"),
    ("--granularity structure --block_columns 8", "need --granularity block or hybrid: add it"),
    ("--granularity block --block_rows 0", "--block_rows: must be at least 1, got 0"),
    ("--granularity block --block_rows 5 --block_columns 8",
     "layer.0.attention.self.query: blocks of 5 x 8 do not divide a matrix of 32 x 32 weights: "
     "block_rows can be 1, 2, 4, 8, 16, 32, and block_columns 1, 2, 4, 8, 16, 32"),
    ("--granularity hybrid --block_columns 64", "blocks of 32 x 64 do not divide a matrix"),
    ("--granularity structure --mask_init kaiming", "--mask_init kaiming needs a matrix of"),
    ("--mask_init magnitude --mask_scale 0", "--mask_init magnitude needs a --mask_scale"),
    (f"--granularity structure {SOFT} --target_remaining 0.1",
     f"--target_remaining 0.1: {1088 / 8192:.4f} of the weights remain at least"),
])  # fmt: skip
def test_what_does_not_fit(words, said, says):
    assert said in says(words)


def test_blocks_fit_all_matrices(tmp_path, tiny_tokenizer, says):
    """The sizes named divide every matrix, not only the one that does not fit."""
    folder = tiny.save(tiny.plain_bert(intermediate_size=24), tmp_path / "model", tiny_tokenizer)
    said = says("--granularity block --block_rows 16 --block_columns 8", model=folder)
    assert "layer.0.intermediate.dense: blocks of 16 x 8 do not divide a matrix of 24 x 32" in said
    assert said.endswith("block_rows can be 1, 2, 4, 8, and block_columns 1, 2, 4, 8")


@pytest.mark.parametrize("values", [{"granularity": "rows"}, {"block_rows": 0}, {"block_rows": 7}])
def test_a_configuration_that_is_wrong(values, refused, tmp_path):
    blocks = {"granularity": "block", "block_rows": 8, "block_columns": 16, "threshold": 0.5}
    folder = tiny.save(tiny.make(suffix=tiny.QA, **blocks), tmp_path / "model")
    edit(folder / "config.json", **values)
    said = refused(counts_parameters.main, ["--serialization_dir", str(folder)])
    assert "cannot load" in said and "--" not in said and str(*values.values()) in said


def test_layers_without_heads_are_legal_and_said(run, caplog, capsys):
    out = run("out", "--granularity structure --final_threshold 0.2 --do_eval")
    assert "--final_threshold 0.2 keeps none of the 4 heads of each layer" in caplog.text
    assert "no heads remain in layer 0, 1: there, the attention only adds a bias" in caplog.text
    counts_parameters.main(["--serialization_dir", str(out)])
    assert capsys.readouterr().out.count("0 of 4") == 2
    for flag in "", "--sparse_inference":
        caplog.clear()
        again = run("again", "--do_eval", flag, model=out, train=False)
        assert "no heads remain in layer 0, 1" in caplog.text
        assert read(again / "eval_results.json")["f1"] == read(out / "eval_results.json")["f1"]


def test_a_granularity_of_ones_own_in_the_scripts(monkeypatch, run):
    class Strips(Block):
        name = "strips"

        def sized(self, rows, columns):
            return type(self)(1, 16)

    monkeypatch.setitem(GRANULARITIES, "strips", Strips())
    out = run("out", "--granularity strips --final_threshold 0.5")
    assert config_of(out)["granularity"] == "strips"
    scores = scores_of(out)
    assert scores["bert.encoder.layer.0.output.dense.mask_scores"].shape == (32, 4)
