"""Which fine-tunes fit which base."""

from typing import Any

import pytest

from artifacts.checkpoint import CheckpointManifest, TensorEntry, assemble
from artifacts.compatibility import check_same_architecture, check_same_config
from deltadock.errors import ArchitectureMismatch


def manifest(model_type: str = "qwen2", dtype: str = "BF16", **shapes: Any) -> CheckpointManifest:
    tensors = [
        TensorEntry(name, dtype, shape, "model.safetensors", "0" * 64)
        for name, shape in shapes.items()
    ]
    return assemble([], tensors, f'{{"model_type": "{model_type}"}}'.encode())


BASE = manifest(a=(2, 3), b=(4,), c=())


def test_a_finetune_of_another_dtype_fits() -> None:
    check_same_architecture(BASE, manifest(c=(), a=(2, 3), b=(4,), dtype="F32"))


@pytest.mark.parametrize(
    ("finetuned", "message"),
    [
        (manifest("llama", a=(2, 3), b=(4,), c=()), "'qwen2' model, the fine-tune a 'llama'"),
        (manifest(a=(2, 3), c=()), "lacks the base's tensor 'b'"),
        (manifest(a=(2, 3), b=(4,), c=(), d=(1,)), "'d' is not in the base"),
        (manifest(a=(3, 2), b=(4,), c=()), r"'a' has shape \[3, 2\].*\[2, 3\] in the base"),
        (manifest(a=(2, 3), b=(4,), c=(1,)), "'c' has shape"),
        (manifest(a=(6,), b=(5,), c=(1,)), "'a' has shape"),
    ],
)
def test_the_first_difference_is_named(finetuned: CheckpointManifest, message: str) -> None:
    with pytest.raises(ArchitectureMismatch, match=message):
        check_same_architecture(BASE, finetuned)


def test_a_config_that_uses_the_weights_differently_is_refused() -> None:
    base = {"model_type": "qwen2", "num_attention_heads": 4, "use_cache": True, "rope_theta": 1e4}
    check_same_config(base, {**base, "use_cache": False, "torch_dtype": "float16"})
    check_same_config(base, {"model_type": "qwen2"})
    with pytest.raises(ArchitectureMismatch, match="num_attention_heads"):
        check_same_config(base, {**base, "num_attention_heads": 8})
    with pytest.raises(ArchitectureMismatch, match="rope_theta"):
        check_same_config(base, {**base, "rope_theta": 1e6})


def test_windows_count_where_they_are_used() -> None:
    base, finetuned = {"sliding_window": 4096}, {"sliding_window": 32768}
    with pytest.raises(ArchitectureMismatch, match="sliding_window"):
        check_same_config(base, finetuned)
    unused = {"use_sliding_window": False}
    check_same_config(base | unused, finetuned | unused)
