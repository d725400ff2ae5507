"""The dtype in which a base is served."""

import pytest
import torch

from deltadock.inference.model.loading import serving_dtype


@pytest.mark.parametrize(
    ("stored", "served"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
    ],
)
def test_a_gpu_gets_floats_that_its_kernels_take(stored: torch.dtype, served: torch.dtype) -> None:
    assert serving_dtype(stored, torch.device("cuda")) == served
    assert serving_dtype(stored, torch.device("cpu")) == torch.float32
