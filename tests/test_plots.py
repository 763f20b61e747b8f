"""The figure of the remaining weights by layer: what can be read in it."""

import pytest
from tiny import make, model_of, save

from paper import plots
from paper.runs import Run


@pytest.fixture
def layers(tmp_path):
    """The figure of a masked model, and its lines: {label: percentages by layer}."""

    def draw(model, **args):
        model.config.threshold, model.config.global_topk = 0.3, True
        args = {"model_name_or_path": "", "teacher_name_or_path": None, "seed": 42} | args
        folder = save(model, tmp_path / "model")
        run = Run(folder, "custom-reviews", "PLATON, global", True, {"acc": 80.0}, args, {})
        figure = plots.layer_figure(run)
        return figure, {line.get_label(): [*line.get_ydata()] for line in figure.axes[0].lines}

    return draw


def test_structures_of_a_layer_share_a_line_that_names_them(layers):
    model = make(suffix="ForSequenceClassification", granularity="structure")
    _, lines = layers(model, granularity="structure")
    assert list(lines) == ["query, key, value, attention.output", "intermediate, output"]
    _, lines = layers(make(suffix="ForSequenceClassification"))
    assert list(lines) == "query key value attention.output intermediate output".split()
    assert [len(percents) for percents in lines.values()] == [2] * 6


def test_the_matrices_of_a_layer_are_those_of_the_family(layers):
    _, lines = layers(model_of("modernbert", "SequenceClassification", "masked_"))
    names = [name for label in lines for name in label.split(", ")]
    assert names == ["attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"]
    assert {len(percents) for percents in lines.values()} == {2}


def test_a_long_title_fits_its_figure(layers):
    more = {"granularity": "structure", "alpha_hidden": 1.0, "teacher_name_or_path": ""}
    figure, _ = layers(make(suffix="ForSequenceClassification"), **more)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    title, (legend,) = axes.title.get_window_extent(), figure.legends
    assert axes.get_title().replace("\n", " ").endswith("100.0% remaining, seed 42")
    for box in title, legend.get_window_extent():
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width
        assert 0 <= box.y0 and box.y1 <= figure.bbox.height

    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
