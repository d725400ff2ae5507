"""A methods table: its rows, kept as CSV, summarized over seeds, printed as text and plotted."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from statistics import mean

from deltadock.compression.options import default_method

RowKey = tuple[str, str, float | None, int, bool]

SIZE_TOLERANCE = 1.005
"""Ratio of bytes up to which an artifact counts as no larger than another."""


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """One method at one budget with one calibration seed: a line of the CSV file.

    Attributes:
        inputs: digest of the pair, the texts and the exercises, so that a table never mixes two.
        method: a name of `deltadock.compression.options`, or `base` or `finetuned` for the models
            themselves.
        budget: code bits per weight; None for methods without one.
        seed: of the calibration.
        equal_bytes: whether the goal was `adamix`'s size at this budget instead of the bits.
        target_bytes: that size.
        artifact_bytes, ratio, true_bits: of the artifact, every byte counted.
        kl, kl_base, agreement, nll, nll_finetuned: on the held-out text, nats per token.
        accuracy: on the exercises; None without them.
        seconds: of the compression.
        status: `ok`, or why there are no figures.
        machine: the machine it ran on.
    """

    inputs: str
    method: str
    budget: float | None
    seed: int
    equal_bytes: bool
    target_bytes: int | None = None
    artifact_bytes: int | None = None
    ratio: float | None = None
    true_bits: float | None = None
    kl: float | None = None
    kl_base: float | None = None
    agreement: float | None = None
    nll: float | None = None
    nll_finetuned: float | None = None
    accuracy: float | None = None
    seconds: float | None = None
    status: str = "ok"
    machine: str = ""

    @property
    def key(self) -> RowKey:
        """Identifies the row within a file."""
        return self.inputs, self.method, self.budget, self.seed, self.equal_bytes


TEXT_COLUMNS = {"inputs", "method", "status", "machine"}
INTEGER_COLUMNS = {"seed", "target_bytes", "artifact_bytes"}


def read_rows(path: Path) -> dict[RowKey, BenchmarkRow]:
    """The rows measured so far; none if there is no file."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            BenchmarkRow(**{key: _parse(key, text) for key, text in row.items()})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]
    return {row.key: row for row in rows}


def _parse(key: str, text: str) -> str | int | float | bool | None:
    if key in TEXT_COLUMNS:
        return text
    if key == "equal_bytes":
        return text == "True"
    if text == "":
        return None
    return int(text) if key in INTEGER_COLUMNS else float(text)


