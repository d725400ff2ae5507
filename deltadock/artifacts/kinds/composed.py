"""Encodings made of others; the segments of part `i` carry its number: `0/codes`.

sum         the parts' deltas added
stack       parts along the first dimension; null: no change there
transposed  the part's delta transposed
new-rows    more rows than the base's: a delta of the base's rows, and the added ones exactly
alias       another tensor's encoding, applied to this tensor's base
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.kinds.record import (
    Details,
    Encoded,
    FloatArray,
    Record,
    count_of,
    make_record,
    shape_of,
)
from deltadock.errors import InvalidArtifact

MAX_SUM: Final = 8
"""Most parts of a sum."""

COMPOSED: Final = frozenset({"sum", "stack", "transposed", "new-rows"})


def _join(record: Record, parts: Sequence[Encoded | None]) -> Encoded:
    return Encoded(
        record,
        {
            f"{number}/{key}": data
            for number, part in enumerate(parts)
            if part is not None
            for key, data in part.segments.items()
        },
    )


def encode_sum(parts: Sequence[Encoded], details: Details | None = None) -> Encoded:
    """The sum of deltas of one shape; its dtype is the first part's.

    Raises:
        ValueError: no parts or more than `MAX_SUM`, or shapes differ.
    """
    shapes = {tuple(part.record["shape"]) for part in parts}
    if len(shapes) != 1 or len(parts) > MAX_SUM:
        raise ValueError(f"A sum has 1 to {MAX_SUM} parts of one shape.")
    records = [part.record for part in parts]
    record = make_record("sum", shapes.pop(), records[0]["dtype"], details, parts=records)
    return _join(record, parts)


def encode_stack(parts: Sequence[Encoded | None], details: Details | None = None) -> Encoded:
    """Deltas of one shape along a new first dimension, as experts lie; None: no change.

    Raises:
        ValueError: all parts are None, or shapes differ.
    """
    records = [None if part is None else part.record for part in parts]
    kinds = {(tuple(record["shape"]), record["dtype"]) for record in records if record is not None}
    if len(kinds) != 1:
        raise ValueError("A stack has parts of one shape and dtype, and at least one.")
    ((shape, dtype),) = kinds
    record = make_record("stack", (len(parts), *shape), dtype, details, parts=records)
    return _join(record, parts)


def encode_transposed(part: Encoded, details: Details | None = None) -> Encoded:
    """A matrix stored as the transpose of the part's."""
    shape, dtype = tuple(part.record["shape"]), part.record["dtype"]
    record = make_record("transposed", shape[::-1], dtype, details, parts=[part.record])
    return _join(record, [part])


def encode_new_rows(
    part: Encoded | None,
    added: npt.NDArray[Any],
    base_rows: int,
    dtype: str,
    details: Details | None = None,
) -> Encoded:
    """A tensor with more rows than the base's.

    Args:
        part: the delta of the base's rows; None: they are the base's.
        added: (added rows, ...) raw data in numpy's type for `dtype`.
        base_rows: rows of the base's tensor.
        dtype: the fine-tuned tensor's dtype.
        details: further keys of the record.

    Raises:
        ValueError: the part is not of the base's shape.
    """
    if part is not None and part.record["shape"] != [base_rows, *added.shape[1:]]:
        raise ValueError("The part of a tensor with new rows has the base's shape.")
    record = make_record(
        "new-rows",
        (base_rows + len(added), *added.shape[1:]),
        dtype,
        details,
        base_rows=base_rows,
        parts=[None if part is None else part.record],
    )
    joined = _join(record, [part])
    return Encoded(record, {**joined.segments, "data": np.ascontiguousarray(added)})


def encode_alias(of: str, shape: tuple[int, ...], dtype: str) -> Encoded:
    """The encoding of the tensor `of` for another tensor of equal shape and dtype.

    It decodes to the same tensor where the two are equal in the base, or `of` is exact.
    """
    return Encoded(make_record("alias", shape, dtype, None, of=of), {})


def part_records(record: Record) -> list[Record | None]:
    """The parts' records, held against the shape of the whole.

    Raises:
        InvalidArtifact: their number or shapes are not what the whole implies.
    """
    kind, shape, parts = record["kind"], shape_of(record), record["parts"]
    if not isinstance(parts, list):
        raise TypeError("not a list")
    if kind == "sum":
        number, may_lack, inner = max(1, min(len(parts), MAX_SUM)), False, shape
    elif kind == "stack":
        (number, *rest), may_lack = shape, True
        inner = tuple(rest)
    elif kind == "transposed":
        columns, rows = shape
        number, may_lack, inner = 1, False, (rows, columns)
    else:
        number, may_lack, inner = 1, True, (_base_rows(record), *shape[1:])
    if len(parts) != number:
        raise InvalidArtifact(f"A record of kind {kind!r} has an impossible number of parts.")
    for part in parts:
        if part is None and may_lack:
            continue
        if shape_of(part) != inner:
            raise InvalidArtifact(f"A part of a record of kind {kind!r} is of another shape.")
    return parts


def _base_rows(record: Record) -> int:
    base_rows: int = count_of(record["base_rows"])
    rows, *_ = shape_of(record)
    if base_rows > rows:
        raise InvalidArtifact("A record of new rows has fewer rows than the base.")
    return base_rows


def added_rows(record: Record) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of the `data` of a tensor with new rows."""
    rows, *rest = shape_of(record)
    return record["dtype"], (rows - _base_rows(record), *rest)


def combine(record: Record, deltas: Iterable[FloatArray | None]) -> FloatArray:
    """The delta of the whole from those of its parts, which may come one at a time.

    Raises:
        InvalidArtifact: the whole has rows of which the base has none.
    """
    if record["kind"] == "new-rows":
        raise InvalidArtifact("A tensor with new rows has no delta; merge it with its base.")
    if record["kind"] == "transposed":
        (only,) = deltas
        assert only is not None
        return np.ascontiguousarray(only.T)
    total = np.zeros(record["shape"], np.float32)
    for number, delta in enumerate(deltas):
        if delta is not None:
            target = total[number] if record["kind"] == "stack" else total
            target += delta
    return total
