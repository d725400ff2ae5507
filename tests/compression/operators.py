"""Counts a compression's operators in a GPU's sizes, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.operators import OperatorCounter
from deltadock.compression.numerics import gptq
from deltadock.kernels import error_compensation


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
