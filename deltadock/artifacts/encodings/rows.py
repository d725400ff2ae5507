"""`rows`: delta[i, j] = scale[i] * (code[i, j] - (2**bits[i] - 1) / 2) * column_scale[j].

Each row has a width of 1 to 8 bits; a row of width 0 is unchanged and not stored.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.encodings.packing import (
    CodeArray,
    WordArray,
    in_pieces,
    pack,
    segment_words,
    unpack,
)
from deltadock.artifacts.encodings.record import (
    Details,
    Encoded,
    FloatArray,
    Record,
    SegmentSpecs,
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


def encode_rows(
    codes: CodeArray,
    bits: npt.NDArray[Any],
    scale: npt.NDArray[Any],
    dtype: str,
    details: Details | None = None,
    column_scale: npt.NDArray[Any] | None = None,
) -> Encoded:
    """Encode quantized rows, sorted by descending width (stable).

    Args:
        codes: (rows, columns) uint8; rows of width 0 are ignored.
        bits: (rows,) bit widths, 0 to 8.
        scale: (rows,), stored as float16; or (1,), one float32 for all rows.
        dtype: the fine-tuned tensor's safetensors dtype.
        details: additional keys of the record.
        column_scale: (columns,), stored as float16.

    Raises:
        ValueError: array sizes disagree, or a width, code or scale is out of range.
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
    fields: dict[str, Any] = {"runs": counts}
    if scale.shape == (1,):
        fields["scale"] = "shared"
        segments["scale"] = np.ascontiguousarray(scale, np.float32)
        if not np.isfinite(segments["scale"]).all():
            raise ValueError("A scale is not finite.")
    else:
        fields["scale"], fields["gain"] = "row", power_of_two(scale[order])
        segments["scale"] = encode_float16(scale[order], fields["gain"])
    if not np.array_equal(order, np.arange(rows)):
        fields["index"], segments["index"] = True, order.astype(np.int32)
    if column_scale is not None:
        if column_scale.shape != (columns,):
            raise ValueError(f"The column_scale needs one number for each of {columns}.")
        fields["column_scale"], segments["column_scale"] = True, encode_float16(column_scale)
    return Encoded(make_record("rows", (rows, columns), dtype, details, **fields), segments)


def decode_rows(encoded: Encoded) -> FloatArray:
    """Decode the delta, (rows, columns) float32.

    Raises:
        InvalidArtifact: the stored indices are not distinct row numbers.
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
        delta *= decode_float16(segments["column_scale"])
    return delta


def stored_rows(encoded: Encoded) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """The index and scale of each stored row, in stored order.

    Raises:
        InvalidArtifact: the indices are not distinct row numbers.
    """
    record, segments = encoded.record, encoded.segments
    rows, stored = record["shape"][0], sum(run["count"] for run in record["runs"])
    index = segments["index"].astype(np.int64) if record.get("index") else np.arange(rows)
    ascending = np.sort(index)
    if stored and (ascending[0] < 0 or ascending[-1] >= rows or (np.diff(ascending) == 0).any()):
        raise InvalidArtifact("The indices of a tensor's stored rows are not distinct rows of it.")
    if record["scale"] == "shared":
        return index, np.broadcast_to(segments["scale"].astype(np.float32), stored)
    return index, decode_float16(segments["scale"], record["gain"])


def segment_specs(record: Record) -> SegmentSpecs:
    """The segments that a record implies, after validating it."""
    rows, columns = matrix_shape(record)
    widths = [width_of(run["bits"]) for run in record["runs"]]
    counts = [count_of(run["count"]) for run in record["runs"]]
    stored = sum(counts)
    if 0 in counts or stored > rows or any(a <= b for a, b in pairwise(widths)):
        raise InvalidArtifact("A record's runs of rows are empty, too many or not falling.")
    words = sum(
        segment_words(count, columns, width) for count, width in zip(counts, widths, strict=True)
    )
    segments: SegmentSpecs = {"codes": ("U32", (words,))}
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
    """Quantize a delta row by row at one width and encode it.

    Unchanged rows are skipped. Each row's scale minimizes its squared error over a search grid.

    Args:
        delta: (rows, columns) float32.
        bits: bit width of the codes.
        dtype: the fine-tuned tensor's dtype.
        details: additional keys of the record.
    """
    changed = np.flatnonzero(np.any(delta != 0, axis=1))
    codes, scale = np.zeros(delta.shape, np.uint8), np.ones(len(delta), np.float32)
    codes[changed], scale[changed] = quantize_midrise(delta[changed], bits)
    widths = np.zeros(len(delta), np.int64)
    widths[changed] = bits
    return encode_rows(codes, widths, scale, dtype, details)


def quantize_midrise(values: FloatArray, bits: int) -> tuple[CodeArray, FloatArray]:
    """Symmetric mid-rise quantization, `value = scale * (code - (2**bits - 1) / 2)`, per row.

    Each row's scale is the best of 24 candidates between 1/3 and 1 times the scale that covers
    the row's largest magnitude. Candidates are rounded as stored: float16 times a shared power of
    two.
    """
    centre = (2**bits - 1) / 2
    peak = np.abs(values).max(axis=1, initial=0.0) / centre
    gain = power_of_two(peak)
    scale = np.zeros(len(values), np.float32)
    codes = np.zeros(values.shape, np.uint8)

    def quantize(of: slice) -> None:
        best_error = np.full(len(values[of]), np.inf, np.float32)
        for shrink in np.linspace(1.0, 1 / 3, 24):
            stored = np.maximum(
                encode_float16(peak[of] * shrink, gain), np.finfo(np.float16).smallest_subnormal
            )
            step = decode_float16(stored, gain)
            code = np.clip(np.floor(values[of] / step[:, None]) + 2 ** (bits - 1), 0, 2**bits - 1)
            error = np.square(step[:, None] * (code - centre) - values[of]).sum(axis=1)
            better = error < best_error
            best_error[better] = error[better]
            scale[of][better] = step[better]
            codes[of][better] = code[better].astype(np.uint8)

    in_pieces(quantize, *values.shape)
    return codes, scale
