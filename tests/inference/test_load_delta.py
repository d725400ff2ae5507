"""A delta is loaded onto the base that it was made for, in architecture, too."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

from deltadock.errors import ArchitectureMismatch, InvalidArtifact
from deltadock.inference.deltas.reading import read_delta
from deltadock.inference.model.weight_deltas import TensorDelta

from .conftest import VOCABULARY, BenchMaker


@dataclass
class EmptySource:
    """A delta that changes no tensor."""

    files: Mapping[str, str | None]
    base_digest: str = "base"
    names: list[str] = field(default_factory=list)

    def change(self, name: str, base: Tensor) -> TensorDelta:
        raise NotImplementedError


@pytest.fixture
def load(
    make_bench: BenchMaker, make_model: Callable[..., Any], tokenizer_json: str
) -> Callable[[str], None]:
    """Loads a delta that carries this config.json."""
    model = make_bench(make_model("qwen2")).model
    files = {"tokenizer.json": tokenizer_json, "config.json": json.dumps({"rope_theta": 10000.0})}

    def load(config: str) -> None:
        read_delta(EmptySource({"config.json": config}), model, "base", files)

    return load


def test_a_config_that_computes_otherwise_is_refused(load: Callable[[str], None]) -> None:
    load(json.dumps({"rope_theta": 10000.0, "eos_token_id": 1}))
    with pytest.raises(ArchitectureMismatch, match="rope_theta"):
        load(json.dumps({"rope_theta": 500000.0}))
    for broken in ("{", "[]"):
        with pytest.raises(InvalidArtifact, match=r"config\.json"):
            load(broken)


def test_a_config_that_says_another_vocabulary_is_refused(load: Callable[[str], None]) -> None:
    load(json.dumps({"vocab_size": VOCABULARY}))
    for size in (VOCABULARY - 1, VOCABULARY + 1):
        with pytest.raises(
            InvalidArtifact, match=rf"says that there are {size} .* for {VOCABULARY}"
        ):
            load(json.dumps({"vocab_size": size}))
