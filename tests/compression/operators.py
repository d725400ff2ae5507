"""Count torch operators: on a GPU each is a launch of some 5 us, whatever it computes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from deltadock.compression.numerics import gptq
from deltadock.kernels import error_compensation

VIEWS = {
    "view", "reshape", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select",
    "diagonal", "detach", "alias", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind",
    "as_strided",
}  # fmt: skip
"""Operators that launch nothing."""


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that would launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Operators counted so far."""
        return self.by_name.total()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[OperatorCounter]:
    """Count operators in GPU sizes: a block of error compensation is one launch."""
    original = error_compensation.round_block

    def launch(*tensors: Tensor) -> None:
        counter.by_name["round_block"] += 1
        with _disable_current_modes():
            original(*tensors)

    with monkeypatch.context() as patch, OperatorCounter() as counter:
        for module in (error_compensation, gptq):
            patch.setattr(module, "round_block", launch)
        patch.setitem(error_compensation.BLOCK, "cpu", error_compensation.BLOCK["cuda"])
        patch.setitem(gptq.SEARCH_ELEMENTS, "cpu", gptq.SEARCH_ELEMENTS["cuda"])
        yield counter
