"""Charts: SVG rendered on the server, coloured by classes of the style sheet, without scripts.

Each chart is well-formed XML; the `<title>` of each cell gives its values as text.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple
from xml.etree import ElementTree as ET

from markupsafe import Markup

from deltadock.api.dashboard.figures import MatrixFigures, MatrixGrid, Place
from deltadock.api.dashboard.formats import percentage, significant

STEPS: Final = 9
"""Colours of the error scale: classes q0 (least) to q8 (most)."""

_WIDTH: Final = 800
"""Target width of a grid in pixels, within the limits on a cell's width."""
_MIN_CELL, _MAX_CELL = 14, 140
_CHARACTER: Final = 6.7
_AXIS: Final = 18
_GAP: Final = 2


class Scale(NamedTuple):
    """A logarithmic colour scale from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Scale":
        """The scale spanning the positive values."""
        positive = [value for value in values if value is not None and value > 0]
        return cls(min(positive, default=1.0), max(positive, default=1.0))

    def step(self, value: float) -> int:
        """The colour of a value, 0 to STEPS - 1; values outside the scale are clamped."""
        if value <= self.low:
            return 0
        if value >= self.high:
            return STEPS - 1
        floor = math.log(self.low)
        share = (math.log(value) - floor) / (math.log(self.high) - floor)
        return min(int(STEPS * share), STEPS - 1)


def error_scale(grid: MatrixGrid) -> Scale:
    """The scale of a grid's errors."""
    return Scale.of(matrix.error for matrix in grid.cells.values())


def tallest(grid: MatrixGrid) -> float:
    """The largest kept share of the full rank over all matrices."""
    return max((matrix.kept for matrix in grid.cells.values()), default=0.0) or 1.0


def heat_map(grid: MatrixGrid) -> Markup:
    """Each matrix's normalised output error as a colour, with its value where it fits."""
    scale = error_scale(grid)

    def draw(parent: ET.Element, matrix: MatrixFigures, box: "Box") -> None:
        step = "none" if matrix.error is None else f"q{scale.step(matrix.error)}"
        cell = _cell(parent, f"cell {step}", f"{matrix.name}\nerror {significant(matrix.error)}")
        _rect(cell, box)
        if box.width >= 40 and box.height >= 16:
            middle = {"x": _n(box.x + box.width / 2), "y": _n(box.y + box.height / 2 + 4)}
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
        _rect(cell, box, "ground")
        # Ranks or, where U and V differ in width, both factors' vectors (twice as many).
        vectors = sum(matrix.widths.values())
        unit = box.height * matrix.kept / full_height / vectors if vectors else 0.0
        bottom = box.y + box.height
        for width, count in sorted(matrix.widths.items(), reverse=True):
            bottom -= count * unit
            _rect(cell, Box(box.x, bottom, box.width, count * unit), f"w{width}")

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


class Box(NamedTuple):
    """A rectangle, in pixels."""

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
    """Draw the axes, and each matrix's cell with `draw`."""
    margin = round(_CHARACTER * max((len(name) for name in grid.projections), default=0)) + 10
    columns = len(grid.layers)
    if len(grid.projections) > 24:
        height = _MIN_CELL
    width = min(max((_WIDTH - margin) // max(columns, 1), _MIN_CELL), _MAX_CELL)
    root = _svg(margin + columns * width, _AXIS + len(grid.projections) * height, "grid", label)
    label_step = math.ceil(30 / width)
    for column, layer in enumerate(grid.layers):
        if column % label_step == 0:
            place = {"x": _n(margin + (column + 0.5) * width), "y": "12", "class": "layer"}
            ET.SubElement(root, "text", place).text = layer
    for row, projection in enumerate(grid.projections):
        top = _AXIS + row * height
        place = {"x": _n(margin - 8), "y": _n(top + height / 2 + 4), "class": "projection"}
        ET.SubElement(root, "text", place).text = projection
        for column, layer in enumerate(grid.layers):
            matrix = grid.cells.get(Place(projection, layer))
            if matrix is not None:
                left = margin + column * width
                draw(root, matrix, Box(left, top, width - _GAP, height - _GAP))
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


def _rect(parent: ET.Element, box: Box, style: str | None = None) -> None:
    attributes = {
        "x": _n(box.x),
        "y": _n(box.y),
        "width": _n(box.width),
        "height": _n(box.height),
    }
    ET.SubElement(parent, "rect", attributes | ({"class": style} if style else {}))


def _n(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _markup(root: ET.Element) -> Markup:
    # Safe: ElementTree escapes all texts and attributes.
    return Markup(ET.tostring(root, encoding="unicode"))
