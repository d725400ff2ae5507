"""Scales are trained end to end and kept only if KL on the choosing windows improves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltadock.artifacts.encodings import DELTA_ENCODINGS, Encoded, decode_dense
from deltadock.compression import distillation
from deltadock.compression.assembly import encode_remaining
from deltadock.compression.calibration.windows import CalibrationSet
from deltadock.compression.checkpoints import CheckpointPair, CheckpointReader, open_pair
from deltadock.compression.distillation import distill
from deltadock.compression.matrices import changed_matrices
from deltadock.compression.methods import optimix
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.numerics.global_allocation import RankWidths
from deltadock.compression.numerics.metric import Metric
from deltadock.compression.trainable_delta import flatten_factors
from deltadock.errors import Cancelled

Pair = tuple[Path, Path]
Outcome = tuple[dict[str, Encoded], dict[str, float]]

GENERATOR = torch.Generator().manual_seed(0)
TRAIN = torch.randint(0, 256, (12, 32), generator=GENERATOR)
HELD = torch.randint(0, 256, (6, 32), generator=GENERATOR)
REPORTED = torch.full((2, 32), 256)
"""No token of the vocabulary: whoever reads these windows fails."""
DATA = CalibrationSet(TRAIN, HELD, REPORTED, "", [])


class Prepared:
    """A pair whose matrices are encoded in one or two bits, with poor scales."""

    def __init__(self, base: Path, tuned: Path) -> None:
        self.base, self.tuned = base, tuned
        self.pair: CheckpointPair = open_pair(base, tuned)
        self.model = BlockwiseModel(tuned)
        self.encoded: dict[str, Encoded] = {}
        for matrix in changed_matrices(self.pair, self.model, with_embedding=True):
            delta = self.pair.delta(matrix.ref)
            rows, columns = (Metric.of(torch.ones(1, n)) for n in delta.shape)
            ((prepared, profile),) = optimix.profile(delta[None], rows, columns)
            count = len(profile.s)
            widths = RankWidths(torch.arange(count), *(torch.full((count,), w) for w in (1, 2)))
            made = optimix.compress(delta[None], [prepared], [widths], rows, columns, ["BF16"])[
                0
            ].encoded
            made.segments["s"] = (1.1 * made.segments["s"]).astype(np.float16)
            self.encoded[matrix.ref.name] = made
        others, _ = encode_remaining(
            self.pair, self.encoded, embedding=self.model.embedding, embedding_bits=4
        )
        self.encoded |= others

    def distill(self, known: tuple[torch.Tensor, torch.Tensor] | None = None) -> Outcome:
        fractions: list[float] = []
        outcome = distill(
            self.pair, self.model, DATA, self.encoded, 2,
            lambda done, _: fractions.append(done), known,
        )  # fmt: skip
        assert fractions == sorted(fractions)
        assert all(0 <= done <= 1 for done in fractions)
        return outcome

    def kl(self, encoded: dict[str, Encoded]) -> float:
        """KL on the choosing windows, computed by plain transformers."""
        scores = []
        for changed in (False, True):
            whole = AutoModelForCausalLM.from_pretrained(self.tuned, dtype=torch.float32).eval()
            if changed:
                weights = load_file(self.base / "model.safetensors")
                for name, parameter in whole.named_parameters():
                    if encoded[name].record["kind"] != "exact":
                        delta = torch.from_numpy(decode_dense(encoded[name]))
                        parameter.data = weights[name].float() + delta
            with torch.inference_mode():
                scores.append(whole(HELD).logits.double().log_softmax(-1).flatten(0, 1))
        target, guess = scores
        return float((target.exp() * (target - guess)).sum(-1).mean())


@pytest.fixture(autouse=True)
def _few_and_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # For a short text: five windows per step.
    monkeypatch.setattr(distillation, "STEPS", 8)
    monkeypatch.setattr(distillation, "RELATIVE_RATE", 0.03)
    monkeypatch.setattr(distillation, "TOKENS_PER_STEP", 5 * TRAIN.shape[1])


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def prepared(request: pytest.FixtureRequest, make_pair: Callable[..., Pair]) -> Prepared:
    return Prepared(*make_pair(tied=request.param))


def same(first: Encoded, second: Encoded) -> bool:
    return first.record == second.record and all(
        np.array_equal(data, second.segments[key]) for key, data in first.segments.items()
    )


def test_kl_decreases_at_the_same_size(prepared: Prepared) -> None:
    before = dict(prepared.encoded)
    copies = {
        name: {key: data.copy() for key, data in one.segments.items()}
        for name, one in before.items()
    }
    trained, figures = prepared.distill()
    assert figures["kept"] == 1
    assert figures["after"] < 0.95 * figures["before"]
    assert figures["before"] == pytest.approx(prepared.kl(before), rel=1e-3)
    # Scales are trained in single precision and stored in half.
    assert figures["after"] == pytest.approx(prepared.kl(trained), rel=1e-2)
    assert trained.keys() == before.keys()
    moved = set()
    for name, one in before.items():
        assert trained[name].record == one.record
        assert trained[name].nbytes == one.nbytes
        for key, data in trained[name].segments.items():
            assert np.array_equal(one.segments[key], copies[name][key])
            assert data.dtype == one.segments[key].dtype
            if not np.array_equal(data, one.segments[key]):
                moved.add(key)
    assert moved == {"s", "row_scale", "column_scale"}


def test_distillation_is_deterministic(prepared: Prepared) -> None:
    (first, figures), (second, again) = prepared.distill(), prepared.distill()
    assert figures == again
    assert all(same(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_scales_that_do_not_improve_are_discarded(
    value: float, make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, accumulate = Prepared(*make_pair()), distillation._accumulate

    def wrong_gradients(*args: Any) -> None:
        """Ascend, or follow NaN."""
        accumulate(*args)
        for factor in flatten_factors(args[2].factors):
            assert factor.grad is not None
            factor.grad.mul_(value)

    monkeypatch.setattr(distillation, "_accumulate", wrong_gradients)
    returned, figures = prepared.distill()
    assert figures["kept"] == 0
    assert not figures["after"] < figures["before"]
    assert returned.keys() == prepared.encoded.keys()
    assert all(same(one, prepared.encoded[name]) for name, one in returned.items())


def test_records_without_scales_are_not_trained(make_pair: Callable[..., Pair]) -> None:
    prepared = Prepared(*make_pair())
    prepared.encoded = {
        name: one for name, one in prepared.encoded.items() if one.record["kind"] == "exact"
    }
    returned, figures = prepared.distill()
    assert returned == prepared.encoded
    assert figures["kept"] == 0
    assert figures["before"] == figures["after"] > 0


def test_the_progress_callback_can_stop_it(make_pair: Callable[..., Pair]) -> None:
    prepared = Prepared(*make_pair())

    def stop(done: float, _text: str) -> None:
        if done > 0:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        distill(prepared.pair, prepared.model, DATA, prepared.encoded, 0, stop)


def test_streamed_and_resident_scales_are_equal(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the device has no room, nothing stays on it: the same bytes, and the report says so."""
    first, figures = prepared.distill()
    monkeypatch.setattr(distillation, "device_budget", lambda _: 0)
    second, streamed = prepared.distill()
    assert (figures.pop("resident"), streamed.pop("resident")) == (1.0, 0.0)
    assert figures == streamed
    assert all(same(one, second[name]) for name, one in first.items())


