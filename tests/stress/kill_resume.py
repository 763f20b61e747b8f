"""Kill runs with SIGKILL at random moments, resume them, and compare them with whole runs.

    python tests/stress/kill_resume.py      # 25 kills over five methods: 10 minutes on 2 cores
    python tests/stress/kill_resume.py --kills 100 --seed 7

A run is 40 updates of a tiny BERT with accumulation, a teacher, batches of similar lengths,
evaluation and a checkpoint every few updates. A kill falls in an update, in an evaluation, or while
a checkpoint or the model is written. A row per method says how many kills there were, where they
fell, and whether weights, scores, optimiser and metrics are equal in every bit.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "topK": "--pruning_method topK --initial_threshold 1 --final_threshold 0.2",
    "sigmoied_threshold": """--pruning_method sigmoied_threshold --initial_threshold 0
        --final_threshold 0.1 --regularization l1 --target_remaining 0.3
        --mask_scores_learning_rate 0.1""",
    "magnitude": "--pruning_method magnitude --initial_threshold 1 --final_threshold 0.2",
    "threshold": """--pruning_method threshold --global_topk --global_topk_frequency_compute 3
        --initial_threshold 1 --final_threshold 0.2""",
    "l0": """--pruning_method l0 --initial_threshold 1 --final_threshold 1 --mask_scale 2.197
        --regularization l0 --final_lambda 20 --mask_scores_learning_rate 0.1""",
}
UPDATES = 40
COMPARED = ("model.safetensors", "eval_results.json", "predictions_.json")
TIMEOUT = 300


class Job:
    """A run of masked_run_squad.py with everything on that resuming must restore."""

    def __init__(self, folder: Path, model: Path, data: Path, method: str):
        self.folder, self.method = Path(folder), method
        flags = f"""--model_type masked_bert --model_name_or_path {model} --data_dir {data}
            --do_lower_case --do_train --do_eval --evaluate_during_training --logging_steps 5
            --max_steps {UPDATES} --teacher_type bert --teacher_name_or_path {model}
            --gradient_accumulation_steps 2 --warmup_steps 5 --save_steps 3 --max_seq_length 48
            --max_query_length 16 --doc_stride 16 --per_gpu_train_batch_size 3 --no_cuda
            --cache_dir {self.folder / "cache"} {METHODS[method]}"""
        self.flags = flags.split()

    def words(self, name: str, *flags: str) -> list[str]:
        """The words of the run in the folder `name`."""
        return [*self.flags, "--output_dir", str(self.folder / name), *flags]

    def start(self, name: str, *flags: str) -> subprocess.Popen:
        """Start the run in the folder `name`, in a process of its own."""
        command = [sys.executable, str(ROOT / "masked_run_squad.py"), *self.words(name, *flags)]
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        variables = os.environ | variables | {"TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=variables, text=True, **pipes)

    def complete(self, name: str, *flags: str) -> None:
        """Run in the folder `name` to the end."""
        finish(self.start(name, *flags))


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate(timeout=TIMEOUT)
    if process.returncode:
        raise SystemExit(f"a run failed with status {process.returncode}:\n{error[-2000:]}")


def differences(one: Path, other: Path) -> list[str]:
    """The files of the run `one` that differ in `other`; training states by their values."""
    different = []
    for path in [one / name for name in COMPARED] + sorted(one.rglob("training_state.pt")):
        twin = other / path.relative_to(one)
        if not path.exists():
            continue
        if not twin.exists():
            same = False
        elif path.suffix == ".pt":
            same = alike(*(torch.load(file, weights_only=True) for file in (path, twin)))
        else:
            same = path.read_bytes() == twin.read_bytes()
        if not same:
            different.append(str(path.relative_to(one)))
    return different


def alike(a, b) -> bool:
    """Whether two values of a training state are equal in every bit, but for the seconds."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def being_written(out: Path) -> bool:
    """Whether a checkpoint, or the final model, is half there."""
    return any(out.glob(".writing-*"))


