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
import tiny
import torch
from tiny import SIZES, TOGETHER, read, weights
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

import masked_run_glue
import masked_run_squad
from emmental.system.hardware import processor_name

GOLDEN = Path(__file__).with_name("golden.json")
HERE = {
    "processor": f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}",
    "torch": torch.__version__,
}

COMMON = """--model_type masked_bert --do_lower_case --do_train --do_eval --max_steps 10
    --warmup_steps 2 --save_steps 0 --logging_steps 4 --no_cuda --learning_rate 1e-3
    --mask_scores_learning_rate 3e-2 --weight_decay 0.01
    --mask_init uniform --mask_scale 0.1 --max_seq_length 48"""
SQUAD = "--max_query_length 16 --doc_stride 16"
TOPK = "--pruning_method topK --final_threshold 0.2"
MAGNITUDE = "--pruning_method magnitude --final_threshold 0.2"
THRESHOLD = "--pruning_method threshold"
SOFT = """--pruning_method sigmoied_threshold --initial_threshold 0 --final_threshold 0.45
    --regularization l1 --target_remaining 0.4 --mask_scores_learning_rate 0.1"""
L0 = """--pruning_method l0 --initial_threshold 1 --final_threshold 1 --mask_init constant
    --mask_scale -0.5 --regularization l0 --mask_scores_learning_rate 0.5"""
BATCH, PARTS = "--per_gpu_train_batch_size", "--gradient_accumulation_steps"
# Batches of 3, 5 and 6: not powers of two, so that a wrong weight shows in the rounding.
SQUAD_RUNS = {
    "movement": f"{TOPK} {BATCH} 3 {PARTS} 2 distilled",
    "movement, global": f"{TOPK} {TOGETHER} {BATCH} 5",
    "movement, bf16": f"{TOPK} {BATCH} 5 --bf16 distilled",
    "threshold": f"{THRESHOLD} --initial_threshold -0.2 --final_threshold 0.05 {BATCH} 6",
    "threshold, global": f"{THRESHOLD} --final_threshold 0.2 {TOGETHER} --regularization l1 "
    f"--final_lambda 3 {BATCH} 5",
    "soft movement, steered": f"{SOFT} {BATCH} 5 {PARTS} 3 distilled",
    "magnitude": f"{MAGNITUDE} {BATCH} 3 {PARTS} 3",
    "magnitude, global": f"{MAGNITUDE} {TOGETHER} {BATCH} 5",
    "l0": f"{L0} --final_lambda 20 {BATCH} 3 {PARTS} 2",
    "l0, steered": f"{L0} --target_remaining 0.5 {BATCH} 6 distilled",
    "dense": f"--model_type bert {BATCH} 5 {PARTS} 2",
}
CUSTOM = "--task_name custom --regression --text_pair_column second"
GLUE_RUNS = {
    "sst-2": f"{TOPK} --task_name sst-2 {BATCH} 5 {PARTS} 2 distilled",
    "regression": f"{SOFT} {CUSTOM} {BATCH} 3 distilled",
}
TWO_RANKS = {
    "movement, two ranks": f"{TOPK} {BATCH} 3 {PARTS} 2 distilled",
    "l0, two ranks": f"{L0} --final_lambda 20 {BATCH} 5",
}


@pytest.fixture(scope="session")
def places(tmp_path_factory, tiny_tokenizer, squad_dir):
    """A folder with models, teachers and data, for the outputs of the runs too."""
    folder = tmp_path_factory.mktemp("golden")
    regression = {"num_labels": 1, "problem_type": "regression"}
    heads = {
        "squad": (BertForQuestionAnswering, {}),
        "sst-2": (BertForSequenceClassification, {"num_labels": 2}),
        "regression": (BertForSequenceClassification, regression),
    }
    for seed, (name, (head, labels)) in enumerate(heads.items()):
        for role in "model", "teacher":
            torch.manual_seed(2 * seed + (role == "teacher"))
            model = head(BertConfig(**SIZES, **labels, initializer_range=0.2))
            tiny.save(model, folder / f"{name}_{role}", tiny_tokenizer)
    words = "ada ben cleo dan eva finn gus hana oslo rome lima kyoto cairo".split()
    for split, rows in ("train", 23), ("dev", 11):
        texts = [" ".join(words[(n * k) % 13] for k in range(1, 3 + n % 4)) for n in range(rows)]
        classes = [f"{text}\t{n % 3 % 2}" for n, text in enumerate(texts)]
        pairs = [f"{text}\t{words[n % 13]}\t{n % 5 / 2}" for n, text in enumerate(texts)]
        for name, lines in (
            ("sst-2", ["sentence\tlabel", *classes]),
            ("regression", ["text\tsecond\tlabel", *pairs]),
        ):
            (folder / f"{name}_data").mkdir(exist_ok=True)
            (folder / f"{name}_data" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "squad_data").symlink_to(squad_dir)
    return folder


def command(places, task, name, flags):
    """The flags of a run, and its output folder."""
    output = places / "out" / name.replace(", ", "_").replace(" ", "_")
    teacher = f"--teacher_type bert --teacher_name_or_path {places}/{task}_teacher"
    flags = f"{COMMON} {flags.replace('distilled', teacher)} {SQUAD if task == 'squad' else ''}"
    flags += f" --model_name_or_path {places}/{task}_model --data_dir {places}/{task}_data"
    return f"{flags} --cache_dir {places}/cache --output_dir {output}".split(), output


def fingerprint(output):
    """Metrics of a run, and of each tensor of its model that is trained: hash, norm and sum."""
    tensors = {}
    for name, tensor in sorted(weights(output).items()):
        if ".embeddings." not in name:
            sums = tensor.double().norm(), tensor.double().sum()
            digest = hashlib.sha256(tensor.numpy()).hexdigest()[:12]
            tensors[name] = [digest, *(f"{value.item():.9g}" for value in sums)]
    return {"results": read(output / "eval_results.json"), "tensors": tensors}


def check(name, found):
    golden = read(GOLDEN)
    expected = golden["runs"][name]
    if golden["here"] == HERE:
        assert found == expected
        return
    assert found["results"] == pytest.approx(expected["results"], rel=1e-3, abs=1e-3)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for tensor, (_, norm, total) in expected["tensors"].items():
        values = [float(value) for value in found["tensors"][tensor][1:]]
        wanted = pytest.approx([float(norm), float(total)], rel=1e-3, abs=1e-3 * float(norm))
        assert values == wanted, tensor


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
