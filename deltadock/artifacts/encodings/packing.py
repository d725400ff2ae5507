"""Pack codes of 1 to 8 bits into 32-bit words, in the layout that the GPU kernels read.

A width is split into power-of-two planes, most significant first (3 = 2+1, 5 = 4+1, 6 = 4+2,
7 = 4+2+1), so that no code straddles a word and 32 codes of `b` bits are exactly `b` words. Within
a word, element `e` of a plane of `p` bits starts at bit `p * (e mod 32/p)`.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

PLANES: Final[dict[int, tuple[int, ...]]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}

ALIGNMENT_WORDS: Final = 32
"""Segments are aligned to 128 bytes."""

CodeArray = npt.NDArray[np.uint8]
WordArray = npt.NDArray[np.uint32]


def plane_words(columns: int, plane: int) -> int:
    """Words per row of `columns` codes in a plane of `plane` bits."""
    return -(-columns * plane // 32)


def segment_words(rows: int, columns: int, bits: int) -> int:
    """Words of a (rows, columns) segment of one width, padded to 128 bytes."""
    words = sum(rows * plane_words(columns, plane) for plane in PLANES[bits])
    return -(-words // ALIGNMENT_WORDS) * ALIGNMENT_WORDS


def _pack_plane(values: WordArray, plane: int) -> WordArray:
    rows, columns = values.shape
    words, per_word = plane_words(columns, plane), 32 // plane
    padded = np.zeros((rows, words * per_word), np.uint32)
    padded[:, :columns] = values
    shifts = (np.arange(per_word, dtype=np.uint32) * plane).astype(np.uint32)
    lanes = padded.reshape(rows, words, per_word) << shifts
    packed: WordArray = np.bitwise_or.reduce(lanes, axis=2)
    return packed


def _unpack_plane(words: WordArray, columns: int, plane: int) -> CodeArray:
    per_word = 32 // plane
    shifts = (np.arange(per_word, dtype=np.uint32) * plane).astype(np.uint32)
    lanes = (words[:, :, None] >> shifts) & np.uint32(2**plane - 1)
    rows, words_per_row = words.shape
    return lanes.reshape(rows, words_per_row * per_word)[:, :columns].astype(np.uint8)


def pack(codes: CodeArray, bits: int) -> WordArray:
    """Pack (rows, columns) codes of one width into a segment of `segment_words` words.

    Raises:
        ValueError: a code exceeds the width.
    """
    rows, columns = codes.shape
    if codes.max(initial=0) >> bits:
        raise ValueError(f"A code does not fit {bits} bits.")
    segment = np.zeros(segment_words(rows, columns, bits), np.uint32)
    position, shift = 0, bits
    for plane in PLANES[bits]:
        shift -= plane
        values = (codes.astype(np.uint32) >> np.uint32(shift)) & np.uint32(2**plane - 1)
        size = rows * plane_words(columns, plane)
        segment[position : position + size] = _pack_plane(values, plane).ravel()
        position += size
    return segment


def unpack(segment: WordArray, rows: int, columns: int, bits: int) -> CodeArray:
    """Unpack a segment into (rows, columns) codes."""
    codes = np.zeros((rows, columns), np.uint8)
    position, shift = 0, bits
    for plane in PLANES[bits]:
        shift -= plane
        words = plane_words(columns, plane)
        block = segment[position : position + rows * words].reshape(rows, words)
        codes |= _unpack_plane(block, columns, plane) << np.uint8(shift)
        position += rows * words
    return codes
