"""The order of a slot's changes and of what the engine launches; the GPU's streams are fakes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from deltadock.inference.deltas import reading
from deltadock.inference.deltas.reading import HostDelta, merge_delta, place_delta, remove_delta


class Stream:
    """Records what it waits for."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def wait_stream(self, other: object) -> None:
        self._calls.append(f"wait for {other}")

    def synchronize(self) -> None:
        self._calls.append("synchronize")


class Model:
    """Records the changes of its slots."""

    device = torch.device("cuda", 0)

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: self._calls.append(name)


CHANGES: list[tuple[Callable[..., None], list[Any], list[str]]] = [
    (place_delta, [HostDelta({}, None, 0)], ["place", "install"]),  # type: ignore[arg-type]
    (remove_delta, [], ["remove"]),
    (merge_delta, [], ["merge"]),
]


@pytest.mark.parametrize(("change", "arguments", "steps"), CHANGES)
def test_a_slot_changes_after_the_passes_that_were_launched(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., None],
    arguments: list[Any],
    steps: list[str],
) -> None:
    """A pass in which nothing is sampled is not waited for by the engine."""
    calls: list[str] = []
    stream = Stream(calls)

    @contextmanager
    def on_stream(used: object) -> Iterator[None]:
        assert used is stream
        calls.append("begin")
        yield
        calls.append("end")

    monkeypatch.setattr(reading, "_copy_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: "the engine's stream")
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    change(Model(calls), 1, *arguments)
    expected = ["wait for the engine's stream", "begin", *steps, "end", "synchronize"]
    assert calls[: len(expected)] == expected