def test_known_states_of_the_fine_tune_are_not_computed_again(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, run = distillation._forward, []
    finetuned = prepared.pair.finetuned
    states = forward(prepared.model, TRAIN, finetuned)[-1]

    def recorded(model: Any, tokens: Any, source: Any) -> Any:
        if isinstance(source, distillation._ResidentSource):
            run.append(tokens)
        return forward(model, tokens, source)

    first, _ = prepared.distill()
    monkeypatch.setattr(distillation, "_forward", recorded)
    second, _ = prepared.distill((TRAIN, states))
    assert [tokens.tolist() for tokens in run] == [HELD.tolist()]
    for name, one in first.items():
        for key, data in one.segments.items():
            np.testing.assert_allclose(
                data.astype(np.float32), second[name].segments[key].astype(np.float32), rtol=2e-3
            )


def test_a_step_reads_no_file_and_unpacks_each_tensor_once(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[str] = []
    unpack, step = distillation._Student._unpack, distillation._accumulate
    read = CheckpointReader.tensor
    steps: list[list[str]] = []

    def counting(student: Any, name: str) -> Any:
        unpacked.append(name)
        return unpack(student, name)

    def recorded(*args: Any) -> None:
        unpacked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointReader, "tensor", lambda *_: pytest.fail("read a file"))
            step(*args)
        steps.append(sorted(unpacked))

    monkeypatch.setattr(distillation._Student, "_unpack", counting)
    monkeypatch.setattr(distillation, "_accumulate", recorded)
    prepared.distill()
    assert CheckpointReader.tensor is read
    deltas = sorted(
        name for name, one in prepared.encoded.items() if one.record["kind"] in DELTA_ENCODINGS
    )
    assert steps == [deltas] * distillation.STEPS


def test_scales_whose_outputs_overflow_are_not_trained(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Prepared(*make_pair())
    name = next(name for name, one in prepared.encoded.items() if "s" in one.segments)
    prepared.encoded[name].segments["s"][0] = np.inf
    monkeypatch.setattr(distillation, "_accumulate", None)
    encoded, figures = prepared.distill()
    assert encoded == prepared.encoded
    assert not np.isfinite(figures["before"])
    assert figures["kept"] == 0
