"""Optimix on single matrices and on whole checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltadock.artifacts.encodings import decode_dense
from deltadock.artifacts.export import merge
from deltadock.artifacts.reader import Artifact
from deltadock.compression import distillation, search, session
from deltadock.compression.calibration.windows import load_calibration
from deltadock.compression.confidence import confidence_bound
from deltadock.compression.methods import optimix
from deltadock.compression.numerics.global_allocation import allocate
from deltadock.compression.numerics.metric import Metric, weighted_errors
from deltadock.compression.options import (
    CalibrationOptions,
    CompressOptions,
    Goal,
    Source,
    goal_for,
)
from deltadock.compression.pipeline import compress
from deltadock.compression.progress import Progress
from deltadock.compression.quality import measure
from deltadock.compression.report import Quality, Report
from deltadock.errors import Cancelled, InvalidGoal, InvalidInput
from tests.compression.conftest import delta_quality
from tests.compression.matrices import make_moment, make_task
from tests.compression.test_pipeline import MemoryStore

Pair = tuple[Path, Path]
CALIBRATION = CalibrationOptions(tokens=512, length=32)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "STEPS", 1)
    monkeypatch.setattr(distillation, "TOKENS_PER_STEP", 128)
    monkeypatch.setattr(distillation, "RELATIVE_RATE", 0.01)


def options(**goal: float) -> CompressOptions:
    return CompressOptions("optimix", goal_for("optimix", **goal)[1], calibration=CALIBRATION)


def run(pair: Pair, out: Path, text: Path, **goal: float) -> Report:
    return compress(*pair, out, options(**goal), calibration=[Source(text)])


def change(finetuned: Path, changed: dict[str, torch.Tensor]) -> None:
    weights = load_file(finetuned / "model.safetensors")
    save_file({**weights, **changed}, finetuned / "model.safetensors", metadata={"format": "pt"})


def metrics(h_out: int, h_in: int, *, diagonal: bool = False) -> tuple[Metric, Metric]:
    rows = make_moment(h_out, seed=1)
    rows = rows.diagonal() if diagonal else rows
    return Metric.of(rows[None]), Metric.of(make_moment(h_in, seed=2)[None])


def cost(residual: torch.Tensor, rows: Metric, columns: Metric) -> float:
    return float(weighted_errors(residual[None], rows, columns))


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (1, 5), (4, 3), (40, 1)])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bits", [0.0, 1.0, 4.0])
def test_one_matrix(shape: tuple[int, int], diagonal: bool, bits: float) -> None:
    delta, (rows, columns) = make_task(*shape).delta, metrics(*shape, diagonal=diagonal)
    ((prepared, profile),) = optimix.profile(delta[None], rows, columns)
    assert profile.overhead == (16 * shape[0] if diagonal else 0)
    # Short vectors are padded to words and take more bits.
    shares = allocate([profile], profile.overhead + bits * (shape[0] + 31) * (shape[1] + 31))
    stored = optimix.DecomposedMatrix.from_tensors(prepared.tensors())
    (result,) = optimix.compress(delta[None], [stored], shares.widths, rows, columns, ["BF16"])
    decoded = torch.from_numpy(decode_dense(result.encoded))
    torch.testing.assert_close(result.approximation, decoded)
    assert decoded.shape == delta.shape
    assert torch.isfinite(decoded).all()
    widths = shares.widths[0]
    kept = len(widths.kept)
    assert result.rank == kept
    assert sum(result.widths.values()) == 2 * kept
    used_bits = 8 * sum(data.nbytes for data in result.encoded.segments.values())
    # Each run of ranks with equal widths is padded to 128 bytes in U and in V.
    padding = 2 * 8 * 128 * len(result.encoded.record["ranks"])
    assert used_bits <= profile.overhead + padding + sum(
        (-(-shape[0] // 32) * u + -(-shape[1] // 32) * v) * 32 + 16
        for u, v in zip(widths.u.tolist(), widths.v.tolist(), strict=True)
    )
    if not bits:
        assert kept == 0
        assert not decoded.any()
        return
    whole = cost(delta.double(), rows, columns)
    error = cost((delta - decoded).double(), rows, columns)
    assert error < whole
    if min(shape) > 30:
        # The allocation predicts the error, up to what refitting gains.
        assert 0.2 * shares.error < error / 2 < 1.3 * shares.error


def test_large_matrices_scale_their_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimix, "SCALED_RANKS", 10)
    delta = make_task(40, 60).delta * torch.logspace(-8, 2, 40)[:, None]
    rows, columns = metrics(40, 60)
    ((prepared, profile),) = optimix.profile(delta[None], rows, columns)
    assert profile.overhead == 16 * (40 + 60)
    shares = allocate([profile], 2.0 * delta.numel())
    (result,) = optimix.compress(delta[None], [prepared], shares.widths, rows, columns, ["BF16"])
    record = result.encoded.record
    assert record["row_scale"]
    assert record["column_scale"]
    error = cost((delta - result.approximation).double(), rows, columns)
    assert error < 0.2 * cost(delta.double(), rows, columns)


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1e6, 1e15])
def test_deltas_of_any_magnitude(size: float) -> None:
    delta, (rows, columns) = size * make_task(32, 48).delta, metrics(32, 48, diagonal=True)
    ((prepared, profile),) = optimix.profile(delta[None], rows, columns)
    shares = allocate([profile], 3.0 * delta.numel())
    (result,) = optimix.compress(delta[None], [prepared], shares.widths, rows, columns, ["BF16"])
    error = cost((delta - result.approximation).double(), rows, columns)
    assert error < 0.05 * cost(delta.double(), rows, columns)


def test_a_delta_of_zero_has_no_ranks() -> None:
    rows, columns = metrics(32, 48, diagonal=True)
    ((prepared, profile),) = optimix.profile(torch.zeros(1, 32, 48), rows, columns)
    widths = allocate([profile], 1000).widths
    (result,) = optimix.compress(
        torch.zeros(1, 32, 48), [prepared], widths, rows, columns, ["BF16"]
    )
    assert torch.equal(result.approximation, torch.zeros(32, 48))


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_within_its_budget(
    make_pair: Callable[..., Pair], text: Path, tmp_path: Path, tied: bool
) -> None:
    pair = make_pair(tied=tied)
    base, finetuned = pair
    report = run(pair, tmp_path / "a.delta", text, bits=2.0)
    weights = load_file(finetuned / "model.safetensors")
    with Artifact(tmp_path / "a.delta") as artifact:
        kinds = {name: record["kind"] for name, record in artifact.records.items()}
        runs = sum(len(record.get("ranks", ())) for record in artifact.records.values())
        assert list(artifact.damaged()) == []
        assert artifact.nbytes == report.artifact_bytes
    assert kinds == {name: "svd" if t.ndim == 2 else "exact" for name, t in weights.items()}
    assert ("lm_head.weight" in kinds) == (not tied)
    assert {matrix.name for matrix in report.matrices} == {
        name for name, kind in kinds.items() if kind == "svd"
    }
    assert all(0 < matrix.error <= 1 and 0 <= matrix.gap < 0.02 for matrix in report.matrices)
    # Codes and scales stay within the budget, except for the padding of runs.
    used_bits = 8 * sum(matrix.bytes for matrix in report.matrices)
    budget = 2.0 * sum(tensor.numel() for tensor in weights.values() if tensor.ndim == 2)
    assert 0.97 * budget < used_bits <= budget + 2 * 8 * 128 * runs
    assert report.distillation is not None
    assert report.quality is not None
    assert 0 < report.quality.kl < 0.1 * report.quality.kl_base

    merge(base, tmp_path / "a.delta", tmp_path / "merged")
    data = load_calibration([Source(text)], finetuned, 128, 0, CALIBRATION)
    scores = []
    for folder in (finetuned, tmp_path / "merged"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            scores.append(model(data.report).logits.double().log_softmax(-1))
    kl = float((scores[0].exp() * (scores[0] - scores[1])).sum(-1).mean())
    assert report.quality.kl == pytest.approx(kl, rel=1e-2)
    assert list(tmp_path.glob("a.delta?*")) == []


def test_interruptions_do_not_change_the_bytes(pair: Pair, text: Path, tmp_path: Path) -> None:
    sources = [Source(text)]
    requested = options(bits=1.0)
    compress(*pair, tmp_path / "whole.delta", requested, calibration=sources)
    whole = (tmp_path / "whole.delta").read_bytes()
    store, blocks = MemoryStore(), 3  # two layers, and the embedding
    for crash in range(1, blocks + 1):

        def interrupt(progress: Progress, at: int = crash) -> None:
            later = progress.stage == "assembling" and progress.message.startswith("distillation")
            if (progress.stage, progress.block) == ("compressing", at) or later:
                raise Cancelled("stop")

        with pytest.raises(Cancelled):
            compress(
                *pair, tmp_path / "b.delta", requested, calibration=sources, progress=interrupt,
                store=store,
            )  # fmt: skip
        assert list(tmp_path.glob("b.delta*")) == []
        assert len(store.kept) == crash
    store.hits = 0
    compress(*pair, tmp_path / "b.delta", requested, calibration=sources, store=store)
    assert store.hits == blocks
    assert (tmp_path / "b.delta").read_bytes() == whole


def test_matrices_without_a_delta(pair: Pair, text: Path, tmp_path: Path) -> None:
    equal, signed = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    before = load_file(pair[0] / "model.safetensors")
    before[signed][0, 0] = 0.0
    change(pair[0], {signed: before[signed]})
    # A zero of the other sign: different bytes, but a delta of zero.
    after = before[signed].clone()
    after[0, 0] = -0.0
    change(pair[1], {equal: before[equal], signed: after})
    report = run(pair, tmp_path / "a.delta", text, bits=1.0)
    with Artifact(tmp_path / "a.delta") as artifact:
        assert equal not in artifact.records
        assert artifact.records[signed]["kind"] == "exact"
        assert artifact.records[equal.replace("0", "1").replace("up", "gate")]["kind"] == "svd"
    assert {equal, signed}.isdisjoint(matrix.name for matrix in report.matrices)
    assert report.quality is not None
    assert report.quality.kl < report.quality.kl_base


def test_a_size_goal_is_met_without_exceeding_it(pair: Pair, text: Path, tmp_path: Path) -> None:
    weights = load_file(pair[1] / "model.safetensors")
    limit = 2 * sum(tensor.numel() for tensor in weights.values()) / 3
    report = run(pair, tmp_path / "a.delta", text, ratio=3)
    # Of so few weights the size does not grow steadily: 2.063 bits take more bytes than 2.072.
    assert 0.94 * limit < report.artifact_bytes <= limit
    assert (tmp_path / "a.delta").stat().st_size == report.artifact_bytes
    assert list(tmp_path.glob("a.delta?*")) == []


@pytest.mark.parametrize("goal", ["max_kl", "min_agreement"])
def test_a_quality_bound_is_met_near_its_smallest_size(
    goal: str, pair: Pair, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "STEPS", 0)
    monkeypatch.setattr(search, "RESOLUTION", 1.3)
    reference = run(pair, tmp_path / "some.delta", text, bits=1.2)
    data = load_calibration([Source(text)], pair[1], 128, 0, CALIBRATION)
    choosing, reporting = data.choose, data.report
    at_reference = delta_quality(pair, tmp_path / "some.delta", choosing)
    some = Goal("max_kl", 1.0) if goal == "max_kl" else Goal("min_agreement", 0.5)
    figure = confidence_bound(some, at_reference)
    seen: list[torch.Tensor] = []

    def watched(*arguments: Any, **others: Any) -> Quality:
        seen.append(arguments[-1])
        return measure(*arguments, **others)

    monkeypatch.setattr(session, "measure", watched)
    report = run(pair, tmp_path / "a.delta", text, **{goal: figure})
    # Reporting windows check what the choosing ones have found.
    assert len(seen) > 2
    assert torch.equal(seen[-1], reporting)
    checks = sum(torch.equal(windows, reporting) for windows in seen)
    assert checks > len(report.notes)  # a note per raise, which may take several
    assert sum(torch.equal(windows, choosing) for windows in seen) == len(seen) - checks
    reached = delta_quality(pair, tmp_path / "a.delta", choosing)
    bound = Goal("max_kl", figure) if goal == "max_kl" else Goal("min_agreement", figure)
    assert report.bound_reached == confidence_bound(bound, reached)
    for one in (report.bound_reached, bound.figure(report.quality.kl, report.quality.agreement)):
        assert one is not None
        assert bound.is_kept(one)
    reported = delta_quality(pair, tmp_path / "a.delta", reporting)
    assert report.quality == reported
    assert report.quality.kl != reached.kl
    assert report.artifact_bytes < 1.2 * reference.artifact_bytes
    with Artifact(tmp_path / "a.delta") as artifact:
        assert artifact.nbytes == report.artifact_bytes
    assert list(tmp_path.glob("*.delta?*")) == []


def test_a_loose_bound_uses_the_smallest_budget(pair: Pair, text: Path, tmp_path: Path) -> None:
    report = run(pair, tmp_path / "a.delta", text, max_kl=50)
    assert report.nominal_bits is not None
    # The embedding's scales alone exceed the method's smallest budget.
    weights = load_file(pair[1] / "model.safetensors")
    matrices = sum(tensor.numel() for tensor in weights.values() if tensor.ndim == 2)
    assert report.nominal_bits == pytest.approx(16 * 256 / matrices, rel=1e-3)
    with pytest.raises(InvalidInput, match="Allow more"):
        run(pair, tmp_path / "b.delta", text, bits=0.05)


@pytest.mark.parametrize("goal", [{"max_kl": 1e-9}, {"target_bytes": 5_000}])
def test_an_unreachable_goal_is_rejected_and_leaves_no_file(
    goal: dict[str, float], pair: Pair, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidGoal):
        run(pair, tmp_path / "a.delta", text, **goal)
    assert list(tmp_path.glob("a.delta*")) == []


def test_kl_is_below_adamix_at_equal_size(pair: Pair, text: Path, tmp_path: Path) -> None:
    adamix = compress(
        *pair, tmp_path / "a.delta",
        CompressOptions(method="adamix", calibration=CALIBRATION),
        calibration=[Source(text)],
    )  # fmt: skip
    report = run(pair, tmp_path / "b.delta", text, target_bytes=adamix.artifact_bytes)
    assert report.artifact_bytes <= adamix.artifact_bytes
    assert report.quality is not None
    assert adamix.quality is not None
    assert report.quality.kl < 0.7 * adamix.quality.kl
