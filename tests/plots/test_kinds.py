from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mmdefense.errors import BadInputError
from mmdefense.plots.activeness import Activeness
from mmdefense.plots.embedding_map import EmbeddingMap
from mmdefense.plots.layer_changes import LayerChanges
from mmdefense.plots.loss_smoothness import LossSmoothness, density
from mmdefense.plots.recovered_triggers import RecoveredTriggers
from mmdefense.plots.training_curves import TrainingCurves
from mmdefense.plots.triggered_samples import TriggeredSamples
from mmdefense.plots.weight_change import WeightChange


def test_the_difference_shows_where_and_which_way_the_trigger_alters_an_image():
    clean = torch.full((1, 1, 4, 4), 0.5)
    triggered = clean.clone()
    triggered[..., 0, 0], triggered[..., 3, 3] = 0.75, 0.25
    (grid,) = TriggeredSamples(clean, triggered).panels()
    difference = grid.rows[-1].images[0, 0]
    assert (difference[0, 0], difference[3, 3], difference[1, 1]) == pytest.approx((1, 0, 0.5))


def test_a_trigger_that_alters_nothing_is_mid_grey():
    clean = torch.rand(1, 1, 4, 4)
    (grid,) = TriggeredSamples(clean, clean).panels()
    assert (grid.rows[-1].images == 0.5).all()


def test_a_trigger_that_works_but_was_not_accepted_is_not_called_rejected():
    images = [np.zeros((1, 2, 2))] * 3
    accepted, works = [True, False, False], [True, True, False]
    plot = RecoveredTriggers(images, ["a", "b", "c"], [0.9, 0.9, 0.1], accepted, works)
    labels = {row.label: row.names for row in plot.panels()[0].rows}
    assert labels["works, not told apart from the triggers of clean models"] == ["b, 90%"]
    assert labels["does not work, or is too large for a trigger"] == ["c, 10%"]


def test_recovered_triggers_stand_under_accepted_or_rejected_with_their_names():
    images = torch.arange(3).view(3, 1, 1, 1) / 2
    plot = RecoveredTriggers(images, ["a", "b", "c"], [0.5] * 3, [False, True, False])
    accepted, rejected = plot.panels()[0].rows
    assert (accepted.label, accepted.names) == ("accepted", ["b, 50%"])
    assert accepted.images.item() == pytest.approx(0.5, abs=1 / 255)
    assert (rejected.names, rejected.images.ravel().tolist()) == (["a, 50%", "c, 50%"], [0.0, 1.0])
    assert "not proof" not in plot.caption  # one was accepted
    none = RecoveredTriggers(images, ["a", "b", "c"], [0.5] * 3, [False] * 3, [True, False, False])
    assert "not proof" in none.caption
    assert "models that nobody tampered with have such triggers" in none.caption
    assert "nobody" not in plot.caption


def test_triggers_of_several_sizes_stand_in_rows_of_their_own():
    images = [torch.zeros(1, 4, 4), torch.zeros(1, 2, 2), torch.ones(1, 4, 4)]
    plot = RecoveredTriggers(images, ["a", "b", "c"], [1.0] * 3, [True] * 3)
    assert [(row.label, row.names) for row in plot.panels()[0].rows] == [
        ("accepted", ["b, 100%"]),
        ("accepted", ["a, 100%", "c, 100%"]),
    ]


def test_no_recovered_trigger_makes_a_plot_of_words_alone():
    assert not RecoveredTriggers([], [], [], []).panels()


def test_columns_of_different_length_are_refused():
    with pytest.raises(BadInputError, match="one length, got 1, 2, 1, 1 and 0"):
        RecoveredTriggers([np.zeros((1, 2, 2))], ["a", "b"], [0.5], [True])


def test_weight_changes_are_sorted_with_the_largest_first():
    plot = WeightChange(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), reset=1)
    (curve,) = plot.panels()[0].curves
    assert curve.y.tolist() == [3, 2, 1, 0]
    assert curve.x.tolist() == [1, 2, 3, 4]


def test_activeness_and_smoothness_hold_both_states():
    assert list(Activeness([1.0, 2.0], [0.5, 0.6]).panels()[0].series) == ["before", "after"]
    plot = LossSmoothness(["before", "after"], trace=(9, -2), lambda_max=(3, 1))
    values = [panel.values.tolist() for panel in plot.panels()]
    assert values == [[3, 1], [9, -2]]


