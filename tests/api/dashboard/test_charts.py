"""Charts of the dashboard."""

from datetime import UTC, datetime
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock import errors
from deltadock.api.dashboard import charts
from deltadock.api.dashboard.figures import NO_LAYER, MatrixFigures, MatrixGrid, ReportFigures
from deltadock.api.dashboard.markdown import markdown
from deltadock.api.dashboard.views import ADVICE
from tests import seed

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
widths = st.dictionaries(st.integers(1, 8), st.integers(1, 60), max_size=7)


@st.composite
def matrices(draw: st.DrawFn) -> MatrixFigures:
    kept = draw(widths)
    rank = sum(kept.values())
    return MatrixFigures(
        name=f"model.layers.{draw(st.integers(0, 40))}.{draw(names)}.weight",
        shape=[max(rank, 1), max(rank, 1) + draw(st.integers(0, 9))],
        error=draw(st.none() | st.floats(0, 4)),
        rank=rank,
        widths=kept,
    )


def titles(root: ET.Element) -> list[str]:
    return [title.text or "" for title in root.iter("title")]


def cells(root: ET.Element) -> list[ET.Element]:
    return [group for group in root.iter("g") if "cell" in group.get("class", "").split()]


@given(st.lists(matrices(), max_size=30))
def test_grids_are_valid_xml_with_a_titled_cell_per_matrix(many: list[MatrixFigures]) -> None:
    grid = MatrixGrid.of(many)
    for draw in (charts.heat_map, charts.width_bars):
        root = ET.fromstring(draw(grid))
        assert len(cells(root)) == len(grid.cells)
        shown = titles(root)
        assert all(any(matrix.name in title for title in shown) for matrix in grid.cells.values())
        height = float(root[1].attrib["height"])
        for rect in root.iter("rect"):
            x, w = (float(rect.attrib[key].removesuffix("%")) for key in ("x", "width"))
            y, h = (float(rect.attrib[key]) for key in ("y", "height"))
            assert min(x, y, w, h) >= -0.02
            assert x + w <= 100.02
            assert y + h <= height + 0.02


def test_heat_map_titles_show_each_error() -> None:
    report = seed.report(layers=3)
    root = ET.fromstring(charts.heat_map(ReportFigures.model_validate(report).grid))
    drawn = {
        title.split("\nerror ")[0]: float(title.split("\nerror ")[1]) for title in titles(root)
    }
    assert drawn == {
        matrix["name"]: pytest.approx(matrix["error"], rel=0.01) for matrix in report["matrices"]
    }
    by_error = sorted(cells(root), key=lambda cell: drawn[titles(cell)[0].split("\n")[0]])
    colours = [cell.attrib["class"] for cell in by_error]
    assert colours == sorted(colours)
    assert [charts.ERRORS.step(error) for error in (0, 1e-3, 0.03, 1, 7)] == [0, 0, 4, 8, 8]


def test_a_layers_bits_are_those_of_all_its_matrices() -> None:
    def matrix(layer: int, name: str, size: int) -> dict[str, object]:
        return {"name": f"layers.{layer}.{name}", "shape": [10, 10], "bytes": size}

    rows = [matrix(0, "q", 10), matrix(0, "k", 20), matrix(1, "q", 25), matrix(1, "k", 30)]
    figures = ReportFigures.model_validate({"matrices": rows})
    assert [layer.bits for layer in figures.bits_by_layer] == [1.2, 2.2]
    root = ET.fromstring(charts.layer_bits(figures.bits_by_layer, 1.0))
    heights = [float(rect.attrib["height"]) for rect in root.iter("rect")]
    assert heights[1] / heights[0] == pytest.approx(2.2 / 1.2, rel=0.01)
    same = ReportFigures.model_validate({"matrices": [matrix(0, "q", 10), matrix(1, "q", 10)]})
    assert same.bits_by_layer == []  # such as BitDelta's: nothing to see


@given(st.lists(st.tuples(st.floats(0.01, 16), st.floats(0, 10)), min_size=1, max_size=8))
def test_rate_and_distortion_stay_inside_their_plot(places: list[tuple[float, float]]) -> None:
    points = [charts.Point("m:1", bits, kl, "/deltas/x", "other") for bits, kl in places]
    root = ET.fromstring(charts.rate_distortion(points))
    height = float(root[1].attrib["height"])
    dots = list(root.iter("circle"))
    assert len(dots) == len(points)
    for dot in dots:
        assert 0 <= float(dot.attrib["cx"].removesuffix("%")) <= 100
        assert 0 <= float(dot.attrib["cy"]) <= height


