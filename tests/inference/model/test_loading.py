"""Which bases are served, and in which dtype."""

import pytest
import torch

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.errors import UnsupportedModel
from deltadock.inference.model.loading import CLASSES, check_servable, serving_dtype
from deltadock.model_target import SERVED


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


def test_the_api_and_nodes_know_the_same_families() -> None:
    assert tuple(CLASSES) == SERVED
    for kind in SERVED:
        check_servable(CheckpointManifest((), (), {"model_type": kind}))


def test_a_refusal_names_its_cause() -> None:
    gemma, quantized = {"model_type": "gemma2"}, {"model_type": "llama", "quantization_config": {}}
    with pytest.raises(
        UnsupportedModel, match=r"type 'gemma2' are not served.*load_delta"
    ) as error:
        check_servable(CheckpointManifest((), (), gemma))
    assert "quantized" not in error.value.message
    with pytest.raises(UnsupportedModel, match="weights are quantized"):
        check_servable(CheckpointManifest((), (), quantized))
