from __future__ import annotations

import base64
import io
import re
import warnings
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mmdefense.errors import BadInputError
from mmdefense.plots.images import ImageGrid, ImageRow
from mmdefense.plots.panels import Bars, Curve, Curves, Histogram, Interval, Scatter
from mmdefense.report.images import data_address
from mmdefense.report.panels import markup

NAN = float("nan")
CHARTS = [
    Curves([Curve("a", [0, 1], [0.2, 0.9])], "x", "y", percent="xy", mark=0.5, mark_label="here"),
    Curves([Curve("a", [1], [NAN]), Curve("b", [1, 2], [NAN, 3])], "x", "y", filled=True),
    Histogram({"before": [1, 2, 3], "after": [0, 0.5, NAN]}, "norm", log=True),
    Histogram({"one": [2.0, 2.0]}, "norm"),
    Bars(["before", "after", "lost"], [-3, 2e4, NAN], "trace"),
    Interval(0.6, -0.5, 1.7, 2.0, "drop"),
    Interval(NAN, NAN, NAN, 2.0, "drop"),
    Scatter(np.eye(2), [0, 1], ["cat"], [False, True]),
]


@pytest.mark.parametrize("chart", CHARTS)
def test_every_chart_is_well_formed_and_takes_its_colors_from_the_page(chart):
    svg = str(markup(chart, "p"))
    ET.fromstring(svg)
    assert "var(--ink)" in svg
    assert not re.search(r"(fill|stroke): *#", svg)  # a colour that was not replaced
    assert "http" not in svg
    assert f'aria-label="{chart.describe()}"' in svg


def test_a_chart_of_many_curves_keeps_room_for_its_axes():
    many = [Curve(f"a stage with a long name, {n}", [0, 1], [0, 1]) for n in range(30)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        markup(Curves(many, "step", "loss"), "p")


def test_ids_are_unique_on_a_page_and_every_reference_has_its_target():
    one, two = (str(markup(CHARTS[0], prefix)) for prefix in ("f1", "f2"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', one)) <= ids[0]


def test_the_same_chart_is_the_same_text_and_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    assert markup(CHARTS[0], "p") == markup(CHARTS[0], "p")
    assert dict(matplotlib.rcParams) == before


def test_charts_drawn_in_threads_equal_those_drawn_alone():
    alone = [markup(chart, "p") for chart in CHARTS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda chart: markup(chart, "p"), CHARTS)) == alone


def test_hostile_labels_are_text_and_neither_markup_nor_mathematics():
    name = '$\\frac{</svg><script>"&$'
    svg = str(markup(Bars([name], [1.0], name), "p"))
    assert "<script" not in svg
    assert "$\\frac{&lt;/svg&gt;&lt;script&gt;" in svg
    assert name in [element.text for element in ET.fromstring(svg).iter() if element.tag == "text"]


def test_the_words_for_a_curve_give_its_ends_and_its_range():
    words = Curves([Curve("ASR", [0, 0.5, 1], [0.9, 0.95, 0.1])], "x", "y", percent="y").describe()
    assert "ASR: 90.0% at 0, 10.0% at 1, from 10.0% to 95.0%" in words


def axes_of(panel):
    figure = Figure(figsize=panel.size)
    axes = figure.add_subplot()
    panel.draw(axes)
    figure.canvas.draw()
    return axes


@pytest.mark.parametrize("steps", [[1, 2, 3], [20], [0, 40, 80, 120]])
def test_an_axis_of_whole_numbers_has_whole_ticks(steps):
    axes = axes_of(Curves([Curve("loss", steps, [0.5] * len(steps))], "step", "loss"))
    assert all(value == round(value) for value in axes.get_xticks())


def test_no_two_classes_look_alike():
    groups = np.arange(43)
    axes = axes_of(Scatter(np.random.default_rng(0).random((43, 2)), groups))
    looks = [(line.get_color(), line.get_marker()) for line in axes.get_lines()]
    assert len(set(looks)) == 43
    assert len({color for color, _ in looks[:20]}) == 20


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    curve = Curve("a", np.arange(100_000), np.arange(100_000) * 2)
    assert len(curve.x) <= 400
    assert (curve.x[0], curve.y[-1]) == (0, 199_998)


def test_zeros_are_counted_in_the_first_bin_of_a_logarithmic_histogram():
    chart = Histogram({"a": [0.0, 1.0, 10.0]}, "norm", log=True)
    edges = chart._edges()
    assert (edges[0], edges[-1]) == pytest.approx((1.0, 10.0))
    assert "3 units" in chart.describe()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Curve("a", [1, 2], [1]),
        lambda: Curve("a", [], []),
        lambda: Histogram({"a": [NAN]}, "x"),
        lambda: Histogram({}, "x"),
        lambda: Bars(["a"], [1, 2], "x"),
        lambda: Scatter(np.zeros((3, 3)), [0, 1, 2]),
        lambda: Scatter(np.zeros((3, 2)), [0, 1]),
        lambda: ImageRow("a", np.zeros((3, 8, 8))),
        lambda: ImageRow("a", np.zeros((1, 0, 8, 8))),
    ],
)
def test_data_of_the_wrong_shape_is_refused(make):
    with pytest.raises(BadInputError):
        make()


def _pixels(markup: str) -> list[np.ndarray]:
    data = re.findall(r'src="data:image/\w+;base64,([^"]+)"', markup)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(item)))) for item in data]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_small_images_are_embedded_pixel_for_pixel(dtype):
    raw = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = raw.to(dtype) if dtype == torch.uint8 else raw / 255
    first, second = _pixels(markup(ImageGrid([ImageRow("clean", images)]), "p"))
    assert (first == raw[0].permute(1, 2, 0).numpy()).all()
    assert (second == raw[1].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (4, 3), (6, 3)])
def test_of_images_of_other_channels_the_first_are_shown(channels, shown):
    images = torch.arange(channels).view(1, channels, 1, 1).expand(2, -1, 4, 4) / channels
    row = ImageRow("clean", images)
    part = "channel 1" if shown == 1 else "channels 1 to 3"
    assert row.label == f"clean ({part} of {channels})"
    assert row.images.shape == (2, shown, 4, 4)
    assert data_address(images[0]) == data_address(images[0, :shown])


def test_every_image_has_its_own_words_and_hostile_ones_are_escaped():
    row = ImageRow('"><script>', torch.rand(2, 1, 4, 4), ["cat"])
    html = str(markup(ImageGrid([row]), "p"))
    assert "<script" not in html
    assert "script&gt;: cat" in html
    assert "script&gt;: image 2" in html


def test_large_images_and_long_rows_are_cut_and_the_page_says_so():
    images = torch.rand(200, 1, 1, 1).expand(200, 3, 300, 200)
    html = str(markup(ImageGrid([ImageRow("clean", images)]), "p"))
    tiles = _pixels(html)
    assert len(tiles) == 96
    assert "(first 96 of 200)" in html
    assert max(tiles[0].shape) == 144
