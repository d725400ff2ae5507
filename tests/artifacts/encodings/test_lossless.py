"""Lossless compression of segments, hostile data included."""

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.encodings import (
    Encoded,
    decode_dense,
    decode_factors,
    decode_rows,
    decode_svd,
    deflate,
    encode_exact,
    encode_rows,
    encode_sum,
    encode_svd,
    expected_segments,
    inflate,
)
from deltadock.errors import InvalidArtifact
from tests.artifacts.samples import (
    LEAVES,
    Sample,
    assert_as_expected,
    assert_decodes,
    svd_matrix,
)


@given(st.sampled_from(range(len(LEAVES))), st.integers(0, 2**32 - 1))
def test_round_trip(kind: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = LEAVES[kind]((int(rng.integers(1, 20)), int(rng.integers(1, 20))), rng)
    packed = deflate(sample.encoded)
    assert_decodes(Sample(packed, sample.delta))
    back = inflate(packed)
    assert back.record == sample.encoded.record
    for key, data in sample.encoded.segments.items():
        assert back.segments[key].tobytes() == data.tobytes()


def test_every_decoder_inflates() -> None:
    svd = encode_svd(svd_matrix(3, 4, 5), "F32")
    np.testing.assert_array_equal(decode_svd(deflate(svd)).s, decode_svd(svd).s)
    np.testing.assert_array_equal(decode_factors(deflate(svd)).u, decode_factors(svd).u)
    np.testing.assert_array_equal(decode_rows(deflate(signs())), decode_rows(signs()))
    exact = encode_exact(np.arange(6, dtype=np.uint16), "BF16", (2, 3))
    assert inflate(deflate(exact)).segments["data"].tolist() == [[0, 1, 2], [3, 4, 5]]


def signs() -> Encoded:
    return encode_rows(np.ones((64, 512), np.uint8), np.ones(64, np.int64), np.ones(1), "F32")


def test_constant_codes_compress() -> None:
    assert deflate(signs()).nbytes < signs().nbytes / 20


def test_deflating_twice_is_rejected() -> None:
    with pytest.raises(ValueError, match="already"):
        deflate(deflate(signs()))
    for whole in (encode_sum([deflate(signs())]), encode_sum([signs()])):
        twice = deflate(whole)
        if "deflated" in whole.record["parts"][0]:
            with pytest.raises(InvalidArtifact, match="part of a deflated"):
                expected_segments(twice.record)
        else:
            assert_as_expected(twice)


def with_codes(data: bytes) -> Encoded:
    """A deflated encoding whose codes are these bytes."""
    packed = deflate(signs())
    sizes = {**packed.record["deflated"], "codes": len(data)}
    codes = np.frombuffer(data, np.uint8)
    return Encoded({**packed.record, "deflated": sizes}, {**packed.segments, "codes": codes})


@pytest.mark.parametrize(
    "data",
    [
        b"not zlib data at all",
        zlib.compress(b"too short" * 10),
        zlib.compress(bytes(4097)),
        zlib.compress(bytes(4096))[:-1] + b"\0",
        zlib.compress(bytes(4096))[:-3],
        zlib.compress(bytes(4096)) + b"more",
    ],
)
def test_other_data_are_rejected(data: bytes) -> None:
    encoded = with_codes(data)
    assert expected_segments(encoded.record)["codes"] == ("U8", (len(data),))
    with pytest.raises(InvalidArtifact, match="deflated segment"):
        decode_dense(encoded)


def test_a_zip_bomb_is_rejected_in_bounded_memory() -> None:
    encoded = with_codes(zlib.compress(bytes(2**22), 9))
    tracemalloc.start()
    with pytest.raises(InvalidArtifact, match="size that its record implies"):
        decode_dense(encoded)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**19


@pytest.mark.parametrize("size", [-1, 3, 10**6, 2.0, True, None])
def test_sizes_that_cannot_be_are_rejected(size: object) -> None:
    record = deflate(signs()).record
    with pytest.raises(InvalidArtifact):
        expected_segments({**record, "deflated": {**record["deflated"], "codes": size}})


@pytest.mark.parametrize("sizes", [True, {}, [], None, {"codes": 20}, {"more": 20}])
def test_sizes_of_other_segments_are_rejected(sizes: object) -> None:
    with pytest.raises(InvalidArtifact):
        expected_segments({**deflate(signs()).record, "deflated": sizes})
