"""The node's benchmarks run from end to end on tiny models."""

import pytest

from benchmarks import fairness, node


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "TOKENS", 8)
    monkeypatch.setattr(node, "LONG_PROMPT", 128)


def test_the_cpu_benchmark_prints_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    node.main(["--tiny", "--rounds", "1"])
    printed = capsys.readouterr().out
    for line in (
        "base over transformers",
        "8 deltas over the base",
        "merged over",
        "computed over cached",
    ):
        assert line in printed


def test_the_fairness_benchmark_prints_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    fairness.main(["--tiny", "--requests", "3"])
    printed = capsys.readouterr().out
    assert "under the flood" in printed
    assert "in one queue:" in printed
