"""Encoded tensors as blobs for the work store."""

import numpy as np
import pytest

from deltadock.artifacts.encodings import Encoded, encode_svd, quantize_rows_midrise
from deltadock.artifacts.serial import deserialize, serialize
from deltadock.errors import MalformedSafetensors
from tests.artifacts.make_golden import tensors
from tests.artifacts.samples import svd_matrix


def blocks() -> dict[str, Encoded]:
    return {
        **tensors(),
        "no ranks": encode_svd(svd_matrix(0, 3, 4), "F32", {}),
        "no rows": quantize_rows_midrise(np.zeros((3, 4), np.float32), 4, "F32"),
        "with: colons: inside": encode_svd(svd_matrix(5, 40, 33), "BF16", {"gap": 0.0}),
    }


def test_round_trip() -> None:
    notes = {"proj.weight": {"error": 0.1 + 0.2, "fallbacks": ["damped twice"], "rank": 4}}
    back, back_notes = deserialize(serialize(blocks(), notes))
    assert back_notes == notes
    assert back.keys() == blocks().keys()
    for name, encoded in blocks().items():
        assert back[name].record == encoded.record
        assert back[name].segments.keys() == encoded.segments.keys()
        for key, data in encoded.segments.items():
            np.testing.assert_array_equal(back[name].segments[key], data)
            assert back[name].segments[key].dtype == data.dtype


def test_serializing_is_deterministic() -> None:
    once = serialize(blocks(), {})
    assert serialize(deserialize(once)[0], {}) == once


def test_an_empty_block() -> None:
    assert deserialize(serialize({}, {})) == ({}, {})


def test_other_bytes_are_rejected() -> None:
    with pytest.raises(MalformedSafetensors):
        deserialize(b"not a block")
