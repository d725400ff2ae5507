"""`rows`: delta[i, j] = scale[i] * (code[i, j] - (2**bits[i] - 1) / 2) * column_scale[j].

Every row has its own width of 1 to 8 bits; a row of width 0 has no delta and is not stored.
"""

from itertools import pairwise
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
    flag_of,
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


def encode_rows(
    codes: CodeArray,
    bits: npt.NDArray[Any],
    scale: npt.NDArray[Any],
    dtype: str,
    details: Details | None = None,
    column_scale: npt.NDArray[Any] | None = None,
) -> Encoded:
    """Encode direct codes; rows are put in the order of falling widths (stable).

    Args:
        codes: (rows, columns) uint8; those of rows of width 0 do not matter.
        bits: (rows,) widths, 0 to 8.
        scale: (rows,), stored as float16; or (1,), one float32 for all rows.
        dtype: the fine-tuned tensor's dtype, safetensors' spelling.
        details: further keys of the record.
        column_scale: (columns,) factors of the columns, stored as float16.

    Raises:
        ValueError: the arrays' sizes do not agree, or a width, code or scale is impossible.
    """
    rows, columns = codes.shape
    widths = np.asarray(bits, np.int64)
    if widths.shape != (rows,) or scale.shape not in {(rows,), (1,)}:
        raise ValueError("Rows need one width each, and one scale each or one for all.")
    if rows and not 0 <= widths.min() <= widths.max() <= 8:
        raise ValueError("Rows have widths of 0 to 8 bits.")
    order = np.argsort(-widths, kind="stable")[: np.count_nonzero(widths)]
    runs = [(width, order[widths[order] == width]) for width in range(8, 0, -1)]
    runs = [(width, members) for width, members in runs if len(members)]
    packed = [pack(codes[members], width) for width, members in runs]
    segments: dict[str, npt.NDArray[Any]] = {
        "codes": np.concatenate(packed) if packed else np.zeros(0, np.uint32)
    }
    counts = [{"count": len(members), "bits": width} for width, members in runs]
    own: dict[str, Any] = {"runs": counts}
    if scale.shape == (1,):
        own["scale"] = "shared"
        segments["scale"] = np.ascontiguousarray(scale, np.float32)
        if not np.isfinite(segments["scale"]).all():
            raise ValueError("A scale is not finite.")
    else:
        own["scale"], own["gain"] = "row", power_of_two(scale[order])
        segments["scale"] = half(scale[order], own["gain"])
    if not np.array_equal(order, np.arange(rows)):
        own["index"], segments["index"] = True, order.astype(np.int32)
    if column_scale is not None:
        if column_scale.shape != (columns,):
            raise ValueError(f"The column_scale needs one number for each of {columns}.")
        own["column_scale"], segments["column_scale"] = True, half(column_scale)
    return Encoded(make_record("rows", (rows, columns), dtype, details, **own), segments)


def decode_rows(encoded: Encoded) -> FloatArray:
    """The delta (rows, columns) float32 that `encode_rows` stored.

    Raises:
        InvalidArtifact: the stored rows' indices are not distinct row numbers.
    """
    record, segments = encoded.record, encoded.segments
    rows, columns = record["shape"]
    runs = record["runs"]
    index, scale = stored_rows(encoded)
    words: WordArray = segments["codes"].view(np.uint32)
    delta = np.zeros((rows, columns), np.float32)
    row = position = 0
    for run in runs:
        count, width = run["count"], run["bits"]
        size = segment_words(count, columns, width)
        codes = unpack(words[position : position + size], count, columns, width)
        values = codes.astype(np.float32) - np.float32((2**width - 1) / 2)
        delta[index[row : row + count]] = values * scale[row : row + count, None]
        row, position = row + count, position + size
    if record.get("column_scale"):
        delta *= unhalf(segments["column_scale"])
    return delta


