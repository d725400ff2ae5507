"""The speed benchmark: both implementations compute the same, and every stage is timed."""

import numpy as np
import pytest
import torch

from benchmarks import compress_speed
from benchmarks.compress_speed import (
    MOMENTS,
    STAGES,
    Timeline,
    main,
    output_error,
    project,
    random_layer,
    time_ours,
    time_straightforward,
)
from benchmarks.straightforward import knapsack
from deltadock.compression.numerics.allocation import allocate

CPU = torch.device("cpu")


def test_both_implementations_have_about_the_same_error() -> None:
    layer = random_layer(64, 96, 2048, CPU)
    ours, approximation = time_ours(layer, 2.0, CPU)
    theirs, other = time_straightforward(layer, 2.0, CPU)
    assert ours.keys() == {MOMENTS, *STAGES.values(), "other"}
    assert theirs.keys() == {MOMENTS, *STAGES.values()}
    assert output_error(layer, approximation) <= 1.1 * output_error(layer, other) < 0.5


def test_knapsack_finds_the_optimum() -> None:
    errors = np.sort(np.random.default_rng(0).random((20, 4)), axis=1)[:, ::-1]
    costs = np.asarray([0, 2, 3, 8])
    error, widths = knapsack(errors, costs, 40)
    assert widths.sum() <= 40
    assert error == pytest.approx(allocate(errors, 40, (0, 2, 3, 8)).error)


def test_a_layer_is_reported_stage_by_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_speed, "RATE_SIZE", 128)
    main(["48x64", "--tokens", "512"])
    out = capsys.readouterr().out
    for stage in (MOMENTS, *STAGES.values(), "total"):
        assert f"\n{stage} " in out


def test_a_part_of_a_model_is_projected(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "tiny", "--blocks", "2", "--tokens", "1024"])
    out = capsys.readouterr().out
    assert "block 2 of" in out
    assert "projected to 4 blocks" in out


def test_the_projection_counts_steady_blocks_and_the_head_once() -> None:
    timeline = Timeline()
    timeline.stages = {"validating": 2.0, "compressing": 15.0, "assembling": 1.0}
    timeline.blocks = [6.0, 4.0, 3.0]
    # Ten blocks of 4 s, the head's 3 s, 2 s between, the other stages five times as long.
    assert project(timeline, 2, 10) == pytest.approx(40 + 3 + 2 + 10 + 5)
