"""Counts a step's operators and what it reads from the device, on any device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import pytest
import torch

from benchmarks.operators import VIEWS, OperatorCounter

READS: Final = ("tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__")
"""Methods that wait for the device and copy from it."""
WAITING: Final = ("nonzero", "masked_select", "unique", "_local_scalar_dense", "equal")
"""Operators that wait for the device: the shape of their result depends on the numbers."""


class CountedOperators(OperatorCounter):
    """Counts operators, and in `reads` how often the host waits for the device."""

    FREE = VIEWS | {"empty", "empty_like"}

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masked_index = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        assert not masked_index, "a mask as an index waits for the device"
        assert not any(name.startswith(waiting) for waiting in WAITING), name
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def counted_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedOperators]:
    """Count what the block does."""
    with monkeypatch.context() as patch, CountedOperators() as counted:

        def counting(method: Any) -> Any:
            def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                counted.reads += 1
                return method(tensor, *args, **kwargs)

            return read

        for name in READS:
            patch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
        yield counted
