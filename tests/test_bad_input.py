"""Bad input gets one clear line and exit status 2, before any work; a traceback is a bug."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForQuestionAnswering

import bertarize
import counts_parameters
import masked_run_squad
import saving_prunebert
from emmental import MaskedBertConfig, MaskedBertForQuestionAnswering, storage
from emmental.training.checks import check_common_arguments

SOME = "--model_type bert --model_name_or_path m --output_dir o".split()
PRUNE = ["--max_seq_length", "48", "--max_query_length", "16", "--max_steps", "4", "--do_train"]


@pytest.fixture
def run(tmp_path, tiny_bert, squad_dir):
    """Run the SQuAD script, and return its output folder."""

    def run_squad(*flags, model=tiny_bert, model_type="masked_bert"):
        common = f"--model_type {model_type} --model_name_or_path {model} --data_dir {squad_dir} "
        common = f"{common} --output_dir {tmp_path}/out --cache_dir {tmp_path}/cache".split()
        masked_run_squad.main([*common, *map(str, flags)])
        return tmp_path / "out"

    return run_squad


@pytest.fixture
def refused(tmp_path, tiny_bert, squad_dir, capsys):
    """Run the SQuAD script, expect status 2 and return the one line it printed."""

    def run(
        *flags,
        model=tiny_bert,
        model_type="masked_bert",
        lines=1,
        script=masked_run_squad,
        bare=False,
    ):
        common = f"--model_type {model_type} --model_name_or_path {model} --data_dir {squad_dir} "
        common = f"{common} --output_dir {tmp_path}/out --cache_dir {tmp_path}/cache".split()
        with pytest.raises(SystemExit) as stop:
            script.main([*([] if bare else common), *map(str, flags)])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()
        messages = [line for line in error if "error: " in line]
        assert len(messages) == lines, error
        assert not (tmp_path / "out" / "model.safetensors").exists()
        return "\n".join(messages)

    return run


SOFT = (
    "--pruning_method sigmoied_threshold --initial_threshold 0 --final_threshold 0.1 "
    "--regularization l1"
)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--do_train --pruning_method topk", "did you mean 'topK'"),
        ("--do_train --pruning_method movement", "not one of topK, threshold"),
        ("--do_train --mask_init constnat", "did you mean 'constant'"),
        ("--do_train --regularization l2", "l0, l1, null"),
        ("--do_train --model_type masked_bart", "did you mean 'masked_bert'"),
        ("--do_trian", "did you mean --do_train"),
        ("", "give --do_train or --do_eval"),
        ("--do_train --final_threshold 15", "--final_threshold is a fraction"),
        (
            "--do_train --pruning_method sigmoied_threshold --initial_threshold=-1",
            "must lie in [0, 1]",
        ),
        ("--do_train --max_steps 100 --warmup_steps 50", "--warmup_steps 33 or less"),
        (
            "--do_train --pruning_method magnitude --regularization l1 --final_lambda 1",
            "needs learned scores",
        ),
        ("--do_train --final_lambda 1", "without --regularization"),
        ("--do_train --pruning_method l0 --global_topk", "--global_topk goes with"),
        ("--do_train --teacher_type bert", "go together"),
        (
            "--do_train --teacher_type bert --teacher_name_or_path t --alpha_ce 0 --alpha_distil 0",
            "leave nothing to learn from",
        ),
        ("--do_train --fp16 --bf16", "exclude each other"),
        ("--do_train --fp16", "needs a GPU"),
        ("--do_eval --resume_from_checkpoint latest", "add --do_train"),
        ("--do_train --train_file absent.json", "there is no file"),
        ("--do_train --max_seq_length 8", "leaves no room for its context"),
        ("--do_train --learning_rate 0", "--learning_rate: must be above 0"),
        (
            "--do_train --initial_warmup nan --warmup_steps 5 --max_steps 10",
            "must be at least 0, got nan",
        ),
        (
            "--do_train --pruning_method threshold --final_threshold inf",
            "--final_threshold: must be finite",
        ),
        ("--do_train --per_gpu_train_batch_size 0", "must be at least 1"),
        ("--do_train --resume_from_checkpoint /nowhere", "is no checkpoint"),
        (
            "--do_train --target_remaining 0.1",
            "use sigmoied_threshold with --regularization l1 or l0 with --regularization l0",
        ),
        (
            f"--do_train {SOFT} --target_remaining 0.1 --regularization null",
            "use sigmoied_threshold with --regularization l1",
        ),
        (f"--do_train {SOFT} --target_remaining 0.004", "must lie between 0.006 and 1"),
        (
            "--do_train --pruning_method l0 --regularization l0 --initial_threshold 1 "
            "--final_threshold 1 --target_remaining 0.1 --max_steps 30 --warmup_steps 20",
            "plateaus",
        ),
        (f"--do_train {SOFT} --target_remaining 10", "must lie between 0.006 and 1"),
        (
            f"--do_train {SOFT} --target_remaining 0.1 --final_threshold 0",
            "needs a --final_threshold between 0 and 1",
        ),
        ("--do_train --warmup_steps 0 --warmup_ratio 0.1", "exclude each other: give one"),
        ("--do_train --warmup_ratio 1", "--warmup_ratio: must be at least 0 and below 1, got 1"),
        ("--do_train --warmup_ratio=-0.1", "must be at least 0 and below 1, got -0.1"),
        (
            "--do_train --warmup_ratio 0.34",
            "--warmup_ratio 0.34: the plateaus last initial_warmup + final_warmup = 3 times",
        ),
        ("--do_train --warmup_ratio 0.5 --final_warmup 1", "use a ratio below 1/2"),
        ("--do-trian", "unknown argument --do-trian; did you mean --do_train?"),
        ("--do_train --train_file \udcd0", "\\udcd0 is not UTF-8: set PYTHONUTF8=1"),
        ("--do_train --max_seq_length 384", "384 is more than the model takes: give 64 or less"),
    ],
)
def test_arguments(refused, flags, said):
    assert said in refused(*flags.split())


def test_all_problems_are_reported_together(refused):
    flags = "--do_train --final_threshold 3 --alpha_ce 1 --teacher_type bert --fp16 --bf16"
    said = refused(*flags.split(), lines=3)
    assert "--final_threshold" in said and "--teacher_type" in said and "--bf16" in said


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            "--do_train --alpha_ce 0.1 --alpha_hidden 1 --temperature 3",
            "--alpha_ce, --alpha_hidden, --temperature: no effect without --teacher_name",
        ),
        (
            "--do_train --model_type bert --final_threshold 0.1",
            "--final_threshold: no effect without --model_type",
        ),
        ("--do_train --sparse_inference", "--sparse_inference: no effect without --do_eval"),
        (
            "--do_train --pruning_method sigmoied_threshold",
            "soft movement prunes little without a penalty",
        ),
        (
            "--do_train --pruning_method sigmoid_threshold --final_threshold 0.1",
            "soft movement: the paper starts with --initial_threshold 0",
        ),
        ("--do_train --fp16_opt_level O1", "--fp16_opt_level is obsolete and ignored"),
    ],
)
def test_arguments_without_effect_are_warned_of(flags, said, tmp_path, caplog):
    common = f"--model_type masked_bert --model_name_or_path b --output_dir {tmp_path / 'out'} "
    flags = (common + flags).split()
    parser = masked_run_squad.get_parser()
    assert check_common_arguments(parser.parse_args(flags)) == []
    assert any(said in message for message in caplog.messages)


def test_plateaus_that_overlap_once_the_data_is_known(refused):
    flags = "--do_train --num_train_epochs 1 --warmup_steps 5 --max_seq_length 48"
    said = refused(*flags.split(), "--max_query_length", "16")
    assert "T = 3 updates" in said and "--warmup_steps 0 or less" in said
    assert "--warmup_ratio below 1/3" in said


def test_flags_may_have_dashes():
    """As torch.distributed.launch writes them. Values keep theirs."""
    words = "--model-type masked_bert --model_name_or_path a-b --output-dir=x-y --local-rank=0"
    parser, words = masked_run_squad.get_parser(), [*words.split(), "--do-train"]
    args = parser.parse_args(words)
    assert (args.model_name_or_path, args.output_dir) == ("a-b", "x-y")
    assert args.local_rank == 0 and args.do_train
    named = {"model_type", "model_name_or_path", "output_dir", "local_rank", "do_train"}
    assert args.given == named
    args = saving_prunebert.get_parser().parse_args("pack a b --base-model c".split())
    assert args.base_model == "c"


def test_output_dir_not_empty(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "is not empty" in refused(*PRUNE)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_models_that_do_not_fit(refused, tmp_path, tiny_bert, tiny_config, tiny_tokenizer):
    assert "no usable checkpoint" in refused(*PRUNE, model=tmp_path / "absent")
    BertConfig(**tiny_config).save_pretrained(tmp_path / "empty")
    assert "cannot load" in refused(*PRUNE, model=tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"broken")
    assert "cannot load" in refused(*PRUNE, model=tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"broken" * 10_000)
    assert "cannot load" in refused(*PRUNE, model=tmp_path / "empty")
    BertForQuestionAnswering(BertConfig(**tiny_config | {"hidden_size": 16})).save_pretrained(
        tmp_path / "narrow"
    )
    BertConfig(**tiny_config).save_pretrained(tmp_path / "narrow")
    assert "does not fit its configuration" in refused(*PRUNE, model=tmp_path / "narrow")

    BertForQuestionAnswering(BertConfig(**tiny_config)).save_pretrained(tmp_path / "bare")
    assert "no usable tokenizer" in refused(*PRUNE, model=tmp_path / "bare")
    BertForQuestionAnswering(BertConfig(**tiny_config | {"vocab_size": 50})).save_pretrained(
        tmp_path / "small"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    assert "does not fit the model: it has ids up to 119" in refused(
        *PRUNE, model=tmp_path / "small"
    )


def test_evaluation_wants_a_trained_model(
    refused, tmp_path, tiny_bert, tiny_config, tiny_tokenizer
):
    length = ["--max_seq_length", "48", "--max_query_length", "16", "--do_eval"]
    assert "is a plain model without masks: fine-prune it first" in refused(*length)
    from transformers import BertModel

    BertModel(BertConfig(**tiny_config)).save_pretrained(tmp_path / "headless")
    tiny_tokenizer.save_pretrained(tmp_path / "headless")
    assert "has no trained BertForQuestionAnswering head" in refused(
        *length, model=tmp_path / "headless", model_type="bert"
    )

    masked = MaskedBertForQuestionAnswering(
        MaskedBertConfig(**tiny_config, pruning_method="magnitude")
    )
    masked.save_pretrained(tmp_path / "masked")
    tiny_tokenizer.save_pretrained(tmp_path / "masked")
    assert "masked checkpoint: give the type masked_bert" in refused(
        *length, model=tmp_path / "masked", model_type="bert"
    )
    assert "does not record the threshold" in refused(*length, model=tmp_path / "masked")
    assert "holds no scores" in refused(
        *length, "--pruning_method", "topK", "--final_threshold", ".5", model=tmp_path / "masked"
    )


def test_teachers_that_do_not_fit(refused, tmp_path, tiny_bert, tiny_config, tiny_tokenizer):
    teach = [*PRUNE, "--teacher_type", "bert", "--teacher_name_or_path"]
    BertForQuestionAnswering(BertConfig(**tiny_config | {"vocab_size": 130})).save_pretrained(
        tmp_path / "larger"
    )
    assert "vocab_size 130 against 120" in refused(*teach, tmp_path / "larger")
    BertForQuestionAnswering(BertConfig(**tiny_config, num_labels=3)).save_pretrained(
        tmp_path / "labels"
    )
    assert "num_labels 3 against 2" in refused(*teach, tmp_path / "labels")
    short = BertConfig(**tiny_config | {"max_position_embeddings": 40})
    BertForQuestionAnswering(short).save_pretrained(tmp_path / "short")
    tiny_tokenizer.save_pretrained(tmp_path / "short")
    assert "it takes 40 tokens, and 48 are needed" in refused(*teach, tmp_path / "short")
    shutil.copytree(tiny_bert, tmp_path / "words")
    for file in (tmp_path / "words").glob("tokenizer*"):
        file.unlink()
    words = list(tiny_tokenizer.get_vocab())
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(words[:5] + words[:4:-1]))
    assert "vocabularies differ" in refused(*teach, tmp_path / "words")


@pytest.mark.parametrize("sizes", [{"vocab_size": 128}, {"max_position_embeddings": 48}])
def test_teachers_of_other_sizes_that_fit(run, tmp_path, tiny_config, tiny_tokenizer, sizes):
    teacher = BertForQuestionAnswering(BertConfig(**tiny_config | sizes))
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    run(*PRUNE, "--teacher_type", "bert", "--teacher_name_or_path", tmp_path / "teacher")


def test_scores_of_a_masked_checkpoint_continue(run, tmp_path, caplog):
    """A flag of initial scores has no effect on the method's own, and its own on another's."""
    still = [*PRUNE, "--mask_scores_learning_rate", "1e-12", "--final_threshold", "0.5"]
    before = load_file(run(*still, "--mask_scale", "-1.5") / "model.safetensors")
    shutil.move(tmp_path / "out", tmp_path / "first")
    for method, value in (("topK", -1.5), ("l0", 2.197)):
        caplog.clear()
        flags = ["--pruning_method", method, "--mask_scale", "2.197", "--overwrite_output_dir"]
        out = run(*still, *flags, model=tmp_path / "first")
        for key, weight in load_file(out / "model.safetensors").items():
            if key.endswith("mask_scores"):
                assert torch.allclose(weight, torch.full_like(weight, value), atol=1e-6)
            assert weight.shape == before[key].shape
        assert json.loads((out / "config.json").read_text())["mask_scale"] == value
        kept = "the checkpoint's scores are kept; mask_scale has no effect"
        assert (kept in caplog.messages) == (method == "topK")
        assert ("start fresh" in caplog.text) == (method == "l0")


@pytest.mark.parametrize(
    "name, value", [("position_embedding_type", "relative_key"), ("num_hidden_layers", 1)]
)
def test_what_a_checkpoint_holds_and_no_model_computes(
    refused, run, tmp_path, tiny_bert, tiny_config, tiny_tokenizer, name, value, caplog
):
    def write(folder, model):
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        return folder

    plain = write(tmp_path / "plain", BertForQuestionAnswering(BertConfig(**tiny_config)))
    model = MaskedBertForQuestionAnswering(MaskedBertConfig(**tiny_config, threshold=0.5))
    masked = write(tmp_path / "masked", model)
    length = PRUNE[:4]
    said = [
        refused(*length, "--do_eval", model=plain, model_type="bert"),
        refused(*length, "--do_eval", model=masked),
        refused(*PRUNE, "--teacher_type", "bert", "--teacher_name_or_path", plain),
        refused("--serialization_dir", masked, script=counts_parameters, bare=True),
        refused("--model_name_or_path", masked, script=bertarize, bare=True),
        refused("pack", masked, tmp_path / "file", script=saving_prunebert, bare=True),
        refused("pack", plain, tmp_path / "file", script=saving_prunebert, bare=True),
    ]
    storage.pack(str(tiny_bert), str(tmp_path / "file"))
    said += [refused("verify", tmp_path / "file", plain, script=saving_prunebert, bare=True)]
    assert all("results would be wrong" in line for line in said)
    caplog.clear()
    run(*PRUNE, model=plain)
    assert sum("training goes on without it" in line for line in caplog.messages) == 1
    run(*length, "--do_eval", model=tmp_path / "out")


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "data"),
        ('{"data": [{"title": "t"}]}', "paragraphs"),
        ('{"data": [{"title": "t", "paragraphs": [{"qas": []}]}]}', "context"),
        ('{"data": []}', "no question"),
    ],
)
def test_data_that_is_not_squad(refused, tmp_path, content, said):
    (tmp_path / "bad.json").write_text(content)
    message = refused(*PRUNE, "--train_file", tmp_path / "bad.json")
    assert said in message and "bad.json" in message


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--train_file {} --do_eval", "--predict_file is missing: give it, or --data_dir"),
        ("--train_file {} --do_train --do_eval", "--predict_file is missing"),
        ("--predict_file {} --do_train", "--train_file is missing: give it, or --data_dir"),
        ("--predict_file {} --do_train --do_eval", "--train_file is missing"),
        ("--train_file {} --do_train --evaluate_during_training", "--predict_file is missing"),
    ],
)
def test_one_file_is_not_completed_from_the_hub(refused, flags, said, squad_dir, tmp_path):
    where = f"--model_type bert --model_name_or_path gone --output_dir {tmp_path}/out "
    flags = where + flags.format(squad_dir / "train-v1.1.json")
    assert said in refused(*flags.split(), bare=True)


def test_unanswerable_questions_want_their_flag(refused, squad_dir):
    assert "--version_2_with_negative" in refused(
        *PRUNE, "--train_file", squad_dir / "train-v2.0.json"
    )


@pytest.mark.parametrize(
    "script, flag",
    [(counts_parameters, "--serialization_dir"), (bertarize, "--model_name_or_path")],
)
def test_counting_and_bertarizing_refuse_what_is_not_masked(
    refused, script, flag, tmp_path, tiny_bert, tiny_config
):
    def said(*flags):
        return refused(*flags, script=script, bare=True)

    assert "is not a folder" in said(flag, tmp_path / "absent")
    assert "is a plain model" in said(flag, tiny_bert)
    model = MaskedBertForQuestionAnswering(MaskedBertConfig(**tiny_config))
    model.save_pretrained(tmp_path / "old")
    assert "does not record the threshold" in said(flag, tmp_path / "old")
    assert "must lie in [0, 1]" in said(flag, tmp_path / "old", "--threshold", "15")
    assert "did you mean 'topK'" in said(flag, tmp_path / "old", "--pruning_method", "topk")


def test_bertarize_replaces_its_own_folder_and_no_other(refused, tmp_path, tiny_config, capsys):
    model = MaskedBertForQuestionAnswering(MaskedBertConfig(**tiny_config, threshold=0.5))
    model.save_pretrained(tmp_path / "run")
    run = ["--model_name_or_path", str(tmp_path / "run")]
    target = bertarize.main(run)  # the folder is replaced as a whole: nothing stale stays in it
    (target / "vocab.txt").write_text("stale")
    assert bertarize.main(run) == target and not (target / "vocab.txt").exists()
    (target / "notes.md").write_text("mine")
    capsys.readouterr()
    assert "holds other files (notes.md)" in refused(*run, script=bertarize, bare=True)
    assert "is the checkpoint itself" in refused(
        *run, "--target_model_path", tmp_path / "run", script=bertarize, bare=True
    )


def test_a_contradicting_flag_is_used_with_a_warning(tmp_path, tiny_config, caplog):
    MaskedBertForQuestionAnswering(MaskedBertConfig(**tiny_config, threshold=0.5)).save_pretrained(
        tmp_path / "run"
    )
    counts = counts_parameters.main(
        ["--serialization_dir", str(tmp_path / "run"), "--threshold", "0.25"]
    )
    assert counts.linear_percent == pytest.approx(25)
    assert any("threshold 0.25 contradicts 0.5" in message for message in caplog.messages)


@pytest.mark.parametrize("script", ["count", "bertarize", "pack", "evaluate", "teach"])
@pytest.mark.parametrize("lacks", ["threshold", "head", "tokenizer"])
def test_messages_name_the_flags_of_their_own_script(
    refused, tmp_path, tiny_config, tiny_tokenizer, script, lacks
):
    model = MaskedBertForQuestionAnswering(MaskedBertConfig(**tiny_config, threshold=0.5))
    model.config.threshold = None if lacks == "threshold" else 0.5
    folder = tmp_path / "lacking"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    if lacks == "head":
        state = load_file(folder / "model.safetensors")
        del state["qa_outputs.weight"]
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    if lacks == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    flags, module = {
        "count": (["--serialization_dir", folder], counts_parameters),
        "bertarize": (["--model_name_or_path", folder], bertarize),
        "pack": (["pack", folder, tmp_path / "file"], saving_prunebert),
        "evaluate": ([*PRUNE[:4], "--do_eval"], None),
        "teach": (
            [*PRUNE, "--teacher_type", "masked_bert", "--teacher_name_or_path", folder],
            None,
        ),
    }[script]
    if (script, lacks) == ("count", "tokenizer"):
        return  # it needs none
    if module:
        said = refused(*flags, script=module, bare=True)
        named = set(re.findall(r"--\w+", said))
        known = "pruning_method threshold global_topk bits base_model".split()
        assert named <= {f"--{name}" for name in known}
    else:
        said = refused(*flags, **({"model": folder} if script == "evaluate" else {}))
        named = set(re.findall(r"--\w+", said))
        assert named <= {f"--{x}" for x in vars(masked_run_squad.get_parser().parse_args(SOME))}
    assert str(folder) in said


def test_an_interrupted_count_advises_no_flag_of_training(refused, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(counts_parameters, "load_masked", stop)
    with pytest.raises(SystemExit) as end:
        counts_parameters.main(["--serialization_dir", "x"])
    assert end.value.code == 130 and "--" not in capsys.readouterr().err
