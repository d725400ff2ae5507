"""Counts a compression's operators in a GPU's sizes, on any device."""

from collections.abc import Callable, Iterator
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

    inside = False

    def one_launch(name: str) -> Callable[..., None]:
        original = getattr(error_compensation, name)

        def launch(*tensors: Tensor) -> None:
            nonlocal inside
            nested, inside = inside, True
            counter.by_name[name] += not nested
            with _disable_current_modes():
                original(*tensors)
            inside = nested

        return launch

    with monkeypatch.context() as patch, OperatorCounter() as counter:
        for module in (error_compensation, gptq):
            patch.setattr(module, "round_block", one_launch("round_block"))
        patch.setattr(error_compensation, "prune_block", one_launch("prune_block"))
        patch.setitem(error_compensation.BLOCK, "cpu", error_compensation.BLOCK["cuda"])
        patch.setitem(gptq.SEARCH_ELEMENTS, "cpu", gptq.SEARCH_ELEMENTS["cuda"])
        yield counter
