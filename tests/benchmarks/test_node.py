"""The node's benchmarks run from end to end, at a size that takes seconds."""

import pytest

from benchmarks import fairness, node, node_gpu


def test_the_cpu_benchmark_prints_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    node.main(["--tiny", "--rounds", "1"])
    told = capsys.readouterr().out
    for line in (
        "base over transformers",
        "8 deltas over the base",
        "merged over",
        "computed over cached",
    ):
        assert line in told


def test_the_gpu_benchmark_runs_whole_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    node_gpu.main(["--device", "cpu", "--tiny"])
    told = capsys.readouterr().out
    for line in (
        "relative error of the logits",
        "of the roofline",
        "merged over packed",
        "cold swap",
        "6 deltas held",
        "first token, p99",
    ):
        assert line in told


def test_the_fairness_benchmark_prints_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    fairness.main(["--tiny", "--requests", "3"])
    told = capsys.readouterr().out
    assert "the flood raises" in told
    assert "in one queue it would" in told
