"""Lies about the kinds of encoding, told by whoever made the hashes too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltadock.artifacts.reader import Artifact
from deltadock.errors import InvalidArtifact
from tests.artifacts.edits import DATA_OFFSET, FILE, drop, put, rewritten
from tests.artifacts.make_golden import GOLDEN
from tests.artifacts.support import split

NO_SEGMENTS = {
    "kind": "alias",
    "of": "proj.weight",
    "shape": [3, 5],
    "dtype": "BF16",
    "sha256": {},
}

LIES: dict[str, Callable[[Any, Any], object]] = {
    "alias of nothing": put("tensors", "alias.weight", "of", value="ghost"),
    "alias of itself": put("tensors", "alias.weight", "of", value="alias.weight"),
    "alias of another shape": put("tensors", "alias.weight", "of", value="proj.weight"),
    "alias of another dtype": put("tensors", "alias.weight", "dtype", value="F16"),
    "alias with a segment": put("tensors", "signs.weight", value=NO_SEGMENTS),
    "part of another shape": put("tensors", "both.weight", "parts", 0, "shape", value=[5, 3]),
    "part missing": put("tensors", "both.weight", "parts", value=[]),
    "part of another kind": put("tensors", "both.weight", "parts", 1, "kind", value="svd"),
    "stack longer": put("tensors", "experts.weight", "shape", value=[4, 3, 5]),
    "deflated of another size": put("tensors", "thinned.weight", "deflated", "codes", value=20),
    "not deflated": drop("tensors", "thinned.weight", "deflated"),
    "base without rows": put("tensors", "new.weight", "base_rows", value=0),
    "another grid": put("tensors", "scaled.weight", "grid", value="zeros"),
    "no row scale": drop("tensors", "scaled.weight", "row_scale"),
    "one scale for all": put("tensors", "embed.weight", "scale", value="shared"),
    "no index": drop("tensors", "embed.weight", "index"),
    "more ranks": put("tensors", "lora.weight", "rank", value=3),
    "factors of another dtype": put("tensors", "lora.weight", "factor_dtype", value="F16"),
    "wider groups": put("tensors", "pruned.weight", "group", value=128),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.delta"
    path.write_bytes(rewritten(LIES[name]))
    with pytest.raises(InvalidArtifact):
        Artifact(path)


@pytest.mark.parametrize(
    "segment", ["pruned.weight:positions", "thinned.weight:bitmap", "embed.weight:index"]
)
def test_codes_that_contradict_their_record_are_refused(tmp_path: Path, segment: str) -> None:
    header, _ = split(FILE)
    begin, end = header[segment]["data_offsets"]
    file = bytearray(FILE)
    file[DATA_OFFSET + begin : DATA_OFFSET + end] = b"\xff" * (end - begin)
    path = tmp_path / "a.delta"
    path.write_bytes(file)
    with Artifact(path) as artifact, pytest.raises(InvalidArtifact):
        artifact.dense(segment.partition(":")[0])


def test_an_alias_reads_as_what_it_stands_for() -> None:
    with Artifact(GOLDEN) as artifact:
        np.testing.assert_array_equal(
            artifact.dense("alias.weight"), artifact.dense("embed.weight")
        )
        assert artifact.tensor_bytes("alias.weight") == 0


@pytest.mark.parametrize("name", ["norm.weight", "new.weight"])
def test_what_has_no_delta_says_so(name: str) -> None:
    with Artifact(GOLDEN) as artifact, pytest.raises(InvalidArtifact, match="no delta"):
        artifact.dense(name)
