"""A methods table as text and as a plot."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.cells import Cell, Row, summarize
from deltadock.compression.catalogue import default_method

CLOSE = 1.005
"""Bytes that an artifact may have over another's and still count as no larger."""

HEADINGS = (
    "budget", "method", "seeds", "true bytes", "ratio", "true bits", "KL", "KL range",
    "agreement", "accuracy", "accuracy range", "seconds",
)  # fmt: skip


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """The cells with figures by budget and method, best KL first within a budget."""

    def place(cell: Cell) -> tuple[float, str]:
        return (cell.budget if cell.budget is not None else float("inf"), cell.method)

    measured = sorted((cell for cell in cells if cell.kl is not None), key=place)
    rows = [summarize(list(group)) for _, group in groupby(measured, key=place)]
    return sorted(rows, key=lambda row: (row.budget is None, row.budget or 0.0, row.kl))


def format_table(cells: Sequence[Cell]) -> str:
    """The table, one line a method and budget, and the cells that have no figures below it."""
    lines = [list(HEADINGS)]
    for row in rows_of(cells):
        spread = accuracy = "–"
        if row.accuracy is not None:
            accuracy = f"{row.accuracy:.1%}"
            spread = f"{row.accuracy_least:.1%}..{row.accuracy_most:.1%}"
        lines.append(
            [
                "–" if row.budget is None else f"{row.budget:g}",
                row.method,
                str(row.seeds),
                f"{row.artifact_bytes:,.0f}",
                f"{row.ratio:.2f}",
                f"{row.true_bits:.3f}",
                f"{row.kl:.6f}",
                f"{row.kl_least:.6f}..{row.kl_most:.6f}",
                f"{row.agreement:.2%}",
                accuracy,
                spread,
                f"{row.seconds:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            value.ljust(width) if place == 1 else value.rjust(width)
            for place, (value, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text += [
        f"{cell.method} at {cell.budget}, seed {cell.seed}: {cell.status}"
        for cell in cells
        if cell.status != "ok"
    ]
    return "\n".join(text) + "\n"


def verdict(cells: Sequence[Cell]) -> str:
    """What the default method's artifact of no more bytes leaves of every other's KL, at worst.

    Artifacts of one seed are compared, and of several that fit the largest. Bytes within `CLOSE`
    of each other count as equal.
    """
    best = default_method().name
    worst: list[tuple[float, str]] = []
    for other in cells:
        if other.method in (best, "exact") or other.kl is None or other.artifact_bytes is None:
            continue
        fitting = [
            (cell.artifact_bytes, cell.kl)
            for cell in cells
            if cell.method == best
            and cell.seed == other.seed
            and cell.kl is not None
            and cell.artifact_bytes is not None
            and cell.artifact_bytes <= CLOSE * other.artifact_bytes
        ]
        if fitting and other.kl > 0:
            budget = "" if other.budget is None else f" at {other.budget:g}"
            ratio = max(fitting)[1] / other.kl
            worst.append((ratio, f"{other.method}{budget}, seed {other.seed}"))
    if not worst:
        return ""
    ratio, name = max(worst)
    return (
        f"{best} at no more bytes, against {len(worst)} artifacts of other methods: at worst "
        f"{ratio:.3f} of the KL ({name})\n"
    )


def plot(cells: Sequence[Cell], title: str, out: Path) -> None:
    """KL against true bits, and accuracy where there are exercises, as `out`.svg and `out`.png.

    A line is the mean over the seeds, the band around it their range.
    """
    # Here, so that the table alone needs no matplotlib.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "deltadock"
    rows = [row for row in rows_of(cells) if row.kl > 0]
    with_accuracy = any(row.accuracy is not None for row in rows)
    figure = Figure(figsize=(11 if with_accuracy else 6.5, 4.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2 if with_accuracy else 1, squeeze=False)[0]
    for method, group in groupby(sorted(rows, key=lambda row: row.method), lambda row: row.method):
        line = sorted(group, key=lambda row: row.true_bits)
        bits = [row.true_bits for row in line]
        (drawn,) = panels[0].plot(bits, [row.kl for row in line], marker="o", ms=3, label=method)
        panels[0].fill_between(
            bits,
            [row.kl_least for row in line],
            [row.kl_most for row in line],
            color=drawn.get_color(),
            alpha=0.2,
            linewidth=0,
        )
        if with_accuracy:
            scores = [float("nan") if row.accuracy is None else row.accuracy for row in line]
            panels[1].plot(bits, scores, marker="o", ms=3, color=drawn.get_color())
    panels[0].set(xscale="log", yscale="log", ylabel="KL to the fine-tune, nats per token")
    if with_accuracy:
        panels[1].set(xscale="log", ylabel="task accuracy", ylim=(0, 1))
    for panel in panels:
        panel.set_xlabel("artifact bits per weight of the checkpoint (all bytes counted)")
        panel.grid(visible=True, which="both", alpha=0.25)
    if rows:
        panels[0].legend(fontsize="small")
    figure.savefig(out.with_name(out.name + ".svg"), metadata={"Date": None})
    figure.savefig(out.with_name(out.name + ".png"), dpi=150)
