"""Exact tensors, and invalid records of every encoding."""

import copy
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.container import DTYPE_BITS
from deltadock.artifacts.encodings import NUMPY_DTYPES, encode_exact, expected_segments
from deltadock.errors import InvalidArtifact
from tests.artifacts.make_golden import tensors
from tests.artifacts.samples import assert_as_expected
from tests.artifacts.test_container import JSON


@pytest.mark.parametrize("dtype", DTYPE_BITS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 1, 2)])
def test_exact_keeps_every_byte(dtype: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    raw = np.arange(count).astype(np.dtype(NUMPY_DTYPES[dtype]))
    encoded = encode_exact(raw, dtype, shape)
    assert_as_expected(encoded)
    assert encoded.nbytes == count * DTYPE_BITS[dtype] // 8
    assert encoded.segments["data"].tobytes() == raw.tobytes()


RECORDS = {name: encoded.record for name, encoded in tensors().items()}

RUN = {"count": 2, "v_bits": 8, "u_bits": 3}
SVD = {"kind": "svd", "shape": [4, 6], "dtype": "BF16", "grid": "zeros", "ranks": [RUN]}
CENTRED = {**SVD, "grid": "midrise", "gain": 0.5, "row_scale": True}
ROWS = {
    "kind": "rows",
    "shape": [4, 6],
    "dtype": "BF16",
    "runs": [{"count": 2, "bits": 4}, {"count": 1, "bits": 2}],
    "scale": "row",
    "gain": 1.0,
    "index": True,
}
LOW_RANK = {
    "kind": "low-rank", "shape": [4, 6], "dtype": "BF16", "rank": 2, "scaling": 0.5,
    "factor_dtype": "BF16",
}  # fmt: skip
SPARSE24 = {
    "kind": "sparse24", "shape": [4, 6], "dtype": "BF16", "bits": 2, "group": 4, "gain": 1.0,
}  # fmt: skip
SPARSE = {**SPARSE24, "kind": "sparse", "kept": 5}
EXACT = {"kind": "exact", "shape": [4, 6], "dtype": "BF16"}
SUM = {**EXACT, "kind": "sum", "parts": [ROWS, SVD]}
STACK = {**EXACT, "kind": "stack", "shape": [3, 4, 6], "parts": [ROWS, None, SVD]}
TRANSPOSED = {**EXACT, "kind": "transposed", "shape": [6, 4], "parts": [ROWS]}
NEW_ROWS = {**EXACT, "kind": "new-rows", "shape": [9, 6], "base_rows": 4, "parts": [ROWS]}
ALIAS = {**EXACT, "kind": "alias", "of": "other"}
VALID = [SVD, CENTRED, ROWS, LOW_RANK, SPARSE24, SPARSE, EXACT, SUM, STACK, TRANSPOSED, NEW_ROWS]

INVALID: dict[str, Any] = {
    "null": None,
    "a number": 7,
    "text": "svd",
    "a list": [SVD],
    "empty": {},
    "kind unknown": {**EXACT, "kind": "lut"},
    "kind a list": {**EXACT, "kind": ["exact"]},
    "no shape": {"kind": "exact", "dtype": "BF16"},
    "shape null": {**EXACT, "shape": None},
    "shape text": {**EXACT, "shape": "46"},
    "dimension text": {**ROWS, "shape": ["4", "6"]},
    "dimension fraction": {**EXACT, "shape": [4.0, 6]},
    "dimension true": {**EXACT, "shape": [True, 6]},
    "dimension negative": {**EXACT, "shape": [-4, -6]},
    "dimension without end": {**EXACT, "shape": [2**48]},
    "too many elements": {**EXACT, "shape": [2**21, 2**20]},
    "too many elements of none": {**EXACT, "shape": [2**40, 0, 2]},
    "too many dimensions": {**EXACT, "shape": [1] * 17},
    "dtype unknown": {**EXACT, "dtype": "F24"},
    "dtype a list": {**EXACT, "dtype": ["BF16"]},
    "svd of one dimension": {**SVD, "shape": [24]},
    "svd of three dimensions": {**SVD, "shape": [2, 2, 6]},
    "svd without ranks": {**EXACT, "kind": "svd", "grid": "zeros"},
    "svd without grid": {key: value for key, value in SVD.items() if key != "grid"},
    "grid unknown": {**SVD, "grid": "lattice"},
    "grid without gain": {**SVD, "grid": "midrise"},
    "gain infinite": {**CENTRED, "gain": math.inf},
    "gain beyond float32": {**CENTRED, "gain": 1e39},
    "gain without end": {**CENTRED, "gain": 10**4000},
    "gain NaN": {**CENTRED, "gain": math.nan},
    "gain true": {**CENTRED, "gain": True},
    "flag a number": {**CENTRED, "row_scale": 1},
    "ranks a number": {**SVD, "ranks": 2},
    "ranks of numbers": {**SVD, "ranks": [2]},
    "width 0": {**SVD, "ranks": [{**RUN, "v_bits": 0}]},
    "width 9": {**SVD, "ranks": [{**RUN, "u_bits": 9}]},
    "width text": {**SVD, "ranks": [{**RUN, "u_bits": "8"}]},
    "width missing": {**SVD, "ranks": [{"count": 2, "v_bits": 8}]},
    "count 0": {**SVD, "ranks": [{**RUN, "count": 0}]},
    "count negative": {**SVD, "ranks": [RUN, {**RUN, "count": -1}]},
    "count fraction": {**SVD, "ranks": [{**RUN, "count": 2.5}]},
    "widths rising": {**SVD, "ranks": [{**RUN, "v_bits": 2}, RUN]},
    "widths twice": {**SVD, "ranks": [RUN, RUN]},
    "rows of width 0": {**ROWS, "runs": [{"count": 1, "bits": 0}]},
    "rows of width 16": {**ROWS, "runs": [{"count": 1, "bits": 16}]},
    "rows of rising widths": {**ROWS, "runs": [{"count": 1, "bits": 2}, {"count": 2, "bits": 4}]},
    "more rows than there are": {**ROWS, "runs": [{"count": 5, "bits": 4}]},
    "rows negative": {**ROWS, "runs": [{"count": -1, "bits": 4}]},
    "rows true": {**ROWS, "runs": [{"count": True, "bits": 4}]},
    "rows left out in silence": {**ROWS, "index": False},
    "rows with scales unknown": {**ROWS, "scale": "column"},
    "rank negative": {**LOW_RANK, "rank": -1},
    "scaling text": {**LOW_RANK, "scaling": "2"},
    "factors of integers": {**LOW_RANK, "factor_dtype": "I32"},
    "groups of none": {**SPARSE24, "group": 0},
    "groups negative": {**SPARSE, "group": -128},
    "sparse width 0": {**SPARSE24, "bits": 0},
    "more kept than there are": {**SPARSE, "kept": 25},
    "sum of none": {**SUM, "parts": []},
    "sum of many": {**SUM, "parts": [ROWS] * 9},
    "sum of null": {**SUM, "parts": [None]},
    "sum of text": {**SUM, "parts": ["rows"]},
    "sum of another shape": {**SUM, "parts": [ROWS, {**ROWS, "shape": [6, 4]}]},
    "parts an object": {**SUM, "parts": {"0": ROWS}},
    "stack too short": {**STACK, "parts": [ROWS]},
    "stack of another shape": {**STACK, "shape": [3, 6, 4]},
    "stack of nothing": {**STACK, "shape": [], "parts": []},
    "transposed null": {**TRANSPOSED, "parts": [None]},
    "transposed not": {**TRANSPOSED, "shape": [4, 6]},
    "fewer rows than the base": {**NEW_ROWS, "base_rows": 10},
    "new rows of another base": {**NEW_ROWS, "base_rows": 5},
    "exact part": {**SUM, "parts": [EXACT]},
    "alias of no name": {**ALIAS, "of": None},
    "alias deflated": {**ALIAS, "deflated": {}},
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_record_is_rejected(name: str) -> None:
    with pytest.raises(InvalidArtifact):
        expected_segments(INVALID[name])


@pytest.mark.parametrize("record", VALID, ids=lambda record: record["kind"])
def test_the_unedited_records_are_accepted(record: dict[str, Any]) -> None:
    assert expected_segments(record)


def test_an_alias_has_no_segments() -> None:
    assert expected_segments(ALIAS) == {}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    keys = list(value) if isinstance(value, dict) else []
    keys = list(range(len(value))) if isinstance(value, list) else keys
    return [path, *(found for key in keys for found in places(value[key], (*path, key)))]


HOSTILE = st.sampled_from(
    [0, 1, -1, 2**31, 2**47, 2**63, 10**400, 1e300, True, "svd", [], {}, [[]]]
)


@given(st.sampled_from(sorted(RECORDS)), st.data())
def test_a_mutated_record_is_rejected_or_accepted(name: str, data: st.DataObject) -> None:
    """With one or two values replaced, only the domain's error may be raised."""
    record = copy.deepcopy(RECORDS[name])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(record)[1:]))
        target = record
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = copy.deepcopy(data.draw(HOSTILE | JSON))
    tracemalloc.start()
    try:
        expected = expected_segments(record)
    except InvalidArtifact:
        return
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20
    for dtype, shape in expected.values():
        assert dtype in DTYPE_BITS
        assert all(isinstance(size, int) and size >= 0 for size in shape)
