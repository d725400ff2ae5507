"""Charts: SVG rendered on the server, coloured by classes of the style sheet, without scripts.

Each chart is well-formed XML; the `<title>` of each cell gives its values as text.
"""

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final, NamedTuple
from xml.etree import ElementTree as ET

from markupsafe import Markup

from deltadock.api.dashboard.figures import (
    LayerBits,
    MatrixFigures,
    MatrixGrid,
    Place,
    RankFigures,
    Spectra,
)
from deltadock.words import percentage, significant

STEPS: Final = 9
"""Colours of the error scale: classes q0 (least) to q8 (most)."""

_WIDTH: Final = 800
"""Target width of a grid in pixels, within the limits on a cell's width."""
_MIN_CELL, _MAX_CELL = 14, 140
_READABLE: Final = 16
"""Most layers of which a cell has room for its value."""
_CHARACTER: Final = 6.7
_AXIS: Final = 18
_GAP: Final = 2


class Scale(NamedTuple):
    """A logarithmic colour scale from `low` to `high`."""

    low: float
    high: float

    def step(self, value: float) -> int:
        """The colour of a value, 0 to STEPS - 1; values outside the scale are clamped."""
        if value <= self.low:
            return 0
        if value >= self.high:
            return STEPS - 1
        floor = math.log(self.low)
        share = (math.log(value) - floor) / (math.log(self.high) - floor)
        return min(int(STEPS * share), STEPS - 1)


ERRORS: Final = Scale(1e-3, 1.0)
"""Of normalised output errors, the same on every page; 1 is as if nothing were stored."""


def tallest(grid: MatrixGrid) -> float:
    """The largest kept share of the full rank over all matrices."""
    return max((matrix.kept for matrix in grid.cells.values()), default=0.0) or 1.0


def heat_map(grid: MatrixGrid) -> Markup:
    """Each matrix's normalised output error as a colour, with its value where it fits."""

    def draw(parent: ET.Element, matrix: MatrixFigures, box: "Box") -> None:
        step = "none" if matrix.error is None else f"q{ERRORS.step(matrix.error)}"
        cell = _cell(parent, f"cell {step}", f"{matrix.name}\nerror {significant(matrix.error)}")
        _rect(cell, box, unit="%")
        if len(grid.layers) <= _READABLE and box.height >= 16:
            middle = {"x": f"{_n(box.x + box.width / 2)}%", "y": _n(box.y + box.height / 2 + 4)}
            ET.SubElement(cell, "text", middle).text = significant(matrix.error, 2)

    return _draw_grid(grid, "Normalised output error by projection and layer", 26, draw)


def width_bars(grid: MatrixGrid) -> Markup:
    """Each matrix's ranks, stacked by width (widest at the bottom).

    A cell's full height is `tallest` of its matrix's full rank.
    """
    full_height = tallest(grid)

    def draw(parent: ET.Element, matrix: MatrixFigures, box: "Box") -> None:
        title = f"{matrix.name}\n{matrix.rank} of {matrix.full_rank} ranks"
        title += f" ({percentage(matrix.kept)})\n{matrix.widths_text}"
        cell = _cell(parent, "cell stack", title)
        _rect(cell, box, "ground", unit="%")
        # Ranks or, where U and V differ in width, both factors' vectors (twice as many).
        vectors = sum(matrix.widths.values())
        unit = box.height * matrix.kept / full_height / vectors if vectors else 0.0
        bottom = box.y + box.height
        for width, count in sorted(matrix.widths.items(), reverse=True):
            bottom -= count * unit
            _rect(cell, box._replace(y=bottom, height=count * unit), f"w{min(width, 8)}", unit="%")

    return _draw_grid(grid, "Ranks by width, by projection and layer", 44, draw)


def stacked(parts: Sequence[tuple[str, float, str]], longest: float) -> Markup:
    """A stacked bar as wide as its container, from (class, value, title); full at `longest`."""
    root = _svg(100, 10, "bar", None)
    root.set("preserveAspectRatio", "none")
    start = 0.0
    for style, value, title in parts:
        # A minimum width keeps small parts visible.
        width = max(100 * value / longest, 0.5) if value > 0 and longest > 0 else 0.0
        _rect(_cell(root, style, title), Box(start, 0, width, 10))
        start += width
    return _markup(root)


class Point(NamedTuple):
    """A delta in `rate_distortion`: stored bits per weight, KL in nats, page, and style.

    `is_apart`: its KL was measured on another text, so that it does not compare with the others'.
    """

    label: str
    bits: float
    kl: float
    href: str
    style: str
    is_apart: bool = False


