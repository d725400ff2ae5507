"""The safetensors parser: accepted files, and hostile ones."""

import hashlib
import itertools
import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.container import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    MAX_NAME,
    Header,
    StreamingInspector,
    header_length,
    parse_header,
)
from deltadock.errors import MalformedSafetensors
from tests.artifacts.support import container, entry

PRINTABLE = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


def inspect(file: bytes, *cuts: int) -> tuple[Header, dict[str, str]]:
    """The inspector's result for a file that arrives in pieces."""
    inspector = StreamingInspector()
    edges = [0, *sorted(cuts), len(file)]
    for begin, end in itertools.pairwise(edges):
        inspector.update(file[begin:end])
    return inspector.finish()


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A well-formed file; tensors may be scalars or empty, and the header in any order."""
    names = draw(st.lists(PRINTABLE, max_size=5, unique=True))
    header: dict[str, Any] = {}
    position = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = entry(dtype, shape, position, position + size)
        position += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(PRINTABLE, PRINTABLE, max_size=2))
    shuffled = dict(draw(st.permutations(list(header.items()))))
    return container(shuffled, draw(st.binary(min_size=position, max_size=position)))


def assert_consistent(header: Header, file_bytes: int) -> None:
    """Check that the tensors tile the data, each with the size of its shape."""
    assert header.data_offset + header.data_bytes == header.file_bytes == file_bytes
    position = 0
    for spec in header.tensors:
        assert spec.begin == position
        assert spec.nbytes == math.prod(spec.shape) * DTYPE_BITS[spec.dtype] // 8
        position = spec.end
    assert position == header.data_bytes


@given(files(), st.data())
def test_the_result_does_not_depend_on_chunking(file: bytes, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(file)), max_size=12))
    header, digests = inspect(file)
    assert inspect(file, *cuts) == (header, digests)
    assert inspect(file, *range(len(file))) == (header, digests)
    assert_consistent(header, len(file))
    assert digests == {
        spec.name: hashlib.sha256(
            file[header.data_offset + spec.begin : header.data_offset + spec.end]
        ).hexdigest()
        for spec in header.tensors
    }


@given(files())
def test_the_reference_accepts_what_we_accept(file: bytes) -> None:
    header, _ = inspect(file)
    theirs = dict(safetensors.deserialize(file))
    assert {spec.name: list(spec.shape) for spec in header.tensors} == {
        name: tensor["shape"] for name, tensor in theirs.items()
    }


def test_files_of_the_reference_are_accepted() -> None:
    tensors: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float16),
    }
    header, digests = inspect(safetensors.numpy.save(tensors, {"format": "np"}))
    assert header.metadata == {"format": "np"}
    assert {spec.name: spec.shape for spec in header.tensors} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert digests == {
        name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in tensors.items()
    }


SMALL = container(
    {
        "b": entry("F16", [3], 8, 14),
        "a": entry("F32", [2, 1], 0, 8),
    },
    bytes(range(14)),
)


def test_every_truncation_is_rejected() -> None:
    for length in range(len(SMALL)):
        with pytest.raises(MalformedSafetensors):
            inspect(SMALL[:length])


def test_every_changed_byte_of_the_header_is_refused_or_consistent() -> None:
    accepted = 0
    for position in range(len(SMALL) - 14):
        for value in set(range(256)) - {SMALL[position]}:
            file = SMALL[:position] + bytes([value]) + SMALL[position + 1 :]
            try:
                header, _ = inspect(file)
            except MalformedSafetensors:
                continue
            accepted += 1
            assert_consistent(header, len(file))
            safetensors.deserialize(file)
    # A different letter in a name, or another dtype of equal size, is still a valid file.
    assert accepted > 0


@given(st.binary(max_size=64))
def test_arbitrary_bytes_raise_only_our_error(file: bytes) -> None:
    for attempt in (file, container(file), container(b"{" + file + b"}")):
        with pytest.raises(MalformedSafetensors):
            inspect(attempt + b"trailing")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F3"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**63), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 2**63), min_size=2, max_size=2) | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON, max_size=3))
def test_arbitrary_headers_are_refused_or_consistent(header: Any) -> None:
    raw = json.dumps(header).encode()
    try:
        parsed = parse_header(raw)
    except MalformedSafetensors:
        return
    assert_consistent(parsed, 8 + len(raw) + parsed.data_bytes)


ONE = entry("U8", [4], 0, 4)
ATTACKS: dict[str, tuple[Any, bytes]] = {
    "duplicate tensor": (
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "duplicate key in an entry": (
        b'{"a":{"dtype":"U8","shape":[1],"shape":[4],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "overlap": ({"a": ONE, "b": entry("U8", [4], 2, 6)}, b"123456"),
    "same bytes twice": ({"a": ONE, "b": ONE}, b"1234"),
    "empty tensor inside another": ({"a": ONE, "b": entry("U8", [0], 2, 2)}, b"1234"),
    "gap between": ({"a": ONE, "b": entry("U8", [4], 5, 9)}, b"123456789"),
    "gap before": ({"a": entry("U8", [4], 1, 5)}, b"12345"),
    "trailing bytes": ({"a": ONE}, b"12345"),
    "data cut off": ({"a": ONE}, b"123"),
    "trailing bytes without tensors": ({}, b"1"),
    "offsets reversed": ({"a": entry("U8", [4], 4, 0)}, b"1234"),
    "offsets that do not fit the shape": ({"a": entry("U8", [4], 0, 3)}, b"123"),
    "three offsets": ({"a": {**ONE, "data_offsets": [0, 4, 4]}}, b"1234"),
    "size of 2**63": ({"a": entry("U8", [2**63], 0, 2**63)}, b""),
    "offset of 2**64 + 4": ({"a": entry("U8", [4], 2**64, 2**64 + 4)}, b"1234"),
    "product that wraps around": ({"a": entry("U8", [2**32, 2**32], 0, 0)}, b""),
    "product that wraps around, times zero": ({"a": entry("U8", [2**62, 4, 0], 0, 0)}, b""),
    "hundred dimensions": ({"a": entry("U8", [1] * 100, 0, 1)}, b"1"),
    "number of five thousand digits": (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "negative dimension": ({"a": entry("U8", [-2, -2], 0, 4)}, b"1234"),
    "negative offset": ({"a": entry("U8", [4], -4, 0)}, b"1234"),
    "true as a dimension": ({"a": {**ONE, "shape": [True, 4]}}, b"1234"),
    "false as an offset": ({"a": {**ONE, "data_offsets": [False, 4]}}, b"1234"),
    "fraction as a dimension": ({"a": {**ONE, "shape": [4.0]}}, b"1234"),
    "text as a dimension": ({"a": {**ONE, "shape": ["4"]}}, b"1234"),
    "NaN as a dimension": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
    "infinite offset": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,Infinity]}}', b"1234"),
    "shape is an object": ({"a": {**ONE, "shape": {"0": 4}}}, b"1234"),
    "entry is a list": ({"a": ["U8", [4], [0, 4]]}, b"1234"),
    "dtype missing": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"),
    "key unknown": ({"a": {**ONE, "strides": [1]}}, b"1234"),
    "dtype unknown": ({"a": entry("F24", [1], 0, 3)}, b"123"),
    "dtype is a list": ({"a": {**ONE, "dtype": ["U8"]}}, b"1234"),
    "metadata is a list": ({"__metadata__": [], "a": ONE}, b"1234"),
    "metadata holds a number": ({"__metadata__": {"n": 1}, "a": ONE}, b"1234"),
    "name with a line break": ({"a\nb": ONE}, b"1234"),
    "name with a NUL": ({"a\0b": ONE}, b"1234"),
    "name with half a surrogate pair": (b'{"\\ud800":' + json.dumps(ONE).encode() + b"}", b"1234"),
    "name without end": ({"a" * (MAX_NAME + 1): ONE}, b"1234"),
    "deep nesting": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "deep nesting unclosed": (b'{"a":' + b'{"a":' * 200_000, b""),
    "list at the top": (b"[]", b""),
    "number at the top": (b"17", b""),
    "space before the object": (b' {"a":1}', b""),
    "byte order mark": (b"\xef\xbb\xbf{}", b""),
    "UTF-16": (json.dumps({"a": ONE}).encode("utf-16-le"), b"1234"),
    "not UTF-8": (b'{"\xff":' + json.dumps(ONE).encode() + b"}", b"1234"),
    "surrogate in UTF-8": (b'{"\xed\xa0\x80":' + json.dumps(ONE).encode() + b"}", b"1234"),
    "two documents": (b"{}{}", b""),
    "NUL padding": (b"{}\0\0", b""),
    "comment": (b"{/**/}", b""),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_rejected(name: str) -> None:
    file = container(*ATTACKS[name])
    with pytest.raises(MalformedSafetensors) as refused:
        inspect(file)
    assert len(refused.value.message) < 1_000, "a message does not repeat what was sent"
    with pytest.raises(MalformedSafetensors):
        inspect(file, *range(0, min(len(file), 300)))


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_impossible_header_lengths_are_refused_on_the_eighth_byte(length: int) -> None:
    prefix = length.to_bytes(8, "little")
    with pytest.raises(MalformedSafetensors):
        header_length(prefix)
    inspector = StreamingInspector()
    inspector.update(prefix[:7])
    with pytest.raises(MalformedSafetensors):
        inspector.update(prefix[7:])


@pytest.mark.parametrize("length", [3, 1_000, MAX_HEADER_BYTES])
def test_a_header_longer_than_its_file_is_rejected(length: int) -> None:
    with pytest.raises(MalformedSafetensors, match="ends inside its header"):
        inspect(length.to_bytes(8, "little") + b"{}")


def test_a_lying_header_is_refused_before_its_data() -> None:
    inspector = StreamingInspector()
    with pytest.raises(MalformedSafetensors):
        inspector.update(container({"a": entry("U8", [4], 0, 2**40)}))


def test_memory_is_bounded_by_the_header() -> None:
    size = 1 << 25
    chunk = bytes(1 << 16)
    tracemalloc.start()
    try:
        inspector = StreamingInspector()
        inspector.update(container({"a": entry("U8", [size], 0, size)}))
        for _ in range(size // len(chunk)):
            inspector.update(chunk)
        inspector.finish()
        # An announced header that never arrives takes no memory either.
        StreamingInspector().update(MAX_HEADER_BYTES.to_bytes(8, "little") + b"{")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18
