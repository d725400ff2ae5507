"""A decoder layer's small operations in Triton against float64, on a GPU or interpreted."""

import pytest
import torch

from tests.kernels.decoder.cases import CASES, DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="no GPU; test_interpreter.py runs these in Triton's interpreter",
)


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    CASES[name]()
