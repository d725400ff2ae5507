"""Records and segments: the types, checks and float conversions shared by all encodings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltadock.errors import InvalidArtifact

FloatArray = npt.NDArray[np.float32]
Record = dict[str, Any]
Details = Mapping[str, Any]

SegmentSpecs = dict[str, tuple[str, tuple[int, ...]]]
"""Segment name -> safetensors dtype and shape."""

NUMPY_DTYPES: Final[dict[str, str]] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
"""numpy's type for each safetensors dtype; types that numpy lacks are stored as their bits."""

FLOAT_DTYPES: Final = frozenset({"F16", "BF16", "F32"})
"""Dtypes of stored factors."""

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
MAX_DIMENSIONS: Final = 16
MAX_ELEMENTS: Final = 2**40
"""Maximum elements of a tensor, an empty dimension counted as one: all sizes fit in 64 bits."""

MIN_RANK_LIMIT: Final = 4096
"""Ranks allowed even for a small matrix: adapters use one rank for matrices of all sizes."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tensor's record (JSON-able) and segments.

    In a file a segment is named `<tensor>:<segment>`.
    """

    record: Record
    segments: dict[str, npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self.segments.values())

    def copy(self) -> "Encoded":
        """Copy the segments, so that they no longer reference a mapped file."""
        return Encoded(self.record, {name: np.array(data) for name, data in self.segments.items()})


@dataclass(frozen=True, slots=True)
class DecodedFactors:
    """Float32 factors, `delta = u @ diag(s) @ v`: u (h_out, r), s (r,), v (r, h_in)."""

    u: FloatArray
    s: FloatArray
    v: FloatArray

    def dense(self) -> FloatArray:
        """The delta, (h_out, h_in) float32."""
        product: FloatArray = np.matmul(self.u * self.s, self.v).astype(np.float32, copy=False)
        return product


def make_record(
    kind: str, shape: tuple[int, ...], dtype: str, details: Details | None, **fields: object
) -> Record:
    """Build a record; `details` are additional keys and cannot override the encoding's `fields`."""
    return {**(details or {}), "kind": kind, "shape": list(shape), "dtype": dtype, **fields}


def encode_exact(array: npt.NDArray[Any], dtype: str, shape: tuple[int, ...]) -> Encoded:
    """Encode a tensor byte for byte; `array` has numpy's type for `dtype`."""
    return Encoded(make_record("exact", shape, dtype, None), {"data": array.reshape(shape)})


def count_of(value: object) -> int:
    """Return a non-negative integer below 2**48; JSON's `true`, `1.0` and `"1"` are rejected."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**48:
        raise TypeError("not a count")
    return value


def flag_of(record: Record, key: str) -> bool:
    """An optional boolean; false if absent."""
    value = record.get(key, False)
    if not isinstance(value, bool):
        raise TypeError("not a boolean")
    return value


def number_of(value: object) -> float:
    """Return a number within float32's range."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError("not a number")
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError("not a finite number")
    return float(value)


def width_of(value: object) -> int:
    """Return a bit width of 1 to 8."""
    width = count_of(value)
    if not 1 <= width <= 8:
        raise InvalidArtifact("A record has an impossible width.")
    return width


def shape_of(record: Record) -> tuple[int, ...]:
    """The tensor's shape, with dimensions and element count within the limits."""
    shape = tuple(count_of(size) for size in record["shape"])
    if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise InvalidArtifact("A record's shape is too large.")
    return shape


def matrix_shape(record: Record) -> tuple[int, int]:
    """The shape of a record that must describe a matrix."""
    rows, columns = shape_of(record)
    return rows, columns


def check_rank(rank: int, shape: tuple[int, int]) -> None:
    """Reject factors much larger than their product, whose size the base's shape bounds.

    Raises:
        InvalidArtifact: the rank exceeds both the matrix's smaller side and `MIN_RANK_LIMIT`.
    """
    if rank > max(min(shape), MIN_RANK_LIMIT):
        raise InvalidArtifact("A record has more ranks than its matrix can need.")


def power_of_two(values: npt.NDArray[Any]) -> float:
    """The power of two that scales the largest magnitude into [0.5, 1); 1 if all are 0.

    The exponent is clamped so that its product with any float16 is a finite, normal float32.
    """
    peak = float(np.abs(values).max(initial=0.0))
    return 2.0 ** min(max(math.frexp(peak)[1], -100), 112) if peak > 0 else 1.0


def encode_float16(values: npt.NDArray[Any], gain: float = 1.0) -> npt.NDArray[np.float16]:
    """`values / gain` as float16.

    Raises:
        ValueError: a result is not finite.
    """
    with np.errstate(over="ignore"):
        stored = (np.asarray(values, np.float64) / gain).astype(np.float16)
    if not np.isfinite(stored).all():
        raise ValueError("A scale is not finite in float16.")
    return stored


def decode_float16(stored: npt.NDArray[Any], gain: float = 1.0) -> FloatArray:
    """The float32 values of `encode_float16`'s result."""
    values: FloatArray = stored.astype(np.float32) * np.float32(gain)
    return values


def encode_floats(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Round to one of `FLOAT_DTYPES`, to nearest even; bfloat16 is returned as uint16 bits.

    Values that already have the stored type are not converted.
    """
    target = np.dtype(NUMPY_DTYPES[dtype])
    if values.dtype == target:
        return np.ascontiguousarray(values)
    if dtype != "BF16":
        return np.ascontiguousarray(values, target)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return rounded.astype(np.uint16)


def decode_floats(stored: npt.NDArray[Any], dtype: str) -> FloatArray:
    """The float32 values of a tensor stored in one of `FLOAT_DTYPES`."""
    if dtype == "BF16":
        words: npt.NDArray[np.uint32] = stored.astype(np.uint32) << np.uint32(16)
        return words.view(np.float32)
    return stored.astype(np.float32)
