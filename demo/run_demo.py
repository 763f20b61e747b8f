"""`make demo`: fine-prune a small BERT with three methods, through the scripts that users run.

    python demo/run_demo.py [--output_dir DIR]

Makes the data and a small pre-trained BERT (demo/make_data.py), fine-tunes a dense teacher, and
fine-prunes with magnitude, movement and soft movement to about 10% remaining, with distillation.
Then counts the remaining weights of the last, bertarizes it, and prints a table. Every command is
shown before it runs.
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
TEACHER = """--model_type bert --per_gpu_train_batch_size 32 --learning_rate 1e-3 --max_steps 600
    --warmup_steps 50"""
PRUNE = """--model_type masked_bert --per_gpu_train_batch_size 16 --learning_rate 2e-4
    --max_steps 1500 --warmup_steps 100 --initial_warmup 1 --final_warmup 4
    --alpha_ce 0.1 --alpha_distil 0.9"""
METHODS = {
    "magnitude": "--pruning_method magnitude --initial_threshold 1 --final_threshold 0.1",
    "movement": """--pruning_method topK --initial_threshold 1 --final_threshold 0.1
        --mask_scores_learning_rate 1e-2""",
    "soft movement": """--pruning_method sigmoied_threshold --initial_threshold 0
        --final_threshold 0.1 --mask_scores_learning_rate 4e-2 --regularization l1
        --final_lambda 380""",
}
HEADER = """
| method        | remaining % |    EM |    F1 | seconds |
|---------------|-------------|-------|-------|---------|"""


def run(script: str, *flags: str) -> float:
    """Run a script of the project and return its seconds. A failure ends the demo."""
    command = [sys.executable, str(ROOT / script), *flags]
    print("\n$ python " + shlex.join([script, *flags]), flush=True)
    started = time.perf_counter()
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"demo: {script} failed; see its output above")
    return time.perf_counter() - started


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir",
        type=lambda text: Path(text).expanduser(),
        default=ROOT / "demo" / "run",
        help="folder of the demo; an earlier demo in it is deleted (default: demo/run)",
    )
    place = parser.parse_args().output_dir.resolve()
    started = time.perf_counter()
    if place.exists() and any(place.iterdir()) and not (place / "bert").is_dir():
        sys.exit(f"demo: {place} is not empty and not from a demo: choose another --output_dir")
    shutil.rmtree(place, ignore_errors=True)
    run("demo/make_data.py", "--output_dir", str(place))

    def train(out: Path, *flags: str) -> tuple[float, float, float, float]:
        """Train, evaluate, and return the remaining weights in percent, EM, F1 and seconds."""
        files = {
            "--train_file": place / "train.json",
            "--predict_file": place / "dev.json",
            "--model_name_or_path": place / "bert",
            "--cache_dir": place / "cache",
            "--output_dir": out,
        }
        paths = [str(word) for pair in files.items() for word in pair]
        seconds = run("masked_run_squad.py", *flags, *COMMON.split(), *paths)
        results = read(out / "eval_results.json")
        remaining = results.get("remaining_percent_linear", 100.0)
        return remaining, results["exact"], results["f1"], seconds

    teacher = place / "teacher"
    rows = [("dense", *train(teacher, *TEACHER.split()))]
    distil = ["--teacher_type", "bert", "--teacher_name_or_path", str(teacher)]
    for method, flags in METHODS.items():
        out = place / method.replace(" ", "_")
        rows.append((method, *train(out, *PRUNE.split(), *flags.split(), *distil)))
    run("counts_parameters.py", "--serialization_dir", str(out))
    run("bertarize.py", "--model_name_or_path", str(out))

    print(HEADER)
    for method, remaining, exact, f1, seconds in rows:
        print(
            f"| {method:<13} | {remaining:>11.1f} | {exact:>5.1f} | {f1:>5.1f} | {seconds:>7.0f} |"
        )
    print(f"\nThe demo took {time.perf_counter() - started:.0f} s. Its files are in {place}.")
    print("bertarized_soft_movement in it is a plain BERT for AutoModelForQuestionAnswering.")


if __name__ == "__main__":
    main()
