"""A delta is loaded onto the base that it was made for, in architecture, too."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from artifacts.encoding import (
    SvdMatrix,
    Vectors,
    encode_alias,
    encode_low_rank,
    encode_new_rows,
    encode_sum,
    encode_svd,
)
from artifacts.reader import Artifact
from artifacts.writer import write_artifact
from deltadock.errors import ArchitectureMismatch, InvalidArtifact, UnsupportedModel
from inference.deltas import ArtifactSource, load_delta
from inference.layers import Change, LowRank

from .conftest import BenchMaker


@dataclass
class EmptySource:
    """A delta that changes no tensor."""

    files: Mapping[str, str | None]
    base_digest: str = "base"
    names: list[str] = field(default_factory=list)

    def change(self, name: str, base: Tensor) -> Change:
        raise NotImplementedError


@pytest.fixture
def load(
    make_bench: BenchMaker, make_model: Callable[..., Any], tokenizer_json: str
) -> Callable[[str], None]:
    """Loads a delta that carries this config.json."""
    model = make_bench(make_model("qwen2")).model
    files = {"tokenizer.json": tokenizer_json, "config.json": json.dumps({"rope_theta": 10000.0})}

    def load(config: str) -> None:
        load_delta(EmptySource({"config.json": config}), model, "base", files)

    return load


def test_a_config_that_computes_otherwise_is_refused(load: Callable[[str], None]) -> None:
    load(json.dumps({"rope_theta": 10000.0, "eos_token_id": 1}))
    with pytest.raises(ArchitectureMismatch, match="rope_theta"):
        load(json.dumps({"rope_theta": 500000.0}))
    for broken in ("{", "[]"):
        with pytest.raises(InvalidArtifact, match=r"config\.json"):
            load(broken)


def test_a_larger_vocabulary_is_refused(
    make_bench: BenchMaker, make_model: Callable[..., Any], tokenizer_json: str
) -> None:
    model = make_bench(make_model("qwen2")).model
    files = {"tokenizer.json": tokenizer_json, "config.json": json.dumps({"vocab_size": 10})}
    source = EmptySource({"config.json": json.dumps({"vocab_size": 11})})
    with pytest.raises(UnsupportedModel, match=r"11 tokens, its base's 10.*deltadock merge"):
        load_delta(source, model, "base", files)


def test_factors_stay_factors(tmp_path: Path) -> None:
    """Scales of rows and columns, and a LoRA's scaling, go into the factors; the rest is merged."""
    rng = np.random.default_rng(0)

    def side(columns: int) -> Vectors:
        return Vectors(rng.integers(0, 8, (2, columns), np.uint8), np.array([3, 3]), None)

    s, scale = np.array([0.5, -0.25], np.float32), rng.uniform(0.5, 2, 6)
    svd = encode_svd(SvdMatrix(side(6), s, side(8)), "F32", {}, scale, rng.uniform(0.5, 2, 8))
    low_rank = encode_low_rank(rng.normal(size=(6, 3)), rng.normal(size=(3, 8)), 2.0, "F32")
    path = tmp_path / "a.delta"
    manifest = {"base_digest": "base", "method": "test", "files": {}, "nominal_bits": None}
    write_artifact(
        path,
        {
            "svd": svd,
            "low-rank": low_rank,
            "alias": encode_alias("svd", (6, 8), "F32"),
            "sum": encode_sum([svd, low_rank]),
            "new": encode_new_rows(svd, np.zeros((1, 8), np.float32), 6, "F32"),
        },
        {**manifest, "checkpoint_bytes": 0, "parameters": 0},
    )
    base = torch.randn(6, 8)
    with Artifact(path) as artifact:
        source = ArtifactSource(artifact)
        for name, rank in (("svd", 2), ("low-rank", 3), ("alias", 2)):
            change = source.change(name, base)
            assert isinstance(change, LowRank)
            assert change.u.shape == (6, rank)
            dense = torch.from_numpy(artifact.dense(name))
            torch.testing.assert_close(change.u @ change.v, dense)
        whole = source.change("sum", base)
        assert isinstance(whole, Tensor)
        torch.testing.assert_close(whole, base + torch.from_numpy(artifact.dense("sum")))
        with pytest.raises(UnsupportedModel, match="adds rows to 'new'"):
            source.change("new", base)
