"""What short runs end with, bit for bit: a change of the code's shape must change none of it.

`golden.json` holds the metrics of each run, and hash, norm and sum of each tensor of the final
model. On the processor and torch that recorded them, the hashes must be equal. Elsewhere, rounding
differs, and the norms, sums and metrics must agree within a tolerance. After a change that is meant
to change them, record them again with

    RECORD_GOLDEN=1 python -m pytest tests/test_golden.py -k record
"""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

import masked_run_glue
import masked_run_squad
from emmental.system.hardware import processor_name

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
HERE = {
    "processor": f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}",
    "torch": torch.__version__,
}

COMMON = [
    *"--model_type masked_bert --do_lower_case --do_train --do_eval".split(),
    *"--max_steps 10 --warmup_steps 2 --save_steps 0 --logging_steps 4".split(),
    *"--no_cuda --learning_rate 1e-3 --mask_scores_learning_rate 3e-2".split(),
    *"--weight_decay 0.01 --mask_init uniform --mask_scale 0.1".split(),
    *"--max_seq_length 48".split(),
]
SQUAD = ["--max_query_length", "16", "--doc_stride", "16"]
TOPK = ["--pruning_method", "topK", "--final_threshold", "0.2"]
SOFT = [
    *"--pruning_method sigmoied_threshold --initial_threshold 0".split(),
    *"--final_threshold 0.45 --regularization l1 --target_remaining 0.4".split(),
    *"--mask_scores_learning_rate 0.1".split(),
]
L0 = [
    *"--pruning_method l0 --initial_threshold 1 --final_threshold 1".split(),
    *"--mask_init constant --mask_scale -0.5 --regularization l0".split(),
    *"--mask_scores_learning_rate 0.5".split(),
]
GLOBAL = ["--global_topk", "--global_topk_frequency_compute", "3"]
# Batches of 3, 5 and 6: not powers of two, so that a wrong weight shows in the rounding.
SQUAD_RUNS = {
    "movement": [
        *TOPK,
        *"--per_gpu_train_batch_size 3 --gradient_accumulation_steps 2 distilled".split(),
    ],
    "movement, global": [*TOPK, *GLOBAL, "--per_gpu_train_batch_size", "5"],
    "movement, bf16": [*TOPK, "--per_gpu_train_batch_size", "5", "--bf16", "distilled"],
    "threshold": [
        *"--pruning_method threshold --initial_threshold -0.2".split(),
        *"--final_threshold 0.05 --per_gpu_train_batch_size 6".split(),
    ],
    "threshold, global": [
        *"--pruning_method threshold --final_threshold 0.2".split(),
        *GLOBAL,
        *"--regularization l1 --final_lambda 3 --per_gpu_train_batch_size 5".split(),
    ],
    "soft movement, steered": [
        *SOFT,
        *"--per_gpu_train_batch_size 5 --gradient_accumulation_steps 3 distilled".split(),
    ],
    "magnitude": [
        *"--pruning_method magnitude --final_threshold 0.2".split(),
        *"--per_gpu_train_batch_size 3 --gradient_accumulation_steps 3".split(),
    ],
    "magnitude, global": [
        *"--pruning_method magnitude --final_threshold 0.2".split(),
        *GLOBAL,
        "--per_gpu_train_batch_size",
        "5",
    ],
    "l0": [
        *L0,
        *"--final_lambda 20 --per_gpu_train_batch_size 3".split(),
        *"--gradient_accumulation_steps 2".split(),
    ],
    "l0, steered": [*L0, *"--target_remaining 0.5 --per_gpu_train_batch_size 6 distilled".split()],
    "dense": [
        *"--model_type bert --per_gpu_train_batch_size 5".split(),
        *"--gradient_accumulation_steps 2".split(),
    ],
}
GLUE_RUNS = {
    "sst-2": [
        *TOPK,
        *"--task_name sst-2 --per_gpu_train_batch_size 5".split(),
        *"--gradient_accumulation_steps 2 distilled".split(),
    ],
    "regression": [
        *SOFT,
        *"--task_name custom --regression --text_pair_column second".split(),
        *"--per_gpu_train_batch_size 3 distilled".split(),
    ],
}
TWO_RANKS = {
    "movement, two ranks": [
        *TOPK,
        *"--per_gpu_train_batch_size 3 --gradient_accumulation_steps 2 distilled".split(),
    ],
    "l0, two ranks": [*L0, "--final_lambda", "20", "--per_gpu_train_batch_size", "5"],
}


