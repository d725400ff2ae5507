"""Quantized rows, one width per row, and the quantizer of embeddings."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.encodings import (
    decode_rows,
    encode_rows,
    quantize_midrise,
    quantize_rows_midrise,
)
from deltadock.errors import InvalidArtifact
from tests.artifacts.samples import (
    assert_as_expected,
    assert_decodes,
    draw_codes,
    read_back,
    rows_sample,
    sparse_rows,
)

SEEDS = st.integers(0, 2**32 - 1)


@given(st.tuples(st.integers(0, 20), st.integers(0, 40)), SEEDS)
def test_round_trip(shape: tuple[int, int], seed: int) -> None:
    assert_decodes(rows_sample(shape, np.random.default_rng(seed)))


def test_rows_are_sorted_by_descending_width() -> None:
    bits = np.array([2, 0, 8, 2, 3])
    encoded = encode_rows(
        draw_codes(np.random.default_rng(0), bits, (5, 7)), bits, np.arange(1.0, 6), "F32"
    )
    assert encoded.record["runs"] == [
        {"count": 1, "bits": 8},
        {"count": 1, "bits": 3},
        {"count": 2, "bits": 2},
    ]
    assert encoded.segments["index"].tolist() == [2, 4, 0, 3]
    scale = encoded.segments["scale"].astype(float) * encoded.record["gain"]
    assert scale.tolist() == [3, 5, 1, 4]


def test_the_identity_order_is_not_stored() -> None:
    for bits in ([3, 3, 3], [8, 2, 1]):
        encoded = encode_rows(np.zeros((3, 4), np.uint8), np.array(bits), np.ones(1), "F32")
        assert encoded.segments.keys() == {"codes", "scale"}
    # Neither of these is: one leaves a row out, the other does not begin with the widest.
    for bits in ([3, 3, 0], [2, 8, 1]):
        encoded = encode_rows(np.zeros((3, 4), np.uint8), np.array(bits), np.ones(1), "F32")
        assert "index" in encoded.segments


def test_a_shared_scale_is_float32() -> None:
    scale = np.array([1 / 3], np.float32)
    encoded = encode_rows(np.ones((2, 3), np.uint8), np.array([1, 1]), scale, "F32")
    assert encoded.segments["scale"].tolist() == scale.tolist()
    np.testing.assert_array_equal(decode_rows(encoded), np.full((2, 3), scale / 2))


def test_invalid_input_is_rejected() -> None:
    codes, ones = np.zeros((3, 4), np.uint8), np.ones(3)
    wrong: list[tuple[str, Any, Any, Any]] = [
        ("one width each", np.ones(2, int), ones, None),
        ("one scale each", np.ones(3, int), np.ones(2), None),
        ("0 to 8", np.array([1, 9, 1]), ones, None),
        ("0 to 8", np.array([1, -1, 1]), ones, None),
        ("finite", np.ones(3, int), np.array([1, np.nan, 1]), None),
        ("finite", np.ones(3, int), np.array([np.inf]), None),
        ("column_scale", np.ones(3, int), ones, np.ones(3)),
        ("finite", np.ones(3, int), ones, np.full(4, 1e9)),
    ]
    for message, bits, scale, column_scale in wrong:
        with pytest.raises(ValueError, match=message):
            encode_rows(codes, bits, scale, "F32", {}, column_scale)
    with pytest.raises(ValueError, match="1 bits"):
        encode_rows(codes + np.uint8(2), np.ones(3, int), ones, "F32")


@given(st.integers(0, 6), st.integers(0, 40), st.integers(1, 8), SEEDS)
def test_quantized_rows_round_trip(rows: int, columns: int, bits: int, seed: int) -> None:
    delta = sparse_rows(rows, columns, seed)
    encoded = quantize_rows_midrise(delta, bits, "BF16")
    assert_as_expected(encoded)
    decoded = read_back(encoded)
    changed = np.any(delta != 0, axis=1)
    assert sum(run["count"] for run in encoded.record["runs"]) == changed.sum()
    assert ("index" in encoded.segments) == (changed.sum() < rows)
    np.testing.assert_array_equal(decoded[~changed], 0)
    # The grid that spans the largest value is one of those tried: half its step bounds the error.
    half_step = np.abs(delta).max(axis=1, initial=0) / (2**bits - 1)
    error = np.square(decoded - delta).sum(axis=1)
    assert (error <= 1.01 * columns * half_step**2 + 1e-12).all()


def test_unchanged_rows_decode_to_zero() -> None:
    encoded = quantize_rows_midrise(np.zeros((5, 7), np.float32), 4, "F32")
    np.testing.assert_array_equal(decode_rows(encoded), np.zeros((5, 7)))


@pytest.mark.parametrize("scale", [1e12, 1.0, 1e-3, 1e-5, 1e-12])
def test_the_relative_error_does_not_depend_on_scale(scale: float) -> None:
    delta = np.random.default_rng(0).normal(scale=scale, size=(50, 64)).astype(np.float32)
    decoded = decode_rows(quantize_rows_midrise(delta, 4, "BF16"))
    assert np.linalg.norm(decoded - delta) / np.linalg.norm(delta) < 0.12


def test_rows_of_very_different_magnitudes_have_finite_scales() -> None:
    values = np.array([[1e9, -1e9], [1e-12, 0], [1e-45, 0]], np.float32)
    codes, scale = quantize_midrise(values, 2)
    assert codes.tolist()[0] == [3, 0]
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("index", [[-1, 2], [1, 4], [1, 1], [1, 2**31 - 1]])
def test_rows_outside_the_tensor_are_rejected(index: list[int]) -> None:
    delta = np.zeros((4, 6), np.float32)
    delta[[1, 2]] = 1
    encoded = quantize_rows_midrise(delta, 4, "BF16")
    encoded.segments["index"] = np.array(index, np.int32)
    with pytest.raises(InvalidArtifact, match="distinct"):
        decode_rows(encoded)