def test_a_plot_names_a_delta_by_the_end_of_a_long_name() -> None:
    point = charts.Point(f"team/{'a' * 60}:12, optimix", 1.0, 0.01, "/deltas/x", "this")
    root = ET.fromstring(charts.rate_distortion([point]))
    assert f"…{'a' * 16}:12" in [text.text for text in root.iter("text")]


@pytest.mark.parametrize(
    ("others", "style", "side"),
    [
        ([], "start", 1),
        ([(2.3, 0.01)], "projection", -1),
        ([(2.3, 0.01), (1.7, 0.01)], "layer", 0),
        ([(0.1, 0.01), (4.0, 0.01)], "start", 1),
    ],
)
def test_a_name_in_a_plot_hides_no_dot(
    others: list[tuple[float, float]], style: str, side: int
) -> None:
    points = [charts.Point("o:1", bits, kl, "/deltas/o", "other") for bits, kl in others]
    points += [charts.Point("m:1, optimix", 2.0, 0.01, "/deltas/m", "this")]
    points += [charts.Point("f:1", 4.4, 1.0, "/deltas/f", "other")]
    (name,) = (
        text for text in ET.fromstring(charts.rate_distortion(points)).iter("text")
        if text.text == "m:1"
    )  # fmt: skip
    assert (name.attrib["class"], np.sign(int(name.attrib["dx"]))) == (style, side)


@given(st.floats(0.01, 1), st.integers(1, 80))
def test_a_name_is_whole_on_a_phone(place: float, length: int) -> None:
    points = [
        charts.Point("f:1", 1.0, 1.0, "/deltas/f", "other"),
        charts.Point("n" * length, place, 0.01, "/deltas/m", "this"),
    ]
    (name,) = (
        text for text in ET.fromstring(charts.rate_distortion(points)).iter("text")
        if set(text.text or "") <= {"n", "…"}
    )  # fmt: skip
    wide = 6.7 * len(name.text or "")
    before = {"start": 0.0, "layer": wide / 2, "projection": wide}[name.attrib["class"]]
    left = 260 * float(name.attrib["x"].removesuffix("%")) / 100 + int(name.attrib["dx"]) - before
    assert 0 <= left <= 260 - wide


def test_two_names_in_a_plot_are_apart() -> None:
    points = [charts.Point(f"m:{n}", 2.0, 0.01, "/deltas/m", "this") for n in (1, 2)]
    names = [
        (text.attrib["dx"], text.attrib["y"])
        for text in ET.fromstring(charts.rate_distortion(points)).iter("text")
        if (text.text or "").startswith("m:")
    ]
    assert len(set(names)) == 2


def test_a_value_between_two_gaps_is_a_dot() -> None:
    times = [datetime(2026, 11, 22, 8, minute, tzinfo=UTC) for minute in range(6)]
    line = charts.Series("device", [1.0, 2.0, None, 3.0, None, None])
    root = ET.fromstring(charts.timeline("x", times, [line], "3"))
    (drawn,) = root.iter("polyline")
    assert drawn.attrib["points"].count(",") == 2
    (dot,) = root.iter("circle")
    assert (float(dot.attrib["cx"]), dot.attrib["class"]) == (260 * 3 / 5, "device")


def test_bar_heights_are_proportional_to_ranks() -> None:
    matrix = MatrixFigures(name="layers.0.q", shape=[100, 200], rank=50, widths={8: 10, 2: 40})
    half = MatrixFigures(name="layers.1.q", shape=[100, 200], rank=25, widths={3: 25})
    root = ET.fromstring(charts.width_bars(MatrixGrid.of([matrix, half])))
    heights = {
        style: float(rect.attrib["height"])
        for rect in root.iter("rect")
        if (style := rect.get("class", ""))
    }
    full = heights["ground"]
    assert heights["w8"] == pytest.approx(full * 0.2, abs=0.01)
    assert heights["w2"] == pytest.approx(full * 0.8, abs=0.01)
    assert heights["w3"] == pytest.approx(full * 0.5, abs=0.01)


