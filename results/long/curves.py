"""The curves of runs, from their TensorBoard events, as CSV: one row for each evaluation.

python results/long/curves.py runs/movement-10 runs/magnitude-10 > results/long/curves.csv
"""

import csv
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLUMNS = {
    "threshold": "threshold",
    "remaining/overall": "remaining",
    "loss/task": "loss",
    "eval/acc": "accuracy",
}


def rows(folder: Path) -> list[list]:
    """The values of a run at the updates at which it was evaluated."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    values = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in COLUMNS}
    steps = sorted(values["eval/acc"])
    return [
        [folder.name, step, *(f"{values[tag].get(step, float('nan')):.4g}" for tag in COLUMNS)]
        for step in steps
    ]


def main() -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["run", "updates", *COLUMNS.values()])
    for name in sys.argv[1:]:
        if not list(Path(name).glob("events.out.tfevents.*")):
            sys.exit(f"{name} has no TensorBoard events: give the output folder of a run")
        writer.writerows(rows(Path(name)))


if __name__ == "__main__":
    main()
