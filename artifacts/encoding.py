"""How one changed tensor is stored: a record for the manifest and named segments of bytes.

    svd     delta = U_hat diag(s) V_hat, every rank of U and V with its own width
    rows    delta of an embedding, row by row: low-bit codes and one scale per changed row
    exact   the fine-tuned tensor itself, byte for byte

Every encoding decodes with numpy alone; a kernel reads the same segments as they lie.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from artifacts.container import DTYPE_BITS
from artifacts.packing import CodeArray, WordArray, pack, segment_words, unpack
from deltadock.errors import InvalidArtifact

FloatArray = npt.NDArray[np.float32]

NUMPY_DTYPES: Final[dict[str, str]] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
"""numpy's type for each safetensors dtype; those numpy lacks keep their raw bits."""

HALF: Final = np.finfo(np.float16)


@dataclass(frozen=True, slots=True)
class Vectors:
    """One side of a decomposition: r quantized singular vectors, one a row.

    Attributes:
        codes: (r, n) uint8.
        bits: (r,) widths, 1 to 8.
        zero: (r,) float16; an entry's value is `code - zero`.
    """

    codes: CodeArray
    bits: npt.NDArray[np.int64]
    zero: npt.NDArray[np.float16]

    def decode(self) -> FloatArray:
        """The values, (r, n) float32."""
        values: FloatArray = self.codes.astype(np.float32) - self.zero.astype(np.float32)[:, None]
        return values


@dataclass(frozen=True, slots=True)
class SvdMatrix:
    """A compressed matrix: U transposed to (r, h_out), s (r,) float32, V (r, h_in).

    `s` is the singular value times the scales of both sides' grids.
    """

    u: Vectors
    s: FloatArray
    v: Vectors


@dataclass(frozen=True, slots=True)
class Factors:
    """Decoded factors, float32: `delta = u @ diag(s) @ v`; u (h_out, r), s (r,), v (r, h_in)."""

    u: FloatArray
    s: FloatArray
    v: FloatArray

    def dense(self) -> FloatArray:
        """The delta, (h_out, h_in) float32."""
        product: FloatArray = np.matmul(self.u * self.s, self.v).astype(np.float32, copy=False)
        return product


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tensor's record (JSON) and segments; a segment's full name is `<tensor>:<segment>`."""

    record: dict[str, Any]
    segments: dict[str, npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of the segments."""
        return sum(segment.nbytes for segment in self.segments.values())


def _groups(matrix: SvdMatrix) -> list[tuple[int, int, int, int]]:
    """Runs of ranks of equal widths, `(begin, end, v_bits, u_bits)`."""
    pairs = list(zip(matrix.v.bits.tolist(), matrix.u.bits.tolist(), strict=True))
    edges = [i for i in range(len(pairs)) if i == 0 or pairs[i] != pairs[i - 1]] + [len(pairs)]
    return [(begin, end, *pairs[begin]) for begin, end in pairwise(edges)]


def _reorder(side: Vectors, order: npt.NDArray[np.int64]) -> Vectors:
    return Vectors(side.codes[order], side.bits[order], side.zero[order])


def encode_svd(matrix: SvdMatrix, dtype: str, details: dict[str, Any]) -> Encoded:
    """Encode a decomposition; ranks are put in the order of falling widths (stable).

    Args:
        matrix: the codes.
        dtype: the fine-tuned tensor's dtype, safetensors' spelling.
        details: what the report says of this matrix (error, damping, fallbacks).
    """
    order = np.lexsort((-matrix.u.bits, -matrix.v.bits))
    matrix = SvdMatrix(_reorder(matrix.u, order), matrix.s[order], _reorder(matrix.v, order))
    groups = _groups(matrix)
    segments: dict[str, npt.NDArray[Any]] = {}
    for side, vectors, column in (("v", matrix.v, 2), ("u", matrix.u, 3)):
        packed = [pack(vectors.codes[run[0] : run[1]], run[column]) for run in groups]
        segments[side] = np.concatenate(packed) if packed else np.zeros(0, np.uint32)
        segments[f"{side}.zero"] = np.ascontiguousarray(vectors.zero)
    segments["s"] = np.ascontiguousarray(matrix.s, np.float32)
    record = {
        "kind": "svd",
        "shape": [matrix.u.codes.shape[1], matrix.v.codes.shape[1]],
        "dtype": dtype,
        "ranks": [{"count": end - begin, "v_bits": v, "u_bits": u} for begin, end, v, u in groups],
        **details,
    }
    return Encoded(record, segments)


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
    return Vectors(codes, bits, encoded.segments[f"{side}.zero"])


def decode_svd(encoded: Encoded) -> SvdMatrix:
    """The codes that `encode_svd` stored, in stored order."""
    h_out, h_in = encoded.record["shape"]
    total = sum(run["count"] for run in encoded.record["ranks"])
    return SvdMatrix(
        _decode_side(encoded, "u", h_out, total),
        encoded.segments["s"],
        _decode_side(encoded, "v", h_in, total),
    )


def encode_exact(raw: npt.NDArray[Any], dtype: str, shape: tuple[int, ...]) -> Encoded:
    """Encode a tensor byte for byte; `raw` holds its data in numpy's type for `dtype`."""
    record = {"kind": "exact", "shape": list(shape), "dtype": dtype}
    return Encoded(record, {"data": raw.reshape(shape)})


