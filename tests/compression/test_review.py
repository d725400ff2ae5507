"""Whole compressions in unusual cases: checkpoints, goals, cancellation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from deltadock.artifacts.export import merge
from deltadock.artifacts.reader import Artifact
from deltadock.compression.calibration.windows import load_calibration, spaced
from deltadock.compression.families import CALIBRATED
from deltadock.compression.methods.base import MatrixTask
from deltadock.compression.methods.registry import matrix_method
from deltadock.compression.numerics.metric import damped
from deltadock.compression.options import (
    CalibrationOptions,
    CompressOptions,
    Goal,
    Source,
    goal_for,
)
from deltadock.compression.pipeline import compress
from deltadock.compression.progress import Progress
from deltadock.compression.report import UNRELATED, Report
from deltadock.errors import (
    BitsOutOfRange,
    Cancelled,
    InvalidCalibration,
    InvalidGoal,
    UnsupportedModel,
)
from tests.compression.conftest import delta_quality
from tests.compression.matrices import compress_one

Pair = tuple[Path, Path]
WEIGHTS = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = change(load_file(folder / WEIGHTS))
    kept = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def make(pair: Pair, text: Path, tmp_path: Path, method: str = "optimix", **goal: float) -> Report:
    """Compress into `a.delta` and merge it into `merged`."""
    out = tmp_path / "a.delta"
    options = CompressOptions(method, goal_for(method, **goal)[1])
    report = compress(*pair, out, options, calibration=[Source(text)])
    merge(pair[0], out, tmp_path / "merged")
    json.dumps(report.to_dict(), allow_nan=False)
    return report


def choosing_kl(pair: Pair, text: Path, tmp_path: Path) -> float:
    """KL of `a.delta` on the windows that decide about distillation."""
    windows = load_calibration([Source(text)], pair[1], 128, 0).choose
    return delta_quality(pair, tmp_path / "a.delta", windows).kl


def test_a_wrong_base_of_the_same_shapes_is_asked_for(
    make_pair: Callable[..., Pair], text: Path, tmp_path: Path
) -> None:
    base, finetuned = make_pair()
    assert UNRELATED not in make((base, finetuned), text, tmp_path, "exact").notes
    (tmp_path / "a.delta").unlink()
    shutil.rmtree(tmp_path / "merged")
    other = make_pair(seed=1)[0]
    assert make((other, finetuned), text, tmp_path, "exact").notes[0] == UNRELATED
    seen: list[Progress] = []
    compress(
        other, finetuned, tmp_path / "b.delta", CompressOptions("low-rank"),
        calibration=[Source(text)], progress=seen.append,
    )  # fmt: skip
    told = next(k for k, progress in enumerate(seen) if progress.message == UNRELATED)
    assert all(progress.stage == "validating" for progress in seen[: told + 1])


@pytest.mark.parametrize("method", ["low-rank", "bitdelta"])
def test_a_model_that_cannot_be_run_is_compressed_by_its_tensors_names(
    method: str, tmp_path: Path
) -> None:
    """Layers, not states or convolutions; the report says why it has no KL."""
    assert "mamba" not in CALIBRATED
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    )
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    out = tmp_path / "a.delta"
    options = CompressOptions(
        method, goal_for(method, bits=8.0 if method == "low-rank" else None)[1]
    )
    report = compress(tmp_path / "base", tmp_path / "tuned", out, options, calibration=None)
    assert report.quality is None
    assert [note for note in report.notes if "'mamba' cannot be calibrated" in note]
    named = {matrix.name.split(".")[-2] for matrix in report.matrices}
    assert named == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    merge(tmp_path / "base", out, tmp_path / "merged")
    before, tuned, merged = (
        load_file(tmp_path / name / WEIGHTS) for name in ("base", "tuned", "merged")
    )
    for name, weight in tuned.items():
        error, change = (weight - merged[name]).norm(), (weight - before[name]).norm()
        if "in_proj" in name or "out_proj" in name:  # a matrix of 2 columns has no rank to spend
            assert error < 0.9 * change, name
        if "A_log" in name or "conv" in name or "norm" in name:
            assert torch.equal(weight, merged[name]), name
    with pytest.raises(UnsupportedModel, match="'low-rank' and 'bitdelta' compress any model"):
        compress(tmp_path / "base", tmp_path / "tuned", out, CompressOptions(), calibration=None)


class StoppingError(Exception):
    """A caller's own exception."""


