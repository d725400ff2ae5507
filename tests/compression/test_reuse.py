"""Work that budgets share is done once, and what is batched or resumed has the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltadock.artifacts.encodings import Encoded
from deltadock.compression import distillation, encoder, search, session
from deltadock.compression.checkpoints import open_pair
from deltadock.compression.methods import adamix, base, optimix
from deltadock.compression.options import CalibrationOptions, CompressOptions, Goal, Source
from deltadock.compression.pipeline import compress
from deltadock.compression.progress import Progress
from deltadock.compression.scratch import Scratch
from deltadock.compression.session import CompressionSession
from deltadock.errors import Cancelled
from tests.compression.conftest import MemoryStore

Pair = tuple[Path, Path]
AMOUNT = CalibrationOptions(tokens=512, length=32)


def drafts(
    pair: Pair, text: Path, method: str, budgets: list[float], reserve: float | None = 1.25
) -> dict[str, Encoded]:
    """The encodings at the last of some budgets."""
    options = CompressOptions(method=method, calibration=AMOUNT)
    with Scratch() as scratch:
        made = CompressionSession(
            open_pair(*pair), options, [Source(text)], scratch, reserve=reserve
        )
        for bits in budgets:
            tensors = made._encode(bits).tensors
    return tensors


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """Counts the calls of a function of a module."""
    calls: list[int] = []
    original = getattr(module, name)

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(module, name, counting)
    return calls


def same(first: dict[str, Encoded], second: dict[str, Encoded]) -> bool:
    return first.keys() == second.keys() and all(
        one.record == second[name].record
        and all(
            np.array_equal(data, second[name].segments[key]) for key, data in one.segments.items()
        )
        for name, one in first.items()
    )


@pytest.mark.parametrize(
    ("method", "module", "name"),
    [
        ("adamix", adamix, "decompose"),
        ("delta-come", base, "decompose"),
        ("low-rank", base, "decompose"),
        ("optimix", optimix, "weighted_svd"),
    ],
)
def test_another_budget_decomposes_nothing_again(
    pair: Pair, text: Path, monkeypatch: pytest.MonkeyPatch, method: str, module: Any, name: str
) -> None:
    calls = counted(monkeypatch, module, name)
    first = drafts(pair, text, method, [1.0])
    once = len(calls)
    assert once > 0
    calls.clear()
    again = drafts(pair, text, method, [0.8, 1.2, 1.0])
    assert len(calls) == once
    assert same(first, again)


def test_a_budget_beyond_the_reserve_does_not_depend_on_those_before(
    pair: Pair, text: Path
) -> None:
    assert same(drafts(pair, text, "adamix", [1.0, 2.0]), drafts(pair, text, "adamix", [2.0]))


@pytest.mark.parametrize("method", ["adamix", "optimix"])
def test_blocks_in_one_batch_resume_to_the_same_bytes(
    pair: Pair, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(encoder.BATCH_WEIGHTS, "cpu", 1 << 20)
    options = CompressOptions(method=method, goal=Goal("bits", 1.0), calibration=AMOUNT)
    store = MemoryStore()

    def stop_when(stage: str) -> Callable[[Any], None]:
        def progress(report: Any) -> None:
            if report.stage == stage:
                raise Cancelled("stop")

        return progress

    compress(*pair, tmp_path / "whole.delta", options, calibration=[Source(text)])
    with pytest.raises(Cancelled):
        compress(
            *pair, tmp_path / "a.delta", options, calibration=[Source(text)], store=store,
            progress=stop_when("assembling"),
        )  # fmt: skip
    assert len(store.kept) == 1, "all blocks of this small model are one batch"
    compress(*pair, tmp_path / "a.delta", options, calibration=[Source(text)], store=store)
    assert (tmp_path / "a.delta").read_bytes() == (tmp_path / "whole.delta").read_bytes()


@pytest.mark.parametrize("goal", [Goal("bits", 1.0), Goal("max_kl", 0.02)], ids=str)
def test_a_retry_distills_only_what_was_not_distilled(
    pair: Pair, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goal: Goal
) -> None:
    """Whatever the search had tried when the first run was stopped, while it measured."""
    monkeypatch.setattr(distillation, "STEPS", 4)
    monkeypatch.setattr(search, "RESOLUTION", 1.3)
    options = CompressOptions(goal=goal, calibration=AMOUNT)
    sources, store = [Source(text)], MemoryStore()
    whole = compress(*pair, tmp_path / "whole.delta", options, calibration=sources)
    assert whole.distillation is not None
    assert whole.distillation["kept"]
    limit = 2 if goal.is_bound else 1
    trials = counted(monkeypatch, session, "distill")

    def stop(progress: Progress) -> None:
        if len(trials) == limit and progress.phase == "comparing":
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        compress(
            *pair, tmp_path / "a.delta", options, calibration=sources, store=store, progress=stop
        )
    again = compress(*pair, tmp_path / "a.delta", options, calibration=sources, store=store)
    assert again.distillation == whole.distillation
    assert (tmp_path / "a.delta").read_bytes() == (tmp_path / "whole.delta").read_bytes()
    both = len(trials)
    compress(*pair, tmp_path / "b.delta", options, calibration=sources)
    assert both == len(trials) - both >= limit
