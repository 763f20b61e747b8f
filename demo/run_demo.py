"""`make demo`: fine-prune a small BERT with three methods, through the scripts that a user would run.

    python demo/run_demo.py [--output_dir DIR]

Makes the data and a small pre-trained BERT (demo/make_data.py), fine-tunes the dense teacher, fine-prunes
with magnitude, movement and soft movement at about 10% remaining with distillation, counts, bertarizes,
and prints a table. Every command is shown as it is run.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COMMON = """--do_train --do_eval --do_lower_case --max_seq_length 96 --per_gpu_eval_batch_size 64
    --save_steps 0 --logging_steps 100"""
TEACHER = "--model_type bert --per_gpu_train_batch_size 32 --learning_rate 1e-3 --max_steps 600 --warmup_steps 50"
PRUNE = """--model_type masked_bert --per_gpu_train_batch_size 16 --learning_rate 2e-4 --max_steps 1500 --warmup_steps 100
    --initial_warmup 1 --final_warmup 4 --alpha_ce 0.1 --alpha_distil 0.9"""
METHODS = {
    "magnitude": "--pruning_method magnitude --initial_threshold 1 --final_threshold 0.1",
    "movement": "--pruning_method topK --initial_threshold 1 --final_threshold 0.1 --mask_scores_learning_rate 1e-2",
    "soft movement": """--pruning_method sigmoied_threshold --initial_threshold 0 --final_threshold 0.1
        --mask_scores_learning_rate 4e-2 --regularization l1 --final_lambda 380""",
}


def run(script: str, *flags: str) -> float:
    """Run one of the project's scripts and return its seconds; a failure ends the demo."""
    command = [sys.executable, str(ROOT / script), *flags]
    print("\n$ python " + shlex.join([script, *flags]), flush=True)
    started = time.perf_counter()
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"demo: {script} failed, see above")
    return time.perf_counter() - started


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=ROOT / "demo" / "run",
        help="emptied first, if a demo made it",
    )
    place = parser.parse_args().output_dir.resolve()
    started = time.perf_counter()
    if place.exists() and any(place.iterdir()) and not (place / "bert").is_dir():
        sys.exit(f"demo: {place} holds other things than a demo: choose another --output_dir")
    shutil.rmtree(place, ignore_errors=True)
    run("demo/make_data.py", "--output_dir", str(place))

    data = ["--train_file", str(place / "train.json"), "--predict_file", str(place / "dev.json")]
    data += [
        "--model_name_or_path",
        str(place / "bert"),
        "--cache_dir",
        str(place / "cache"),
        *COMMON.split(),
    ]
    teacher = place / "teacher"
    seconds = run("masked_run_squad.py", *TEACHER.split(), *data, "--output_dir", str(teacher))
    results = read(teacher / "eval_results.json")
    rows = [("dense", 100.0, results["exact"], results["f1"], seconds)]

    distil = ["--teacher_type", "bert", "--teacher_name_or_path", str(teacher)]
    for method, flags in METHODS.items():
        out = place / method.replace(" ", "_")
        seconds = run(
            "masked_run_squad.py",
            *PRUNE.split(),
            *flags.split(),
            *data,
            *distil,
            "--output_dir",
            str(out),
        )
        run(
            "counts_parameters.py",
            "--serialization_dir",
            str(out),
            "--json",
            str(out / "counts.json"),
        )
        run("bertarize.py", "--model_name_or_path", str(out))
        results = read(out / "eval_results.json")
        remaining = read(out / "counts.json")["remaining_percent_linear"]
        rows.append((method, remaining, results["exact"], results["f1"], seconds))

    print(
        f"\n| {'method':<13} | remaining % |    EM |    F1 | seconds |\n|{'-' * 15}|{'-' * 13}|{'-' * 7}|{'-' * 7}|{'-' * 9}|"
    )
    for method, remaining, exact, f1, seconds in rows:
        print(
            f"| {method:<13} | {remaining:>11.1f} | {exact:>5.1f} | {f1:>5.1f} | {seconds:>7.0f} |"
        )
    print(
        f"\nThe whole demo took {time.perf_counter() - started:.0f} s. Everything it made is in {place}:"
    )
    print(
        "the bertarized_* folders hold plain BERTs, for AutoModelForQuestionAnswering.from_pretrained."
    )


if __name__ == "__main__":
    main()
