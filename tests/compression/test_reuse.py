"""Work that budgets share is done once, and what is batched or resumed has the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltadock.artifacts.encodings import Encoded
from deltadock.compression import session
from deltadock.compression.checkpoints import open_pair
from deltadock.compression.methods import adamix, base, optimix
from deltadock.compression.options import CalibrationOptions, CompressOptions, Goal, Source
from deltadock.compression.pipeline import compress
from deltadock.compression.scratch import Scratch
from deltadock.compression.session import CompressionSession
from deltadock.errors import Cancelled

Pair = tuple[Path, Path]
AMOUNT = CalibrationOptions(tokens=512, length=32)


def drafts(
    pair: Pair, text: Path, method: str, budgets: list[float], reserve: float | None = 1.25
) -> dict[str, Encoded]:
    """The encodings at the last of some budgets."""
    options = CompressOptions(method=method, calibration=AMOUNT)
    with Scratch() as scratch:
        made = CompressionSession(open_pair(*pair), options, scratch, reserve=reserve)
        made.prepare([Source(text)])
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
    monkeypatch.setitem(session.BATCH_WEIGHTS, "cpu", 1 << 20)
    options = CompressOptions(method=method, goal=Goal("bits", 1.0), calibration=AMOUNT)
    stored: dict[str, bytes] = {}

    class Store:
        def get(self, key: str) -> bytes | None:
            return stored.get(key)

        def put(self, key: str, data: bytes) -> None:
            stored[key] = data

    def stop_when(stage: str) -> Callable[[Any], None]:
        def progress(report: Any) -> None:
            if report.stage == stage:
                raise Cancelled("stop")

        return progress

    compress(*pair, tmp_path / "whole.delta", options, calibration=[Source(text)])
    with pytest.raises(Cancelled):
        compress(
            *pair, tmp_path / "a.delta", options, calibration=[Source(text)], store=Store(),
            progress=stop_when("assembling"),
        )  # fmt: skip
    assert len(stored) == 1, "all blocks of this small model are one batch"
    compress(*pair, tmp_path / "a.delta", options, calibration=[Source(text)], store=Store())
    assert (tmp_path / "a.delta").read_bytes() == (tmp_path / "whole.delta").read_bytes()