def test_bars_of_two_factors_do_not_exceed_the_ranks() -> None:
    widths = {8: 20, 3: 30, 2: 50}
    matrix = MatrixFigures(name="layers.0.q", shape=[100, 200], rank=50, widths=widths)
    root = ET.fromstring(charts.width_bars(MatrixGrid.of([matrix])))
    heights = {rect.get("class", ""): float(rect.attrib["height"]) for rect in root.iter("rect")}
    full = heights["ground"]
    assert heights["w8"] == pytest.approx(full * 0.2, abs=0.01)
    assert heights["w8"] + heights["w3"] + heights["w2"] == pytest.approx(full, abs=0.01)
    assert titles(root)[0].endswith("20 × 8 bit, 30 × 3 bit, 50 × 2 bit in two factors")


def test_spectra_show_the_width_of_each_rank_in_three_layers() -> None:
    spectra = ReportFigures.model_validate(seed.report(layers=9)).spectra
    assert [one.projection for one in spectra] == list(seed.PROJECTIONS)
    assert list(spectra[0].by_layer) == ["0", "4", "8"]
    root = ET.fromstring(charts.spectrum(spectra[0]))
    assert len(list(root.iter("polyline"))) == 3
    assert len(cells(root)) == 18
    assert "layer 0, rank 1\n0.400, 8 bit" in titles(root)
    assert sum(title.endswith("dropped") for title in titles(root)) == 3
    assert spectra[0].has_dropped
    for circle in root.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= 300
        assert 0 <= float(circle.attrib["cy"]) <= 180


@given(st.floats(1e-6, 10), st.floats(1e-6, 10), st.floats(0, 20))
def test_color_scale_is_monotonic(low: float, high: float, value: float) -> None:
    scale = charts.Scale(min(low, high), max(low, high))
    assert 0 <= scale.step(value) < charts.STEPS
    assert scale.step(value) <= scale.step(value * 1.5)
    assert scale.step(scale.low) == 0


def test_stacked_bar_widths_are_proportional() -> None:
    root = ET.fromstring(charts.stacked([("a", 30, "<b>"), ("b", 20, "two"), ("c", 0, "")], 100))
    rects = [(float(rect.attrib["x"]), float(rect.attrib["width"])) for rect in root.iter("rect")]
    assert rects == [(0, 30), (30, 20), (50, 0)]
    assert titles(root) == ["<b>", "two", ""]


def test_equal_projections_of_different_stacks_are_distinguished() -> None:
    grid = MatrixGrid.of(
        MatrixFigures(name=name)
        for name in ("text.layers.1.q.weight", "vision.layers.1.q.weight", "lm_head.weight")
    )
    assert len(grid.cells) == 3
    assert list(grid.projections) == ["text.layers.*.q", "vision.layers.*.q", "lm_head"]
    assert list(grid.layers) == ["1", NO_LAYER]


def test_shares_add_up_to_the_artifact() -> None:
    figures = ReportFigures.model_validate(seed.report())
    assert sum(share.bytes for share in figures.shares) == figures.artifact_bytes
    assert figures.shares[0].label == "self_attn.q_proj × 24"
    assert figures.shares[-1].label == "header and manifest"


def test_cards_are_rendered_without_anything_that_runs() -> None:
    html = markdown(
        "# Skills\n\n**Bold**, <b onclick=alert(1)>x</b>\n\n<script>alert(1)</script>\n\n"
        "[good](https://example.org) [bad](javascript:alert(1)) ![image](https://example.org/x.png)"
        "\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    assert "<h3>Skills</h3>" in html
    assert "<strong>Bold</strong>" in html
    assert "<td>1</td>" in html
    assert 'href="https://example.org"' in html
    for hostile in ("<script", "<b ", "<img", 'href="javascript'):
        assert hostile not in html


def test_advice_depends_on_the_error_code() -> None:
    """Where a message does not say what to do, the page does."""
    assert ADVICE[errors.WorkerLost.code]
    assert ADVICE.keys() <= {error.code for error in _tree(errors.DeltadockError)}


def _tree(root: type[errors.DeltadockError]) -> set[type[errors.DeltadockError]]:
    return {root}.union(*map(_tree, root.__subclasses__()))