_LABEL: Final = 20
"""Characters of a name in a plot, the last ones."""
_PLOT: Final = 260
"""Pixels across for which names are placed: a phone's. Where there are more, there is more room."""
_LEFT, _BOTTOM, _TOP = 56, 40, 12
"""Of the plots that are as wide as their container, in pixels; across, they count in percent."""


def rate_distortion(points: Sequence[Point]) -> Markup:
    """KL (logarithmic, lower is better) over bits per weight, a linked dot for each point."""
    height = 250
    root, axis, plot = _axes("KL over bits per weight", height)
    most = 1.1 * max(point.bits for point in points)
    kls = [max(point.kl, 1e-7) for point in points]
    low, high = math.floor(math.log10(min(kls))), math.ceil(math.log10(max(kls)) + 1e-9)
    high = max(high, low + 1)

    def x(bits: float) -> float:
        return 100 * bits / most

    def y(kl: float) -> float:
        share = (math.log10(max(kl, 1e-7)) - low) / (high - low)
        return _TOP + (height - _TOP - _BOTTOM) * (1 - share)

    for power in range(low, high + 1):
        _rule(plot, 0, y(10.0**power), 100, unit="%")
        _label(axis, _LEFT - 8, y(10.0**power) + 4, f"{10.0**power:g}", "projection")
    for tick in _ticks(most):
        _label(plot, x(tick), height - _BOTTOM + 16, f"{tick:g}", "layer", unit="%")
    _label(plot, 50, height - 6, "bits per weight, all stored", "layer", unit="%")
    for point in sorted(points, key=lambda point: point.style == "this"):
        link = ET.SubElement(plot, "a", {"href": point.href})
        cell = _cell(
            link,
            f"dot {point.style}{' apart' if point.is_apart else ''}",
            f"{point.label}\n{significant(point.bits)} bits, KL {significant(point.kl)}"
            f"{' on another text' if point.is_apart else ''}",
        )
        across, down = f"{_n(x(point.bits))}%", y(point.kl)
        ET.SubElement(cell, "circle", {"cx": across, "cy": _n(down), "r": "6"})
        # What can be clicked, large enough for a finger.
        target = {"x": across, "y": _n(down - 12), "width": "24", "height": "24"}
        ET.SubElement(cell, "rect", target | {"transform": "translate(-12)"})
    taken = [Box(_PLOT * x(p.bits) / 100 - 7, y(p.kl) - 7, 14, 14) for p in points]
    for point in points:
        if point.style != "this":
            continue
        name = point.label.partition(", ")[0]
        if len(name) > _LABEL:
            name = f"…{name[1 - _LABEL :]}"
        boxes = [spot.box(name, x(point.bits), y(point.kl)) for spot in _SPOTS]
        spot, box = min(zip(_SPOTS, boxes, strict=True), key=lambda one: _hidden(one[1], taken))
        taken.append(box)
        text = _label(plot, x(point.bits), y(point.kl) + spot.dy, name, spot.style, unit="%")
        text.set("dx", str(spot.dx))
    return _markup(root)


class _Spot(NamedTuple):
    """Where a name may be beside its dot: the style that anchors it, and its distance."""

    style: str
    dx: int
    dy: int

    def box(self, name: str, across: float, down: float) -> "Box":
        """The pixels that it takes there."""
        width = _CHARACTER * len(name)
        before = {"start": 0.0, "layer": width / 2, "projection": width}[self.style]
        return Box(_PLOT * across / 100 + self.dx - before, down + self.dy - 9, width, 12)


_SPOTS: Final = (
    _Spot("start", 10, 4), _Spot("projection", -10, 4), _Spot("layer", 0, -11),
    _Spot("layer", 0, 19), _Spot("start", 8, -9), _Spot("start", 8, 17),
    _Spot("projection", -8, -9), _Spot("projection", -8, 17),
)  # fmt: skip


def _hidden(name: "Box", taken: Sequence["Box"]) -> float:
    """How much a name would hide, or lose beyond the edges of the plot."""
    lost = max(0.0, -name.x) + max(0.0, name.x + name.width - _PLOT) + max(0.0, -name.y)
    return lost + sum(
        max(0.0, min(name.x + name.width, box.x + box.width) - max(name.x, box.x))
        for box in taken
        if name.y < box.y + box.height and box.y < name.y + name.height
    )


