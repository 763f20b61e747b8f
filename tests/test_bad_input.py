"""Bad input gets one clear line and exit status 2, before any work; a traceback is a bug."""

import re

import pytest
import tiny
import torch
from tiny import edit, plain_bert, read, weights
from transformers import BertConfig

import bertarize
import counts_parameters
import masked_run_squad
import saving_prunebert
from emmental import storage
from emmental.training.checks import check_common_arguments

SIZES = "--max_seq_length 48 --max_query_length 16"
PRUNE = f"{SIZES} --max_steps 4 --do_train"
EVAL = f"{SIZES} --do_eval"
SOFT = f"--do_train {tiny.SOFT} --final_threshold 0.1"
STEERED = f"{SOFT} --target_remaining"


@pytest.fixture
def words(tmp_path, tiny_bert, squad_dir):
    """The words of a command with its places, these flags and no others."""

    def make(flags, model=tiny_bert, output="out"):
        places = f"--model_name_or_path {model} --data_dir {squad_dir}"
        places += f" --output_dir {tmp_path / output} --cache_dir {tmp_path}/cache"
        return f"--model_type masked_bert {places} {flags}".split()

    return make


@pytest.fixture
def says(refused, words, tmp_path):
    """The one line with which the SQuAD script, or another with these words, refuses."""

    def call(flags, *more, script=masked_run_squad, lines=1, **options):
        if script is masked_run_squad:
            flags = words(flags, **options)
        else:
            flags = [*flags.split(), *map(str, more)]
        said = refused(script.main, flags, lines=lines)
        assert not (tmp_path / "out" / "model.safetensors").exists()
        return said

    return call


@pytest.mark.parametrize("flags, said", [
    ("--do_train --pruning_method topk", "did you mean 'topK'"),
    ("--do_train --pruning_method movement", "not one of topK, threshold"),
    ("--do_train --mask_init constnat", "did you mean 'constant'"),
    ("--do_train --regularization l2", "l0, l1, null"),
    ("--do_train --model_type masked_bart", "did you mean 'masked_bert'"),
    ("--do_trian", "did you mean --do_train"),
    ("", "give --do_train or --do_eval"),
    ("--do_train --final_threshold 15", "--final_threshold is a fraction"),
    ("--do_train --pruning_method sigmoied_threshold --initial_threshold=-1", "lie in [0, 1]"),
    ("--do_train --max_steps 100 --warmup_steps 50", "--warmup_steps 33 or less"),
    ("--do_train --pruning_method magnitude --regularization l1 --final_lambda 1",
     "needs learned scores"),
    ("--do_train --final_lambda 1", "without --regularization"),
    ("--do_train --pruning_method l0 --global_topk", "--global_topk goes with"),
    ("--do_train --teacher_type bert", "go together"),
    ("--do_train --teacher_type bert --teacher_name_or_path t --alpha_ce 0 --alpha_distil 0",
     "leave nothing to learn from"),
    ("--do_train --fp16 --bf16", "exclude each other"),
    ("--do_train --fp16", "needs a GPU"),
    ("--do_eval --resume_from_checkpoint latest", "add --do_train"),
    ("--do_train --train_file absent.json", "there is no file"),
    ("--do_train --max_seq_length 8", "leaves no room for its context"),
    ("--do_train --learning_rate 0", "--learning_rate: must be above 0"),
    ("--do_train --initial_warmup nan --warmup_steps 5 --max_steps 10",
     "must be at least 0, got nan"),
    ("--do_train --pruning_method threshold --final_threshold inf",
     "--final_threshold: must be finite"),
    ("--do_train --per_gpu_train_batch_size 0", "must be at least 1"),
    ("--do_train --resume_from_checkpoint /nowhere", "is no checkpoint"),
    ("--do_train --target_remaining 0.1",
     "use sigmoied_threshold with --regularization l1 or l0 with --regularization l0"),
    (f"{STEERED} 0.1 --regularization null", "use sigmoied_threshold with --regularization l1"),
    (f"{STEERED} 0.004", "must lie between 0.006 and 1"),
    (f"{STEERED} 10", "must lie between 0.006 and 1"),
    (f"{SOFT} --lr_cycles 4", "--lr_cycles needs a method that ranks"),
    ("--do_train --lr_cycles 4 --final_threshold 0.4", "--first_cut 0.3 must lie between"),
    (f"{STEERED} 0.1 --final_threshold 0", "needs a --final_threshold between 0 and 1"),
    (f"--do_train {tiny.L0} --target_remaining 0.1 --max_steps 30 --warmup_steps 20", "plateaus"),
    ("--do_train --warmup_steps 0 --warmup_ratio 0.1", "exclude each other: give one"),
    ("--do_train --warmup_ratio 1", "--warmup_ratio: must be at least 0 and below 1, got 1"),
    ("--do_train --warmup_ratio=-0.1", "must be at least 0 and below 1, got -0.1"),
    ("--do_train --warmup_ratio 0.34",
     "--warmup_ratio 0.34: the plateaus last initial_warmup + final_warmup = 3 times"),
    ("--do_train --warmup_ratio 0.5 --final_warmup 1", "use a ratio below 1/2"),
    ("--do-trian", "unknown argument --do-trian; did you mean --do_train?"),
    ("--do_train --train_file \udcd0", "\\udcd0 is not UTF-8: set PYTHONUTF8=1"),
    ("--do_train --max_seq_length 384", "384 is more than the model takes: give 64 or less"),
    (f"{PRUNE} --model_name_or_path absent", "no usable checkpoint"),
    (f"{PRUNE} --train_file {{}}/train-v2.0.json", "--version_2_with_negative"),
    # The plateaus overlap, once the data is known.
    (f"--do_train --num_train_epochs 1 --warmup_steps 5 {SIZES}", "T = 3 updates"),
    (f"--do_train --num_train_epochs 1 --warmup_steps 5 {SIZES}", "--warmup_steps 0 or less"),
    (f"--do_train --num_train_epochs 1 --warmup_steps 5 {SIZES}", "--warmup_ratio below 1/3"),
])  # fmt: skip
def test_arguments(says, squad_dir, flags, said):
    assert said in says(flags.replace("{}", str(squad_dir)))


