"""Lossless compression: each segment is replaced by its zlib stream (RFC 1950)."""

import zlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.encodings.record import (
    NUMPY_DTYPES,
    Encoded,
    Record,
    SegmentSpecs,
    count_of,
)
from deltadock.errors import InvalidArtifact

MAX_RATIO: Final = 1032
"""Maximum number of bytes that one byte of a deflate stream can expand to."""

OVERHEAD: Final = 64
"""Bytes allowed for zlib's header and checksum."""


def deflate(encoded: Encoded) -> Encoded:
    """Compress every segment of an encoding with zlib.

    Raises:
        ValueError: the encoding is already deflated.
    """
    if "deflated" in encoded.record:
        raise ValueError("The encoding is deflated already.")
    segments: dict[str, npt.NDArray[Any]] = {
        key: np.frombuffer(zlib.compress(np.asarray(data, order="C").tobytes(), 9), np.uint8)
        for key, data in encoded.segments.items()
    }
    sizes = {key: len(data) for key, data in segments.items()}
    return Encoded({**encoded.record, "deflated": sizes}, segments)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array, computed in Python integers, which do not overflow."""
    size = np.dtype(NUMPY_DTYPES[dtype]).itemsize
    for dimension in shape:
        size *= dimension
    return size


def segment_specs(record: Record, inflated: SegmentSpecs) -> SegmentSpecs:
    """The segments of a deflated record, given those of the record without `deflated`.

    Raises:
        InvalidArtifact: `deflated` does not list these segments, or a size is impossible.
    """
    sizes = record["deflated"]
    if not isinstance(sizes, dict) or sizes.keys() != inflated.keys():
        raise InvalidArtifact("A deflated record does not give the size of each segment.")
    for key, (dtype, shape) in inflated.items():
        stored, full = count_of(sizes[key]), _nbytes(dtype, shape)
        if not full / MAX_RATIO <= stored <= full + full // 1000 + OVERHEAD:
            raise InvalidArtifact("A deflated segment cannot have the size that its record gives.")
    return {key: ("U8", (sizes[key],)) for key in inflated}


def inflate_segment(data: npt.NDArray[Any], dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Decompress a segment, allocating no more than its dtype and shape require.

    Raises:
        InvalidArtifact: the data are not a zlib stream of exactly this size.
    """
    size = _nbytes(dtype, shape)
    stream = zlib.decompressobj()
    try:
        # A limit of 0 would mean no limit.
        raw = stream.decompress(data.tobytes(), size + 1)
    except zlib.error as error:
        raise InvalidArtifact("A deflated segment is not zlib data.") from error
    if len(raw) != size or not stream.eof or stream.unused_data:
        raise InvalidArtifact("A deflated segment is not of the size that its record implies.")
    return np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(shape)
