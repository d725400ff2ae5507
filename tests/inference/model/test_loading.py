"""Which bases are served, and in which dtype."""

import pytest
import torch

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.errors import UnsupportedModel
from deltadock.inference.model.families import FAMILIES
from deltadock.inference.model.loading import check_servable, serving_dtype
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
    assert tuple(FAMILIES) == SERVED
    for kind in SERVED:
        check_servable(CheckpointManifest((), (), {"model_type": kind}))


def test_a_refusal_names_its_cause() -> None:
    falcon, quantized = {"model_type": "falcon"}, {"model_type": "llama", "quantization_config": {}}
    with pytest.raises(
        UnsupportedModel, match=r"type 'falcon' are not served.*load_delta"
    ) as error:
        check_servable(CheckpointManifest((), (), falcon))
    assert "quantized" not in error.value.message
    with pytest.raises(UnsupportedModel, match="weights are quantized"):
        check_servable(CheckpointManifest((), (), quantized))
    embedding = {"model_type": "gemma3_text", "use_bidirectional_attention": True}
    with pytest.raises(UnsupportedModel, match="later tokens too"):
        check_servable(CheckpointManifest((), (), embedding))


@pytest.mark.parametrize("switch", [{}, {"use_sliding_window": False}])
@pytest.mark.parametrize("kind", ["smollm3", "qwen2", "qwen3"])
def test_windows_that_are_set_and_switched_off_are_refused(
    kind: str, switch: dict[str, bool]
) -> None:
    config = {"model_type": kind, "sliding_window": 5, **switch}
    windows = {"layer_types": ["sliding_attention", "full_attention"]}
    with pytest.raises(UnsupportedModel, match="`use_sliding_window` is not true"):
        check_servable(CheckpointManifest((), (), config | windows))
    for settled in (
        config | {"layer_types": ["full_attention"] * 2},
        config | {"layer_types": None},
        config | windows | {"use_sliding_window": True},
        config | windows | {"model_type": "gemma2"},  # which has no such switch
    ):
        check_servable(CheckpointManifest((), (), settled))