def test_a_misspelt_flag_is_named_before_the_one_that_is_missing(refused):
    said = refused(counts_parameters.main, ["--serialisation_dir", "x"])
    assert "unknown argument --serialisation_dir; did you mean --serialization_dir?" in said


def test_all_problems_are_reported_together(says):
    flags = "--do_train --final_threshold 3 --alpha_ce 1 --teacher_type bert --fp16 --bf16"
    said = says(flags, lines=3)
    assert "--final_threshold" in said and "--teacher_type" in said and "--bf16" in said


@pytest.mark.parametrize("flags, said", [
    ("--alpha_ce 0.1 --alpha_hidden 1 --temperature 3",
     "--alpha_ce, --alpha_hidden, --temperature: no effect without --teacher_name"),
    ("--model_type bert --final_threshold 0.1",
     "--final_threshold: no effect without --model_type"),
    ("--sparse_inference", "--sparse_inference: no effect without --do_eval"),
    ("--eval_all_checkpoints", "--eval_all_checkpoints: no effect without --do_eval"),
    ("--speedup_batch 4 --speedup_of onnx",
     "--speedup_of, --speedup_batch: no effect without --target_speedup"),
    ("--first_cut 0.5", "--first_cut: no effect without --lr_cycles"),
    ("--pruning_method sigmoied_threshold", "soft movement prunes little without a penalty"),
    ("--pruning_method sigmoid_threshold --final_threshold 0.1",
     "soft movement: the paper starts with --initial_threshold 0"),
    ("--fp16_opt_level O1", "--fp16_opt_level is obsolete and ignored"),
])  # fmt: skip
def test_arguments_without_effect_are_warned_of(words, flags, said, caplog):
    args = masked_run_squad.get_parser().parse_args(words(f"--do_train {flags}"))
    assert check_common_arguments(args) == []
    assert any(said in message for message in caplog.messages)


def test_flags_may_have_dashes():
    """As torch.distributed.launch writes them. Values keep theirs."""
    words = "--model-type masked_bert --model_name_or_path a-b --output-dir=x-y --local-rank=0"
    args = masked_run_squad.get_parser().parse_args([*words.split(), "--do-train"])
    assert (args.model_name_or_path, args.output_dir) == ("a-b", "x-y")
    assert args.local_rank == 0 and args.do_train
    named = {"model_type", "model_name_or_path", "output_dir", "local_rank", "do_train"}
    assert args.given == named
    args = saving_prunebert.get_parser().parse_args("pack a b --base-model c".split())
    assert args.base_model == "c"


