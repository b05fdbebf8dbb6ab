"""What holds for every kind of plot, those of a user included."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from mmdefense.errors import BadInputError
from mmdefense.plots.activeness import Activeness
from mmdefense.plots.base import Numbers, Panel, Plot
from mmdefense.plots.embedding_map import EmbeddingMap
from mmdefense.plots.inverted_samples import InvertedSamples
from mmdefense.plots.layer_changes import LayerChanges
from mmdefense.plots.layers_compared import LayersCompared
from mmdefense.plots.loss_smoothness import LossSmoothness
from mmdefense.plots.panels import Curve, Curves
from mmdefense.plots.pruning_curve import PruningCurve, PruningPhases
from mmdefense.plots.recovered_triggers import RecoveredTriggers
from mmdefense.plots.settings_compared import SettingsCompared
from mmdefense.plots.smoothness_course import SmoothnessCourse
from mmdefense.plots.training_curves import TrainingCurves
from mmdefense.plots.triggered_clips import TriggeredClips
from mmdefense.plots.triggered_clouds import TriggeredClouds
from mmdefense.plots.triggered_samples import TriggeredSamples
from mmdefense.plots.triggered_texts import TriggeredTexts
from mmdefense.plots.unit_coverage import UnitCoverage
from mmdefense.plots.unlearning_changes import ActivenessCompared, UnlearningChanges
from mmdefense.plots.weight_change import WeightChange
from mmdefense.report.archive import read_plots, write_plots
from mmdefense.report.panels import markup, shown_plots

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GREY = torch.rand(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
PLACES = np.random.default_rng(0).random((6, 2))
SHARES = [0.0, 0.5, 1.0]
HISTORY = [{"stage": "tune", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
SPECTRUM = (np.asarray([-1.0, 0.0, 3.0]), np.asarray([0.25, 0.5, 0.25]))


@dataclass(frozen=True, eq=False)
class Mine(Plot):
    """A kind that a user wrote."""

    values: Numbers

    title = "Mine"
    caption = "A line."

    def panels(self) -> list[Curves]:
        return [Curves([Curve("line", [0, 1], self.values)], "x", "y")]


PLOTS: list[Plot] = [
    Activeness([1.0, 2.0], torch.tensor([0.5, 0.6])),
    EmbeddingMap(PLACES, PLACES[::-1], [0, 1, 2] * 2, [False] * 5 + [True], ["a", "b", "c"]),
    InvertedSamples(IMAGES, IMAGES.flip(3), "patch to 2", 0.9),
    LayerChanges(["stem", "head"], [0.1, 0.2], [0, 1], [4, 4]),
    LayersCompared({"one": {"stem": 0.1, "head": 0.2}, "two": {"head": 0.3}}),
    LossSmoothness(["before", "after"], [9.0, 1.0], [3.0, 1.0], {"before": SPECTRUM}),
    LossSmoothness(["before", "after"], [9.0, 1.0]),
    Mine([1.0, 2.0]),
    ActivenessCompared({"benign": [1.0, 2.0], "backdoored": torch.tensor([2.0, 3.0])}),
    PruningCurve(SHARES, SHARES, 0.5),
    PruningPhases(SHARES, SHARES, torch.tensor(SHARES), 0.5),
    RecoveredTriggers(list(IMAGES), list("abcd"), [0.9] * 4, [True] * 3 + [False], [True] * 4),
    SettingsCompared(["before", "none"], [99.0, 98.0], [100.0, 3.0]),
    SmoothnessCourse([0, 9], SHARES[:2], SHARES[:2], [1.0, 9.0], [2.0, 99.0], {"9": SPECTRUM}),
    TrainingCurves(HISTORY),
    TriggeredClips(GREY, GREY.flip(4), ["walk", "run"], [0, 2, 4, 6]),
    TriggeredClouds(GREY[0, 0, :, :, :3], GREY[0, 0, :, :, 3:6], ["a", "b", "c", "d"]),
    TriggeredSamples(IMAGES, IMAGES.flip(3), ["a"], trigger=IMAGES[:1]),
    TriggeredTexts(["a b"], ["a x b"], ["right"], ["wrong"]),
    UnitCoverage(SHARES, {"NWC": SHARES, "random": torch.tensor(SHARES)}),
    UnlearningChanges([0.01, 1.0], torch.tensor([0.1, 2.0]), 0.9),
    WeightChange(torch.rand(3, 4), reset=2),
]
each_plot = pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: type(plot).__name__)


@each_plot
def test_a_plot_draws_on_the_axes_of_a_user_and_leaves_the_settings_alone(plot):
    before = dict(matplotlib.rcParams)
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    plot.draw(axes)
    figure.canvas.draw()
    assert axes.get_title() == plot.title
    assert dict(matplotlib.rcParams) == before
    size = figure.get_size_inches().tolist()
    assert size == [6, 4]


@each_plot
def test_a_plot_comes_back_from_the_archive_as_it_is_shown(plot, tmp_path):
    named = replace(plot, of="fip")
    write_plots([named], tmp_path / "a.npz")
    (found,) = read_plots(tmp_path / "a.npz")
    assert (type(found), found.heading, found.caption) == (type(plot), named.heading, plot.caption)
    assert found.wide == plot.wide
    assert shown_plots([found])[0].panels == shown_plots([named])[0].panels


@each_plot
def test_a_plot_is_short_as_text_and_a_picture_in_a_notebook(plot):
    assert repr(plot).startswith(f"{type(plot).__name__}(")
    assert len(repr(plot)) < 600
    html = plot._repr_html_()
    assert '<img alt="' in html
    assert "data:image/png;base64," in html


def test_a_plot_draws_on_the_current_axes_by_default():
    from matplotlib import pyplot

    matplotlib.use("agg")
    figure, axes = pyplot.subplots()
    assert Mine([1.0, 2.0]).draw() is axes
    assert axes.get_title() == "Mine"
    pyplot.close(figure)


@each_plot
def test_every_panel_says_in_words_what_it_shows(plot):
    for panel in plot.panels():
        assert panel.describe() in markup(panel, "p").unescape()


@each_plot
def test_no_label_shows_the_markup_of_formulas(plot):
    assert not any("mathdefault" in markup(panel, "p") for panel in plot.panels())


@pytest.mark.parametrize("given", [{"pruning_curve": 1}, torch.rand(3), Curves([], "x", "y")])
def test_what_is_no_plot_is_refused_by_its_type(given, tmp_path):
    with pytest.raises(BadInputError, match=rf"got {type(given).__name__}"):
        shown_plots([given])
    with pytest.raises(BadInputError, match=rf"got {type(given).__name__}"):
        write_plots([given], tmp_path / "a.npz")


def test_what_is_no_panel_is_refused_by_its_type():
    with pytest.raises(BadInputError, match="got Mine"):
        markup(Mine([1.0, 2.0]), "p")  # type: ignore[arg-type]


def test_a_panel_of_a_user_is_drawn(tmp_path):
    class Cross(Panel):
        def describe(self) -> str:
            return "A cross."

        def draw(self, axes: Any) -> None:
            axes.plot([0, 1], [0, 1])
            axes.plot([0, 1], [1, 0])

    html = markup(Cross(), "p")
    assert html.startswith("<svg")
    assert 'aria-label="A cross."' in html


def test_a_field_that_the_archive_cannot_hold_is_named(tmp_path):
    with pytest.raises(BadInputError, match=r"Mine.values must hold numbers.*got complex"):
        write_plots([Mine([1j])], tmp_path / "a.npz")


def test_a_kind_that_is_not_known_is_named_and_not_imported(tmp_path):
    tree = '[{"kind": "antigravity.Apple", "fields": {}}]'
    np.savez(tmp_path / "a.npz", tree=np.asarray(tree))
    with pytest.raises(BadInputError, match=r"the kind of plot antigravity.Apple is unknown"):
        read_plots(tmp_path / "a.npz")
    assert "antigravity" not in sys.modules


def test_a_plot_is_made_without_matplotlib():
    code = (
        "import importlib, pkgutil, sys, mmdefense.plots as plots\n"
        "for module in pkgutil.iter_modules(plots.__path__):\n"
        "    importlib.import_module(f'mmdefense.plots.{module.name}')\n"
        "assert 'matplotlib' not in sys.modules and 'sklearn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
