"""Figures: what can be read in them, and the pictures that scripts write."""

import csv
import shutil

import pytest
from matplotlib.text import Text
from test_points import tables
from tiny import make, model_of, save
from torch.utils.tensorboard import SummaryWriter

import counts_parameters
import paper_tables
from emmental.checkpoints.counts import count_layers, remaining_weights
from emmental.modules.masks import find_masks
from paper import front, plots
from paper.points import ROOT
from paper.runs import Run

HEAD = "ForSequenceClassification"


def grid(model, title=""):
    """The figure of a model's layers, its columns, and the texts of its cells."""
    model.config.threshold, model.config.global_topk = 0.3, True
    masks = find_masks(model)
    counts, layers = remaining_weights(model, masks), count_layers(model, masks)
    figure = plots.layer_figure(counts, layers, title)
    axes = figure.axes[0]
    columns = [label.get_text().split("\n") for label in axes.get_xticklabels()]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    return figure, columns, cells, counts, layers


def test_a_grid_of_layers_has_matrices_heads_and_neurons():
    _, columns, cells, counts, layers = grid(make(suffix=HEAD, granularity="structure"))
    names = "query key value attention.output intermediate output".split()
    assert columns == [
        *([*name.split("."), "%"] for name in names),
        ["heads", "of 4"],
        ["neurons", "of 64"],
    ]
    assert len(cells) == 2 * len(columns)
    for row, layer in enumerate(layers):
        assert (cells[6, row], cells[7, row]) == (str(layer.heads), str(layer.neurons))
        for column in range(6):
            assert cells[column, row] == f"{counts.matrices[6 * row + column].percent:.3g}"


def test_a_family_without_heads_has_its_matrices_alone():
    model = model_of("modernbert", HEAD.removeprefix("For"), "masked_")
    _, columns, cells, *_ = grid(model)
    assert columns == [
        [*name.split("."), "%"] for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")
    ]
    assert len(cells) == 8


def test_a_long_title_fits_its_figure():
    args = {"alpha_hidden": 1.0, "granularity": "structure", "model_name_or_path": ""}
    args |= {"teacher_name_or_path": "", "seed": 42}
    run = Run("", "custom-reviews", "PLATON, global", True, {"acc": 80.0}, args, {})
    figure, *_ = grid(make(suffix=HEAD), plots._title(run))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_title().replace("\n", " ").endswith("100.0% remaining, seed 42")
    for text in (axes.title, *axes.get_xticklabels()):
        box = text.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width
        assert 0 <= box.y0 and box.y1 <= figure.bbox.height


def test_names_stand_beside_the_ends_of_their_lines_and_apart():
    figure, axes = plots.panel("x", "y", "")
    for number, end in enumerate((5, 5, 5.01, 1)):
        axes.plot(
            [1, 2], [3, end], label=f"{number}" + ", a name of more than one line" * (number == 1)
        )
    axes.plot([1, 2], [0, 1], label="_unnamed")
    plots.name_ends(axes)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without its leader
    assert [text.get_text()[0] for text in axes.texts] in (
        ["3", "0", "1", "2"],
        ["3", "1", "0", "2"],
    )
    for number, box in enumerate(boxes):
        assert box.x0 > axes.bbox.x1 and box.x1 <= figure.bbox.width
        assert not any(box.overlaps(other) for other in boxes[:number])


