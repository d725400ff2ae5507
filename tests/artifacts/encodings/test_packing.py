"""Codes packed into words: the layout that the kernels read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.encodings.packing import PLANES, CodeArray, pack, segment_words, unpack

WIDTHS = range(1, 9)


def codes_of(rows: int, columns: int, bits: int, seed: int) -> CodeArray:
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), np.uint8)


@given(st.integers(0, 7), st.integers(0, 140), st.sampled_from(WIDTHS), st.integers(0, 2**32 - 1))
def test_round_trip(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = codes_of(rows, columns, bits, seed)
    words = pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (segment_words(rows, columns, bits),)
    assert words.nbytes % 128 == 0
    np.testing.assert_array_equal(unpack(words, rows, columns, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 33), (3, 0), (1, 1), (5, 31), (2, 65)])
def test_round_trip_at_the_edges(rows: int, columns: int, bits: int) -> None:
    codes = codes_of(rows, columns, bits, seed=0)
    np.testing.assert_array_equal(unpack(pack(codes, bits), rows, columns, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_32_codes_take_one_word_per_bit(bits: int) -> None:
    assert sum(PLANES[bits]) == bits
    assert segment_words(1, 32 * 32, bits) == 32 * bits


def test_words_of_three_bits_by_hand() -> None:
    codes = np.zeros((2, 33), np.uint8)
    codes[0, :3] = [0b101, 0b010, 0b111]
    codes[0, 32] = 0b110
    codes[1, 15] = 0b101
    # The two high bits of every row come first, 16 codes a word, then the low bit, 32 a word.
    first_high = [0b11_01_10, 0, 0b11]
    second_high = [0b10 << 30, 0, 0]
    first_low = [0b101, 0]
    second_low = [1 << 15, 0]
    expected = [*first_high, *second_high, *first_low, *second_low]
    words = pack(codes, 3)
    assert words[: len(expected)].tolist() == expected
    assert words[len(expected) :].tolist() == [0] * (32 - len(expected))


def test_words_of_seven_bits_by_hand() -> None:
    codes = np.array([[0b1011_01_1, 0b0001_10_0]], np.uint8)
    assert pack(codes, 7)[:3].tolist() == [0b0001_1011, 0b10_01, 0b0_1]


def test_words_of_eight_bits_are_little_endian_bytes() -> None:
    codes = np.arange(7, dtype=np.uint8)[None] + 1
    assert pack(codes, 8).astype("<u4").tobytes()[:8] == bytes([1, 2, 3, 4, 5, 6, 7, 0])