def test_sampling_propagates_the_callers_exception(pair: Pair, tmp_path: Path) -> None:
    """A worker that stops must not report a fault of the model."""

    def stop(progress: Progress) -> None:
        if progress.message.startswith("sampling"):
            raise StoppingError

    options = CompressOptions(calibration=CalibrationOptions(tokens=512, length=64))
    with pytest.raises(StoppingError):
        compress(*pair, tmp_path / "a.delta", options, calibration=None, progress=stop)


def overflow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight is finite, and no output is."""
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = 3e38
    return weights


@pytest.mark.parametrize(
    "method", ["adamix", "low-rank", "bitdelta", "bitdelta-distilled", "exact"]
)
def test_a_fine_tune_whose_outputs_overflow_is_compared_with_nothing(
    method: str, pair: Pair, text: Path, tmp_path: Path
) -> None:
    rewrite(pair[1], overflow)
    with pytest.raises(InvalidCalibration, match="hold NaN or an infinity"):
        make(pair, text, tmp_path, method)


@pytest.mark.parametrize("goal", [{"bits": 0.5}, {"target_bytes": 30_000}, {"max_kl": 0.1}])
def test_only_norms_have_changed(
    pair: Pair, text: Path, tmp_path: Path, goal: dict[str, float]
) -> None:
    before = load_file(pair[0] / WEIGHTS)
    rewrite(pair[1], lambda w: {k: t if t.ndim == 1 else before[k] for k, t in w.items()})
    report = make(pair, text, tmp_path, **goal)
    assert report.quality.kl == pytest.approx(0, abs=1e-9)
    assert {tensor.kind for tensor in report.other_tensors} == {"exact"}
    merged, tuned = (load_file(folder / WEIGHTS) for folder in (tmp_path / "merged", pair[1]))
    assert all(torch.equal(merged[name], tensor) for name, tensor in tuned.items())


def test_the_error_of_a_too_small_budget_names_the_smallest(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(BitsOutOfRange, match=r"0\.05 bits .* more than 0\.0\d+"):
        make(pair, text, tmp_path, bits=0.05)


def test_a_loose_bound_uses_a_small_budget_and_drops_matrices(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    report = make(pair, text, tmp_path, max_kl=5.0)
    assert report.quality is not None
    assert report.quality.kl < 5
    assert report.nominal_bits is not None
    assert report.nominal_bits < 0.1
    dropped = [matrix for matrix in report.matrices if matrix.rank == 0]
    assert dropped
    assert all("no rank" in " ".join(matrix.fallbacks) for matrix in dropped)


def test_a_text_too_short_for_a_bound_is_refused_before_anything_is_compressed(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    with pytest.raises(InvalidGoal, match=r"agreement at least 0\.9999 takes 29956 tokens"):
        compress(
            *pair, tmp_path / "a.delta", CompressOptions(goal=Goal("min_agreement", 0.9999)),
            calibration=[Source(text)], progress=lambda progress: seen.append(progress.phase),
        )  # fmt: skip
    assert not {"inputs", "encoding"} & set(seen)


def test_an_unreachable_size_is_rejected_during_validation(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    with pytest.raises(InvalidGoal, match="1,000 bytes cannot be reached"):
        compress(
            *pair,
            tmp_path / "a.delta",
            CompressOptions(goal=Goal("target_bytes", 1000)),
            calibration=[Source(text)],
            progress=lambda progress: seen.append(progress.stage),
        )
    assert set(seen) == {"validating"}


@pytest.mark.parametrize("goal", [{}, {"max_kl": 0.1}, {"target_bytes": 40_000}])
@pytest.mark.parametrize("stage", ["assembling", "verifying"])
def test_a_cancelled_compression_leaves_no_file(
    pair: Pair, text: Path, tmp_path: Path, stage: str, goal: dict[str, float]
) -> None:
    def cancel(progress: Progress) -> None:
        if progress.stage == stage:
            raise Cancelled("Cancelled on request.")

    out = tmp_path / "out" / "a.delta"
    out.parent.mkdir()
    options = CompressOptions("adamix", goal_for("adamix", **goal)[1])
    with pytest.raises(Cancelled):
        compress(*pair, out, options, calibration=[Source(text)], progress=cancel)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("method", ["optimix", "adamix"])
def test_a_tied_head_that_is_also_stored_is_an_alias(
    pair: Pair, text: Path, tmp_path: Path, method: str
) -> None:
    for folder in pair:
        rewrite(folder, lambda w: {**w, HEAD: w[EMBEDDING].clone()})
    report = make(pair, text, tmp_path, method=method)
    kinds = {tensor.name: tensor.kind for tensor in report.other_tensors}
    assert kinds[HEAD] == "alias"
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert torch.equal(merged[HEAD], merged[EMBEDDING])
    assert not torch.equal(merged[HEAD], load_file(pair[0] / WEIGHTS)[HEAD])
    assert report.quality is not None
    assert 0 < report.quality.kl < 0.5 * report.quality.kl_base
    if report.distillation is not None and report.distillation["kept"]:
        kl = choosing_kl(pair, text, tmp_path)
        assert report.distillation["after"] == pytest.approx(kl, rel=0.02)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_distillation_and_verification_agree_for_a_larger_vocabulary(
    make_pair: Callable[..., Pair], text: Path, tmp_path: Path, tied: bool
) -> None:
    base, tuned = make_pair(tied=tied)
    model = AutoModelForCausalLM.from_pretrained(tuned)
    model.resize_token_embeddings(261)
    model.save_pretrained(tuned)
    report = make((base, tuned), text, tmp_path, bits=0.5)
    with Artifact(tmp_path / "a.delta") as artifact:
        assert artifact.records[EMBEDDING]["kind"] == "new-rows"
    assert report.distillation is not None
    assert report.distillation["kept"]
    kl = choosing_kl((base, tuned), text, tmp_path)
    assert report.distillation["after"] == pytest.approx(kl, rel=0.02)
    added = load_file(tuned / WEIGHTS)[EMBEDDING][256:]
    assert torch.equal(load_file(tmp_path / "merged" / WEIGHTS)[EMBEDDING][256:], added)


METHODS = [
    "adamix", "delta-come", "topk-2", "topk-32", "low-rank", "bitdelta", "delta-zip", "gpt-zip"
]  # fmt: skip


def encode(method: str, delta: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The delta after the call, to detect changes in place, and its approximation."""
    found = matrix_method(method)
    assert found is not None
    given = delta.clone()
    result = compress_one(found, MatrixTask("layer", given, moment, "BF16", 1.0, "exact"))
    return given, result.approximation


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_calibration_inputs(method: str) -> None:
    delta = 0.01 * torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    _, approximation = encode(method, delta, damped(torch.zeros(64, 64, dtype=torch.float64)))
    assert torch.linalg.norm(delta - approximation) < torch.linalg.norm(delta)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_methods_do_not_modify_the_delta(method: str, shape: tuple[int, int]) -> None:
    delta = 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given, approximation = encode(method, delta, torch.eye(shape[1], dtype=torch.float64))
    assert torch.equal(given, delta)
    assert approximation.isfinite().all()


def test_a_delta_too_small_for_codes_is_kept_exactly(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(pair[0], lambda w: {**w, name: torch.zeros_like(w[name])})
    tiny = (3e-40 * torch.randn(96, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    rewrite(pair[1], lambda w: {**w, name: tiny})
    report = make(pair, text, tmp_path, method="adamix")
    assert {t.name: t.kind for t in report.other_tensors}[name] == "exact"
    assert torch.equal(load_file(tmp_path / "merged" / WEIGHTS)[name], tiny)


def test_spaced_windows_cover_the_text() -> None:
    assert spaced(128, 32).tolist()[:2] == [0, 4]
    assert spaced(128, 32).tolist()[-1] == 127
    assert spaced(5, 32).tolist() == [0, 1, 2, 3, 4]
    assert spaced(5, 1).tolist() == [0]