def layer_bits(layers: Sequence[LayerBits], budget: float | None) -> Markup:
    """Stored bits per weight of each layer, with the budget as a line."""
    bottom, height = 136, 124
    root, axis, plot = _axes("Bits per weight by layer", bottom + _BOTTOM)
    most = 1.1 * max([layer.bits for layer in layers] + ([budget] if budget else []))
    share = 100 / len(layers)
    for tick in _ticks(most):
        _rule(plot, 0, bottom - height * tick / most, 100, unit="%")
        _label(axis, _LEFT - 8, bottom - height * tick / most + 4, f"{tick:g}", "projection")
    for number, layer in enumerate(layers):
        cell = _cell(plot, "bar-of-layer", f"layer {layer.layer}: {significant(layer.bits)} bits")
        tall = height * layer.bits / most
        left = number * share
        _rect(cell, Box(left, bottom - tall, 0.92 * share, tall), unit="%")
    _label_columns(plot, [layer.layer for layer in layers], bottom + 16, 7.0 * share)
    if budget:
        line = _rule(plot, 0, bottom - height * budget / most, 100, unit="%")
        line.set("class", "budget")
    _label(plot, 50, bottom + _BOTTOM - 4, "layer", "layer", unit="%")
    return _markup(root)


def _axes(label: str, height: int) -> tuple[ET.Element, ET.Element, ET.Element]:
    """A plot as wide as its container: its root, and what is drawn of the axis and beside it."""
    root = ET.Element("div", {"class": "axes plot", "role": "group", "aria-label": label})
    axis = ET.SubElement(root, "svg", {"class": "grid", "width": str(_LEFT), "height": str(height)})
    return root, axis, ET.SubElement(root, "svg", {"class": "grid", "height": str(height)})


def _label_columns(parent: ET.Element, names: Sequence[str], y: float, width: float) -> None:
    """Names of columns about `width` pixels wide, so many as there is room for."""
    step = math.ceil(30 / width)
    for number, name in enumerate(names):
        if number % step == 0:
            style = "layer" if number % (3 * step) == 0 else "layer if-wide"
            _label(parent, 100 * (number + 0.5) / len(names), y, name, style, unit="%")


class Series(NamedTuple):
    """A line of a `timeline`: its style, and its values at the timeline's times, None for gaps."""

    style: str
    values: Sequence[float | None]


def timeline(label: str, times: Sequence[datetime], series: Sequence[Series], top: str) -> Markup:
    """Values over time from zero up; `top` is the text of the largest one."""
    width, height, above, below = 260, 74, 14, 16
    root = _svg(width, height, "grid plot", label)
    first = times[0]
    span = max((times[-1] - first).total_seconds(), 1.0)
    most = max((v for line in series for v in line.values if v is not None), default=0.0) or 1.0
    bottom = height - below
    _rule(root, 0, above, width)
    _rule(root, 0, bottom, width)
    _label(root, 0, above - 4, top, "start")
    start = f"{round(span / 60)} min ago" if span >= 60 else f"{round(span)} s ago"
    _label(root, 0, height - 3, start, "start")
    _label(root, width, height - 3, "now", "projection")
    for line in series:
        runs: list[list[tuple[str, str]]] = [[]]
        for time, value in zip(times, line.values, strict=True):
            if value is None:
                runs.append([])
                continue
            x = width * (time - first).total_seconds() / span
            y = bottom - (bottom - above) * value / most
            runs[-1].append((_n(x), _n(y)))
        for points in filter(None, runs):
            if len(points) == 1:
                cx, cy = points[0]
                dot = {"cx": cx, "cy": cy, "r": "2.5", "class": line.style}
                ET.SubElement(root, "circle", dot)
            else:
                shape = {"points": " ".join(map(",".join, points)), "class": line.style}
                ET.SubElement(root, "polyline", shape)
    return _markup(root)


def spectrum(spectra: Spectra) -> Markup:
    """Singular values over their place, both logarithmic; a dot's colour is its rank's width.

    Ranks that the method dropped are rings.
    """
    width, height, left, bottom, top, right = 300, 180, 46, 30, 8, 10
    root = _svg(width, height, "grid plot", f"Singular values of {spectra.projection}")
    ranks = [rank for found in spectra.by_layer.values() for rank in found]
    last = math.log10(max(rank.place for rank in ranks)) or 1.0
    values = [max(rank.value, 1e-12) for rank in ranks]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)

    def x(place: int) -> float:
        return left + (width - left - right) * math.log10(place) / last

    def y(value: float) -> float:
        share = (math.log10(max(value, 1e-12)) - low) / max(high - low, 1)
        return top + (height - top - bottom) * (1 - share)

    for power in range(low, high + 1):
        _rule(root, left, y(10.0**power), width - right)
        _label(root, left - 6, y(10.0**power) + 4, f"{10.0**power:g}", "projection")
    for power in range(math.floor(last) + 1):
        _label(root, x(10**power), height - bottom + 15, f"{10**power}", "layer")
    for layer, found in spectra.by_layer.items():
        points = " ".join(f"{_n(x(rank.place))},{_n(y(rank.value))}" for rank in found)
        ET.SubElement(root, "polyline", {"points": points})
        for rank in found:
            bits = f"{rank.u_bits} bit" if rank.u_bits else "dropped"
            if rank.u_bits != rank.v_bits:
                bits = f"U {rank.u_bits}, V {rank.v_bits} bit"
            title = f"layer {layer}, rank {rank.place}\n{significant(rank.value)}, {bits}"
            place = {"cx": _n(x(rank.place)), "cy": _n(y(rank.value)), "r": "4"}
            dot = _cell(root, f"cell w{_mean_width(rank)}", title)
            ET.SubElement(dot, "circle", place)
    return _markup(root)


