"""The cells of a methods table: one compression measured, kept as a row of a CSV file."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean

Key = tuple[str, str, float | None, int, bool]


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one budget with one calibration seed.

    Attributes:
        inputs: digest of the pair, the texts and the exercises, so that a table never mixes two.
        method: a name of `deltadock.compression.catalogue`, or `base` or `finetuned` for the models
            themselves.
        budget: code bits per weight; None for methods without one.
        seed: of the calibration.
        equal_bytes: whether `adamix`'s size at this budget was the goal, not the bits.
        target_bytes: that size.
        artifact_bytes, ratio, true_bits: what came out, every byte counted.
        kl, kl_base, agreement, nll, nll_finetuned: on the held-out text, nats per token.
        accuracy: on the exercises; None without them.
        seconds: that compressing took.
        status: `ok`, or why there are no figures.
        machine: what it ran on.
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
    def key(self) -> Key:
        """What makes it this cell."""
        return self.inputs, self.method, self.budget, self.seed, self.equal_bytes


TEXTS = {"inputs", "method", "status", "machine"}
WHOLE = {"seed", "target_bytes", "artifact_bytes"}


def read_cells(path: Path) -> dict[Key, Cell]:
    """The cells measured so far; none where there is no file."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        cells = [Cell(**{key: _parse(key, text) for key, text in row.items()})  # type: ignore[arg-type]
                 for row in csv.DictReader(file)]  # fmt: skip
    return {cell.key: cell for cell in cells}


def _parse(key: str, text: str) -> str | int | float | bool | None:
    if key in TEXTS:
        return text
    if key == "equal_bytes":
        return text == "True"
    if text == "":
        return None
    return int(text) if key in WHOLE else float(text)


def write_cells(path: Path, cells: Iterable[Cell]) -> None:
    """Write the file anew, complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Cell)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(cell) for cell in cells)
    partial.replace(path)


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one method and budget over their seeds: means, and the spread of KL."""

    method: str
    budget: float | None
    seeds: int
    artifact_bytes: float
    ratio: float
    true_bits: float
    kl: float
    kl_least: float
    kl_most: float
    agreement: float
    accuracy: float | None
    accuracy_least: float | None
    accuracy_most: float | None
    seconds: float


def summarize(cells: Sequence[Cell]) -> Row:
    """One row of cells that differ in their seed alone."""

    def values(name: str) -> list[float]:
        found = (getattr(cell, name) for cell in cells)
        return [float(value) for value in found if value is not None]

    def average(name: str) -> float:
        return mean(values(name) or [float("nan")])

    accuracies = values("accuracy")
    return Row(
        method=cells[0].method,
        budget=cells[0].budget,
        seeds=len(cells),
        artifact_bytes=average("artifact_bytes"),
        ratio=average("ratio"),
        true_bits=average("true_bits"),
        kl=average("kl"),
        kl_least=min(values("kl")),
        kl_most=max(values("kl")),
        agreement=average("agreement"),
        accuracy=mean(accuracies) if accuracies else None,
        accuracy_least=min(accuracies, default=None),
        accuracy_most=max(accuracies, default=None),
        seconds=average("seconds"),
    )
