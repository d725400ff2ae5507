"""What the benchmark of the base's products does on a GPU only."""

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import linear
from benchmarks.linear import AheadProducts
from benchmarks.machine_code import compile_kernel, disassemble


def test_what_is_brought_ahead_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next product: nothing is left when the capture of a graph ends, or for another."""
    events: list[str] = []

    def stream(name: str) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda _: events.append(f"{name} waits"))

    main, weights = stream("main"), [torch.full((64, 32), float(number)) for number in range(3)]
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())

    class Launcher:
        def __getitem__(self, _: object) -> Any:
            return lambda weight, *_, **__: events.append(f"weight {int(weight[0, 0])}")

    monkeypatch.setattr(linear, "bring_kernel", Launcher())
    products = AheadProducts(weights)
    for weight in weights:
        products(weight, weight)
    assert events == [
        "side waits",
        "weight 1",
        "main waits",
        "side waits",
        "weight 2",
        "main waits",
    ]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="it compiles nothing")
def test_it_only_asks() -> None:
    compiled = compile_kernel(
        90, linear.bring_kernel, linear.TYPES, {"COLUMNS": 16, "LINES": 64, "LINE": 32}, num_warps=1
    )
    code = disassemble(compiled)
    assert code.operations.count("CCTL") == 16 * 64 // 32
    assert code.stack_bytes == 0
    assert "LDG" not in code.operations
