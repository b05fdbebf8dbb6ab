from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mmdefense.errors import BadInputError
from mmdefense.report import figures
from mmdefense.report.record import LayerChange


def test_the_difference_shows_where_and_which_way_the_trigger_alters_an_image():
    clean = torch.full((1, 1, 4, 4), 0.5)
    triggered = clean.clone()
    triggered[..., 0, 0], triggered[..., 3, 3] = 0.75, 0.25
    (grid,) = figures.triggered_samples(clean, triggered).plots
    difference = grid.rows[-1].images[0, 0]
    assert (difference[0, 0], difference[3, 3], difference[1, 1]) == pytest.approx((1, 0, 0.5))


def test_a_trigger_that_alters_nothing_is_mid_grey():
    clean = torch.rand(1, 1, 4, 4)
    (grid,) = figures.triggered_samples(clean, clean).plots
    assert (grid.rows[-1].images == 0.5).all()


def test_a_trigger_that_works_but_was_not_accepted_is_not_called_rejected():
    images = [np.zeros((1, 2, 2))] * 3
    figure = figures.recovered_triggers(
        images, ["a", "b", "c"], accepted=[True, False, False], works=[True, True, False]
    )
    labels = {row.label: row.names for row in figure.plots[0].rows}
    assert labels["works, not told apart from the triggers of clean models"] == ["b"]
    assert labels["does not work"] == ["c"]


def test_recovered_triggers_stand_under_accepted_or_rejected_with_their_names():
    images = torch.arange(3).view(3, 1, 1, 1) / 2
    figure = figures.recovered_triggers(images, ["a", "b", "c"], accepted=[False, True, False])
    accepted, rejected = figure.plots[0].rows
    assert (accepted.label, accepted.names, accepted.images.item()) == ("accepted", ["b"], 0.5)
    assert (rejected.names, rejected.images.ravel().tolist()) == (["a", "c"], [0.0, 1.0])
    assert "not proof" in figure.caption


def test_triggers_of_several_sizes_stand_in_rows_of_their_own():
    images = [torch.zeros(1, 4, 4), torch.zeros(1, 2, 2), torch.ones(1, 4, 4)]
    rows = figures.recovered_triggers(images, ["a", "b", "c"]).plots[0].rows
    assert [(row.label, row.names) for row in rows] == [
        ("accepted", ["b"]),
        ("accepted", ["a", "c"]),
    ]


def test_no_recovered_trigger_makes_a_figure_of_words_alone():
    figure = figures.recovered_triggers(torch.zeros(0, 1, 2, 2), [])
    assert not figure.plots


def test_the_pruning_curve_says_that_the_defense_did_not_see_the_asr():
    fractions = np.linspace(0, 1, 5)
    assert "ASR" in figures.pruning_curve(fractions, fractions, asr=fractions).plots[0].describe()
    assert "by accuracy alone" in figures.pruning_curve(fractions, fractions, asr=fractions).caption
    assert "by accuracy alone" not in figures.pruning_curve(fractions, fractions).caption


def test_weight_changes_are_sorted_with_the_largest_first():
    figure = figures.weight_change(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), reset=1)
    (curve,) = figure.plots[0].curves
    assert curve.y.tolist() == [3, 2, 1, 0]
    assert curve.x.tolist() == [1, 2, 3, 4]


def test_activeness_and_smoothness_hold_both_states():
    assert list(figures.activeness([1.0, 2.0], [0.5, 0.6]).plots[0].series) == ["before", "after"]
    values = [plot.values.tolist() for plot in figures.smoothness((3, 1), (9, -2)).plots]
    assert values == [[3, 1], [9, -2]]


def test_an_embedding_keeps_classes_together_and_depends_on_the_seed_alone():
    images, labels = load_digits(n_class=2, return_X_y=True)
    images, labels = images[:60], labels[:60]
    triggered = np.arange(60) >= 50
    before, after = figures.embedding(images, images, labels, triggered=triggered, seed=4).plots
    assert (before.points == after.points).all()
    assert before.crossed.tolist() == triggered.tolist()
    distance = np.linalg.norm(before.points[:, None] - before.points[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(1)] == labels).mean() > 0.9


def test_a_collapsed_embedding_is_a_point_and_one_that_is_not_finite_is_refused():
    ones, labels = np.ones((6, 3)), np.arange(6)
    (before, _) = figures.embedding(ones, ones, labels).plots
    assert not before.points.any()
    with pytest.raises(BadInputError, match="finite"):
        figures.embedding(ones * np.nan, ones, labels)
    with pytest.raises(BadInputError, match="at least 3"):
        figures.embedding(ones[:2], ones[:2], labels[:2])


def test_training_curves_have_a_panel_per_figure_and_a_line_per_stage():
    history = [
        {"stage": stage, "step": step, "loss": step * 1.0, "trace": None if step else 2.0}
        for stage in ("unlearn", "tune")
        for step in (0, 1)
    ]
    history.append({"stage": "prune", "step": 9, "kept": 4})
    figure = figures.training_curves(history)
    assert figure is not None
    assert [plot.ylabel for plot in figure.plots] == ["loss", "trace"]
    assert [curve.name for curve in figure.plots[0].curves] == ["unlearn", "tune"]
    assert figure.plots[0].curves[1].y.tolist() == [0, 1]
    assert figures.training_curves([]) is None


def test_layer_changes_keep_the_order_and_the_largest():
    layers = [LayerChange(layer=f"l{n}", change=n % 7 / 10, units=4, silenced=1) for n in range(60)]
    figure = figures.layer_changes(layers)
    assert figure is not None
    (bars,) = figure.plots
    assert len(bars.values) == 24
    assert bars.values.min() >= 0.4
    numbers = [int(label.split()[0][1:]) for label in bars.labels]
    assert numbers == sorted(numbers)
    assert "60 of 240 units" in figure.caption
    assert "24 of 60" in figure.caption
    assert figures.layer_changes([]) is None
