"""A task of the tests alone, through all of `run`: names and places in a sentence, by token."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import NAMES, PLACES, model_of, same, save, tokenizer_of, weights
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, AutoTokenizer

from emmental.checkpoints.tokenizer import load_tokenizer
from emmental.data.padding import pad_batch
from emmental.losses import distillation_loss
from emmental.training import run
from emmental.training.task import Task

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--model_type masked_bert --do_train --do_eval --max_steps 6 --warmup_steps 1 "
    "--learning_rate 3e-3 --final_threshold 0.5 --logging_steps 3 --save_steps 3 "
    "--adam_epsilon 1e-4 --no_cuda"
)


class Tagging(Task):
    """Which words are names or places; the loss is a mean over words, not over sentences."""

    head, labels = "TokenClassification", ("other", "name", "place")
    max_seq_length, logging_steps, save_steps = 32, 10, 10
    result_files = ("eval_results.*", "tags_*.json")

    def add_arguments(self, parser):
        parser.add_argument("--sentences", type=int, default=20, help="how many there are")

    def load_examples(self, args, source):
        words = [name for pair in zip(NAMES, PLACES, strict=True) for name in pair]
        self.sentences = [
            [words[(n * k) % 16] if k % 3 else "lives" for k in range(2 + n % 5)]
            for n in range(args.sentences)
        ]

    def make_features(self, args, tokenizer, model):
        kinds = dict.fromkeys(NAMES, 1) | dict.fromkeys(PLACES, 2)
        rows = []
        for sentence in self.sentences:
            tags = [-100, *(kinds.get(word, 0) for word in sentence), -100]
            ids = tokenizer(sentence, is_split_into_words=True).input_ids
            rows.append({"input_ids": ids, "tags": tags, "length": len(tags)})
        self.train_set = Dataset.from_list(rows)
        self.evaluation_sets = {"dev": Dataset.from_list(rows[:7])}

    def collate(self, features):
        return pad_batch(features, columns={"tags": -100})

    def loss(self, logits, batch):
        return F.cross_entropy(logits[0].transpose(1, 2), batch["tags"])

    def distillation_loss(self, student, teacher, batch, temperature):
        words = batch["tags"] >= 0
        return distillation_loss((student[0][words],), (teacher[0][words],), temperature)

    def weight(self, batch):
        return float((batch["tags"] >= 0).sum())

    def score(self, split, logits, step, output_dir):
        features = self.evaluation_sets[split]
        rows = zip((row for (row,) in logits), features, strict=True)
        found = [row.argmax(-1)[: own["length"]].tolist() for row, own in rows]
        tags = [tag for row in features for tag in row["tags"]]
        pairs = [(a, b) for a, b in zip(sum(found, []), tags, strict=True) if b >= 0]
        (output_dir / f"tags_{'' if step is None else step}.json").write_text(json.dumps(found))
        return {"accuracy": sum(a == b for a, b in pairs) / len(pairs)}


def flags(tmp_path, model, name, more):
    return f"{FLAGS} --model_name_or_path {model} --output_dir {tmp_path / name} {more}".split()


@pytest.fixture
def tagger(tmp_path, tiny_bert):
    """The tiny BERT with an output for each tag, the same for every seed of a run."""
    torch.manual_seed(1)
    model = AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=3)
    model.config.id2label = dict(enumerate(Tagging.labels))
    model.config.label2id = {name: n for n, name in enumerate(Tagging.labels)}
    model.save_pretrained(tmp_path / "tagger")
    for file in tiny_bert.glob("tokenizer*"):
        (tmp_path / "tagger" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "tagger"


def test_it_trains_evaluates_and_resumes(tmp_path, tagger):
    more = (
        "--per_gpu_train_batch_size 3 --gradient_accumulation_steps 3 --evaluate_during_training "
        "--max_steps 30 --logging_steps 10 --save_steps 10 --alpha_ce 1 --alpha_distil 0.1 "
        f"--teacher_type bert --teacher_name_or_path {tagger}"
    )
    results = run.main(Tagging(), "Tags.", flags(tmp_path, tagger, "whole", more))
    assert results["accuracy"] > 0.5
    assert results["remaining_percent_linear"] == pytest.approx(50, abs=0.1)
    whole = tmp_path / "whole"
    assert {path.name for path in whole.glob("tags_*")} == {
        f"tags_{step}.json" for step in ("", 10, 20, 30)
    }
    labels = json.loads((whole / "config.json").read_text())["id2label"]
    assert labels == {"0": "other", "1": "name", "2": "place"}
    more = f"{more} --resume_from_checkpoint {whole / 'checkpoint-20'}"
    run.main(Tagging(), "Tags.", flags(tmp_path, tagger, "again", more))
    assert same(whole, tmp_path / "again")
    places = f"--model_name_or_path {whole} --output_dir {tmp_path / 'alone'}"
    alone = f"--model_type masked_bert --do_eval --no_cuda {places}".split()
    assert run.main(Tagging(), "Tags.", alone)["accuracy"] == results["accuracy"]


def test_words_weigh_alike_in_whatever_batch_they_are(tmp_path, tagger):
    """One batch of 20, and four of 5 accumulated: the same mean over all words."""
    size, accumulation = "--per_gpu_train_batch_size", "--gradient_accumulation_steps 4"
    teach = f"--alpha_hidden 1 --teacher_type bert --teacher_name_or_path {tagger}"
    run.main(Tagging(), "Tags.", flags(tmp_path, tagger, "one", f"{size} 20 {teach}"))
    parts = f"{size} 6 {accumulation} {teach}"
    run.main(Tagging(), "Tags.", flags(tmp_path, tagger, "parts", parts))
    one, other = (weights(tmp_path / name) for name in ("one", "parts"))
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


def test_examples_alone_would_weigh_otherwise(tmp_path, tagger):
    class Unweighted(Tagging):
        weight = None

    more = "--per_gpu_train_batch_size 3 --gradient_accumulation_steps 7"
    for name, task in ("words", Tagging), ("sentences", Unweighted):
        run.main(task(), "Tags.", flags(tmp_path, tagger, name, more))
    words, sentences = (weights(tmp_path / name) for name in ("words", "sentences"))
    assert any(not torch.allclose(words[name], sentences[name], rtol=1e-3) for name in words)


@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
def test_words_are_read_behind_a_space_as_in_a_text(tmp_path, kind):
    tokenizer = tokenizer_of(kind)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id")}
    model = model_of(kind, "TokenClassification", vocab_size=len(tokenizer), num_labels=3, **ids)
    save(model, tmp_path / "base", tokenizer)
    more = "--model_type masked"
    run.main(Tagging(), "Tags.", flags(tmp_path, tmp_path / "base", "out", more))
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    for tokens_of in load_tokenizer(str(tmp_path / "out")), served:
        words = tokens_of(["ada", "lives", "in", "oslo"], is_split_into_words=True)
        assert words.word_ids() == [None, 0, 1, 2, 3, None]  # each is one token
        assert words.input_ids == tokens_of("ada lives in oslo").input_ids


def test_columns_are_padded_like_tokens_or_like_words():
    features = [
        {"input_ids": [1, 2, 3], "tags": [4, 5, 6], "words": [7], "weights": [0.5]},
        {"input_ids": [1], "tags": [8], "words": [9, 9], "weights": [1.0]},
    ]
    columns = {"tags": -100, "words": -1, "weights": 0.0}
    batch = pad_batch(features, multiple_of=4, columns=columns)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [1, 0, 0, 0]]
    assert batch["tags"].tolist() == [[4, 5, 6, -100], [8, -100, -100, -100]]
    assert batch["words"].tolist() == [[7, -1], [9, 9]]
    assert batch["weights"].tolist() == [[0.5], [1.0]]
    assert not batch["token_type_ids"].any()
