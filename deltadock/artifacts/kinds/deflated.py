"""Lossless compression of an encoding's segments: zlib data in place of what it holds."""

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.kinds.record import NUMPY_DTYPES, Encoded, Expected, Record, count_of
from deltadock.errors import InvalidArtifact

HIGHEST_RATIO = 1032
"""Bytes that one byte of zlib data can stand for, at most."""

OVERHEAD = 64
"""zlib's own bytes, and some more."""


def deflated(encoded: Encoded) -> Encoded:
    """The same encoding with every segment as zlib data.

    Raises:
        ValueError: it is deflated already.
    """
    if "deflated" in encoded.record:
        raise ValueError("The encoding is deflated already.")
    segments: dict[str, npt.NDArray[Any]] = {
        key: np.frombuffer(zlib.compress(np.asarray(data, order="C").tobytes(), 9), np.uint8)
        for key, data in encoded.segments.items()
    }
    sizes = {key: len(data) for key, data in segments.items()}
    return Encoded({**encoded.record, "deflated": sizes}, segments)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array, computed without overflow."""
    size = np.dtype(NUMPY_DTYPES[dtype]).itemsize
    for dimension in shape:
        size *= dimension
    return size


def expected(record: Record, raw: Expected) -> Expected:
    """The deflated segments that stand for those in `raw`.

    Raises:
        InvalidArtifact: the sizes are not of these segments, or cannot be.
    """
    sizes = record["deflated"]
    if not isinstance(sizes, dict) or sizes.keys() != raw.keys():
        raise InvalidArtifact("A deflated record does not give the size of each segment.")
    for key, (dtype, shape) in raw.items():
        stored, inflated = count_of(sizes[key]), nbytes(dtype, shape)
        if not inflated / HIGHEST_RATIO <= stored <= inflated + inflated // 1000 + OVERHEAD:
            raise InvalidArtifact("A deflated segment cannot have the size that its record gives.")
    return {key: ("U8", (sizes[key],)) for key in raw}


def inflate(data: npt.NDArray[Any], dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The array of a deflated segment; never more memory than its dtype and shape tell.

    Raises:
        InvalidArtifact: the data are not zlib data of exactly this size.
    """
    size = nbytes(dtype, shape)
    stream = zlib.decompressobj()
    try:
        # A limit of 0 would mean none.
        raw = stream.decompress(data.tobytes(), size + 1)
    except zlib.error as error:
        raise InvalidArtifact("A deflated segment is not zlib data.") from error
    if len(raw) != size or not stream.eof or stream.unused_data:
        raise InvalidArtifact("A deflated segment is not of the size that its record implies.")
    return np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(shape)
