"""Which fine-tunes fit which base."""

import json
from typing import Any

import pytest

from deltadock.artifacts.checkpoint import CheckpointManifest, FileEntry, TensorEntry, assemble
from deltadock.artifacts.compatibility import check_same_architecture, check_structure, vocabulary
from deltadock.errors import ArchitectureMismatch


def manifest(
    model_type: str = "qwen2", dtype: str = "BF16", config: Any = None, **shapes: Any
) -> CheckpointManifest:
    tensors = [
        TensorEntry(name, dtype, shape, "model.safetensors", "0" * 64)
        for name, shape in shapes.items()
    ]
    whole = {"model_type": model_type, **(config or {})}
    files = [FileEntry("model.safetensors", 0, "0" * 64)]
    return assemble(files, tensors, json.dumps(whole).encode())


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


@pytest.mark.parametrize("nested", [False, True])
def test_heads_and_activations_are_compared(nested: bool) -> None:
    def whole(**config: Any) -> dict[str, Any]:
        return {"text_config": config} if nested else config

    base = whole(num_attention_heads=4, head_dim=None)
    check_structure(base, whole(num_attention_heads=4, head_dim=8, rope_theta=1e6))
    check_structure(base, {})
    with pytest.raises(ArchitectureMismatch, match="num_attention_heads = 8"):
        check_structure(base, whole(num_attention_heads=8))


def with_vocabulary(tokens: int, rows: int | None = None, *, nested: bool = False) -> Any:
    """A model whose embedding, head and head's bias have a row for each token."""
    rows = tokens if rows is None else rows
    config = {"vocab_size": tokens, "hidden_size": 4}
    return manifest(
        config={"text_config": config} if nested else config,
        embed=(rows, 4),
        head=(rows, 4),
        bias=(rows,),
        square=(4, 4),
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("tokens", [9, 13])
def test_a_vocabulary_may_be_resized(nested: bool, tokens: int) -> None:
    base = with_vocabulary(10, nested=nested)
    check_same_architecture(base, with_vocabulary(tokens, nested=nested))


def test_rows_are_more_or_fewer_with_the_vocabulary_only() -> None:
    for finetuned in (
        with_vocabulary(10, rows=13),
        with_vocabulary(10, rows=9),
        with_vocabulary(9, rows=8),
        with_vocabulary(13, rows=12),
        with_vocabulary(13, rows=9),
        manifest(config={"vocab_size": 13}, embed=(13, 5), head=(13, 4), bias=(13,), square=(4, 4)),
        manifest(config={"vocab_size": 13}, embed=(13, 4), head=(13, 4), bias=(13,), square=(7, 4)),
    ):
        with pytest.raises(ArchitectureMismatch, match=r"has shape.*may have other rows"):
            check_same_architecture(with_vocabulary(10), finetuned)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"vocab_size": 7}, 7),
        ({"text_config": {"vocab_size": 7}}, 7),
        ({"vocab_size": 7, "text_config": {"vocab_size": 8}}, 7),
        ({}, None),
        ({"text_config": 7}, None),
        ({"vocab_size": "7"}, None),
        ({"vocab_size": True}, None),
    ],
)
def test_the_vocabulary_of_a_config(config: Any, tokens: int | None) -> None:
    assert vocabulary(config) == tokens
