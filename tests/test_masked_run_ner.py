"""masked_run_ner.py as a user runs it: train, evaluate, predict, and what follows."""

import json
import random

import datasets
import pytest
import torch
from seqeval.metrics import f1_score
from tiny import (
    NAMES,
    PLACES,
    RUNS,
    TOPK,
    edit,
    model_of,
    plain_bert,
    read,
    same,
    save,
    scalars,
    tokenizer_of,
    weights,
    write,
)
from transformers import pipeline

import bertarize
import counts_parameters
import masked_run_ner
import saving_prunebert
from paper.report import headline
from paper.runs import find_runs

TRAIN = f"{TOPK} --do_train --max_steps 8 --warmup_steps 2 --save_steps 0 --logging_steps 4"
SIZES = "--max_seq_length 12 --per_gpu_train_batch_size 4 --no_cuda"
DENSE = "--model_type dense"
ALL = "--do_eval --do_predict"
PARTS = dict(enumerate(["NOUN", "VERB", "ADP", "PUNCT"]))
LEARN = f"{DENSE} --do_train --max_steps 40 --learning_rate 3e-3 --save_steps 0"


def sentences(count, seed, tag=str):
    """'ada lives in oslo . who is in rome rome ?' with the tags of names and places."""
    rng = random.Random(seed)
    for _ in range(count):
        words, tags = [], []
        for _ in range(rng.randint(1, 3)):
            place = rng.sample(PLACES, rng.randint(1, 2))
            words += [rng.choice(NAMES), "lives", "in", *place, "."]
            tags += ["B-name", "O", "O", "B-place", *["I-place"] * (len(place) - 1), "O"]
        yield words, [tag(x) for x in tags]


def columns(rows, separator="\t"):
    lines = ("".join(f"{w}{separator}{t}\n" for w, t in zip(*row)) for row in rows)
    return "-DOCSTART- O\n\n" + "\n".join(lines)


@pytest.fixture(scope="session")
def ner_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ner")
    for seed, (split, count) in enumerate({"train": 24, "valid": 9}.items()):
        write(folder / f"{split}.conll", columns(sentences(count, seed)))
    words = "\n".join("".join(f"{word}\n" for word in row) for row, _ in sentences(5, 2))
    write(folder / "test.txt", words)
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tiny_bert, ner_dir):
    """The folder of a fine-pruned model, with its results and predictions."""
    folder = tmp_path_factory.mktemp("pruned")
    flags = f"--model_type masked --model_name_or_path {tiny_bert} --output_dir {folder / 'out'}"
    flags += f" --cache_dir {folder / 'cache'} --data_dir {ner_dir} {SIZES} {TRAIN} {ALL}"
    masked_run_ner.main(flags.split())
    return folder / "out"


@pytest.fixture
def command(tmp_path, tiny_bert, ner_dir):
    """The command line of a run, in the folder `output`; later flags win."""

    def call(*words, output="out", model=tiny_bert, data=ner_dir):
        flags = f"--model_type masked --model_name_or_path {model} --cache_dir {tmp_path / 'cache'}"
        flags += f" --output_dir {tmp_path / output} {SIZES}"
        flags += f" --data_dir {data}" if data else ""
        return f"{flags} {' '.join(words)}".split()

    return call


@pytest.fixture
def run(command, tmp_path):
    def call(*words, output="out", **options):
        masked_run_ner.main(command(*words, output=output, **options))
        return tmp_path / output

    return call


def results(folder):
    return read(folder / "eval_results.json")


def tagged(path):
    """The rows of a file of columns, by sentence."""
    parts = path.read_text().split("\n\n")
    return [[row.split("\t") for row in part.splitlines()] for part in parts if part]


