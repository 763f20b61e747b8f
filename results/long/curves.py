"""The curves of runs, from their TensorBoard events, as CSV: one row for each evaluation.

python results/long/curves.py runs/movement-10 runs/magnitude-10 > results/long/curves.csv
python paper_tables.py figure      # draws them
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emmental.system.errors import one_line_errors
from paper.curves import read_curves

COLUMNS = {
    "threshold": "threshold",
    "remaining/overall": "remaining",
    "loss/task": "loss",
    "eval/acc": "accuracy",
}


def rows(folder: Path) -> list[list]:
    """The values of a run at the updates at which it was evaluated."""
    curves = read_curves(folder)
    columns = [curves.get(tag, {}) for tag in COLUMNS]
    return [
        [folder.name, step, *(f"{values.get(step, float('nan')):.4g}" for values in columns)]
        for step in sorted(columns[-1])
    ]


def main() -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    with one_line_errors():
        table = [row for name in sys.argv[1:] for row in rows(Path(name))]
        writer.writerows([["run", "updates", *COLUMNS.values()], *table])


if __name__ == "__main__":
    main()
