"""Quantized sparse deltas: value = scale * (code - (2**bits - 1) / 2) where kept, else 0.

    sparse24    2 of every 4 columns are kept, each position stored in 2 bits
    sparse      arbitrary entries are kept, marked in a bitmap

Scales are float16 times a gain, one per row and group of `group` columns.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.encodings.packing import CodeArray, WordArray, pack, segment_words, unpack
from deltadock.artifacts.encodings.record import (
    Details,
    Encoded,
    FloatArray,
    Record,
    SegmentSpecs,
    count_of,
    decode_float16,
    encode_float16,
    make_record,
    matrix_shape,
    number_of,
    power_of_two,
    width_of,
)
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
        codes: (rows, columns) uint8, ignored where `mask` is false.
        mask: (rows, columns); exactly two of every aligned four columns are true, at most two of
            an incomplete last group.
        scale: (rows, ceil(columns / group)), stored as float16.
        bits: bit width of the codes, 1 to 8.
        group: columns per scale.
        dtype: the fine-tuned tensor's safetensors dtype.
        details: additional keys of the record.

    Raises:
        ValueError: the mask is not 2:4, or sizes disagree.
    """
    rows, columns = codes.shape
    quads = -(-columns // 4)
    kept = np.zeros((rows, 4 * quads), np.bool_)
    kept[:, :columns] = mask
    for column in range(4 * quads - 1, columns - 1, -1):  # pad the last group to two
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
    """Encode an unstructured sparse matrix; like `encode_sparse24`, with an arbitrary mask."""
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
    segments["scale"] = encode_float16(scale, gain)
    return gain


def _apply_scale(encoded: Encoded, values: FloatArray) -> FloatArray:
    """Multiply (rows, columns) values by their scales, in place."""
    columns = values.shape[1]
    scale = decode_float16(encoded.segments["scale"], encoded.record["gain"])
    values *= scale[:, np.arange(columns) // encoded.record["group"]]
    return values


def _dequantize(codes: CodeArray, bits: int) -> FloatArray:
    values: FloatArray = codes.astype(np.float32) - np.float32((2**bits - 1) / 2)
    return values


def decode_sparse24(encoded: Encoded) -> FloatArray:
    """Decode the delta, (rows, columns) float32.

    Raises:
        InvalidArtifact: the two positions in a group of four are not ascending.
    """
    rows, columns = encoded.record["shape"]
    quads, bits = -(-columns // 4), encoded.record["bits"]
    words: WordArray = encoded.segments["positions"].view(np.uint32)
    positions = unpack(words, rows, 2 * quads, 2).reshape(rows, quads, 2)
    if (positions[:, :, 0] >= positions[:, :, 1]).any():
        raise InvalidArtifact("The kept positions of a 2:4 sparse tensor do not ascend.")
    words = encoded.segments["codes"].view(np.uint32)
    values = _dequantize(unpack(words, rows, 2 * quads, bits), bits).reshape(rows, quads, 2)
    delta = np.zeros((rows, quads, 4), np.float32)
    np.put_along_axis(delta, positions.astype(np.int64), values, axis=2)
    return _apply_scale(encoded, np.ascontiguousarray(delta.reshape(rows, 4 * quads)[:, :columns]))


def decode_sparse(encoded: Encoded) -> FloatArray:
    """Decode the delta, (rows, columns) float32.

    Raises:
        InvalidArtifact: the bitmap does not mark exactly as many entries as there are codes.
    """
    rows, columns = encoded.record["shape"]
    kept, bits = encoded.record["kept"], encoded.record["bits"]
    words: WordArray = encoded.segments["bitmap"].view(np.uint32)
    mask = unpack(words, rows, columns, 1).astype(np.bool_)
    if np.count_nonzero(mask) != kept:
        raise InvalidArtifact("A sparse tensor's bitmap does not mark as many entries as it has.")
    words = encoded.segments["codes"].view(np.uint32)
    delta = np.zeros((rows, columns), np.float32)
    delta[mask] = _dequantize(unpack(words, 1, kept, bits), bits)[0]
    return _apply_scale(encoded, delta)


def _common_specs(record: Record) -> tuple[int, int, int, SegmentSpecs]:
    rows, columns = matrix_shape(record)
    group = count_of(record["group"])
    number_of(record["gain"])
    if group < 1:
        raise InvalidArtifact("A record has groups of no columns.")
    scale: SegmentSpecs = {"scale": ("F16", (rows, -(-columns // group)))}
    return rows, columns, width_of(record["bits"]), scale


def segment_specs24(record: Record) -> SegmentSpecs:
    """The segments that a record implies, after validating it."""
    rows, columns, bits, scale = _common_specs(record)
    kept = 2 * -(-columns // 4)
    return {
        "positions": ("U32", (segment_words(rows, kept, 2),)),
        "codes": ("U32", (segment_words(rows, kept, bits),)),
        **scale,
    }


def segment_specs(record: Record) -> SegmentSpecs:
    """The segments that a record implies, after validating it."""
    rows, columns, bits, scale = _common_specs(record)
    kept = count_of(record["kept"])
    if kept > rows * columns:
        raise InvalidArtifact("A sparse record keeps more entries than there are.")
    return {
        "bitmap": ("U32", (segment_words(rows, columns, 1),)),
        "codes": ("U32", (segment_words(1, kept, bits),)),
        **scale,
    }
