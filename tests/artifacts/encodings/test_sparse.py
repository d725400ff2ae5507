"""Sparse codes, 2:4 and unstructured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.encodings import Encoded, decode_dense, encode_sparse, encode_sparse24
from deltadock.artifacts.encodings.packing import pack
from deltadock.errors import InvalidArtifact
from tests.artifacts.samples import assert_decodes, sparse_sample


@given(st.tuples(st.integers(0, 20), st.integers(0, 50)), st.integers(0, 2**32 - 1))
def test_round_trip(shape: tuple[int, int], seed: int) -> None:
    assert_decodes(sparse_sample(shape, np.random.default_rng(seed)))


def sparse24(columns: int = 8) -> Encoded:
    mask = np.zeros((3, columns), np.bool_)
    mask[:, [0, 2, 5, 6]] = True
    scale = np.ones((3, 2))
    return encode_sparse24(np.ones((3, columns), np.uint8), mask, scale, 2, 4, "BF16")


def test_a_2_4_pattern_has_the_expected_size() -> None:
    rng = np.random.default_rng(0)
    mask = np.tile([True, False, False, True], (64, 64))
    codes = rng.integers(0, 16, (64, 256)).astype(np.uint8)
    encoded = encode_sparse24(codes, mask, np.ones((64, 2)), 4, 128, "BF16")
    weights = 64 * 256
    assert encoded.nbytes == (weights // 2 * (4 + 2)) // 8 + 64 * 2 * 2


@pytest.mark.parametrize("kept", [[0], [0, 1, 2], [0, 1, 2, 3], []])
def test_another_pattern_is_rejected(kept: list[int]) -> None:
    mask = np.zeros((3, 8), np.bool_)
    mask[:, [4, 5]] = mask[:, [0, 1]] = True
    mask[2, :4] = False
    mask[2, kept] = True
    with pytest.raises(ValueError, match="two of every four"):
        encode_sparse24(np.zeros((3, 8), np.uint8), mask, np.ones((3, 2)), 2, 4, "BF16")


def test_scales_of_another_size_are_rejected() -> None:
    codes, mask = np.zeros((3, 8), np.uint8), np.ones((3, 8), np.bool_)
    with pytest.raises(ValueError, match="scale for each"):
        encode_sparse(codes, mask, np.ones((3, 1)), 2, 4, "BF16")


@pytest.mark.parametrize("pair", [[0, 0], [3, 1]])
def test_positions_that_do_not_ascend_are_rejected(pair: list[int]) -> None:
    encoded = sparse24()
    positions = np.array([[0, 1, *pair]] * 3, np.uint8)
    encoded.segments["positions"] = pack(positions, 2)
    with pytest.raises(InvalidArtifact, match="ascend"):
        decode_dense(encoded)


def test_a_bitmap_of_another_count_is_rejected() -> None:
    codes, mask = np.zeros((3, 8), np.uint8), np.ones((3, 8), np.bool_)
    encoded = encode_sparse(codes, mask, np.ones((3, 2)), 2, 4, "BF16")
    mask[0, 0] = False
    encoded.segments["bitmap"] = pack(mask.astype(np.uint8), 1)
    with pytest.raises(InvalidArtifact, match="bitmap"):
        decode_dense(encoded)