def encode_rows(delta: FloatArray, bits: int, dtype: str, details: dict[str, Any]) -> Encoded:
    """Encode an embedding's delta row by row on symmetric mid-rise grids.

    Rows without a change are left out. The step of each row is searched for least square error.

    Args:
        delta: (rows, columns) float32.
        bits: width of the codes.
        dtype: the fine-tuned tensor's dtype.
        details: what the report says of this tensor.
    """
    changed = np.flatnonzero(np.any(delta != 0, axis=1))
    codes, scale = quantize_midrise(delta[changed], bits)
    segments: dict[str, npt.NDArray[Any]] = {"codes": pack(codes, bits), "scale": scale}
    if len(changed) < len(delta):
        segments["index"] = changed.astype(np.int32)
    record = {
        "kind": "rows",
        "shape": list(delta.shape),
        "dtype": dtype,
        "bits": bits,
        "changed": len(changed),
        **details,
    }
    return Encoded(record, segments)


def quantize_midrise(values: FloatArray, bits: int) -> tuple[CodeArray, npt.NDArray[np.float16]]:
    """Symmetric mid-rise codes, `value = scale * (code - (2**bits - 1) / 2)`, one scale a row.

    The scale is the best of 24 between a third of what spans the row's largest value and that.
    """
    centre = (2**bits - 1) / 2
    peak = np.abs(values).max(axis=1, initial=0.0) / centre
    best_error = np.full(len(values), np.inf, np.float32)
    best_scale = np.zeros(len(values), np.float16)
    best_codes = np.zeros(values.shape, np.uint8)
    for shrink in np.linspace(1.0, 1 / 3, 24):
        scale = np.clip(peak * shrink, HALF.smallest_subnormal, HALF.max).astype(np.float16)
        step = scale.astype(np.float32)[:, None]
        codes = np.clip(np.floor(values / step) + 2 ** (bits - 1), 0, 2**bits - 1)
        error = np.square(step * (codes - centre) - values).sum(axis=1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_codes[better] = codes[better].astype(np.uint8)
    return best_codes, best_scale


def decode_rows(encoded: Encoded) -> FloatArray:
    """The delta (rows, columns) float32 that `encode_rows` stored.

    Raises:
        InvalidArtifact: the changed rows' indices are not ascending row numbers.
    """
    rows, columns = encoded.record["shape"]
    bits, changed = encoded.record["bits"], encoded.record["changed"]
    words: WordArray = encoded.segments["codes"].view(np.uint32)
    codes = unpack(words, changed, columns, bits).astype(np.float32)
    values = (codes - (2**bits - 1) / 2) * encoded.segments["scale"].astype(np.float32)[:, None]
    delta = np.zeros((rows, columns), np.float32)
    index = encoded.segments.get("index", np.arange(rows))
    if changed and (
        index[0] < 0 or index[-1] >= rows or (np.diff(index.astype(np.int64)) <= 0).any()
    ):
        raise InvalidArtifact("The indices of a tensor's changed rows do not ascend within it.")
    delta[index] = values
    return delta


def decode_factors(encoded: Encoded) -> Factors:
    """Float32 factors of an `svd` tensor."""
    matrix = decode_svd(encoded)
    return Factors(np.ascontiguousarray(matrix.u.decode().T), matrix.s, matrix.v.decode())


def expected_segments(record: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each segment's dtype and shape that a record implies; what a reader checks before decoding.

    Raises:
        InvalidArtifact: the record is not one that this version understands.
    """
    try:
        kind, shape = record["kind"], [_count(n) for n in record["shape"]]
        if record["dtype"] not in DTYPE_BITS:
            raise InvalidArtifact("A record has an unknown dtype.")
        if kind == "exact":
            return {"data": (record["dtype"], tuple(shape))}
        rows, columns = shape
        if kind == "rows":
            return _expected_rows(record, rows, columns)
        if kind == "svd":
            return _expected_svd(record, rows, columns)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArtifact("A tensor's record is incomplete or of the wrong types.") from error
    raise InvalidArtifact(
        f"The artifact stores a tensor as {kind!r}, which this version cannot read. Upgrade it."
    )


def _count(value: object) -> int:
    """`value` if it is a whole number of at least 0; JSON's `true`, `1.0` and `"1"` are not."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**48:
        raise TypeError("not a count")
    return value


def _expected_rows(
    record: dict[str, Any], rows: int, columns: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    bits, changed = _count(record["bits"]), _count(record["changed"])
    if not 1 <= bits <= 8 or not 0 <= changed <= rows:
        raise InvalidArtifact("A record of rows has an impossible width or count.")
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "codes": ("U32", (segment_words(changed, columns, bits),)),
        "scale": ("F16", (changed,)),
    }
    if changed < rows:
        expected["index"] = ("I32", (changed,))
    return expected


def _expected_svd(
    record: dict[str, Any], h_out: int, h_in: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    total = sum(_count(run["count"]) for run in record["ranks"])
    for side, columns in (("v", h_in), ("u", h_out)):
        words = 0
        for run in record["ranks"]:
            width, count = _count(run[f"{side}_bits"]), run["count"]
            if not 1 <= width <= 8 or count < 1:
                raise InvalidArtifact("A record has an impossible width or count.")
            words += segment_words(count, columns, width)
        expected[side] = ("U32", (words,))
        expected[f"{side}.zero"] = ("F16", (total,))
    expected["s"] = ("F32", (total,))
    return expected
