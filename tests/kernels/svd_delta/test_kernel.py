"""The Triton kernels against float64, on a GPU or in Triton's interpreter."""

import pytest
import torch

from tests.kernels.svd_delta.cases import CASES, GRAPH_CASES, INTERPRETED

needs_gpu = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU; test_interpreter.py runs these in Triton's interpreter",
)


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    CASES[name]()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", GRAPH_CASES)
def test_graphs(name: str) -> None:
    GRAPH_CASES[name]()
