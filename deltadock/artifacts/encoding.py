"""How one changed tensor is stored: a record for the manifest and named segments of bytes.

    svd         diag(row_scale) U diag(s) V diag(column_scale), every rank with its own widths
    rows        direct low-bit codes, every row with its own width
    low-rank    float factors, as a LoRA adapter has them
    sparse24    low-bit codes of 2 of every 4 columns
    sparse      low-bit codes of any entries
    exact       the fine-tuned tensor itself, byte for byte
    sum, stack, transposed, new-rows, alias     made of others

Any of them may be deflated. Every encoding decodes with numpy alone; a kernel reads the same
segments as they lie.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.container import DTYPE_BITS
from deltadock.artifacts.kinds import composed, exact, low_rank, rows, sparse, svd
from deltadock.artifacts.kinds import deflated as deflation
from deltadock.artifacts.kinds.composed import (
    encode_alias,
    encode_new_rows,
    encode_stack,
    encode_sum,
    encode_transposed,
)
from deltadock.artifacts.kinds.deflated import deflated
from deltadock.artifacts.kinds.exact import encode_exact
from deltadock.artifacts.kinds.low_rank import encode_low_rank
from deltadock.artifacts.kinds.record import (
    NUMPY_DTYPES,
    Encoded,
    Expected,
    FloatArray,
    Record,
    from_raw,
    shape_of,
    to_raw,
)
from deltadock.artifacts.kinds.rows import (
    encode_rows,
    quantize_midrise,
    quantize_rows_midrise,
    stored_rows,
)
from deltadock.artifacts.kinds.sparse import encode_sparse, encode_sparse24
from deltadock.artifacts.kinds.svd import Factors, SvdMatrix, Vectors, encode_svd
from deltadock.errors import InvalidArtifact

__all__ = [
    "DELTA_KINDS",
    "FACTORED",
    "NUMPY_DTYPES",
    "Encoded",
    "Expected",
    "Factors",
    "FloatArray",
    "SvdMatrix",
    "Vectors",
    "decode_dense",
    "decode_factors",
    "decode_rows",
    "decode_svd",
    "deflated",
    "encode_alias",
    "encode_exact",
    "encode_low_rank",
    "encode_new_rows",
    "encode_rows",
    "encode_sparse",
    "encode_sparse24",
    "encode_stack",
    "encode_sum",
    "encode_svd",
    "encode_transposed",
    "expected_segments",
    "from_raw",
    "inflated",
    "parts",
    "quantize_midrise",
    "quantize_rows_midrise",
    "raw_data",
    "stored_rows",
    "to_raw",
]

MAX_DEPTH: Final = 4
"""Encodings within encodings, the innermost counted."""

DECODERS: Final[dict[str, Callable[[Encoded], FloatArray]]] = {
    "svd": svd.decode,
    "rows": rows.decode_rows,
    "low-rank": low_rank.decode,
    "sparse24": sparse.decode_sparse24,
    "sparse": sparse.decode_sparse,
}

EXPECTED: Final[dict[str, Callable[[Record], Expected]]] = {
    "svd": svd.expected,
    "rows": rows.expected,
    "low-rank": low_rank.expected,
    "sparse24": sparse.expected_sparse24,
    "sparse": sparse.expected_sparse,
}

FACTORED: Final = frozenset({"svd", "low-rank"})
"""Kinds that `decode_factors` takes."""

DELTA_KINDS: Final = DECODERS.keys() | composed.COMPOSED - {"new-rows"}
"""Kinds that stand for a delta; what compositions are made of."""


def expected_segments(record: Record) -> Expected:
    """Each segment's dtype and shape that a record implies; what a reader checks before decoding.

    Takes time and memory in proportion to the record alone.

    Raises:
        InvalidArtifact: the record is not one that this version understands.
    """
    try:
        return _expected(record, 1, may_deflate=True)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArtifact("A tensor's record is incomplete or of the wrong types.") from error


def _expected(record: Record, depth: int, *, may_deflate: bool) -> Expected:
    if "deflated" in record:
        if not may_deflate:
            raise InvalidArtifact("A part of a deflated record is deflated.")
        return deflation.expected(record, _raw_expected(record, depth, may_deflate=False))
    return _raw_expected(record, depth, may_deflate=may_deflate)


def _raw_expected(record: Record, depth: int, *, may_deflate: bool) -> Expected:
    kind = record["kind"]
    if record["dtype"] not in DTYPE_BITS:
        raise InvalidArtifact("A record has an unknown dtype.")
    if kind in EXPECTED:
        return EXPECTED[kind](record)
    if kind in composed.COMPOSED:
        if depth == MAX_DEPTH:
            raise InvalidArtifact("A record is nested too deeply.")
        segments: Expected = {}
        for number, part in enumerate(composed.part_records(record)):
            if part is None:
                continue
            if part["kind"] not in DELTA_KINDS:
                raise InvalidArtifact(f"A record has a part of kind {part['kind']!r}.")
            for key, spec in _expected(part, depth + 1, may_deflate=may_deflate).items():
                segments[f"{number}/{key}"] = spec
        if kind == "new-rows":
            segments["data"] = composed.added_rows(record)
        return segments
    if depth == 1 and kind == "exact":
        return exact.expected(record)
    if depth == 1 and kind == "alias":
        shape_of(record)
        if not isinstance(record["of"], str) or "deflated" in record:
            raise TypeError("not an alias")
        return {}
    raise InvalidArtifact(
        f"The artifact stores a tensor as {kind!r}, which this version cannot read. Upgrade it."
    )


def inflated(encoded: Encoded) -> Encoded:
    """The encoding without the lossless compression of its own segments.

    Raises:
        InvalidArtifact: a segment does not inflate to what its record implies.
    """
    if "deflated" not in encoded.record:
        return encoded
    record = {key: value for key, value in encoded.record.items() if key != "deflated"}
    return Encoded(
        record,
        {
            key: deflation.inflate(encoded.segments[key], dtype, shape)
            for key, (dtype, shape) in expected_segments(record).items()
        },
    )


def raw_data(encoded: Encoded) -> npt.NDArray[Any]:
    """What an encoding holds as it is: an `exact` tensor, or the rows that `new-rows` adds.

    Raises:
        InvalidArtifact: it is deflated, and not to what its record implies.
    """
    record, data = encoded.record, encoded.segments["data"]
    if "deflated" not in record:
        return data
    shape = composed.added_rows(record)[1] if record["kind"] == "new-rows" else shape_of(record)
    return deflation.inflate(data, record["dtype"], shape)


def parts(encoded: Encoded) -> Iterator[Encoded | None]:
    """The parts of a composed encoding, in order; None where there is no change.

    Parts of what is deflated are deflated, so that only one at a time need be inflated.
    """
    segments: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, data in encoded.segments.items():
        number, _, own = key.partition("/")
        segments[number][own] = data
    for index, record in enumerate(composed.part_records(encoded.record)):
        if record is None:
            yield None
            continue
        found = segments[str(index)]
        if "deflated" in encoded.record:
            sizes = {key: len(data) for key, data in found.items()}
            yield Encoded({**record, "deflated": sizes}, found)
        else:
            yield Encoded(record, found)


def decode_dense(encoded: Encoded) -> FloatArray:
    """The delta, float32, in the tensor's shape.

    Takes memory in proportion to the elements, or to 4096 times the sides of a small matrix;
    whoever has the base holds the shape against it first.

    Raises:
        InvalidArtifact: the kind stands for no delta (exact, alias, new-rows), or the segments
            contradict each other.
    """
    kind, shape = encoded.record["kind"], encoded.record["shape"]
    if kind not in DELTA_KINDS:
        raise InvalidArtifact(f"A tensor stored as {kind!r} has no delta; merge it with its base.")
    if 0 in shape:
        # Its other sides may be of any size.
        return np.zeros(shape, np.float32)
    if kind in DECODERS:
        return DECODERS[kind](inflated(encoded))
    return composed.combine(
        encoded.record,
        (None if part is None else decode_dense(part) for part in parts(encoded)),
    )


def decode_svd(encoded: Encoded) -> SvdMatrix:
    """The codes that `encode_svd` stored, in stored order; without the row and column scales."""
    return svd.decode_svd(inflated(encoded))


def decode_rows(encoded: Encoded) -> FloatArray:
    """The delta (rows, columns) float32 that `encode_rows` stored."""
    return rows.decode_rows(inflated(encoded))


def decode_factors(encoded: Encoded) -> Factors:
    """Float32 factors of an `svd` or `low-rank` tensor; their product is the delta."""
    decode = svd.decode_factors if encoded.record["kind"] == "svd" else low_rank.decode_factors
    return decode(inflated(encoded))