@pytest.fixture(scope="session")
def places(tmp_path_factory, tiny_config, tiny_tokenizer, squad_dir):
    """A folder with models, teachers and data, for the outputs of the runs too."""
    folder = tmp_path_factory.mktemp("golden")
    heads = {
        "squad": (BertForQuestionAnswering, {}),
        "sst-2": (BertForSequenceClassification, {"num_labels": 2}),
        "regression": (
            BertForSequenceClassification,
            {"num_labels": 1, "problem_type": "regression"},
        ),
    }
    for seed, (name, (head, labels)) in enumerate(heads.items()):
        for role in "model", "teacher":
            torch.manual_seed(2 * seed + (role == "teacher"))
            head(BertConfig(**tiny_config, **labels, initializer_range=0.2)).save_pretrained(
                folder / f"{name}_{role}"
            )
            tiny_tokenizer.save_pretrained(folder / f"{name}_{role}")
    words = "ada ben cleo dan eva finn gus hana oslo rome lima kyoto cairo".split()
    for split, rows in ("train", 23), ("dev", 11):
        texts = [" ".join(words[(n * k) % 13] for k in range(1, 3 + n % 4)) for n in range(rows)]
        for name, header, cells in (
            ("sst-2", "sentence\tlabel", [f"{text}\t{n % 3 % 2}" for n, text in enumerate(texts)]),
            (
                "regression",
                "text\tsecond\tlabel",
                [f"{text}\t{words[n % 13]}\t{n % 5 / 2}" for n, text in enumerate(texts)],
            ),
        ):
            (folder / f"{name}_data").mkdir(exist_ok=True)
            (folder / f"{name}_data" / f"{split}.tsv").write_text(
                "\n".join([header, *cells]) + "\n"
            )
    (folder / "squad_data").symlink_to(squad_dir)
    return folder


def command(places, task, name, flags):
    """The flags of a run, and its output folder."""
    output = places / "out" / name.replace(", ", "_").replace(" ", "_")
    teacher = (
        ["--teacher_type", "bert", "--teacher_name_or_path", f"{places}/{task}_teacher"]
        if "distilled" in flags
        else []
    )
    flags = [
        *COMMON,
        *(flag for flag in flags if flag != "distilled"),
        *teacher,
        *(SQUAD if task == "squad" else []),
    ]
    paths = {
        "model_name_or_path": f"{task}_model",
        "data_dir": f"{task}_data",
        "cache_dir": "cache",
    }
    flags += [word for flag, path in paths.items() for word in (f"--{flag}", f"{places}/{path}")]
    return [*flags, "--output_dir", str(output)], output


def fingerprint(output):
    """Metrics of a run, and of each tensor of its model that is trained: hash, norm and sum."""
    results = json.loads((output / "eval_results.json").read_text())
    tensors = {}
    for name, tensor in sorted(load_file(output / "model.safetensors").items()):
        if ".embeddings." not in name:
            norm, total = (
                f"{value.item():.9g}" for value in (tensor.double().norm(), tensor.double().sum())
            )
            tensors[name] = [hashlib.sha256(tensor.numpy()).hexdigest()[:12], norm, total]
    return {"results": results, "tensors": tensors}


def check(name, found):
    golden = json.loads(GOLDEN.read_text())
    expected = golden["runs"][name]
    if golden["here"] == HERE:
        assert found == expected
        return
    assert found["results"] == pytest.approx(expected["results"], rel=1e-3, abs=1e-3)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for tensor, (_, norm, total) in expected["tensors"].items():
        values = [float(value) for value in found["tensors"][tensor][1:]]
        assert values == pytest.approx(
            [float(norm), float(total)], rel=1e-3, abs=1e-3 * float(norm)
        ), tensor


def run_alone(places, task, name, flags):
    flags, output = command(places, task, name, flags)
    (masked_run_squad if task == "squad" else masked_run_glue).main(flags)
    return fingerprint(output)


def run_two_ranks(places, on_two_ranks):
    made = {name: command(places, "squad", name, flags) for name, flags in TWO_RANKS.items()}
    on_two_ranks(*(flags for flags, _ in made.values()))
    return {name: fingerprint(output) for name, (_, output) in made.items()}


@pytest.mark.parametrize("name", SQUAD_RUNS)
def test_squad_runs(places, name):
    check(name, run_alone(places, "squad", name, SQUAD_RUNS[name]))


@pytest.mark.parametrize("name", GLUE_RUNS)
def test_glue_runs(places, name):
    check(name, run_alone(places, name, name, GLUE_RUNS[name]))


def test_two_ranks(places, on_two_ranks):
    for name, found in run_two_ranks(places, on_two_ranks).items():
        check(name, found)


@pytest.mark.skipif("RECORD_GOLDEN" not in os.environ, reason="records the values, when asked to")
def test_record(places, on_two_ranks):
    runs = {name: run_alone(places, "squad", name, flags) for name, flags in SQUAD_RUNS.items()}
    runs |= {name: run_alone(places, name, name, flags) for name, flags in GLUE_RUNS.items()}
    runs |= run_two_ranks(places, on_two_ranks)
    lines = [f" {json.dumps(name)}: {json.dumps(found)}" for name, found in runs.items()]
    GOLDEN.write_text(f'{{"here": {json.dumps(HERE)},\n"runs": {{\n' + ",\n".join(lines) + "\n}}\n")
