"""The methods table: its cells, what it keeps, and what it writes."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.cells import Cell, read_cells, write_cells
from benchmarks.exercises import accuracy, read_exercises
from benchmarks.methods import Pair, planned, run, with_target
from benchmarks.tables import format_table, rows_of, verdict
from deltadock.compression.catalogue import METHODS

SAMPLES = Path(__file__).parents[2] / "samples"


def cell(method: str, budget: float | None, seed: int, kl: float | None, size: int = 100) -> Cell:
    return Cell(
        "", method, budget, seed, equal_bytes=False, artifact_bytes=size, ratio=10.0,
        true_bits=1.6, kl=kl, agreement=0.9, seconds=1.0,
    )  # fmt: skip


def test_the_table_is_measured_once_and_written(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table"
    cells = list(planned(["exact", "adamix"], [1.0, 3.0], [0, 1]))
    done = run(pair, cells, out)
    assert [(c.method, c.budget, c.seed) for c in done] == [
        ("adamix", 1.0, 0), ("adamix", 3.0, 0), ("adamix", 1.0, 1), ("adamix", 3.0, 1),
        ("exact", None, 0),
    ]  # fmt: skip
    assert all(c.status == "ok" and c.accuracy == 0 and c.machine for c in done)
    assert done[-1].kl == pytest.approx(0, abs=1e-9)
    assert done[-1].agreement == 1
    sizes = [c.artifact_bytes for c in done]
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert sizes[0] < sizes[1]
    rows = rows_of(done)
    assert [row.seeds for row in rows] == [2, 2, 1]
    assert rows[0].kl_least <= rows[0].kl <= rows[0].kl_most
    assert (tmp_path / "table.txt").read_text().count("adamix") == 2
    assert (tmp_path / "table.svg").read_text().startswith("<?xml")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.delattr(methods, "Bench")
    assert run(pair, cells, out) == done


def test_cells_survive_the_file(tmp_path: Path) -> None:
    cells = [cell("adamix", 1.0, 0, 0.25), cell("exact", None, 0, None)]
    write_cells(tmp_path / "cells.csv", cells)
    assert list(read_cells(tmp_path / "cells.csv").values()) == cells


def test_a_cell_that_fails_says_why_and_is_tried_again(pair: Pair, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    broken = replace(pair, calibration=empty)
    for _ in range(2):
        (failed,) = run(broken, list(planned(["adamix"], [1.0], [0])), tmp_path / "table")
        assert failed.kl is None
        assert "tokens" in failed.status
        assert failed.status in format_table([failed])


def test_equal_bytes_take_the_references_size() -> None:
    reference = cell("adamix", 1.0, 2, 0.2, size=777)
    done = {reference.key: reference}
    assert with_target(replace(reference, kl=None), done).target_bytes is None
    other = with_target(Cell("", "low-rank", 1.0, 2, equal_bytes=False), done)
    assert other.equal_bytes
    assert other.target_bytes == 777


def test_methods_get_the_budgets_they_take() -> None:
    cells = [(c.method, c.budget, c.seed) for c in planned(list(METHODS), [0.5, 2.0], [0, 1])]
    assert cells[:3] == [("adamix", 0.5, 0), ("adamix", 2.0, 0), ("adamix", 0.5, 1)]
    assert ("delta-zip", 2.0, 1) in cells
    assert ("delta-zip", 0.5, 0) not in cells
    assert [cell for cell in cells if cell[0] == "exact"] == [("exact", None, 0)]
    assert "lora" not in {method for method, _, _ in cells}


def test_rows_are_sorted_by_budget_then_by_kl() -> None:
    cells = [
        cell("a", 2.0, 0, 0.3), cell("b", 2.0, 0, 0.1), cell("b", 0.5, 0, 0.9),
        cell("exact", None, 0, 0.0), cell("a", 2.0, 1, 0.1),
    ]  # fmt: skip
    rows = rows_of(cells)
    assert [(row.method, row.budget) for row in rows] == [
        ("b", 0.5), ("b", 2.0), ("a", 2.0), ("exact", None),
    ]  # fmt: skip
    assert rows[2].kl == pytest.approx(0.2)


def test_the_verdict_compares_with_the_largest_that_fits() -> None:
    cells = [
        cell("optimix", 0.5, 0, 0.02, size=50), cell("optimix", 1.0, 0, 0.01, size=100),
        cell("optimix", 2.0, 0, 0.001, size=200), cell("optimix", 1.0, 1, 0.5, size=99),
        cell("adamix", 1.0, 0, 0.04, size=100), cell("gpt-zip", None, 0, 0.1, size=60),
        cell("bitdelta", None, 0, 9.0, size=40), cell("exact", None, 0, 1e-9, size=900),
    ]  # fmt: skip
    assert "against 2 artifacts" in verdict(cells)
    assert "0.250 of the KL (adamix at 1, seed 0)" in verdict(cells)
    assert verdict(cells[:4]) == ""


def test_accuracy_counts_first_lines(tmp_path: Path) -> None:
    exercises = read_exercises(SAMPLES / "exercises.jsonl")[:20]
    assert accuracy(SAMPLES / "finetuned", exercises, batch=7) >= 0.8
    assert accuracy(SAMPLES / "base", exercises) < 0.1
