"""The table method x budget for any pair, as text, CSV and a plot, with the spread over seeds.

    python -m benchmarks.methods --base DIR --finetuned DIR --calibration FILE --heldout FILE \
        [--exercises FILE] [--methods adamix,optimix] [--budgets 0.5,1,2] [--seeds 0,1,2] \
        [--equal-bytes] --out PREFIX

Writes PREFIX.csv, PREFIX.txt, PREFIX.svg and PREFIX.png. Cells that PREFIX.csv has already are not
measured again (`--again` does), so an interrupted run goes on where it was. Quality is measured on
the held-out text, never on the calibration text, in windows of 256 tokens. With `--equal-bytes`
every method gets the TRUE artifact bytes that `adamix` took at the same budget and seed. A method
calibrates once a seed for all budgets; that time is part of every artifact's seconds.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Final

import torch

from benchmarks.cells import Cell, Key, read_cells, write_cells
from benchmarks.exercises import accuracy, read_exercises
from benchmarks.harness import describe_machine
from benchmarks.tables import format_table, plot, verdict
from deltadock.artifacts.checkpoint import scan_folder
from deltadock.artifacts.export import merge
from deltadock.compression.calibration.options import TOKENS, CalibrationOptions, Source
from deltadock.compression.catalogue import METHODS, check_method
from deltadock.compression.evaluation import evaluate
from deltadock.compression.goal import Goal
from deltadock.compression.maker import Maker
from deltadock.compression.pipeline import reach
from deltadock.compression.run import CompressOptions, open_run
from deltadock.compression.scratch import Scratch
from deltadock.compression.work import NoWorkStore
from deltadock.errors import BitsOutOfRange, DeltadockError
from deltadock.kernels.device import choose_device

REFERENCE: Final = "adamix"
"""The method whose sizes `--equal-bytes` gives to every other."""
BUDGETS: Final = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class Pair:
    """What is compressed, calibrated on and measured on."""

    base: Path
    finetuned: Path
    calibration: Path
    heldout: Path
    exercises: Path | None
    tokens: int = TOKENS

    def digest(self) -> str:
        """Names the inputs' content, hex."""
        known = hashlib.sha256()
        for folder in (self.base, self.finetuned):
            known.update(scan_folder(folder).digest.encode())
        for file in (self.calibration, self.heldout, self.exercises):
            known.update(b"" if file is None else hashlib.sha256(file.read_bytes()).digest())
        known.update(str(self.tokens).encode())
        return known.hexdigest()[:16]

    def accuracy(self, folder: Path, device: str) -> float | None:
        """Task accuracy of a checkpoint; None without exercises."""
        if self.exercises is None:
            return None
        return accuracy(folder, read_exercises(self.exercises), device)


def accepts(name: str, budget: float) -> bool:
    """Whether the method takes this bit budget."""
    try:
        check_method(name, budget)
    except BitsOutOfRange:
        return False
    return True


def planned(methods: list[str], budgets: list[float], seeds: list[int]) -> Iterator[Cell]:
    """The cells of the table without their figures, the reference method's first.

    Methods of one size have one cell a seed, and what needs no calibration has one seed. Imported
    adapters are no compression of this pair.
    """
    for name in sorted(methods, key=lambda name: name != REFERENCE):
        info = METHODS[name]
        if info.imports_adapter:
            continue
        sized = info.bits_min is not None
        for seed in seeds if info.needs_calibration else seeds[:1]:
            for budget in [b for b in budgets if accepts(name, b)] if sized else [None]:
                yield Cell("", name, budget, seed, equal_bytes=False)


class Bench:
    """One method with one calibration seed, calibrated once for all of its budgets."""

    def __init__(self, pair: Pair, method: str, seed: int, scratch: Scratch, device: str) -> None:
        """Calibrate; how long that took counts for every artifact.

        Raises:
            DeltadockError: the pair or its text cannot be used.
        """
        self._pair, self._device = pair, device
        started = time.monotonic()
        options = CompressOptions(
            method=method, seed=seed, calibration=CalibrationOptions(tokens=pair.tokens)
        )
        run = open_run(pair.base, pair.finetuned, options, lambda progress: None)
        self._maker = Maker(run, METHODS[method], scratch, NoWorkStore(), device)
        self._maker.prepare([Source(pair.calibration)])
        self._seconds = time.monotonic() - started

    def measure(self, cell: Cell) -> Cell:
        """The cell with its figures.

        Raises:
            DeltadockError: the method cannot make an artifact of this size.
        """
        pair = self._pair
        goal = None if cell.budget is None else Goal("bits", cell.budget)
        if cell.target_bytes is not None:
            goal = Goal("target_bytes", cell.target_bytes)
        with tempfile.TemporaryDirectory() as name:
            delta, merged = Path(name) / "out.delta", Path(name) / "merged"
            started = time.monotonic()
            report = reach(self._maker, goal, delta)
            seconds = self._seconds + time.monotonic() - started
            quality = evaluate(pair.base, pair.finetuned, delta, pair.heldout, device=self._device)
            score = None
            if pair.exercises is not None:
                merge(pair.base, delta, merged)
                score = pair.accuracy(merged, self._device)
        return replace(
            cell,
            artifact_bytes=report.artifact_bytes,
            ratio=report.ratio,
            true_bits=report.true_bits,
            kl=quality.kl,
            kl_base=quality.kl_base,
            agreement=quality.agreement,
            nll=quality.nll,
            nll_finetuned=quality.nll_finetuned,
            accuracy=score,
            seconds=seconds,
        )


