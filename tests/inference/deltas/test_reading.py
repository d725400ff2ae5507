"""A delta is loaded only onto a base of the same architecture and vocabulary."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deltadock.errors import ArchitectureMismatch, InvalidArtifact
from deltadock.inference.deltas.reading import read_delta
from tests.inference.conftest import VOCABULARY, BenchMaker

BASE = {"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 264}


@pytest.fixture
def load(
    make_bench: BenchMaker, make_model: Callable[..., Any], tokenizer_json: str
) -> Callable[[str], None]:
    """`load(config)`: load a delta with this config.json."""
    model = make_bench(make_model("qwen2")).model
    files = {"tokenizer.json": tokenizer_json, "config.json": json.dumps(BASE)}

    def load(config: str) -> None:
        empty: Any = SimpleNamespace(base_digest="base", files={"config.json": config}, records={})
        read_delta(empty, model, "base", files)

    return load


def test_a_config_of_another_architecture_is_refused(load: Callable[[str], None]) -> None:
    load(json.dumps(BASE | {"eos_token_id": 1, "head_dim": 8, "rope_theta": 500000.0}))
    with pytest.raises(ArchitectureMismatch, match="num_attention_heads = 8"):
        load(json.dumps(BASE | {"num_attention_heads": 8, "head_dim": 8}))
    with pytest.raises(InvalidArtifact, match="rope_parameters"):
        load(json.dumps(BASE | {"rope_theta": "x", "head_dim": 8}))
    for broken in ("{", "[]"):
        with pytest.raises(InvalidArtifact, match=r"config\.json"):
            load(broken)


def test_a_config_with_another_vocabulary_is_refused(load: Callable[[str], None]) -> None:
    load(json.dumps(BASE | {"vocab_size": VOCABULARY}))
    for size in (VOCABULARY - 1, VOCABULARY + 1):
        with pytest.raises(InvalidArtifact, match=rf"states {size} .* for {VOCABULARY}"):
            load(json.dumps(BASE | {"vocab_size": size}))
