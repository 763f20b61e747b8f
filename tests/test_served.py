"""What a folder's model and tokenizer answer, in other programs, is what the script computed."""

import pytest
import tiny
import torch
from tiny import TOKENIZERS, refusal, tokenizer_of, write_split
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import bertarize
from emmental.data.padding import padding_of
from emmental.models.families import FAMILIES
from emmental.models.inputs import input_names
from emmental.packing.pack import pack, unpack
from masked_run_glue import Glue, main

# Each family with a tokenizer of its own, and some with that of another.
PAIRS = [(kind, kind) for kind in TOKENIZERS]
PAIRS += [("bert", "roberta"), ("roberta", "bert"), ("modernbert", "bert"), ("albert", "mpnet")]


def model_of(kind, tokenizer):
    """A stock model whose outputs depend on token types, if it has them."""
    names = ("pad", "bos", "eos", "cls", "sep")
    settings = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    settings |= {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "initializer_range": 0.5}
    case = "deberta-v3" if kind == "deberta-v2" else kind
    return tiny.model_of(case, "SequenceClassification", max_position_embeddings=130, **settings)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Fine-prune a model on pairs; returns its folder, the pairs, and the script's outputs."""

    def run(model, tokenizer):
        tiny.save(model, tmp_path / "model", tokenizer)
        for split in ("train", "test"):
            write_split(tmp_path / f"{split}.tsv", "rte", 8, seed=5, test=split == "test")
        outputs = []
        monkeypatch.setattr(Glue, "submit", lambda self, split, logits, _: outputs.extend(logits))
        words = f"--task_name rte --data_dir {tmp_path} --output_dir {tmp_path / 'out'} --do_train"
        words += f" --model_name_or_path {tmp_path / 'model'} --model_type masked --do_predict"
        words += f" --cache_dir {tmp_path / 'cache'} --max_steps 2 --final_threshold 0.5 --no_cuda"
        main(words.split())
        rows = [line.split("\t") for line in (tmp_path / "test.tsv").read_text().splitlines()]
        logits = torch.stack([torch.from_numpy(row) for (row,) in outputs])
        return tmp_path / "out", [row[1:3] for row in rows[1:]], logits

    return run


@pytest.mark.parametrize("kind, vocabulary", PAIRS)
def test_a_folder_answers_as_the_script_did(trained, tmp_path, kind, vocabulary):
    tokenizer = tokenizer_of(vocabulary, padding_side="left")  # which shifts the positions of BERT
    out, pairs, wanted = trained(model_of(kind, tokenizer), tokenizer)
    convert = ["--model_name_or_path", str(out)]
    folders = [out, bertarize.main(convert), tmp_path / "unpacked"]
    if FAMILIES[kind].heads:
        folders.append(bertarize.main([*convert, "--compact"]))
    pack(str(out), str(tmp_path / "packed"), 32)
    unpack(str(tmp_path / "packed"), str(folders[2]))
    for folder in folders:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        served = AutoTokenizer.from_pretrained(folder)
        batch = served(*zip(*pairs), padding=True, return_tensors="pt")
        assert set(batch) == set(input_names(model))  # and of its ONNX file
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-4, rtol=1e-4)


def test_token_types_that_no_batch_has_are_refused():
    tokenizer = tokenizer_of("bert")
    backend, ids = tokenizer.backend_tokenizer, [("[CLS]", 2), ("[SEP]", 3)]
    frame = {"single": "[CLS] $A [SEP]", "pair": "[CLS]:0 $A:0 [SEP]:1 $B:1 [SEP]:1"}
    backend.post_processor = processors.TemplateProcessing(**frame, special_tokens=ids)
    said = refusal(padding_of, tokenizer, model_of("bert", tokenizer))
    assert "gives the token types [0, 0, 1, 1, 1] for two texts" in said