def measured(cells: list[Cell], pair: Pair, device: str) -> Iterator[Cell]:
    """Cells of one method and seed with their figures, or with the reason why they have none."""
    with Scratch() as scratch:
        bench: Bench | None = None
        for cell in cells:
            try:
                bench = bench or Bench(pair, cell.method, cell.seed, scratch, device)
                yield bench.measure(cell)
            except DeltadockError as error:
                yield replace(cell, status=str(error))


def with_target(cell: Cell, done: dict[Key, Cell]) -> Cell:
    """The cell with the reference method's bytes at its budget and seed as its goal.

    Methods of a few fixed sizes keep their own.
    """
    if cell.method == REFERENCE or cell.budget is None or METHODS[cell.method].budgets:
        return cell
    reference = replace(cell, method=REFERENCE, equal_bytes=False)
    return replace(cell, equal_bytes=True, target_bytes=done[reference.key].artifact_bytes)


def run(
    pair: Pair,
    cells: list[Cell],
    out: Path,
    *,
    equal_bytes: bool = False,
    again: bool = False,
    device: str = "cpu",
) -> list[Cell]:
    """Measure the cells that `out`.csv lacks, and write the table of all of them.

    Args:
        pair: what to measure on.
        cells: of `planned`, the reference method's among them where `equal_bytes`.
        out: path of the results without suffix.
        equal_bytes: give every method the reference's bytes.
        again: measure also what the file has.
        device: torch device.
    """
    table = out.with_name(out.name + ".csv")
    inputs, machine = pair.digest(), describe_machine(device)
    done = read_cells(table)
    references = {}
    for name, folder in (("base", pair.base), ("finetuned", pair.finetuned)):
        cell = Cell(inputs, name, None, 0, equal_bytes=False, machine=machine)
        if cell.key not in done and pair.exercises is not None:
            done[cell.key] = replace(cell, accuracy=pair.accuracy(folder, device))
        references[name] = done.get(cell.key, cell).accuracy
    mine = []
    for _, plans in groupby(cells, key=lambda cell: (cell.method, cell.seed)):
        group = [replace(plan, inputs=inputs, machine=machine) for plan in plans]
        if equal_bytes:
            group = [with_target(cell, done) for cell in group]
        kept = {cell.key for cell in done.values() if cell.status == "ok" and not again}
        for cell in measured([cell for cell in group if cell.key not in kept], pair, device):
            done[cell.key] = cell
            write_cells(table, done.values())
            print(describe_cell(cell), flush=True)
        mine += [done[cell.key] for cell in group]
    goal = f"the bytes of {REFERENCE} at this budget" if equal_bytes else "code bits per weight"
    bases = [cell.kl_base for cell in mine if cell.kl_base is not None]
    lines = [
        f"Pair {pair.finetuned.name} on {pair.base.name}, inputs {inputs}",
        f"Calibrated on {pair.calibration.name}, measured on {pair.heldout.name}; budget: {goal}",
        *(f"KL of the base {kl:.4f} nats per token" for kl in bases[:1]),
        *(f"Accuracy of {name}: {score:.1%}" for name, score in references.items() if score),
        *sorted({f"Machine: {cell.machine}" for cell in mine}),
        "",
    ]
    text = "\n".join(lines) + "\n" + format_table(mine) + verdict(mine)
    out.with_name(out.name + ".txt").write_text(text, encoding="utf-8")
    plot(mine, out.name, out)
    print(text)
    return mine


def describe_cell(cell: Cell) -> str:
    """One line of progress."""
    budget = "" if cell.budget is None else f" at {cell.budget:g}"
    if cell.kl is None:
        return f"{cell.method}{budget}, seed {cell.seed}: {cell.status}"
    score = "" if cell.accuracy is None else f", accuracy {cell.accuracy:.1%}"
    return (
        f"{cell.method}{budget}, seed {cell.seed}: {cell.artifact_bytes:,} bytes, "
        f"KL {cell.kl:.6f}, agreement {cell.agreement:.2%}{score}, {cell.seconds:.1f} s"
    )


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("base", "finetuned", "calibration", "heldout"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--exercises", type=Path, help=".jsonl of prompt and answer")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument(
        "--budgets", type=lambda text: [float(b) for b in text.split(",")], default=list(BUDGETS)
    )
    parser.add_argument(
        "--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--equal-bytes", action="store_true", help=f"{REFERENCE}'s true bytes")
    parser.add_argument("--again", action="store_true", help="measure kept cells again")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--calibration-tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX")
    arguments = parser.parse_args()
    unknown = set(arguments.methods) - METHODS.keys()
    if unknown:
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    methods = dict.fromkeys([REFERENCE] if arguments.equal_bytes else []) | dict.fromkeys(
        arguments.methods
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    pair = Pair(
        arguments.base,
        arguments.finetuned,
        arguments.calibration,
        arguments.heldout,
        arguments.exercises,
        arguments.calibration_tokens,
    )
    run(
        pair,
        list(planned(list(methods), arguments.budgets, arguments.seeds)),
        arguments.out,
        equal_bytes=arguments.equal_bytes,
        again=arguments.again,
        device=str(choose_device(arguments.device)),
    )


if __name__ == "__main__":
    main()
