"""`svd`: delta = diag(row_scale) U_hat diag(s) V_hat diag(column_scale), one width per rank.

On the `zeros` grid each vector has a zero point and `s` is float32. On the `midrise` grid codes are
symmetric, no zero points are stored, and `s` is float16 times a gain.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.encodings.packing import CodeArray, WordArray, pack, segment_words, unpack
from deltadock.artifacts.encodings.record import (
    DecodedFactors,
    Details,
    Encoded,
    FloatArray,
    Record,
    SegmentSpecs,
    check_rank,
    count_of,
    decode_float16,
    encode_float16,
    flag_of,
    make_record,
    matrix_shape,
    number_of,
    power_of_two,
    width_of,
)
from deltadock.errors import InvalidArtifact


@dataclass(frozen=True, slots=True)
class Vectors:
    """r quantized singular vectors of length n, U or V, one per row.

    Attributes:
        codes: (r, n) uint8.
        bits: (r,) bit widths, 1 to 8.
        zero: (r,) float16 zero points, `value = code - zero`; None: the mid-rise grid,
            `value = code - (2**bits - 1) / 2`.
    """

    codes: CodeArray
    bits: npt.NDArray[np.int64]
    zero: npt.NDArray[np.float16] | None

    def decode(self) -> FloatArray:
        """Dequantize to (r, n) float32."""
        zero = (2.0**self.bits - 1) / 2 if self.zero is None else self.zero
        values: FloatArray = self.codes.astype(np.float32) - zero.astype(np.float32)[:, None]
        return values


@dataclass(frozen=True, slots=True)
class SvdMatrix:
    """A quantized decomposition: U transposed to (r, h_out), s (r,) float32, V (r, h_in).

    `s` is the singular value times the quantization steps of both sides.
    """

    u: Vectors
    s: FloatArray
    v: Vectors


def _groups(matrix: SvdMatrix) -> list[tuple[int, int, int, int]]:
    """Consecutive ranks of equal widths, `(begin, end, v_bits, u_bits)`."""
    pairs = list(zip(matrix.v.bits.tolist(), matrix.u.bits.tolist(), strict=True))
    edges = [i for i in range(len(pairs)) if i == 0 or pairs[i] != pairs[i - 1]] + [len(pairs)]
    return [(begin, end, *pairs[begin]) for begin, end in pairwise(edges)]


def _reorder(side: Vectors, order: npt.NDArray[np.int64]) -> Vectors:
    zero = None if side.zero is None else side.zero[order]
    return Vectors(side.codes[order], side.bits[order], zero)


def encode_svd(
    matrix: SvdMatrix,
    dtype: str,
    details: Details | None = None,
    row_scale: npt.NDArray[Any] | None = None,
    column_scale: npt.NDArray[Any] | None = None,
) -> Encoded:
    """Encode a decomposition, ranks sorted by descending width (stable).

    Args:
        matrix: the codes; either both sides have zero points or neither has.
        dtype: the fine-tuned tensor's safetensors dtype.
        details: additional keys of the record.
        row_scale: (h_out,) scales of the delta's rows, stored as float16.
        column_scale: (h_in,) scales of its columns, stored as float16.

    Raises:
        ValueError: only one side has zero points, or a scale has the wrong size or is not finite.
    """
    if (matrix.u.zero is None) != (matrix.v.zero is None):
        raise ValueError("Both sides of a decomposition need zero points, or neither.")
    order = np.lexsort((-matrix.u.bits, -matrix.v.bits))
    matrix = SvdMatrix(_reorder(matrix.u, order), matrix.s[order], _reorder(matrix.v, order))
    groups = _groups(matrix)
    shape = (matrix.u.codes.shape[1], matrix.v.codes.shape[1])
    fields: dict[str, Any] = {
        "ranks": [{"count": end - begin, "v_bits": v, "u_bits": u} for begin, end, v, u in groups]
    }
    segments: dict[str, npt.NDArray[Any]] = {}
    for side, vectors, column in (("v", matrix.v, 2), ("u", matrix.u, 3)):
        packed = [pack(vectors.codes[run[0] : run[1]], run[column]) for run in groups]
        segments[side] = np.concatenate(packed) if packed else np.zeros(0, np.uint32)
        if vectors.zero is not None:
            segments[f"{side}.zero"] = np.ascontiguousarray(vectors.zero)
    if matrix.u.zero is None:
        fields["grid"], fields["gain"] = "midrise", power_of_two(matrix.s)
        segments["s"] = encode_float16(matrix.s, fields["gain"])
    else:
        fields["grid"] = "zeros"
        segments["s"] = np.ascontiguousarray(matrix.s, np.float32)
    for key, scale, size in (("row_scale", row_scale, 0), ("column_scale", column_scale, 1)):
        if scale is not None:
            if scale.shape != (shape[size],):
                raise ValueError(f"The {key} needs one number for each of {shape[size]}.")
            fields[key], segments[key] = True, encode_float16(scale)
    return Encoded(make_record("svd", shape, dtype, details, **fields), segments)


def _decode_side(encoded: Encoded, side: str, columns: int, total: int) -> Vectors:
    words: WordArray = encoded.segments[side].view(np.uint32)
    codes = np.zeros((total, columns), np.uint8)
    bits = np.zeros(total, np.int64)
    row = position = 0
    for run in encoded.record["ranks"]:
        count, width = run["count"], run[f"{side}_bits"]
        size = segment_words(count, columns, width)
        codes[row : row + count] = unpack(words[position : position + size], count, columns, width)
        bits[row : row + count] = width
        row, position = row + count, position + size
    return Vectors(codes, bits, encoded.segments.get(f"{side}.zero"))


def decode_svd(encoded: Encoded) -> SvdMatrix:
    """The codes in stored order, without row and column scales."""
    h_out, h_in = encoded.record["shape"]
    total = sum(run["count"] for run in encoded.record["ranks"])
    return SvdMatrix(
        _decode_side(encoded, "u", h_out, total),
        decode_float16(encoded.segments["s"], encoded.record.get("gain", 1.0)),
        _decode_side(encoded, "v", h_in, total),
    )


def decode_factors(encoded: Encoded) -> DecodedFactors:
    """Dequantized factors, the row scale folded into `u` and the column scale into `v`."""
    matrix = decode_svd(encoded)
    u, v = matrix.u.decode(), matrix.v.decode()
    if (row_scale := encoded.segments.get("row_scale")) is not None:
        u *= decode_float16(row_scale)
    if (column_scale := encoded.segments.get("column_scale")) is not None:
        v *= decode_float16(column_scale)
    return DecodedFactors(np.ascontiguousarray(u.T), matrix.s, v)


def decode(encoded: Encoded) -> FloatArray:
    """Decode the delta, (h_out, h_in) float32."""
    return decode_factors(encoded).dense()


def segment_specs(record: Record) -> SegmentSpecs:
    """The segments that a record implies, after validating it."""
    h_out, h_in = matrix_shape(record)
    widths = [(width_of(run["v_bits"]), width_of(run["u_bits"])) for run in record["ranks"]]
    counts = [count_of(run["count"]) for run in record["ranks"]]
    if 0 in counts or any(a <= b for a, b in pairwise(widths)):
        raise InvalidArtifact("A record's runs of ranks are empty or not of falling widths.")
    total = sum(counts)
    check_rank(total, (h_out, h_in))
    segments: SegmentSpecs = {}
    for number, (side, columns) in enumerate((("v", h_in), ("u", h_out))):
        words = sum(
            segment_words(count, columns, width[number])
            for count, width in zip(counts, widths, strict=True)
        )
        segments[side] = ("U32", (words,))
        if record["grid"] == "zeros":
            segments[f"{side}.zero"] = ("F16", (total,))
    if record["grid"] == "zeros":
        segments["s"] = ("F32", (total,))
    elif record["grid"] == "midrise":
        number_of(record["gain"])
        segments["s"] = ("F16", (total,))
    else:
        raise InvalidArtifact("A record names an unknown grid.")
    for key, size in (("row_scale", h_out), ("column_scale", h_in)):
        if flag_of(record, key):
            segments[key] = ("F16", (size,))
    return segments
