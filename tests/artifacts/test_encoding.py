"""What is stored comes back, and records that make no sense do not pass."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.container import DTYPE_BITS
from artifacts.encoding import (
    NUMPY_DTYPES,
    Encoded,
    FloatArray,
    SvdMatrix,
    Vectors,
    decode_factors,
    decode_rows,
    decode_svd,
    encode_exact,
    encode_rows,
    encode_svd,
    expected_segments,
    quantize_midrise,
)
from deltadock.errors import InvalidArtifact
from tests.artifacts.test_container import JSON


def vectors(rng: np.random.Generator, ranks: int, columns: int) -> Vectors:
    bits = rng.integers(1, 9, ranks)
    codes = (rng.integers(0, 256, (ranks, columns)) % (2 ** bits[:, None])).astype(np.uint8)
    return Vectors(codes, bits, rng.uniform(0, 200, ranks).astype(np.float16))


def svd_matrix(ranks: int, h_out: int, h_in: int, seed: int = 0) -> SvdMatrix:
    rng = np.random.default_rng(seed)
    s = rng.normal(size=ranks).astype(np.float32)
    return SvdMatrix(vectors(rng, ranks, h_out), s, vectors(rng, ranks, h_in))


def assert_as_expected(encoded: Encoded) -> None:
    """The segments are what a reader will look for, and the record survives JSON."""
    assert json.loads(json.dumps(encoded.record)) == encoded.record
    expected = expected_segments(encoded.record)
    assert expected.keys() == encoded.segments.keys()
    for key, (dtype, shape) in expected.items():
        segment = encoded.segments[key]
        assert (segment.dtype, segment.shape) == (np.dtype(NUMPY_DTYPES[dtype]), shape)
    assert encoded.nbytes == sum(segment.nbytes for segment in encoded.segments.values())


@given(st.integers(0, 9), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_svd_round_trip(ranks: int, h_out: int, h_in: int, seed: int) -> None:
    matrix = svd_matrix(ranks, h_out, h_in, seed)
    encoded = encode_svd(matrix, "BF16", {"damping": 0.5})
    assert_as_expected(encoded)
    assert encoded.record["shape"] == [h_out, h_in]
    assert encoded.record["damping"] == 0.5
    # Falling width of V, then of U; equal ranks keep their order.
    order = sorted(range(ranks), key=lambda i: (-matrix.v.bits[i], -matrix.u.bits[i]))
    stored = decode_svd(encoded)
    np.testing.assert_array_equal(stored.s, matrix.s[order])
    for side, original in ((stored.u, matrix.u), (stored.v, matrix.v)):
        np.testing.assert_array_equal(side.codes, original.codes[order])
        np.testing.assert_array_equal(side.bits, original.bits[order])
        np.testing.assert_array_equal(side.zero, original.zero[order])
    runs = encoded.record["ranks"]
    assert sum(run["count"] for run in runs) == ranks
    assert all(
        (a["v_bits"], a["u_bits"]) > (b["v_bits"], b["u_bits"]) for a, b in itertools.pairwise(runs)
    )


def test_factors_multiply_to_the_delta() -> None:
    matrix = svd_matrix(6, 20, 30)
    u = matrix.u.codes.astype(float) - matrix.u.zero.astype(float)[:, None]
    v = matrix.v.codes.astype(float) - matrix.v.zero.astype(float)[:, None]
    factors = decode_factors(encode_svd(matrix, "F32", {}))
    assert (factors.u.shape, factors.s.shape, factors.v.shape) == ((20, 6), (6,), (6, 30))
    assert factors.dense().dtype == np.float32
    np.testing.assert_allclose(factors.dense(), (u.T * matrix.s) @ v, rtol=1e-3, atol=0.5)


def test_a_matrix_of_no_ranks_is_no_delta() -> None:
    factors = decode_factors(encode_svd(svd_matrix(0, 3, 4), "F32", {}))
    np.testing.assert_array_equal(factors.dense(), np.zeros((3, 4)))


def sparse_rows(rows: int, columns: int, seed: int, scale: float = 1.0) -> FloatArray:
    rng = np.random.default_rng(seed)
    delta = rng.normal(scale=scale, size=(rows, columns)) * rng.integers(0, 2, (rows, 1))
    return delta.astype(np.float32)


@given(st.integers(0, 6), st.integers(0, 40), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_rows_round_trip(rows: int, columns: int, bits: int, seed: int) -> None:
    delta = sparse_rows(rows, columns, seed)
    encoded = encode_rows(delta, bits, "BF16", {})
    assert_as_expected(encoded)
    decoded = decode_rows(encoded)
    assert decoded.shape == delta.shape
    changed = np.any(delta != 0, axis=1)
    assert encoded.record["changed"] == changed.sum()
    assert ("index" in encoded.segments) == (changed.sum() < rows)
    np.testing.assert_array_equal(decoded[~changed], 0)
    # The grid that spans the largest value is one of those tried: half its step bounds the error.
    half_step = np.abs(delta).max(axis=1, initial=0) / (2**bits - 1)
    error = np.square(decoded - delta).sum(axis=1)
    assert (error <= 1.01 * columns * half_step**2 + 1e-12).all()


def test_no_changed_row_is_no_delta() -> None:
    encoded = encode_rows(np.zeros((5, 7), np.float32), 4, "F32", {})
    np.testing.assert_array_equal(decode_rows(encoded), np.zeros((5, 7)))


@pytest.mark.parametrize("scale", [1e4, 1.0, 1e-3, 1e-5])
def test_rows_lose_the_same_at_every_scale(scale: float) -> None:
    delta = np.random.default_rng(0).normal(scale=scale, size=(50, 64)).astype(np.float32)
    decoded = decode_rows(encode_rows(delta, 4, "BF16", {}))
    assert np.linalg.norm(decoded - delta) / np.linalg.norm(delta) < 0.12


def test_the_grid_is_as_wide_as_half_precision_goes() -> None:
    codes, scale = quantize_midrise(np.array([[1e9, -1e9], [1e-12, 0]], np.float32), 2)
    assert codes.tolist()[0] == [3, 0]
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("dtype", DTYPE_BITS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 1, 2)])
def test_exact_keeps_every_byte(dtype: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    raw = np.arange(count).astype(np.dtype(NUMPY_DTYPES[dtype]))
    encoded = encode_exact(raw, dtype, shape)
    assert_as_expected(encoded)
    assert encoded.nbytes == count * DTYPE_BITS[dtype] // 8
    assert encoded.segments["data"].tobytes() == raw.tobytes()


SVD = {
    "kind": "svd",
    "shape": [4, 6],
    "dtype": "BF16",
    "ranks": [{"count": 2, "v_bits": 8, "u_bits": 3}],
}
ROWS = {"kind": "rows", "shape": [4, 6], "dtype": "BF16", "bits": 4, "changed": 2}
EXACT = {"kind": "exact", "shape": [4, 6], "dtype": "BF16"}
RUN = {"count": 2, "v_bits": 8, "u_bits": 3}
NONSENSE: dict[str, Any] = {
    "null": None,
    "a number": 7,
    "text": "svd",
    "a list": [SVD],
    "empty": {},
    "kind unknown": {**EXACT, "kind": "lut"},
    "kind a list": {**EXACT, "kind": ["exact"]},
    "no shape": {"kind": "exact", "dtype": "BF16"},
    "shape null": {**EXACT, "shape": None},
    "shape text": {**EXACT, "shape": "46"},
    "dimension text": {**ROWS, "shape": ["4", "6"]},
    "dimension fraction": {**EXACT, "shape": [4.0, 6]},
    "dimension true": {**EXACT, "shape": [True, 6]},
    "dimension negative": {**EXACT, "shape": [-4, -6]},
    "dtype unknown": {**EXACT, "dtype": "F24"},
    "dtype a list": {**EXACT, "dtype": ["BF16"]},
    "svd of one dimension": {**SVD, "shape": [24]},
    "svd of three dimensions": {**SVD, "shape": [2, 2, 6]},
    "svd without ranks": {**EXACT, "kind": "svd"},
    "ranks a number": {**SVD, "ranks": 2},
    "ranks of numbers": {**SVD, "ranks": [2]},
    "width 0": {**SVD, "ranks": [{**RUN, "v_bits": 0}]},
    "width 9": {**SVD, "ranks": [{**RUN, "u_bits": 9}]},
    "width text": {**SVD, "ranks": [{**RUN, "u_bits": "8"}]},
    "width missing": {**SVD, "ranks": [{"count": 2, "v_bits": 8}]},
    "count 0": {**SVD, "ranks": [{**RUN, "count": 0}]},
    "count negative": {**SVD, "ranks": [RUN, {**RUN, "count": -1}]},
    "count fraction": {**SVD, "ranks": [{**RUN, "count": 2.5}]},
    "rows of width 0": {**ROWS, "bits": 0},
    "rows of width 16": {**ROWS, "bits": 16},
    "more rows changed than there are": {**ROWS, "changed": 5},
    "rows changed negative": {**ROWS, "changed": -1},
    "rows changed true": {**ROWS, "changed": True},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused(name: str) -> None:
    with pytest.raises(InvalidArtifact):
        expected_segments(NONSENSE[name])


@pytest.mark.parametrize("record", [SVD, ROWS, EXACT], ids=lambda record: record["kind"])
def test_what_the_nonsense_was_made_from_is_accepted(record: dict[str, Any]) -> None:
    assert expected_segments(record)


@given(
    st.sampled_from([SVD, ROWS, EXACT]),
    st.dictionaries(st.sampled_from([*SVD, *ROWS]), JSON | st.lists(st.integers()), max_size=2),
)
def test_any_record_is_refused_or_understood(record: dict[str, Any], changes: Any) -> None:
    try:
        expected = expected_segments({**record, **changes})
    except InvalidArtifact:
        return
    assert all(dtype in DTYPE_BITS and min(shape, default=0) >= 0
               for dtype, shape in expected.values())  # fmt: skip


@pytest.mark.parametrize("index", [[-1, 2], [1, 4], [2, 1], [1, 1], [1, 2**31 - 1]])
def test_rows_outside_the_tensor_are_refused(index: list[int]) -> None:
    delta = np.zeros((4, 6), np.float32)
    delta[[1, 2]] = 1
    encoded = encode_rows(delta, 4, "BF16", {})
    encoded.segments["index"] = np.array(index, np.int32)
    with pytest.raises(InvalidArtifact, match="ascend"):
        decode_rows(encoded)
