"""Composed encodings."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.encodings import (
    Encoded,
    decode_dense,
    deflate,
    encode_alias,
    encode_exact,
    encode_new_rows,
    encode_rows,
    encode_stack,
    encode_sum,
    encode_transposed,
    expected_segments,
    parts,
)
from deltadock.errors import InvalidArtifact
from tests.artifacts.samples import LEAVES, Sample, assert_as_expected, assert_decodes


def leaf(shape: tuple[int, int], rng: np.random.Generator) -> Sample:
    kinds: list[Callable[[tuple[int, int], np.random.Generator], Sample]] = LEAVES
    return kinds[rng.integers(len(kinds))](shape, rng)


def matrix(shape: tuple[int, int], rng: np.random.Generator, depth: int = 3) -> Sample:
    """A matrix of any kind, composed at most to this depth, each part perhaps deflated."""
    choice = rng.integers(4) if depth > 1 else 3
    if choice == 0:
        found = [matrix(shape, rng, depth - 1) for _ in range(rng.integers(1, 4))]
        sample = Sample(
            encode_sum([part.encoded for part in found]), sum(part.delta for part in found)
        )
    elif choice == 1:
        part = matrix(shape[::-1], rng, depth - 1)
        sample = Sample(encode_transposed(part.encoded), part.delta.T)
    else:
        sample = leaf(shape, rng)
    if rng.integers(3) == 0 and choice > 1:
        sample = Sample(deflate(sample.encoded), sample.delta)
    return sample


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
SEEDS = st.integers(0, 2**32 - 1)


@given(SHAPES, SEEDS)
def test_round_trip(shape: tuple[int, int], seed: int) -> None:
    assert_decodes(matrix(shape, np.random.default_rng(seed)))


@given(st.integers(1, 5), SHAPES, SEEDS)
def test_a_stack_is_its_parts(count: int, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = [matrix(shape, rng) if rng.integers(4) else None for _ in range(count)]
    found.append(matrix(shape, rng))
    delta = np.stack([np.zeros(shape) if part is None else part.delta for part in found])
    encoded = encode_stack([None if part is None else part.encoded for part in found])
    assert encoded.record["shape"] == [count + 1, *shape]
    assert_decodes(Sample(encoded, delta))
    for sample, part in zip(found, parts(encoded), strict=True):
        assert (sample is None) == (part is None)
        if sample is not None and part is not None:
            np.testing.assert_array_equal(decode_dense(part), decode_dense(sample.encoded))


def small(rows: int = 3, columns: int = 4) -> Encoded:
    codes = np.ones((rows, columns), np.uint8)
    return encode_rows(codes, np.ones(rows, np.int64), np.ones(1), "F32")


@pytest.mark.parametrize("part", [None, small()])
def test_new_rows_have_no_delta(part: Encoded | None) -> None:
    added = np.arange(8, dtype=np.float32).reshape(2, 4)
    encoded = encode_new_rows(part, added, 3, "F32")
    assert_as_expected(encoded)
    assert encoded.record["shape"] == [5, 4]
    with pytest.raises(InvalidArtifact, match="merge it"):
        decode_dense(encoded)


def test_encodings_without_a_delta_cannot_be_parts() -> None:
    exact = encode_exact(np.zeros((3, 4), np.float32), "F32", (3, 4))
    alias = encode_alias("other", (3, 4), "F32")
    grown = encode_new_rows(None, np.zeros((1, 4), np.float32), 2, "F32")
    for part in (exact, alias, grown):
        assert_as_expected(part)
        for whole in (encode_sum([part]), encode_stack([part]), encode_transposed(part)):
            with pytest.raises(InvalidArtifact, match="part of kind"):
                expected_segments(whole.record)
        with pytest.raises(InvalidArtifact, match="has no delta"):
            decode_dense(part)


def test_nesting_is_bounded() -> None:
    encoded = small()
    for _ in range(3):
        encoded = encode_transposed(encoded)
    assert_as_expected(encoded)
    with pytest.raises(InvalidArtifact, match="deeply"):
        expected_segments(encode_transposed(encoded).record)
    record = encoded.record
    for _ in range(100_000):
        record = {**record, "shape": record["shape"][::-1], "parts": [record]}
    with pytest.raises(InvalidArtifact, match="deeply"):
        expected_segments(record)


def test_parts_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(ValueError, match="one shape"):
        encode_sum([small(), small(4, 3)])
    with pytest.raises(ValueError, match="1 to 8"):
        encode_sum([])
    with pytest.raises(ValueError, match="1 to 8"):
        encode_sum([small()] * 9)
    with pytest.raises(ValueError, match="at least one"):
        encode_stack([None, None])
    with pytest.raises(ValueError, match="one shape"):
        encode_stack([small(), small(4, 3)])
    with pytest.raises(ValueError, match="base's shape"):
        encode_new_rows(small(), np.zeros((1, 4), np.float32), 4, "F32")
