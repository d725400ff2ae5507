"""Sparse deltas with low-bit codes: value = scale * (code - (2**bits - 1) / 2) where kept, else 0.

    sparse24    2 of every 4 columns are kept, their positions stored in 2 bits each
    sparse      any entries are kept, marked in a bitmap

Scales are float16 times a gain, one for each row and group of `group` columns.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.kinds.record import (
    Details,
    Encoded,
    Expected,
    FloatArray,
    Record,
    count_of,
    half,
    make_record,
    matrix_shape,
    number_of,
    power_of_two,
    unhalf,
    width_of,
)
from deltadock.artifacts.packing import CodeArray, WordArray, pack, segment_words, unpack
from deltadock.errors import InvalidArtifact

BoolArray = npt.NDArray[np.bool_]


def encode_sparse24(
    codes: CodeArray,
    mask: BoolArray,
    scale: npt.NDArray[Any],
    bits: int,
    group: int,
    dtype: str,
    details: Details | None = None,
) -> Encoded:
    """Encode a 2:4 sparse matrix.

    Args:
        codes: (rows, columns) uint8; only those where `mask` is true matter.
        mask: (rows, columns); exactly two are true in every four columns from a multiple of
            four on, at most two in the last columns where they are fewer than four.
        scale: (rows, ceil(columns / group)), stored as float16.
        bits: width of the codes, 1 to 8.
        group: columns that share a scale in a row.
        dtype: the fine-tuned tensor's dtype.
        details: further keys of the record.

    Raises:
        ValueError: the mask is not 2:4, or the sizes do not agree.
    """
    rows, columns = codes.shape
    quads = -(-columns // 4)
    kept = np.zeros((rows, 4 * quads), np.bool_)
    kept[:, :columns] = mask
    for column in range(4 * quads - 1, columns - 1, -1):  # what fills the last four up to two
        kept[:, column] = kept[:, -4:].sum(axis=1) < 2
    if (kept.reshape(rows, quads, 4).sum(axis=2) != 2).any():
        raise ValueError("A 2:4 mask keeps two of every four columns.")
    padded = np.zeros((rows, 4 * quads), np.uint8)
    padded[:, :columns] = codes
    positions = (np.nonzero(kept)[1] % 4).astype(np.uint8)
    segments: dict[str, npt.NDArray[Any]] = {
        "positions": pack(positions.reshape(rows, 2 * quads), 2),
        "codes": pack(padded[kept].reshape(rows, 2 * quads), bits),
    }
    gain = _add_scale(segments, scale, (rows, columns), group)
    record = make_record(
        "sparse24", (rows, columns), dtype, details, bits=bits, group=group, gain=gain
    )
    return Encoded(record, segments)


def encode_sparse(
    codes: CodeArray,
    mask: BoolArray,
    scale: npt.NDArray[Any],
    bits: int,
    group: int,
    dtype: str,
    details: Details | None = None,
) -> Encoded:
    """Encode an unstructured sparse matrix; arguments as for `encode_sparse24`, with any mask."""
    segments: dict[str, npt.NDArray[Any]] = {
        "bitmap": pack(mask.astype(np.uint8), 1),
        "codes": pack(codes[mask][None], bits),
    }
    gain = _add_scale(segments, scale, codes.shape, group)
    record = make_record(
        "sparse",
        codes.shape,
        dtype,
        details,
        bits=bits,
        group=group,
        gain=gain,
        kept=int(np.count_nonzero(mask)),
    )
    return Encoded(record, segments)


def _add_scale(
    segments: dict[str, npt.NDArray[Any]],
    scale: npt.NDArray[Any],
    shape: tuple[int, ...],
    group: int,
) -> float:
    if scale.shape != (shape[0], -(-shape[1] // group)):
        raise ValueError("A sparse matrix needs a scale for each row and group of columns.")
    gain = power_of_two(scale)
    segments["scale"] = half(scale, gain)
    return gain


def _scaled(encoded: Encoded, centred: FloatArray) -> FloatArray:
    """(rows, columns) values times their scales, in place."""
    columns = centred.shape[1]
    scale = unhalf(encoded.segments["scale"], encoded.record["gain"])
    centred *= scale[:, np.arange(columns) // encoded.record["group"]]
    return centred


def _centred(codes: CodeArray, bits: int) -> FloatArray:
    values: FloatArray = codes.astype(np.float32) - np.float32((2**bits - 1) / 2)
    return values


def decode_sparse24(encoded: Encoded) -> FloatArray:
    """The delta (rows, columns) float32.

    Raises:
        InvalidArtifact: the two positions of four columns do not ascend.
    """
    rows, columns = encoded.record["shape"]
    quads, bits = -(-columns // 4), encoded.record["bits"]
    words: WordArray = encoded.segments["positions"].view(np.uint32)
    positions = unpack(words, rows, 2 * quads, 2).reshape(rows, quads, 2)
    if (positions[:, :, 0] >= positions[:, :, 1]).any():
        raise InvalidArtifact("The kept positions of a 2:4 sparse tensor do not ascend.")
    words = encoded.segments["codes"].view(np.uint32)
    values = _centred(unpack(words, rows, 2 * quads, bits), bits).reshape(rows, quads, 2)
    delta = np.zeros((rows, quads, 4), np.float32)
    np.put_along_axis(delta, positions.astype(np.int64), values, axis=2)
    return _scaled(encoded, np.ascontiguousarray(delta.reshape(rows, 4 * quads)[:, :columns]))


def decode_sparse(encoded: Encoded) -> FloatArray:
    """The delta (rows, columns) float32.

    Raises:
        InvalidArtifact: the bitmap marks more or fewer entries than there are codes.
    """
    rows, columns = encoded.record["shape"]
    kept, bits = encoded.record["kept"], encoded.record["bits"]
    words: WordArray = encoded.segments["bitmap"].view(np.uint32)
    mask = unpack(words, rows, columns, 1).astype(np.bool_)
    if np.count_nonzero(mask) != kept:
        raise InvalidArtifact("A sparse tensor's bitmap does not mark as many entries as it has.")
    words = encoded.segments["codes"].view(np.uint32)
    delta = np.zeros((rows, columns), np.float32)
    delta[mask] = _centred(unpack(words, 1, kept, bits), bits)[0]
    return _scaled(encoded, delta)


def _expected(record: Record) -> tuple[int, int, int, Expected]:
    rows, columns = matrix_shape(record)
    group = count_of(record["group"])
    number_of(record["gain"])
    if group < 1:
        raise InvalidArtifact("A record has groups of no columns.")
    scale: Expected = {"scale": ("F16", (rows, -(-columns // group)))}
    return rows, columns, width_of(record["bits"]), scale


def expected_sparse24(record: Record) -> Expected:
    """The segments that a record implies."""
    rows, columns, bits, scale = _expected(record)
    kept = 2 * -(-columns // 4)
    return {
        "positions": ("U32", (segment_words(rows, kept, 2),)),
        "codes": ("U32", (segment_words(rows, kept, bits),)),
        **scale,
    }


def expected_sparse(record: Record) -> Expected:
    """The segments that a record implies."""
    rows, columns, bits, scale = _expected(record)
    kept = count_of(record["kept"])
    if kept > rows * columns:
        raise InvalidArtifact("A sparse record keeps more entries than there are.")
    return {
        "bitmap": ("U32", (segment_words(rows, columns, 1),)),
        "codes": ("U32", (segment_words(1, kept, bits),)),
        **scale,
    }
