"""Pack codes of 1 to 8 bits into 32-bit words, in the layout that the GPU kernels read.

A width is split into power-of-two planes, most significant first (3 = 2+1, 5 = 4+1, 6 = 4+2,
7 = 4+2+1), so that no code straddles a word and 32 codes of `b` bits are exactly `b` words. Within
a word, element `e` of a plane of `p` bits starts at bit `p * (e mod 32/p)`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

PIECE: Final = 1 << 18
"""Codes that a thread takes at a time; its intermediate arrays stay in the cache."""

CodeArray = npt.NDArray[np.uint8]
WordArray = npt.NDArray[np.uint32]


def plane_words(columns: int, plane: int) -> int:
    """Words per row of `columns` codes in a plane of `plane` bits."""
    return -(-columns * plane // 32)


def segment_words(rows: int, columns: int, bits: int) -> int:
    """Words of a (rows, columns) segment of one width, padded to 128 bytes."""
    words = sum(rows * plane_words(columns, plane) for plane in PLANES[bits])
    return -(-words // ALIGNMENT_WORDS) * ALIGNMENT_WORDS


def in_pieces(work: Callable[[slice], None], rows: int, columns: int) -> None:
    """Call `work` for slices of the rows of (rows, columns), in threads if there are several."""
    if rows * columns <= PIECE:
        work(slice(0, rows))
        return
    step = max(1, PIECE // columns)
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(work, (slice(row, row + step) for row in range(0, rows, step))):
            pass


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
    planes = list(_planes(segment, rows, columns, bits))

    def pack_rows(of: slice) -> None:
        for words, plane, shift in planes:
            values = (codes[of].astype(np.uint32) >> np.uint32(shift)) & np.uint32(2**plane - 1)
            words[of] = _pack_plane(values, plane)

    in_pieces(pack_rows, rows, columns)
    return segment


def unpack(segment: WordArray, rows: int, columns: int, bits: int) -> CodeArray:
    """Unpack a segment into (rows, columns) codes."""
    codes = np.zeros((rows, columns), np.uint8)
    planes = list(_planes(segment, rows, columns, bits))

    def unpack_rows(of: slice) -> None:
        for words, plane, shift in planes:
            codes[of] |= _unpack_plane(words[of], columns, plane) << np.uint8(shift)

    in_pieces(unpack_rows, rows, columns)
    return codes


def _planes(
    segment: WordArray, rows: int, columns: int, bits: int
) -> Iterator[tuple[WordArray, int, int]]:
    """Each plane of a segment: its words (rows, words of a row), bits, and lowest bit of a code."""
    position, shift = 0, bits
    for plane in PLANES[bits]:
        shift -= plane
        words = plane_words(columns, plane)
        yield segment[position : position + rows * words].reshape(rows, words), plane, shift
        position += rows * words
