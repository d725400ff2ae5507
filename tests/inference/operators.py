"""Counts a step's operators and what it reads from the device, on any device."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS: Final = ("tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__")
"""Methods that wait for the device and copy from it."""
WAITING: Final = ("nonzero", "masked_select", "unique", "_local_scalar_dense", "equal")
"""Operators that wait for the device: the shape of their result depends on the numbers."""
VIEWS: Final = frozenset(
    (
        *("alias", "detach", "expand", "flatten", "permute", "reshape", "resolve_conj"),
        *("resolve_neg", "select", "slice", "split", "split_with_sizes", "t", "transpose"),
        *("unsqueeze", "view", "empty", "_unsafe_view", "squeeze", "chunk"),
    )
)
"""Operators that launch nothing on the device."""


class CountedOperators(TorchDispatchMode):
    """Counts operators by name, without those that launch nothing.

    `reads` counts how often the host waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
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
        if name not in VIEWS:
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


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