def test_trains_evaluates_and_predicts(pruned, ner_dir):
    names = """README.md config.json model.safetensors tokenizer.json tokenizer_config.json
        training_args.json training_summary.json eval_results.txt eval_results.json
        predictions.txt""".split()
    files = {file.name for file in pruned.iterdir()}
    assert {name for name in files if not name.startswith("events.out.tfevents")} == {*names}
    labels = [*read(pruned / "config.json")["id2label"].values()]
    assert labels == ["B-name", "B-place", "I-place", "O"]
    assert {"precision", "recall", "f1", "f1_name", "recall_place"} <= results(pruned).keys()
    rows = tagged(pruned / "predictions.txt")
    assert [[word for word, _ in row] for row in rows] == [row for row, _ in sentences(5, 2)]
    counts = counts_parameters.main(["--serialization_dir", str(pruned)])
    assert counts.linear_percent == pytest.approx(results(pruned)["remaining_percent_linear"])
    card = (pruned / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card and "masked_run_ner.py" in card

    runs, left_out = find_runs(str(pruned))
    assert not left_out and runs[0].task == f"ner-{ner_dir.name}"
    assert runs[0].metrics == {"f1": pytest.approx(100 * results(pruned)["f1"])}
    assert headline(runs)[1][0].startswith(f"ner-{ner_dir.name} (f1)")


def test_plain_packed_and_onnx_models_predict_the_same(run, pruned, tmp_path, ner_dir, capsys):
    plain = tmp_path / "plain"
    words = ["--model_name_or_path", str(pruned), "--target_model_path", str(plain)]
    bertarize.main(words)
    onnx = tmp_path / "model.onnx"
    bertarize.main(["--model_name_or_path", str(plain), "--onnx", str(onnx)])
    assert not (tmp_path / "bertarized_plain").exists()  # it is plain already
    by_onnx = run(ALL, f"--onnx_file {onnx}", model=pruned, output="onnx")
    sparse = run(ALL, "--sparse_inference", model=pruned, output="sparse")
    alone = run(DENSE, ALL, model=plain, output="alone")
    for folder in (by_onnx, sparse, alone):
        same_results(folder, pruned)
    tagger = pipeline("token-classification", model=str(plain))
    labels = {*read(plain / "config.json")["label2id"]}
    assert {entry["entity"] for entry in tagger("ada lives in oslo .")} <= labels

    file = str(tmp_path / "packed")
    assert saving_prunebert.main(["pack", str(pruned), file, "--bits", "32"]) == 0
    capsys.readouterr()
    assert saving_prunebert.main(["verify", file, str(pruned), "--data_dir", str(ner_dir)]) == 0
    printed, f1 = capsys.readouterr().out, f"{results(pruned)['f1']:.4g}"
    assert "all masks are equal" in printed and f"f1: {f1} checkpoint, {f1} packed" in printed


def same_results(folder, other):
    ours, theirs = results(folder), results(other)
    assert ours == pytest.approx({name: theirs[name] for name in ours})
    assert (folder / "predictions.txt").read_text() == (other / "predictions.txt").read_text()


def test_a_model_learns_and_its_metrics_are_those_of_seqeval(run, tmp_path, ner_dir):
    """Of sentences that are longer than a window; a test set with tags is scored."""
    data = tmp_path / "tagged"
    data.mkdir()
    write(data / "train.jsonl", "".join(map(line, sentences(24, 0))))
    for split in ("dev", "test"):
        write(data / f"{split}.txt", columns(sentences(9, 1), " "))
    out = run(LEARN, ALL, data=data)
    assert results(out)["f1"] > 0.9
    rows = tagged(out / "predictions.txt")
    gold, predicted = ([[row[place] for row in part] for part in rows] for place in (1, 2))
    assert gold == [tags for _, tags in sentences(9, 1)]
    test = read(out / "test_results.json")
    assert test == {name: results(out)[name] for name in test}
    assert test["f1"] == pytest.approx(f1_score(gold, predicted))
    alone = run(DENSE, ALL, model=out, output="alone", data=ner_dir)  # the labels are the model's
    assert results(alone) == pytest.approx(results(out))
    assert not (alone / "test_results.json").exists()


def line(row, names=("tokens", "ner_tags")):
    return json.dumps(dict(zip(names, row))) + "\n"


def test_tags_that_are_no_entities_have_an_accuracy(run, tmp_path):
    kinds = {"O": 0, "B-name": 1, "B-place": 2, "I-place": 10}
    for seed, split in enumerate(("train", "dev")):
        rows = sentences(24 - seed, seed, kinds.get)
        write(tmp_path / f"{split}.jsonl", "".join(line(row, ("words", "tags")) for row in rows))
    out = run(LEARN, "--do_eval", data=tmp_path)
    assert results(out).keys() == {"acc"} and results(out)["acc"] > 0.9
    assert list(read(out / "config.json")["id2label"].values()) == ["0", "1", "2", "10"]
    edit(out / "config.json", "id2label", "label2id", num_labels=4)  # the names are in order
    alone = run(DENSE, "--do_eval", model=out, output="alone", data=tmp_path)
    assert results(alone) == pytest.approx(results(out))


@pytest.mark.parametrize("case", ["roberta", "albert", "deberta-v3", "modernbert"])
def test_other_families_and_their_tokenizers(run, tmp_path, case):
    kind = {"deberta-v3": "deberta-v2"}.get(case, case)
    tokenizer = tokenizer_of(kind)
    model = model_of(case, vocab_size=len(tokenizer))
    source = save(model, tmp_path / "source", tokenizer)
    out = run(TRAIN, ALL, model=source)
    assert results(out)["remaining_percent_linear"] == pytest.approx(20, abs=0.1)
    plain = bertarize.main(["--model_name_or_path", str(out)])
    same_results(run(DENSE, ALL, model=plain, output="alone"), out)


def test_distillation_is_of_words_and_hidden_states(run):
    teacher = run(LEARN, output="teacher")
    teach = f"--teacher_type dense --teacher_name_or_path {teacher} --alpha_distil 0.9"
    teach += " --alpha_ce 0.1 --alpha_hidden 0.3 --logging_steps 1"
    curves = scalars(run(TRAIN, RUNS["sigmoied_threshold"], teach))
    last = {tag: list(values.values())[-1] for tag, values in curves.items()}
    assert last["loss/distil"] > 1e-4 and last["loss/hidden"] > 1e-4
    expected = 0.9 * last["loss/distil"] + 0.1 * last["loss/task"] + 0.3 * last["loss/hidden"]
    expected += last["lambda"] * last["loss/penalty"]
    assert last["loss"] == pytest.approx(expected, rel=1e-4)


def test_losses_are_means_over_words():
    task, torch_seed = masked_run_ner.Tagging(), torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 6, 3, generator=torch_seed)
    tags = torch.tensor([[-100, 1, -100, 2, 0, -100], [-100, 0, *[-100] * 4]])
    words, batch = tags >= 0, {"tags": tags}
    assert task.weight(batch) == 4
    expected = torch.nn.functional.cross_entropy(student[words], tags[words])
    torch.testing.assert_close(task.loss((student,), batch), expected)
    logs = [(logits[words] / 2).log_softmax(-1) for logits in (student, teacher)]
    expected = 4 * (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean()
    loss = task.distillation_loss((student,), (teacher,), batch, 2.0)
    torch.testing.assert_close(loss, expected)


def test_two_processes_reach_the_weights_of_one(run, command, on_two_ranks, tmp_path, pruned):
    """Whatever number of words each has."""
    teach = f"--alpha_hidden 1 --teacher_type masked --teacher_name_or_path {pruned}"
    flags = f"{TRAIN} {ALL} {teach} --check_ranks"
    two = command(flags, "--per_gpu_train_batch_size 2", output="two")
    on_two_ranks(["masked_run_ner", *two])
    one = run(flags, output="one")
    torch.testing.assert_close(weights(tmp_path / "two"), weights(one), rtol=1e-3, atol=1e-5)
    same_results(tmp_path / "two", one)


def test_resume_is_bit_identical(run):
    flags = TRAIN, "--gradient_accumulation_steps 2 --save_steps 4"
    more = "--do_eval --eval_all_checkpoints --evaluate_during_training"
    whole = run(*flags, more, output="whole")
    assert {"f1", "f1_4", "f1_8", "f1_name_4"} <= results(whole).keys()
    assert scalars(whole)["eval/f1"][4] == pytest.approx(results(whole)["f1_4"])
    resumed = run(*flags, f"--resume_from_checkpoint {whole / 'checkpoint-4'}", output="resumed")
    assert same(whole, resumed)


def test_a_compact_model_predicts_the_same(run):
    out = run(TRAIN, "--granularity structure", ALL)
    compact = bertarize.main(["--model_name_or_path", str(out), "--compact"])
    same_results(run(DENSE, ALL, model=compact, output="alone"), out)


def test_the_hub_is_asked_when_there_is_no_data_dir(run, hub):
    names = datasets.ClassLabel(names=["O", "B-name", "B-place", "I-place"])
    kinds = {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)}
    rows = dict(zip(kinds, zip(*sentences(8, 0, names.str2int))))
    asked = hub(datasets.Dataset.from_dict(rows, datasets.Features(kinds)))
    place = "--dataset_name people --dataset_config en"
    out = run(place, TRAIN, ALL, data=None)
    found = sorted((*names, options["split"]) for names, options in asked)
    assert found == [("people", "en", x) for x in ("test", "train", "validation")]
    assert "datasets:\n- people" in (out / "README.md").read_text()
    assert read(out / "test_results.json")["f1"] == results(out)["f1"]


