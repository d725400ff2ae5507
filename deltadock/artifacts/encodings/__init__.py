"""Encodings of one changed tensor: a JSON record for the manifest, and named binary segments.

    svd         diag(row_scale) U diag(s) V diag(column_scale), one bit width per rank
    rows        quantized codes, one bit width per row
    low-rank    float factors, as in a LoRA adapter
    sparse24    quantized codes of 2 of every 4 columns
    sparse      quantized codes of arbitrary entries
    exact       the fine-tuned tensor, byte for byte
    sum, stack, transposed, new-rows, alias     composed of other encodings

All but `alias` can be deflated. Decoding needs numpy only; the GPU kernels read the segments
without repacking. `docs/format.md` specifies every record and segment.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.container import DTYPE_BITS
from deltadock.artifacts.encodings import composed, lossless, low_rank, rows, sparse, svd
from deltadock.artifacts.encodings.composed import (
    encode_alias,
    encode_new_rows,
    encode_stack,
    encode_sum,
    encode_transposed,
)
from deltadock.artifacts.encodings.lossless import deflate
from deltadock.artifacts.encodings.low_rank import encode_low_rank
from deltadock.artifacts.encodings.record import (
    NUMPY_DTYPES,
    DecodedFactors,
    Encoded,
    FloatArray,
    Record,
    SegmentSpecs,
    decode_floats,
    encode_exact,
    encode_floats,
    shape_of,
)
from deltadock.artifacts.encodings.rows import (
    encode_rows,
    quantize_midrise,
    quantize_rows_midrise,
    stored_rows,
)
from deltadock.artifacts.encodings.sparse import encode_sparse, encode_sparse24
from deltadock.artifacts.encodings.svd import SvdMatrix, Vectors, encode_svd
from deltadock.errors import InvalidArtifact

__all__ = [
    "DELTA_ENCODINGS",
    "FACTORED_ENCODINGS",
    "NUMPY_DTYPES",
    "DecodedFactors",
    "Encoded",
    "FloatArray",
    "SvdMatrix",
    "Vectors",
    "decode_dense",
    "decode_factors",
    "decode_floats",
    "decode_rows",
    "decode_svd",
    "deflate",
    "encode_alias",
    "encode_exact",
    "encode_floats",
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
    "inflate",
    "parts",
    "quantize_midrise",
    "quantize_rows_midrise",
    "stored_array",
    "stored_rows",
]

MAX_DEPTH: Final = 4
"""Maximum nesting of encodings, the innermost one counted."""

_DECODERS: Final[dict[str, Callable[[Encoded], FloatArray]]] = {
    "svd": svd.decode,
    "rows": rows.decode_rows,
    "low-rank": low_rank.decode,
    "sparse24": sparse.decode_sparse24,
    "sparse": sparse.decode_sparse,
}

_SEGMENT_SPECS: Final[dict[str, Callable[[Record], SegmentSpecs]]] = {
    "svd": svd.segment_specs,
    "rows": rows.segment_specs,
    "low-rank": low_rank.segment_specs,
    "sparse24": sparse.segment_specs24,
    "sparse": sparse.segment_specs,
}

FACTORED_ENCODINGS: Final = frozenset({"svd", "low-rank"})
"""Encodings that `decode_factors` accepts."""

DELTA_ENCODINGS: Final = _DECODERS.keys() | composed.COMPOSED - {"new-rows"}
"""Encodings that represent a delta; only these can be parts of a composition."""


def expected_segments(record: Record) -> SegmentSpecs:
    """The dtype and shape of every segment that a record implies, validated before decoding.

    Time and memory are linear in the size of the record.

    Raises:
        InvalidArtifact: this version does not understand the record.
    """
    try:
        return _specs(record, 1, may_deflate=True)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArtifact("A tensor's record is incomplete or of the wrong types.") from error


def _specs(record: Record, depth: int, *, may_deflate: bool) -> SegmentSpecs:
    if "deflated" in record:
        if not may_deflate:
            raise InvalidArtifact("A part of a deflated record is deflated.")
        return lossless.segment_specs(record, _inflated_specs(record, depth, may_deflate=False))
    return _inflated_specs(record, depth, may_deflate=may_deflate)


def _inflated_specs(record: Record, depth: int, *, may_deflate: bool) -> SegmentSpecs:
    kind = record["kind"]
    if record["dtype"] not in DTYPE_BITS:
        raise InvalidArtifact("A record has an unknown dtype.")
    if kind in _SEGMENT_SPECS:
        return _SEGMENT_SPECS[kind](record)
    if kind in composed.COMPOSED:
        if depth == MAX_DEPTH:
            raise InvalidArtifact("A record is nested too deeply.")
        segments: SegmentSpecs = {}
        for number, part in enumerate(composed.part_records(record)):
            if part is None:
                continue
            if part["kind"] not in DELTA_ENCODINGS:
                raise InvalidArtifact(f"A record has a part of kind {part['kind']!r}.")
            for key, spec in _specs(part, depth + 1, may_deflate=may_deflate).items():
                segments[f"{number}/{key}"] = spec
        if kind == "new-rows":
            segments["data"] = composed.added_rows_spec(record)
        return segments
    if depth == 1 and kind == "exact":
        return {"data": (record["dtype"], shape_of(record))}
    if depth == 1 and kind == "alias":
        shape_of(record)
        if not isinstance(record["of"], str) or "deflated" in record:
            raise TypeError("not an alias")
        return {}
    raise InvalidArtifact(
        f"The artifact stores a tensor as {kind!r}, which this version cannot read. Upgrade it."
    )


def inflate(encoded: Encoded) -> Encoded:
    """Undo `deflate`; an encoding that is not deflated is returned unchanged.

    Raises:
        InvalidArtifact: a segment does not inflate to the size its record implies.
    """
    if "deflated" not in encoded.record:
        return encoded
    record = {key: value for key, value in encoded.record.items() if key != "deflated"}
    return Encoded(
        record,
        {
            key: lossless.inflate_segment(encoded.segments[key], dtype, shape)
            for key, (dtype, shape) in expected_segments(record).items()
        },
    )


def stored_array(encoded: Encoded) -> npt.NDArray[Any]:
    """The uncoded data of an `exact` tensor, or the added rows of a `new-rows` tensor.

    Raises:
        InvalidArtifact: the segment does not inflate to the size its record implies.
    """
    record, data = encoded.record, encoded.segments["data"]
    if "deflated" not in record:
        return data
    is_new_rows = record["kind"] == "new-rows"
    shape = composed.added_rows_spec(record)[1] if is_new_rows else shape_of(record)
    return lossless.inflate_segment(data, record["dtype"], shape)


def parts(encoded: Encoded) -> Iterator[Encoded | None]:
    """The parts of a composed encoding, in order; None where the tensor is unchanged.

    Parts of a deflated encoding are yielded deflated, so that one can be inflated at a time.
    """
    segments: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, data in encoded.segments.items():
        number, _, part_key = key.partition("/")
        segments[number][part_key] = data
    for index, record in enumerate(composed.part_records(encoded.record)):
        if record is None:
            yield None
            continue
        part_segments = segments[str(index)]
        if "deflated" in encoded.record:
            sizes = {key: len(data) for key, data in part_segments.items()}
            yield Encoded({**record, "deflated": sizes}, part_segments)
        else:
            yield Encoded(record, part_segments)


def decode_dense(encoded: Encoded) -> FloatArray:
    """Decode a delta to float32, in the tensor's shape.

    Memory is linear in the number of elements, or in 4096 times the sides of a small matrix.
    Callers that have the base compare shapes first.

    Raises:
        InvalidArtifact: the encoding represents no delta (exact, alias, new-rows), or its segments
            contradict each other.
    """
    kind, shape = encoded.record["kind"], encoded.record["shape"]
    if kind not in DELTA_ENCODINGS:
        raise InvalidArtifact(f"A tensor stored as {kind!r} has no delta; merge it with its base.")
    if 0 in shape:
        # The other dimensions may be arbitrarily large.
        return np.zeros(shape, np.float32)
    if kind in _DECODERS:
        return _DECODERS[kind](inflate(encoded))
    return composed.combine(
        encoded.record,
        (None if part is None else decode_dense(part) for part in parts(encoded)),
    )


def decode_svd(encoded: Encoded) -> SvdMatrix:
    """The codes passed to `encode_svd`, in stored order, without row and column scales."""
    return svd.decode_svd(inflate(encoded))


def decode_rows(encoded: Encoded) -> FloatArray:
    """The delta passed to `encode_rows`, (rows, columns) float32."""
    return rows.decode_rows(inflate(encoded))


def decode_factors(encoded: Encoded) -> DecodedFactors:
    """The float32 factors of an `svd` or `low-rank` tensor; their product is the delta."""
    decode = svd.decode_factors if encoded.record["kind"] == "svd" else low_rank.decode_factors
    return decode(inflate(encoded))
