"""Decompositions: one width per rank and side, on either grid, scaled or not."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.encodings import SvdMatrix, decode_factors, decode_svd, encode_svd
from tests.artifacts.samples import assert_as_expected, assert_decodes, svd_matrix, svd_sample

SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 70))
SEEDS = st.integers(0, 2**32 - 1)


@given(SHAPES, SEEDS)
def test_round_trip(shape: tuple[int, int], seed: int) -> None:
    assert_decodes(svd_sample(shape, np.random.default_rng(seed)))


@given(st.integers(0, 9), SHAPES, st.booleans(), SEEDS)
def test_codes_round_trip(ranks: int, shape: tuple[int, int], midrise: bool, seed: int) -> None:
    matrix = svd_matrix(ranks, *shape, seed, midrise=midrise)
    encoded = encode_svd(matrix, "BF16", {"damping": 0.5})
    assert_as_expected(encoded)
    assert encoded.record["shape"] == list(shape)
    assert encoded.record["damping"] == 0.5
    # Falling width of V, then of U; equal ranks keep their order.
    order = sorted(range(ranks), key=lambda i: (-matrix.v.bits[i], -matrix.u.bits[i]))
    stored = decode_svd(encoded)
    np.testing.assert_allclose(stored.s, matrix.s[order], rtol=1e-3 if midrise else 0, atol=1e-6)
    for side, original in ((stored.u, matrix.u), (stored.v, matrix.v)):
        np.testing.assert_array_equal(side.codes, original.codes[order])
        np.testing.assert_array_equal(side.bits, original.bits[order])
        assert (side.zero is None) == (original.zero is None) == midrise
        if side.zero is not None and original.zero is not None:
            np.testing.assert_array_equal(side.zero, original.zero[order])
    runs = encoded.record["ranks"]
    assert sum(run["count"] for run in runs) == ranks
    assert all(
        (a["v_bits"], a["u_bits"]) > (b["v_bits"], b["u_bits"]) for a, b in itertools.pairwise(runs)
    )


def test_factors_multiply_to_the_delta() -> None:
    matrix = svd_matrix(6, 20, 30)
    assert matrix.u.zero is not None
    assert matrix.v.zero is not None
    u = matrix.u.codes.astype(float) - matrix.u.zero.astype(float)[:, None]
    v = matrix.v.codes.astype(float) - matrix.v.zero.astype(float)[:, None]
    factors = decode_factors(encode_svd(matrix, "F32"))
    assert (factors.u.shape, factors.s.shape, factors.v.shape) == ((20, 6), (6,), (6, 30))
    assert factors.dense().dtype == np.float32
    np.testing.assert_allclose(factors.dense(), (u.T * matrix.s) @ v, rtol=1e-3, atol=0.5)


def test_row_and_column_scales_are_folded_into_the_factors() -> None:
    matrix = svd_matrix(3, 4, 5, midrise=True)
    rows, columns = np.array([1, 2, -0.5, 4]), np.array([1, 0.25, 8, -2, 0])
    plain = decode_factors(encode_svd(matrix, "F32"))
    scaled = decode_factors(encode_svd(matrix, "F32", {}, rows, columns))
    np.testing.assert_array_equal(scaled.u, plain.u * rows[:, None])
    np.testing.assert_array_equal(scaled.s, plain.s)
    np.testing.assert_array_equal(scaled.v, plain.v * columns)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_a_gain_keeps_scales_of_any_size_in_float16(scale: float) -> None:
    matrix = svd_matrix(4, 3, 3, midrise=True)
    s = np.array([1, -0.3, 0.01, 0], np.float32) * np.float32(scale)
    encoded = encode_svd(SvdMatrix(matrix.u, s, matrix.v), "F32")
    assert np.abs(encoded.segments["s"]).max() <= 1
    assert np.log2(encoded.record["gain"]).is_integer()
    stored = sorted(decode_svd(encoded).s)
    np.testing.assert_allclose(stored, sorted(s), rtol=1e-3)


def test_a_midrise_matrix_stores_no_zero_points() -> None:
    matrix = svd_matrix(9, 10, 10, midrise=True)
    assert encode_svd(matrix, "BF16").segments.keys() == {"u", "v", "s"}


def test_a_matrix_of_rank_0_decodes_to_zero() -> None:
    for midrise in (False, True):
        factors = decode_factors(encode_svd(svd_matrix(0, 3, 4, midrise=midrise), "F32", {}))
        np.testing.assert_array_equal(factors.dense(), np.zeros((3, 4)))


def test_invalid_input_is_rejected() -> None:
    zeros, midrise = svd_matrix(3, 4, 5), svd_matrix(3, 4, 5, midrise=True)
    with pytest.raises(ValueError, match="zero points"):
        encode_svd(SvdMatrix(zeros.u, zeros.s, midrise.v), "F32")
    with pytest.raises(ValueError, match="row_scale"):
        encode_svd(midrise, "F32", {}, np.ones(5))
    with pytest.raises(ValueError, match="column_scale"):
        encode_svd(midrise, "F32", {}, None, np.ones((5, 1)))
    for bad in (1e9, np.nan):
        with pytest.raises(ValueError, match="finite"):
            encode_svd(midrise, "F32", {}, np.full(4, bad))
    infinite = SvdMatrix(midrise.u, np.full(3, np.inf, np.float32), midrise.v)
    with pytest.raises(ValueError, match="finite"):
        encode_svd(infinite, "F32")
    midrise.u.codes[0] = 255
    midrise.u.bits[0] = 7
    with pytest.raises(ValueError, match="7 bits"):
        encode_svd(midrise, "F32")