def being_evaluated(out: Path) -> bool:
    """Whether an evaluation has written predictions, and not yet their n-best lists."""
    files = {path.name for path in out.glob("*predictions_*.json*")}
    return any(
        f"nbest_{name}" not in files for name in files if name.startswith("predictions_")
    ) or any(name.startswith(".") for name in files)


WATCHED = {"writing a checkpoint": being_written, "evaluating": being_evaluated}


def kill_at(process, out: Path, moment: str, delay: float, patience: float) -> str | None:
    """Kill the run at a moment and say which it was; None if the run ends before.

    moment: one of WATCHED, when it is seen; else `delay` seconds after the training started.
    """
    end = time.perf_counter() + TIMEOUT
    known, seen = {path.name for path in out.glob("events.*")}, None
    while process.poll() is None and time.perf_counter() < end:
        now = time.perf_counter()
        if seen is None and {path.name for path in out.glob("events.*")} - known:
            seen = now
        if seen and (WATCHED[moment](out) if moment in WATCHED else now >= seen + delay):
            process.kill()
            process.communicate()
            places = (name for name, sign in WATCHED.items() if sign(out))
            return next(places, "an update or between two")
        if moment in WATCHED and seen and now > seen + patience:
            return None
        time.sleep(0.0005)
    return None


def kill_until_done(job: Job, kills: int, seed: int) -> dict:
    """Kill the run `kills` times, resume it each time, and compare it with a whole run.

    Half of the kills fall at a random time, the others while something is written.
    """
    rng = random.Random(f"{seed} {job.method}")
    job.complete("whole")
    span = json.loads((job.folder / "whole" / "training_summary.json").read_text())["seconds"]
    out, moments, resumes = job.folder / "killed", [], 0
    out.mkdir()
    while len(moments) < kills:
        process = job.start("killed", "--resume_from_checkpoint", "latest")
        resumes += bool(moments)
        moment = rng.choice(["any", "any", *WATCHED])
        place = kill_at(process, out, moment, rng.uniform(0, 0.6 * span), span)
        if place:
            moments.append(place)
        else:  # it got through: once more from its first checkpoint
            finish(process)
            _rewind(out)
    job.complete("killed", "--resume_from_checkpoint", "latest")
    different = differences(job.folder / "whole", out)
    return {
        "method": job.method,
        "kills": len(moments),
        "resumes": resumes + 1,
        "where": moments,
        "equal": not different,
        "different": different,
    }


def _rewind(out: Path) -> None:
    """Make a finished run one that was killed early: its first whole checkpoint stays."""
    checkpoints = list(out.glob("checkpoint-*"))
    checkpoints.sort(key=lambda path: int(path.name.partition("-")[2]))
    for path in [*checkpoints[1:], *(path for path in out.iterdir() if path.is_file())]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_material(folder: Path) -> tuple[Path, Path]:
    """A tiny BERT and a tiny SQuAD."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny

    data = folder / "squad"
    data.mkdir()
    tiny.make_squad(data / "train-v1.1.json", 60, seed=1)
    tiny.make_squad(data / "dev-v1.1.json", 20, seed=2)
    return tiny.save(tiny.plain_bert(), folder / "bert", tiny.bert_tokenizer(folder)), data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25, help="in all (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        material = make_material(Path(name))
        for place, method in enumerate(METHODS):
            share = args.kills // len(METHODS) + (place < args.kills % len(METHODS))
            folder = Path(name) / method
            folder.mkdir()
            rows.append(
                kill_until_done(Job(folder, *material, method), share, args.seed) if share else {}
            )
            print(json.dumps(rows[-1]), flush=True)
    print(f"\n| method | kills | {' | '.join(WATCHED)} | resumes | bit-equal |")
    print(f"|{'---|' * (4 + len(WATCHED))}")
    for row in filter(None, rows):
        counts = " | ".join(str(row["where"].count(name)) for name in WATCHED)
        equal = "yes" if row["equal"] else ", ".join(row["different"])
        print(f"| {row['method']} | {row['kills']} | {counts} | {row['resumes']} | {equal} |")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    sys.exit(0 if all(row["equal"] for row in rows if row) else 1)


if __name__ == "__main__":
    main()