def stored_rows(encoded: Encoded) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Number and scale of each stored row, in stored order.

    Raises:
        InvalidArtifact: the numbers are not distinct row numbers.
    """
    record, segments = encoded.record, encoded.segments
    rows, stored = record["shape"][0], sum(run["count"] for run in record["runs"])
    index = segments["index"].astype(np.int64) if record.get("index") else np.arange(rows)
    ascending = np.sort(index)
    if stored and (ascending[0] < 0 or ascending[-1] >= rows or (np.diff(ascending) == 0).any()):
        raise InvalidArtifact("The indices of a tensor's stored rows are not distinct rows of it.")
    if record["scale"] == "shared":
        return index, np.broadcast_to(segments["scale"].astype(np.float32), stored)
    return index, unhalf(segments["scale"], record["gain"])


def expected(record: Record) -> Expected:
    """The segments that a record implies."""
    rows, columns = matrix_shape(record)
    widths = [width_of(run["bits"]) for run in record["runs"]]
    counts = [count_of(run["count"]) for run in record["runs"]]
    stored = sum(counts)
    if 0 in counts or stored > rows or any(a <= b for a, b in pairwise(widths)):
        raise InvalidArtifact("A record's runs of rows are empty, too many or not falling.")
    words = sum(
        segment_words(count, columns, width) for count, width in zip(counts, widths, strict=True)
    )
    segments: Expected = {"codes": ("U32", (words,))}
    if record["scale"] == "shared":
        segments["scale"] = ("F32", (1,))
    elif record["scale"] == "row":
        number_of(record["gain"])
        segments["scale"] = ("F16", (stored,))
    else:
        raise InvalidArtifact("A record of rows has scales of an unknown kind.")
    if flag_of(record, "index"):
        segments["index"] = ("I32", (stored,))
    elif stored < rows:
        raise InvalidArtifact("A record of rows leaves rows out without saying which.")
    if flag_of(record, "column_scale"):
        segments["column_scale"] = ("F16", (columns,))
    return segments


def quantize_rows_midrise(
    delta: FloatArray, bits: int, dtype: str, details: Details | None = None
) -> Encoded:
    """Quantize a delta row by row, all rows with one width, and encode it.

    Rows without a change are left out. The step of each row is searched for least square error.

    Args:
        delta: (rows, columns) float32.
        bits: width of the codes.
        dtype: the fine-tuned tensor's dtype.
        details: further keys of the record.
    """
    changed = np.flatnonzero(np.any(delta != 0, axis=1))
    codes, scale = np.zeros(delta.shape, np.uint8), np.ones(len(delta), np.float32)
    codes[changed], scale[changed] = quantize_midrise(delta[changed], bits)
    widths = np.zeros(len(delta), np.int64)
    widths[changed] = bits
    return encode_rows(codes, widths, scale, dtype, details)


def quantize_midrise(values: FloatArray, bits: int) -> tuple[CodeArray, FloatArray]:
    """Symmetric mid-rise codes, `value = scale * (code - (2**bits - 1) / 2)`, one scale a row.

    The scale is the best of 24 between a third of what spans the row's largest value and that,
    each as float16 times the rows' common power of two holds it.
    """
    centre = (2**bits - 1) / 2
    peak = np.abs(values).max(axis=1, initial=0.0) / centre
    gain = power_of_two(peak)
    best_error = np.full(len(values), np.inf, np.float32)
    best_scale = np.zeros(len(values), np.float32)
    best_codes = np.zeros(values.shape, np.uint8)
    for shrink in np.linspace(1.0, 1 / 3, 24):
        stored = np.maximum(half(peak * shrink, gain), np.finfo(np.float16).smallest_subnormal)
        scale = unhalf(stored, gain)
        step = scale[:, None]
        codes = np.clip(np.floor(values / step) + 2 ** (bits - 1), 0, 2**bits - 1)
        error = np.square(step * (codes - centre) - values).sum(axis=1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_codes[better] = codes[better].astype(np.uint8)
    return best_codes, best_scale
