"""Encodings composed of others; the segments of part `i` are prefixed with its index: `0/codes`.

sum         the sum of the parts' deltas
stack       parts along the first dimension; null: unchanged there
transposed  the transpose of the part's delta
new-rows    more rows than the base: a delta of the base's rows, and the added rows unquantized
alias       another tensor's encoding, applied to this tensor's base
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.encodings.record import (
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
"""Maximum parts of a sum."""

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
    """Encode the sum of deltas of equal shape; the dtype is the first part's.

    Raises:
        ValueError: there are no parts or more than `MAX_SUM`, or shapes differ.
    """
    shapes = {tuple(part.record["shape"]) for part in parts}
    if len(shapes) != 1 or len(parts) > MAX_SUM:
        raise ValueError(f"A sum has 1 to {MAX_SUM} parts of one shape.")
    records = [part.record for part in parts]
    record = make_record("sum", shapes.pop(), records[0]["dtype"], details, parts=records)
    return _join(record, parts)


def encode_stack(parts: Sequence[Encoded | None], details: Details | None = None) -> Encoded:
    """Stack deltas of equal shape along a new first dimension, e.g. experts; None: unchanged.

    Raises:
        ValueError: all parts are None, or shapes or dtypes differ.
    """
    records = [None if part is None else part.record for part in parts]
    forms = {(tuple(record["shape"]), record["dtype"]) for record in records if record is not None}
    if len(forms) != 1:
        raise ValueError("A stack has parts of one shape and dtype, and at least one.")
    ((shape, dtype),) = forms
    record = make_record("stack", (len(parts), *shape), dtype, details, parts=records)
    return _join(record, parts)


def encode_transposed(part: Encoded, details: Details | None = None) -> Encoded:
    """Encode the transpose of a matrix."""
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
    """Encode a tensor with more rows than the base's.

    Args:
        part: the delta of the base's rows; None: they are unchanged.
        added: (added rows, ...) in numpy's type for `dtype`.
        base_rows: rows of the base's tensor.
        dtype: the fine-tuned tensor's safetensors dtype.
        details: additional keys of the record.

    Raises:
        ValueError: the part does not have the base's shape.
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
    """Reuse the encoding of the tensor `of` for another tensor of equal shape and dtype.

    Both decode to the same tensor if they are equal in the base or `of` is exact.
    """
    return Encoded(make_record("alias", shape, dtype, None, of=of), {})


def part_records(record: Record) -> list[Record | None]:
    """The parts' records, validated against the composed shape.

    Raises:
        InvalidArtifact: their number or shapes do not match it.
    """
    kind, shape, parts = record["kind"], shape_of(record), record["parts"]
    if not isinstance(parts, list):
        raise TypeError("not a list")
    if kind == "sum":
        number, nullable, inner = max(1, min(len(parts), MAX_SUM)), False, shape
    elif kind == "stack":
        (number, *rest), nullable = shape, True
        inner = tuple(rest)
    elif kind == "transposed":
        columns, rows = shape
        number, nullable, inner = 1, False, (rows, columns)
    else:
        number, nullable, inner = 1, True, (_base_rows(record), *shape[1:])
    if len(parts) != number:
        raise InvalidArtifact(f"A record of kind {kind!r} has an impossible number of parts.")
    for part in parts:
        if part is None and nullable:
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


def added_rows_spec(record: Record) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of the `data` segment of a `new-rows` record."""
    rows, *rest = shape_of(record)
    return record["dtype"], (rows - _base_rows(record), *rest)


def combine(record: Record, deltas: Iterable[FloatArray | None]) -> FloatArray:
    """Combine the parts' deltas, consumed one at a time, into the composed delta.

    Raises:
        InvalidArtifact: the record is `new-rows`, which has no delta.
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