def test_refuses_what_does_not_fit(command, refused, tmp_path, tiny_bert, tiny_tokenizer, ner_dir):
    def says(*words, **options):
        return refused(masked_run_ner.main, command(*words, **options))

    assert "give --data_dir, or --dataset_name" in says(ALL, data=None)
    assert "give --data_dir, or --dataset_name" in says(ALL, "--dataset_name x")
    assert "--dataset_config needs --dataset_name" in says(ALL, "--dataset_config x")
    assert "must hold exactly one file train.*" in says(TRAIN, data=tmp_path)
    assert "--max_seq_length is 2, but must be at least 3" in says(TRAIN, "--max_seq_length 2")
    other = plain_bert("TokenClassification", id2label=PARTS)
    other = save(other, tmp_path / "other", tiny_tokenizer)
    said = says(DENSE, "--do_eval", model=other)
    assert "valid.conll: has the tags B-name, B-place, I-place, O" in said
    assert "the model NOUN, VERB, ADP, PUNCT: give a model and files of the same task" in said
    teach = f"--teacher_type dense --teacher_name_or_path {other}"
    assert "has the labels NOUN, VERB, ADP, PUNCT, but those of the task are" in says(TRAIN, teach)
    assert "the model has 2 outputs without names" in says(DENSE, "--do_eval", model=tiny_bert)
    (tmp_path / "bad").mkdir()
    write(tmp_path / "bad" / "train.conll", "a\tB-x\nb\tPER\n\nc\tO\n")
    said = says(TRAIN, data=tmp_path / "bad")
    assert "train.conll:1: its sentence has the tag 'PER'" in said
    assert not (tmp_path / "out").exists()


def test_other_labels_start_a_fresh_head_and_are_not_compared_in_a_test_set(
    run, tmp_path, tiny_tokenizer, caplog
):
    other = plain_bert("TokenClassification", id2label=PARTS)
    other = save(other, tmp_path / "other", tiny_tokenizer)
    out = run(TRAIN, model=other)
    assert "has other labels (NOUN, VERB, ADP, PUNCT): it starts fresh" in caplog.text
    write(tmp_path / "test.conll", "ada\tNOUN\nlives\tVERB\n")
    (tmp_path / "alone").mkdir()
    write(tmp_path / "alone" / "test_results.json", "{}")  # of another test set: it goes
    alone = run("--do_predict", model=out, data=tmp_path, output="alone")
    assert "test.conll: has the tags NOUN, VERB, and the model B-name" in caplog.text
    assert [file.name for file in alone.iterdir()] == ["predictions.txt"]
