"""The memory benchmark measures a fresh process and distinguishes both outcomes."""

import pytest

from benchmarks.memory import main, verdict


def test_a_tiny_checkpoint_is_within_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--blocks", "2", "--hidden", "64", "--intermediate", "96", "--tokens", "512"]
    assert main([*sizes, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "peak resident memory" in out
    assert "PASS" in out


def test_a_peak_over_the_limit_exits_with_status_1() -> None:
    assert verdict(3.0, 2.0) == 1