# ------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "name, start", [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_counts_as_a_picture(tmp_path, capsys, name, start):
    folder = save(make(suffix=HEAD, threshold=0.3), tmp_path / "run")
    words = ["--serialization_dir", str(folder)]
    counts_parameters.main(words)
    said = capsys.readouterr().out
    counts_parameters.main([*words, "--plot", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes().startswith(start) and capsys.readouterr().out == said


@pytest.mark.parametrize("name, said", [
    ("a.doc", "the name must end in one of .avif"),
    ("a", "the name must end in one of"),
    ("gone/a.png", "there is no folder"),
])  # fmt: skip
def test_a_picture_that_cannot_be_written_is_refused_before_the_count(
    tmp_path, refused, name, said
):
    words = ["--serialization_dir", "nowhere", "--plot", str(tmp_path / name)]
    assert f"--plot {tmp_path / name}: {said}" in refused(counts_parameters.main, words)


def test_the_curves_of_a_run(tmp_path):
    names = [f"bert.encoder.layer.{n}.attention.self.{x}" for n in (0, 1) for x in ("query", "key")]
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (1, 2, 3):
            values = {
                "threshold": 1 / step,
                "loss": step,
                "loss/task": step,
                "remaining/overall": 3 / 8 / step,
            }
            values |= {f"remaining/{x}": number / 4 / step for number, x in enumerate(names)}
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
    args = {"alpha_hidden": 0, "model_name_or_path": "", "teacher_name_or_path": None, "seed": 1}
    threshold, remaining, loss = plots.curves_figure(
        Run(tmp_path, "sst-2", "movement", False, {}, args, {})
    ).axes
    assert [*threshold.lines[0].get_ydata()] == pytest.approx([1, 1 / 2, 1 / 3])
    assert [*remaining.lines[3].get_ydata()] == pytest.approx([75, 37.5, 25])
    assert [text.get_text() for text in remaining.texts] == [
        "query, layer 0",
        "overall",
        "key, layer 1",
    ]
    assert {text.get_text() for text in loss.texts} == {"loss", "loss/task"}


# ------------------------------------------------------------------- figures of the repository


@pytest.fixture
def results(tmp_path):
    """A copy of the CSV files of results/, and what adds a row to one of them."""
    for file in (ROOT / "results").rglob("*.csv"):
        place = tmp_path / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)

    def add(to, **cells):
        file = tmp_path / "results" / to
        with file.open(newline="") as lines:
            columns = next(csv.reader(lines))
        with file.open("a", newline="") as lines:
            csv.DictWriter(lines, columns).writerow(cells)

    return tmp_path / "results", add


def test_figures_of_the_repository(tmp_path, capsys):
    tables("figure", "--to", tmp_path)
    for name in capsys.readouterr().out.split():
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") and 5000 < len(content) < 100_000
        assert (ROOT / name.removeprefix(f"{tmp_path}/")).exists()


def test_a_new_row_is_drawn(results):
    folder, add = results
    before = front.best_of_ours(folder)
    row = {
        "task": "sst-2",
        "method": "PLATON, global",
        "granularity": "weight",
        "remaining %": 10.3,
    }
    add("long/runs.csv", **row, metrics="acc 88.5")
    add("long/runs.csv", **row | {"granularity": "structure"}, metrics="acc 99.0")
    add("long/runs.csv", **row, metrics="failed")
    after = front.best_of_ours(folder)
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {("sst-2", "PLATON", 10)}
    assert after["sst-2", "PLATON", 10] == (10.3, pytest.approx(100 * 88.5 / 89.45))
    add("speed.csv", name="blocks", metric=88, runtime="ONNX Runtime int8", times=5.5)
    lines = {line.get_label(): line for line in front.front_figure(folder).axes[1].lines}
    int8 = lines["blocks, ONNX Runtime int8"]
    assert [*map(float, (*int8.get_xdata(), *int8.get_ydata()))] == [5.5, 88]
    assert int8.get_fillstyle() == "none" != lines["MiniLM, torch"].get_fillstyle()
    add("long/curves.csv", run="soft-10", updates=30000, accuracy=0.85)
    figure = front.accuracy_figure(folder / "long" / "curves.csv")
    assert "soft-10" in {text.get_text() for text in figure.axes[0].texts}


@pytest.mark.parametrize("text, said", [
    ("", "speed.csv has no column name, metric, runtime, times, or no row"),
    ("name,metric,runtime\na,1,x\n", "speed.csv has no column times"),
    ("name,metric,runtime,times\na,1,x,1.9x\n", "speed.csv: '1.9x' is not a number"),
    (None, "speed.csv"),
])  # fmt: skip
def test_rows_that_cannot_be_drawn(results, refused, monkeypatch, tmp_path, text, said):
    folder, _ = results
    (folder / "speed.csv").unlink() if text is None else (folder / "speed.csv").write_text(text)
    monkeypatch.setattr(front.figures, "__defaults__", (folder,))
    status = 1 if text is None else 2
    assert said in refused(paper_tables.main, ["figure", "--to", str(tmp_path)], status=status)
    assert not (tmp_path / "docs").exists()