def write_rows(path: Path, rows: Iterable[BenchmarkRow]) -> None:
    """Replace the file atomically."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        columns = [field.name for field in fields(BenchmarkRow)]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    partial.replace(path)


@dataclass(frozen=True, slots=True)
class SeedSummary:
    """A method at a budget over its seeds: means, and the ranges of KL and accuracy."""

    method: str
    budget: float | None
    seeds: int
    artifact_bytes: float
    ratio: float
    true_bits: float
    kl: float
    kl_min: float
    kl_max: float
    agreement: float
    accuracy: float | None
    accuracy_min: float | None
    accuracy_max: float | None
    seconds: float


def _summarize(rows: Sequence[BenchmarkRow]) -> SeedSummary:
    """Summarize rows that differ only in their seed."""

    def values(name: str) -> list[float]:
        column = (getattr(row, name) for row in rows)
        return [float(value) for value in column if value is not None]

    def average(name: str) -> float:
        return mean(values(name) or [float("nan")])

    accuracies = values("accuracy")
    return SeedSummary(
        method=rows[0].method,
        budget=rows[0].budget,
        seeds=len(rows),
        artifact_bytes=average("artifact_bytes"),
        ratio=average("ratio"),
        true_bits=average("true_bits"),
        kl=average("kl"),
        kl_min=min(values("kl")),
        kl_max=max(values("kl")),
        agreement=average("agreement"),
        accuracy=mean(accuracies) if accuracies else None,
        accuracy_min=min(accuracies, default=None),
        accuracy_max=max(accuracies, default=None),
        seconds=average("seconds"),
    )


def summarize(rows: Sequence[BenchmarkRow]) -> list[SeedSummary]:
    """The measured rows by budget and method, sorted by budget and then by KL."""

    def order(row: BenchmarkRow) -> tuple[float, str]:
        return (row.budget if row.budget is not None else float("inf"), row.method)

    measured = sorted((row for row in rows if row.kl is not None), key=order)
    summaries = [_summarize(list(group)) for _, group in groupby(measured, key=order)]
    return sorted(summaries, key=lambda it: (it.budget is None, it.budget or 0.0, it.kl))


HEADINGS = (
    "budget", "method", "seeds", "true bytes", "ratio", "true bits", "KL", "KL range",
    "agreement", "accuracy", "accuracy range", "seconds",
)  # fmt: skip


def format_table(rows: Sequence[BenchmarkRow]) -> str:
    """The table, a line per method and budget, followed by the rows that failed."""
    lines = [list(HEADINGS)]
    for row in summarize(rows):
        spread = accuracy = "–"
        if row.accuracy is not None:
            accuracy = f"{row.accuracy:.1%}"
            spread = f"{row.accuracy_min:.1%}..{row.accuracy_max:.1%}"
        lines.append(
            [
                "–" if row.budget is None else f"{row.budget:g}",
                row.method,
                str(row.seeds),
                f"{row.artifact_bytes:,.0f}",
                f"{row.ratio:.2f}",
                f"{row.true_bits:.3f}",
                f"{row.kl:.6f}",
                f"{row.kl_min:.6f}..{row.kl_max:.6f}",
                f"{row.agreement:.2%}",
                accuracy,
                spread,
                f"{row.seconds:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            value.ljust(width) if column == 1 else value.rjust(width)
            for column, (value, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text += [
        f"{row.method} at {row.budget}, seed {row.seed}: {row.status}"
        for row in rows
        if row.status != "ok"
    ]
    return "\n".join(text) + "\n"


def verdict(rows: Sequence[BenchmarkRow]) -> str:
    """The largest ratio of the default method's KL, at no more bytes, to any other artifact's.

    Artifacts of the same seed are compared; of several that fit, the largest. Sizes within
    SIZE_TOLERANCE count as equal.
    """
    best = default_method().name
    worst: list[tuple[float, str]] = []
    for other in rows:
        if other.method in (best, "exact") or other.kl is None or other.artifact_bytes is None:
            continue
        fitting = [
            (row.artifact_bytes, row.kl)
            for row in rows
            if row.method == best
            and row.seed == other.seed
            and row.kl is not None
            and row.artifact_bytes is not None
            and row.artifact_bytes <= SIZE_TOLERANCE * other.artifact_bytes
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


def plot(rows: Sequence[BenchmarkRow], title: str, out: Path) -> None:
    """Plot KL, and accuracy if measured, against true bits as `out`.svg and `out`.png.

    Lines are means over the seeds, bands their ranges.
    """
    # Imported here: the text table needs no matplotlib.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "deltadock"
    summaries = [row for row in summarize(rows) if row.kl > 0]
    with_accuracy = any(row.accuracy is not None for row in summaries)
    figure = Figure(figsize=(11 if with_accuracy else 6.5, 4.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2 if with_accuracy else 1, squeeze=False)[0]
    for method, group in groupby(
        sorted(summaries, key=lambda row: row.method), lambda row: row.method
    ):
        line = sorted(group, key=lambda row: row.true_bits)
        bits = [row.true_bits for row in line]
        (drawn,) = panels[0].plot(bits, [row.kl for row in line], marker="o", ms=3, label=method)
        panels[0].fill_between(
            bits,
            [row.kl_min for row in line],
            [row.kl_max for row in line],
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
    if summaries:
        # Beside the panels: in one, it would hide points.
        named = panels[0].get_legend_handles_labels()
        figure.legend(*named, loc="outside right center", fontsize="small")
    figure.savefig(out.with_name(out.name + ".svg"), metadata={"Date": None})
    figure.savefig(out.with_name(out.name + ".png"), dpi=150)
