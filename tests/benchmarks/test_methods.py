"""The methods table: planning, measuring, resuming, and its files."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.methods import Pair, accuracy, planned, read_exercises, run, with_target
from benchmarks.tables import (
    BenchmarkRow,
    format_table,
    read_rows,
    summarize,
    verdict,
    write_rows,
)
from deltadock.compression.options import METHODS

SAMPLES = Path(__file__).parents[2] / "samples"


def make_row(
    method: str, budget: float | None, seed: int, kl: float | None, size: int = 100
) -> BenchmarkRow:
    return BenchmarkRow(
        "", method, budget, seed, equal_bytes=False, artifact_bytes=size, ratio=10.0,
        true_bits=1.6, kl=kl, agreement=0.9, seconds=1.0,
    )  # fmt: skip


def test_rows_are_measured_once_and_written(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table"
    rows = list(planned(["exact", "adamix"], [1.0, 3.0], [0, 1]))
    done = run(pair, rows, out)
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
    summaries = summarize(done)
    assert [row.seeds for row in summaries] == [2, 2, 1]
    assert summaries[0].kl_min <= summaries[0].kl <= summaries[0].kl_max
    assert (tmp_path / "table.txt").read_text().count("adamix") == 2
    assert (tmp_path / "table.svg").read_text().startswith("<?xml")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.delattr(methods, "MethodBenchmark")
    assert run(pair, rows, out) == done


def test_rows_round_trip_through_csv(tmp_path: Path) -> None:
    rows = [make_row("adamix", 1.0, 0, 0.25), make_row("exact", None, 0, None)]
    write_rows(tmp_path / "rows.csv", rows)
    assert list(read_rows(tmp_path / "rows.csv").values()) == rows


def test_a_failed_row_has_its_reason_and_is_retried(pair: Pair, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    broken = replace(pair, calibration=empty)
    for _ in range(2):
        (failed,) = run(broken, list(planned(["adamix"], [1.0], [0])), tmp_path / "table")
        assert failed.kl is None
        assert "tokens" in failed.status
        assert failed.status in format_table([failed])


def test_equal_bytes_uses_the_reference_size() -> None:
    reference = make_row("adamix", 1.0, 2, 0.2, size=777)
    done = {reference.key: reference}
    assert with_target(replace(reference, kl=None), done).target_bytes is None
    other = with_target(BenchmarkRow("", "low-rank", 1.0, 2, equal_bytes=False), done)
    assert other.equal_bytes
    assert other.target_bytes == 777


def test_methods_get_the_budgets_they_accept() -> None:
    rows = [(c.method, c.budget, c.seed) for c in planned(list(METHODS), [0.5, 2.0], [0, 1])]
    assert rows[:3] == [("adamix", 0.5, 0), ("adamix", 2.0, 0), ("adamix", 0.5, 1)]
    assert ("delta-zip", 2.0, 1) in rows
    assert ("delta-zip", 0.5, 0) not in rows
    assert [row for row in rows if row[0] == "exact"] == [("exact", None, 0)]
    assert "lora" not in {method for method, _, _ in rows}


def test_summaries_are_sorted_by_budget_then_kl() -> None:
    rows = [
        make_row("a", 2.0, 0, 0.3), make_row("b", 2.0, 0, 0.1), make_row("b", 0.5, 0, 0.9),
        make_row("exact", None, 0, 0.0), make_row("a", 2.0, 1, 0.1),
    ]  # fmt: skip
    summaries = summarize(rows)
    assert [(row.method, row.budget) for row in summaries] == [
        ("b", 0.5), ("b", 2.0), ("a", 2.0), ("exact", None),
    ]  # fmt: skip
    assert summaries[2].kl == pytest.approx(0.2)


def test_the_verdict_compares_with_the_largest_artifact_that_fits() -> None:
    rows = [
        make_row("optimix", 0.5, 0, 0.02, size=50), make_row("optimix", 1.0, 0, 0.01, size=100),
        make_row("optimix", 2.0, 0, 0.001, size=200), make_row("optimix", 1.0, 1, 0.5, size=99),
        make_row("adamix", 1.0, 0, 0.04, size=100), make_row("gpt-zip", None, 0, 0.1, size=60),
        make_row("bitdelta", None, 0, 9.0, size=40), make_row("exact", None, 0, 1e-9, size=900),
    ]  # fmt: skip
    assert "against 2 artifacts" in verdict(rows)
    assert "0.250 of the KL (adamix at 1, seed 0)" in verdict(rows)
    assert verdict(rows[:4]) == ""


def test_accuracy_compares_first_lines(tmp_path: Path) -> None:
    exercises = read_exercises(SAMPLES / "exercises.jsonl")[:20]
    assert accuracy(SAMPLES / "finetuned", exercises, batch=7) >= 0.8
    assert accuracy(SAMPLES / "base", exercises) < 0.1