def test_the_density_is_that_of_the_nodes_smoothed():
    nodes, weights = np.asarray([-1.0, 2.0]), np.asarray([0.25, 0.75])
    grid = np.linspace(-6, 7, 4001)
    height = density(nodes, weights, grid, width=0.5)
    assert np.trapezoid(height, grid) == pytest.approx(1, abs=1e-9)
    assert np.trapezoid(height * grid, grid) == pytest.approx(1.25, abs=1e-9)
    at = np.exp(-((1 - nodes) ** 2) / (2 * 0.25)) / (0.5 * np.sqrt(2 * np.pi))
    found = density(nodes, weights, np.asarray([1.0]), 0.5)
    assert found.tolist() == pytest.approx([float((at * weights).sum())])


def test_an_embedding_keeps_classes_together_and_depends_on_the_seed_alone():
    images, labels = load_digits(n_class=2, return_X_y=True)
    images, labels = images[:60], labels[:60]
    triggered = np.arange(60) >= 50
    plot = EmbeddingMap.by_tsne(images, images, labels, triggered=triggered, seed=4)
    before, after = plot.panels()
    assert (before.points == after.points).all()
    assert before.crossed.tolist() == triggered.tolist()
    distance = np.linalg.norm(before.points[:, None] - before.points[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(1)] == labels).mean() > 0.9


def test_a_collapsed_embedding_is_a_point_and_one_that_is_not_finite_is_refused():
    ones, labels = np.ones((6, 3)), np.arange(6)
    (before, _) = EmbeddingMap.by_tsne(ones, ones, labels).panels()
    assert not before.points.any()
    with pytest.raises(BadInputError, match="finite"):
        EmbeddingMap.by_tsne(ones * np.nan, ones, labels)
    with pytest.raises(BadInputError, match="at least 3"):
        EmbeddingMap.by_tsne(ones[:2], ones[:2], labels[:2])


def test_training_curves_have_a_panel_per_value_and_a_line_per_stage():
    history = [
        {"stage": stage, "step": step, "loss": step * 1.0, "trace": None if step else 2.0}
        for stage in ("unlearn", "tune")
        for step in (0, 1)
    ]
    history.append({"stage": "prune", "step": 9, "kept": 4})
    panels = TrainingCurves(history).panels()
    assert [panel.ylabel for panel in panels] == ["loss", "trace"]
    assert [curve.name for curve in panels[0].curves] == ["unlearn", "tune"]
    assert panels[0].curves[1].y.tolist() == [0, 1]
    assert not TrainingCurves([]).panels()


def test_layer_changes_keep_the_order_and_the_largest():
    names, changes = [f"l{n}" for n in range(60)], [n % 7 / 10 for n in range(60)]
    plot = LayerChanges(names, changes, pruned=[1] * 60, units=[4] * 60)
    (bars,) = plot.panels()
    assert len(bars.values) == 24
    assert bars.values.min() >= 0.4
    numbers = [int(label.split()[0][1:]) for label in bars.labels]
    assert numbers == sorted(numbers)
    assert "60 of 240 units" in plot.caption
    assert "24 of 60" in plot.caption
    assert not LayerChanges([], [], [], []).panels()


def test_crosses_are_spoken_of_where_there_are_some():
    places = np.random.default_rng(0).random((4, 2))
    plain = EmbeddingMap(places, places, [0, 1, 0, 1])
    untouched = EmbeddingMap(places, places, [0, 1, 0, 1], [False] * 4)
    crossed = EmbeddingMap(places, places, [0, 1, 0, 1], [False] * 3 + [True])
    assert ["rosses" in plot.caption for plot in (plain, untouched, crossed)] == [
        False,
        False,
        True,
    ]


def test_captions_fit_what_is_shown():
    still = LayerChanges(["stem", "head"], [0.1, 0.2], [0, 0], [4, 4])
    assert "No unit was pruned" in still.caption
    tuned = [{"stage": "fine-tune", "step": step, "loss": 1.0} for step in (1, 2)]
    unlearnt = [{"stage": "unlearn", "step": step, "loss": 1.0} for step in (1, 2)]
    assert "on purpose" not in TrainingCurves(tuned).caption
    assert "on purpose" in TrainingCurves(tuned + unlearnt).caption
    assert "zeros" not in Activeness([1.0, 2.0]).caption
    assert "zeros" in Activeness([0.0, 2.0]).caption
    assert "standard error" not in LossSmoothness(["before"], [9.0]).caption
    assert "standard error" in LossSmoothness(["before"], [9.0], trace_error=[1.0]).caption


def test_layers_of_long_names_stay_apart():
    names = [f"encoder.stages.{n}.layers.0.layer.1.convolution" for n in range(12)]
    (bars,) = LayerChanges(names, [0.1] * 12, [3] * 12, [4] * 12).panels()
    assert len(set(bars.labels)) == 12
    assert all(len(label) <= 28 and label.endswith("(3 pruned)") for label in bars.labels)
