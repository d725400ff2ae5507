"""What every kind of encoding shares: records, segments, and checks that trust neither."""

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

Expected = dict[str, tuple[str, tuple[int, ...]]]
"""Segment -> its safetensors dtype and shape."""

NUMPY_DTYPES: Final[dict[str, str]] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
"""numpy's type for each safetensors dtype; those numpy lacks keep their raw bits."""

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
MAX_DIMENSIONS: Final = 16
MAX_ELEMENTS: Final = 2**40
"""Bound of a tensor's elements, an empty dimension counted as one: all sizes fit 64 bits."""

MANY_RANKS: Final = 4096
"""Ranks that even a small matrix may have: an adapter's rank is chosen for the large ones."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tensor's record (JSON) and segments; a segment's full name is `<tensor>:<segment>`."""

    record: Record
    segments: dict[str, npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of the segments."""
        return sum(segment.nbytes for segment in self.segments.values())

    def copy(self) -> "Encoded":
        """The same with segments of its own, which keep no file mapped."""
        return Encoded(self.record, {name: np.array(data) for name, data in self.segments.items()})


def count_of(value: object) -> int:
    """`value` if it is a whole number of at least 0; JSON's `true`, `1.0` and `"1"` are not."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**48:
        raise TypeError("not a count")
    return value


def flag_of(record: Record, key: str) -> bool:
    """An optional boolean; absent is false."""
    value = record.get(key, False)
    if not isinstance(value, bool):
        raise TypeError("not a boolean")
    return value


def number_of(value: object) -> float:
    """`value` if it is a number that float32 holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError("not a number")
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError("not a finite number")
    return float(value)


def width_of(value: object) -> int:
    """`value` if it is a width of codes, 1 to 8."""
    width = count_of(value)
    if not 1 <= width <= 8:
        raise InvalidArtifact("A record has an impossible width.")
    return width


def shape_of(record: Record) -> tuple[int, ...]:
    """The tensor's shape, each dimension and their product within bounds."""
    shape = tuple(count_of(size) for size in record["shape"])
    if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise InvalidArtifact("A record's shape is too large.")
    return shape


def check_rank(rank: int, shape: tuple[int, int]) -> None:
    """Refuse factors that are far larger than their product, which a base's shape bounds.

    Raises:
        InvalidArtifact: more ranks than the matrix's smaller side has, and than `MANY_RANKS`.
    """
    if rank > max(min(shape), MANY_RANKS):
        raise InvalidArtifact("A record has more ranks than its matrix can need.")


def matrix_shape(record: Record) -> tuple[int, int]:
    """The shape of a record that must be a matrix's."""
    rows, columns = shape_of(record)
    return rows, columns


def make_record(
    kind: str, shape: tuple[int, ...], dtype: str, details: Details | None, **own: object
) -> Record:
    """A record; `details` are further keys, which cannot replace the kind's own."""
    return {**(details or {}), "kind": kind, "shape": list(shape), "dtype": dtype, **own}


def power_of_two(values: npt.NDArray[Any]) -> float:
    """The power of two that brings the largest magnitude into [0.5, 1); 1 where all are 0.

    It keeps away from float32's ends, so that its product with any float16 is a float32.
    """
    peak = float(np.abs(values).max(initial=0.0))
    return 2.0 ** min(max(math.frexp(peak)[1], -100), 112) if peak > 0 else 1.0


def half(values: npt.NDArray[Any], gain: float = 1.0) -> npt.NDArray[np.float16]:
    """`values / gain` in float16.

    Raises:
        ValueError: some are not finite in float16.
    """
    with np.errstate(over="ignore"):
        stored = (np.asarray(values, np.float64) / gain).astype(np.float16)
    if not np.isfinite(stored).all():
        raise ValueError("A scale is not finite in float16.")
    return stored


def unhalf(stored: npt.NDArray[Any], gain: float = 1.0) -> FloatArray:
    """Float32 values of what `half` gave."""
    values: FloatArray = stored.astype(np.float32) * np.float32(gain)
    return values


FLOAT_DTYPES: Final = frozenset({"F16", "BF16", "F32"})
"""Dtypes that factors are stored in."""


def to_raw(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Round to one of FLOAT_DTYPES, to nearest even; bfloat16 as its raw uint16.

    What is in that form already stays as it is.
    """
    target = np.dtype(NUMPY_DTYPES[dtype])
    if values.dtype == target:
        return np.ascontiguousarray(values)
    if dtype != "BF16":
        return np.ascontiguousarray(values, target)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return rounded.astype(np.uint16)


def from_raw(stored: npt.NDArray[Any], dtype: str) -> FloatArray:
    """Float32 values of a tensor in one of FLOAT_DTYPES."""
    if dtype == "BF16":
        words: npt.NDArray[np.uint32] = stored.astype(np.uint32) << np.uint32(16)
        return words.view(np.float32)
    return stored.astype(np.float32)
