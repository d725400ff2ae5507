"""Encodings of random codes, each with its delta computed in numpy."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.encodings import (
    NUMPY_DTYPES,
    Encoded,
    FloatArray,
    SvdMatrix,
    Vectors,
    decode_dense,
    encode_low_rank,
    encode_rows,
    encode_sparse,
    encode_sparse24,
    encode_svd,
    expected_segments,
)
from deltadock.artifacts.encodings.packing import CodeArray
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.serial import deserialize, serialize
from deltadock.artifacts.writer import write_artifact
from tests.artifacts.make_golden import MANIFEST

Float64 = npt.NDArray[np.float64]


class Sample(NamedTuple):
    """An encoding and its expected delta."""

    encoded: Encoded
    delta: Float64


def draw_codes(rng: np.random.Generator, bits: Any, shape: tuple[int, int]) -> CodeArray:
    """Codes of each row's width; 0 in rows of width 0."""
    widths = np.broadcast_to(np.asarray(bits), shape[:1])
    codes: CodeArray = (rng.integers(0, 256, shape) % 2 ** widths[:, None]).astype(np.uint8)
    return codes


def centred(codes: CodeArray, bits: Any) -> Float64:
    """Values of codes on the mid-rise grid."""
    widths = np.broadcast_to(np.asarray(bits, np.float64), codes.shape[:1])
    values: Float64 = codes - (2 ** widths[:, None] - 1) / 2
    return values


def vectors(
    rng: np.random.Generator, ranks: int, columns: int, *, midrise: bool = False
) -> Vectors:
    bits = rng.integers(1, 9, ranks)
    zero = None if midrise else rng.uniform(0, 200, ranks).astype(np.float16)
    return Vectors(draw_codes(rng, bits, (ranks, columns)), bits, zero)


def svd_matrix(
    ranks: int, h_out: int, h_in: int, seed: int = 0, *, midrise: bool = False
) -> SvdMatrix:
    rng = np.random.default_rng(seed)
    s = rng.normal(size=ranks).astype(np.float32)
    u = vectors(rng, ranks, h_out, midrise=midrise)
    return SvdMatrix(u, s, vectors(rng, ranks, h_in, midrise=midrise))


def sparse_rows(rows: int, columns: int, seed: int, scale: float = 1.0) -> FloatArray:
    rng = np.random.default_rng(seed)
    delta = rng.normal(scale=scale, size=(rows, columns)) * rng.integers(0, 2, (rows, 1))
    return delta.astype(np.float32)


def svd_sample(shape: tuple[int, int], rng: np.random.Generator, dtype: str = "BF16") -> Sample:
    """Either grid, with and without row and column scales."""
    midrise, by_row, by_column = rng.integers(0, 2, 3).astype(bool)
    matrix = svd_matrix(
        int(rng.integers(0, 6)), *shape, int(rng.integers(1 << 31)), midrise=midrise
    )
    row_scale = rng.uniform(0.5, 2, shape[0]) if by_row else None
    column_scale = rng.uniform(0.5, 2, shape[1]) if by_column else None
    sides = []
    for side in (matrix.u, matrix.v):
        codes = side.codes.astype(np.float64)
        sides.append(
            centred(side.codes, side.bits) if side.zero is None else codes - side.zero[:, None]
        )
    delta = (sides[0].T * matrix.s) @ sides[1]
    delta = delta * (1 if row_scale is None else row_scale[:, None])
    delta = delta * (1 if column_scale is None else column_scale)
    return Sample(encode_svd(matrix, dtype, {"damping": 0.5}, row_scale, column_scale), delta)


def rows_sample(shape: tuple[int, int], rng: np.random.Generator, dtype: str = "BF16") -> Sample:
    """Any widths, sorted or not; scales of any magnitude."""
    bits = rng.integers(0 if rng.integers(2) else 1, 9, shape[0])
    bits = np.sort(bits)[::-1] if rng.integers(2) else bits
    codes = draw_codes(rng, bits, shape)
    size = 1 if rng.integers(2) else shape[0]
    scale = rng.normal(size=size) * 10.0 ** rng.integers(-9, 4)
    column_scale = rng.uniform(0.5, 2, shape[1]) if rng.integers(2) else None
    delta = centred(codes, bits) * scale[:, None] * (bits > 0)[:, None]
    delta = delta * (1 if column_scale is None else column_scale)
    return Sample(encode_rows(codes, bits, scale, dtype, {}, column_scale), delta)


def low_rank_sample(
    shape: tuple[int, int], rng: np.random.Generator, dtype: str = "BF16"
) -> Sample:
    """Factors that every float dtype represents exactly."""
    rank = int(rng.integers(0, 5))
    u = rng.integers(-128, 129, (shape[0], rank)) / 64
    v = rng.integers(-128, 129, (rank, shape[1])) / 64
    scaling = float(rng.integers(-8, 9)) / 4
    stored = str(rng.choice(["BF16", "F16", "F32"]))
    return Sample(encode_low_rank(u, v, scaling, dtype, {}, stored), scaling * u @ v)


def sparse_sample(shape: tuple[int, int], rng: np.random.Generator, dtype: str = "BF16") -> Sample:
    """2:4 or unstructured sparsity."""
    bits, group = int(rng.integers(1, 9)), int(rng.integers(1, 20))
    codes = draw_codes(rng, bits, shape)
    scale = rng.normal(size=(shape[0], -(-shape[1] // group))) * 10.0 ** rng.integers(-9, 4)
    structured = bool(rng.integers(2))
    if structured:
        order = np.argsort(rng.random((shape[0], -(-shape[1] // 4), 4)), axis=2)
        mask = (order < 2).reshape(shape[0], order.shape[1] * 4)[:, : shape[1]]
    else:
        mask = rng.random(shape) < rng.random()
    encode = encode_sparse24 if structured else encode_sparse
    wide = scale[:, np.arange(shape[1]) // group]
    return Sample(
        encode(codes, mask, scale, bits, group, dtype), centred(codes, bits) * wide * mask
    )


LEAVES = [svd_sample, rows_sample, low_rank_sample, sparse_sample]


def assert_as_expected(encoded: Encoded) -> None:
    """Check that a reader expects these segments, and that the record round-trips through JSON."""
    assert json.loads(json.dumps(encoded.record, allow_nan=False)) == encoded.record
    expected = expected_segments(encoded.record)
    assert expected.keys() == encoded.segments.keys()
    for key, (dtype, shape) in expected.items():
        segment = encoded.segments[key]
        assert (segment.dtype, segment.shape) == (np.dtype(NUMPY_DTYPES[dtype]), shape)
    assert encoded.nbytes == sum(segment.nbytes for segment in encoded.segments.values())


def read_back(encoded: Encoded) -> FloatArray:
    """The delta after a round trip through the work store and a file."""
    assert_as_expected(encoded)
    tensors, _ = deserialize(serialize({"t": encoded}, {}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.delta"
        write_artifact(path, tensors, MANIFEST)
        with Artifact(path) as artifact:
            artifact.check_intact()
            delta = artifact.dense("t")
    np.testing.assert_array_equal(delta, decode_dense(encoded))
    assert (delta.dtype, delta.shape) == (np.float32, tuple(encoded.record["shape"]))
    return delta


def assert_decodes(sample: Sample) -> None:
    """Check the decoded delta, up to float16 and float32 rounding."""
    peak = np.abs(sample.delta).max(initial=0.0)
    np.testing.assert_allclose(read_back(sample.encoded), sample.delta, rtol=2e-3, atol=2e-3 * peak)