def test_output_dir_not_empty(says, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "is not empty" in says(PRUNE)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_models_that_do_not_fit(says, tmp_path, tiny_tokenizer):
    model = tmp_path / "model"
    config = BertConfig(**tiny.SIZES)
    config.save_pretrained(model)
    for content in (None, b"broken", b"broken" * 10_000):
        if content:
            (model / "model.safetensors").write_bytes(content)
        assert "cannot load" in says(PRUNE, model=model)
    tiny.save(plain_bert(hidden_size=16), model)
    config.save_pretrained(model)
    assert "does not fit its configuration" in says(PRUNE, model=model)
    assert "no usable tokenizer" in says(PRUNE, model=tiny.save(plain_bert(), tmp_path / "bare"))
    small = tiny.save(plain_bert(vocab_size=50), tmp_path / "small", tiny_tokenizer)
    said = says(PRUNE, model=small)
    assert "does not fit the model: it has ids up to 119" in said


def test_evaluation_wants_a_trained_model(says, tmp_path, tiny_tokenizer):
    assert "is a plain model without masks: fine-prune it first" in says(EVAL)
    headless = tiny.save(plain_bert(head=""), tmp_path / "headless", tiny_tokenizer)
    said = says(f"{EVAL} --model_type bert", model=headless)
    assert "has no trained BertForQuestionAnswering head" in said
    masked = tiny.save(tiny.make("magnitude", tiny.QA), tmp_path / "masked", tiny_tokenizer)
    for flags, said in (
        ("--model_type bert", "masked checkpoint: give the type masked_bert"),
        ("", "does not record the threshold"),
        ("--pruning_method topK --final_threshold .5", "holds no scores"),
    ):
        assert said in says(f"{EVAL} {flags}", model=masked)


def test_teachers_that_do_not_fit(says, tmp_path, tiny_bert, tiny_tokenizer):
    for name, model, said in (
        ("larger", plain_bert(vocab_size=130), "its vocab_size is 130, and 120 is needed"),
        ("labels", plain_bert(num_labels=3), "it has 3 labels, not 2"),
        ("short", plain_bert(max_position_embeddings=40), "it takes 40 tokens, and 48 are needed"),
        ("words", plain_bert(), "vocabularies differ"),
    ):
        own = tiny_tokenizer if name in ("short", "words") else None
        teacher = tiny.save(model, tmp_path / name, own)
        if name == "words":
            for file in teacher.glob("tokenizer*"):
                file.unlink()
            known = list(tiny_tokenizer.get_vocab())
            (teacher / "vocab.txt").write_text("\n".join(known[:5] + known[:4:-1]))
        assert said in says(f"{PRUNE} --teacher_type bert --teacher_name_or_path {teacher}")


@pytest.mark.parametrize("sizes", [{"vocab_size": 128}, {"max_position_embeddings": 48}])
def test_teachers_of_other_sizes_that_fit(words, tmp_path, tiny_tokenizer, sizes):
    teacher = tiny.save(plain_bert(**sizes), tmp_path / "teacher", tiny_tokenizer)
    teach = f"--teacher_type bert --teacher_name_or_path {teacher}"
    masked_run_squad.main(words(f"{PRUNE} {teach}"))


def test_scores_of_a_masked_checkpoint_continue(words, tmp_path, caplog):
    """A flag of initial scores has no effect on the method's own, and its own on another's."""
    still = f"{PRUNE} --mask_scores_learning_rate 1e-12 --final_threshold 0.5 --mask_scale"
    masked_run_squad.main(words(f"{still} -1.5", output="first"))
    before = weights(tmp_path / "first")
    for method, value in (("topK", -1.5), ("l0", 2.197)):
        caplog.clear()
        flags = f"{still} 2.197 --pruning_method {method}"
        masked_run_squad.main(words(flags, tmp_path / "first", output=method))
        for key, weight in weights(tmp_path / method).items():
            if key.endswith("mask_scores"):
                assert torch.allclose(weight, torch.full_like(weight, value), atol=1e-6)
            assert weight.shape == before[key].shape
        assert read(tmp_path / method / "config.json")["mask_scale"] == value
        kept = "the checkpoint's scores are kept; mask_scale has no effect"
        assert (kept in caplog.messages) == (method == "topK")
        assert ("start fresh" in caplog.text) == (method == "l0")


@pytest.mark.parametrize(
    "name, value", [("position_embedding_type", "relative_key"), ("num_hidden_layers", 1)]
)
def test_what_a_checkpoint_holds_and_no_model_computes(
    says, words, tmp_path, tiny_bert, tiny_tokenizer, name, value, caplog
):
    models = {"plain": plain_bert(), "masked": tiny.make(suffix=tiny.QA, threshold=0.5)}
    for folder, model in models.items():
        edit(tiny.save(model, tmp_path / folder, tiny_tokenizer) / "config.json", **{name: value})
    plain, masked, file = (tmp_path / x for x in (*models, "file"))
    storage.pack(str(tiny_bert), str(tmp_path / "packed"))
    said = [
        says(f"{EVAL} --model_type bert", model=plain),
        says(EVAL, model=masked),
        says(f"{PRUNE} --teacher_type bert --teacher_name_or_path {plain}"),
        says("--serialization_dir", masked, script=counts_parameters),
        says("--model_name_or_path", masked, script=bertarize),
        says("pack", masked, file, script=saving_prunebert),
        says("pack", plain, file, script=saving_prunebert),
        says("verify", tmp_path / "packed", plain, script=saving_prunebert),
    ]
    assert all("results would be wrong" in line for line in said)
    caplog.clear()
    masked_run_squad.main(words(PRUNE, plain))
    assert sum("training goes on without it" in line for line in caplog.messages) == 1
    masked_run_squad.main(words(EVAL, tmp_path / "out", output="evaluated"))


@pytest.mark.parametrize("flags, said", [
    ("--train_file {} --do_eval", "--predict_file is missing: give it, or --data_dir"),
    ("--train_file {} --do_train --do_eval", "--predict_file is missing"),
    ("--predict_file {} --do_train", "--train_file is missing: give it, or --data_dir"),
    ("--predict_file {} --do_train --do_eval", "--train_file is missing"),
    ("--train_file {} --do_train --evaluate_during_training", "--predict_file is missing"),
])  # fmt: skip
def test_one_file_is_not_completed_from_the_hub(refused, flags, said, squad_dir, tmp_path):
    words = f"--model_type bert --model_name_or_path gone --output_dir {tmp_path}/out {flags}"
    words = words.format(squad_dir / "train-v1.1.json").split()
    assert said in refused(masked_run_squad.main, words)


@pytest.mark.parametrize(
    "script, flag",
    [(counts_parameters, "--serialization_dir"), (bertarize, "--model_name_or_path")],
)
def test_counting_and_bertarizing_refuse_what_is_not_masked(
    says, script, flag, tmp_path, tiny_bert
):
    old = tiny.save(tiny.make(suffix=tiny.QA), tmp_path / "old")
    for words, said in (
        ([tmp_path / "absent"], "is not a folder"),
        ([tiny_bert], "is a plain model"),
        ([old], "does not record the threshold"),
        ([old, "--threshold", "15"], "must lie in [0, 1]"),
        ([old, "--pruning_method", "topk"], "did you mean 'topK'"),
    ):
        assert said in says(flag, *words, script=script)


def test_bertarize_replaces_its_own_folder_and_no_other(says, tmp_path):
    folder = tiny.save(tiny.make(suffix=tiny.QA, threshold=0.5), tmp_path / "run")
    run = ["--model_name_or_path", str(folder)]
    target = bertarize.main(run)  # the folder is replaced as a whole: nothing stale stays in it
    (target / "vocab.txt").write_text("stale")
    assert bertarize.main(run) == target and not (target / "vocab.txt").exists()
    (target / "notes.md").write_text("mine")
    assert "holds other files (notes.md)" in says(*run, script=bertarize)
    said = says(*run, "--target_model_path", folder, script=bertarize)
    assert "is the checkpoint itself" in said


def test_a_contradicting_flag_is_used_with_a_warning(tmp_path, caplog):
    folder = tiny.save(tiny.make(suffix=tiny.QA, threshold=0.5), tmp_path / "run")
    words = ["--serialization_dir", str(folder), "--threshold", "0.25"]
    assert counts_parameters.main(words).linear_percent == pytest.approx(25)
    assert any("threshold 0.25 contradicts 0.5" in message for message in caplog.messages)


@pytest.mark.parametrize("lacks", ["threshold", "head", "tokenizer"])
def test_messages_name_the_flags_of_their_own_script(says, tmp_path, tiny_tokenizer, lacks):
    model = tiny.make(suffix=tiny.QA, threshold=None if lacks == "threshold" else 0.5)
    folder = tiny.save(model, tmp_path / "lacking", tiny_tokenizer)
    if lacks == "head":
        tiny.rewrite(folder, lambda x: {k: v for k, v in x.items() if k != "qa_outputs.weight"})
    if lacks == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    teach = f"{PRUNE} --teacher_type masked_bert --teacher_name_or_path {folder}"
    of_squad = says(EVAL, model=folder), says(teach)
    others = [
        says("--model_name_or_path", folder, script=bertarize),
        says("pack", folder, tmp_path / "file", script=saving_prunebert),
    ]
    if lacks != "tokenizer":  # counting needs none
        others.append(says("--serialization_dir", folder, script=counts_parameters))
    some = "--model_type bert --model_name_or_path m --output_dir o".split()
    known = set(vars(masked_run_squad.get_parser().parse_args(some)))
    for lines, flags in (
        (of_squad, known),
        (others, {"pruning_method", "threshold", "global_topk", "bits", "base_model"}),
    ):
        for line in lines:
            assert set(re.findall(r"--(\w+)", line)) <= flags and str(folder) in line


def test_an_interrupted_count_advises_no_flag_of_training(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(counts_parameters, "load_masked", stop)
    with pytest.raises(SystemExit) as end:
        counts_parameters.main(["--serialization_dir", "x"])
    assert end.value.code == 130 and "--" not in capsys.readouterr().err