def _mean_width(rank: RankFigures) -> int:
    """The class of a rank's colour: 0 of one that is dropped, 8 of the widest."""
    return min((rank.u_bits + rank.v_bits + 1) // 2, 8)


def _ticks(most: float) -> list[float]:
    """Three to seven round values from 0 up to `most`."""
    step = 10.0 ** math.floor(math.log10(most / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) <= 6)
    return [round(step * number, 9) for number in range(int(most / step) + 1)]


def _rule(root: ET.Element, x1: float, y: float, x2: float, *, unit: str = "") -> ET.Element:
    """A horizontal line; `unit` is that of x."""
    ends = {"x1": _n(x1) + unit, "y1": _n(y), "x2": _n(x2) + unit, "y2": _n(y)}
    return ET.SubElement(root, "line", ends)


def _label(
    root: ET.Element, x: float, y: float, text: str, style: str, *, unit: str = ""
) -> ET.Element:
    label = ET.SubElement(root, "text", {"x": _n(x) + unit, "y": _n(y), "class": style})
    label.text = text
    return label


class Box(NamedTuple):
    """A rectangle, in pixels; x and width of a grid's cell are in percent."""

    x: float
    y: float
    width: float
    height: float


def _draw_grid(
    grid: MatrixGrid,
    label: str,
    height: int,
    draw: Callable[[ET.Element, MatrixFigures, Box], None],
) -> Markup:
    """Draw the axes, and each matrix's cell with `draw`: as wide as there is room for."""
    margin = round(_CHARACTER * max((len(name) for name in grid.projections), default=0)) + 10
    columns = len(grid.layers)
    if len(grid.projections) > 24:
        height = _MIN_CELL
    width = min(max((_WIDTH - margin) // max(columns, 1), _MIN_CELL), _MAX_CELL)
    tall = _AXIS + len(grid.projections) * height
    root = ET.Element("div", {"class": "cells", "role": "group", "aria-label": label})
    names = ET.SubElement(root, "svg", {"class": "grid", "width": str(margin), "height": str(tall)})
    body = {"class": "grid", "width": str(columns * width), "height": str(tall)}
    cells = ET.SubElement(root, "svg", body)
    _label_columns(cells, list(grid.layers), 12, width)
    for row, projection in enumerate(grid.projections):
        top = _AXIS + row * height
        _label(names, margin - 8, top + height / 2 + 4, projection, "projection")
        for column, layer in enumerate(grid.layers):
            matrix = grid.cells.get(Place(projection, layer))
            if matrix is not None:
                share = 100 / columns
                box = Box(column * share, top, share * (1 - _GAP / width), height - _GAP)
                draw(cells, matrix, box)
    return _markup(root)


def _svg(width: int, height: int, style: str, label: str | None) -> ET.Element:
    attributes = {"viewBox": f"0 0 {width} {height}", "class": style}
    if label is None:
        attributes["aria-hidden"] = "true"
    else:
        # The role `img` would hide the cells' titles from assistive technology.
        attributes |= {"width": str(width), "height": str(height)}
        attributes |= {"role": "group", "aria-label": label}
    return ET.Element("svg", attributes)


def _cell(parent: ET.Element, style: str, title: str) -> ET.Element:
    cell = ET.SubElement(parent, "g", {"class": style})
    ET.SubElement(cell, "title").text = title
    return cell


def _rect(parent: ET.Element, box: Box, style: str | None = None, *, unit: str = "") -> None:
    attributes = {
        "x": f"{_n(box.x)}{unit}",
        "y": _n(box.y),
        "width": f"{_n(box.width)}{unit}",
        "height": _n(box.height),
    }
    ET.SubElement(parent, "rect", attributes | ({"class": style} if style else {}))


def _n(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _markup(root: ET.Element) -> Markup:
    # Safe: ElementTree escapes all texts and attributes.
    return Markup(ET.tostring(root, encoding="unicode"))
