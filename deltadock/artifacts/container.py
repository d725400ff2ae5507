"""The safetensors container: a strict header parser, and a streaming validator and hasher.

Layout of a file (little endian): 8 bytes `n`, the header's length; `n` bytes of JSON; the data.
The header maps a tensor's name to its dtype, shape and `[begin, end)` in the data; the intervals
must tile the data without gap or overlap. The header is validated before any tensor data is read,
in time and memory linear in its bounded size.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltadock.errors import MalformedSafetensors

MAX_HEADER_BYTES: Final = 100_000_000
"""The reference implementation's limit."""

MAX_NAME: Final = 512
"""Maximum characters of a tensor's name, which is quoted in messages and stored in databases."""

MAX_TENSORS: Final = 100_000
"""Maximum tensors per file: several times the count of the largest models."""

DTYPE_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip

NON_FINITE_BITS: Final = {
    "F8_E4M3": ("u1", 0x7F), "F8_E5M2": ("u1", 0x7C), "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x47EFFFFFF0000000),
}  # fmt: skip
"""Unsigned type of a float's bits, and the least bits without sign of a NaN or an infinity; of F64,
those of the least value that overflows float32, which everything is computed in."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file: name, dtype, shape and byte range `[begin, end)` within the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header; `tensors` are in the order of their data."""

    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str]
    data_offset: int
    data_bytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.data_offset + self.data_bytes


def header_length(prefix: bytes) -> int:
    """The header's length, from the file's first 8 bytes.

    Raises:
        MalformedSafetensors: fewer than 8 bytes, or a length below 2 or above the limit.
    """
    if len(prefix) < 8:
        raise MalformedSafetensors(
            "The file is shorter than 8 bytes, so it is not safetensors. Was it cut off?"
        )
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise MalformedSafetensors(
            "The file does not begin with the length of a safetensors header, so it is not "
            "safetensors (PyTorch .bin files must be converted first)."
        )
    return length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise MalformedSafetensors("The header names a tensor twice.")
    return entries


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _spec(name: str, entry: object) -> TensorSpec:
    if len(name) > MAX_NAME or not name.isprintable():
        raise MalformedSafetensors(
            f"A tensor's name is not plain text of at most {MAX_NAME} characters: {name[:40]!r}."
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedSafetensors(
            f"Tensor {name!r} needs exactly the keys dtype, shape and data_offsets."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise MalformedSafetensors(f"Tensor {name!r} has an unknown dtype: {dtype!r:.40}.")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, shape)):
        raise MalformedSafetensors(f"Tensor {name!r} has an invalid shape.")
    # Empty dimensions count as one here: loaders multiply the others in 64 bits.
    if math.prod(max(size, 1) for size in shape) * DTYPE_BITS[dtype] // 8 >= 2**63:
        raise MalformedSafetensors(f"The shape {shape} of tensor {name!r} is too large.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise MalformedSafetensors(f"Tensor {name!r} has invalid data_offsets.")
    begin, end = offsets
    expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != expected:
        raise MalformedSafetensors(
            f"Tensor {name!r} of shape {shape} and dtype {dtype} takes {expected} bytes, but its "
            f"data_offsets span {end - begin}."
        )
    return TensorSpec(name, dtype, tuple(shape), begin, end)


def parse_header(raw: bytes) -> Header:
    """Parse and validate the JSON header `raw` (without its 8-byte length).

    Raises:
        MalformedSafetensors: the header is invalid, or its tensors leave gaps or overlap.
    """
    if raw[:1] != b"{":
        raise MalformedSafetensors("The header does not begin with '{'.")
    # Counted before parsing, which takes many times the header's size in memory.
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise MalformedSafetensors(f"The header names more than {MAX_TENSORS} tensors.")
    try:
        # Decoded explicitly: json.loads would detect UTF-16 and accept lone surrogates.
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise MalformedSafetensors("The header is not valid JSON.") from error
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedSafetensors("__metadata__ must map text to text.")
    specs = sorted(
        (_spec(name, entry) for name, entry in parsed.items()),
        key=lambda spec: (spec.begin, spec.end),
    )
    position = 0
    for spec in specs:
        if spec.begin != position:
            kind = "overlaps its neighbour" if spec.begin < position else "leaves a gap before it"
            raise MalformedSafetensors(f"The data of tensor {spec.name!r} {kind}.")
        position = spec.end
    return Header(tuple(specs), metadata, 8 + len(raw), position)


class StreamingInspector:
    """Validates and hashes a safetensors file as it streams, in chunks of any size.

    Pass every chunk to `update`, then call `finish`. The header is validated as soon as it is
    complete, so an invalid file is rejected before its data is stored. Only the header is held in
    memory.
    """

    def __init__(self, non_finite: set[str] | None = None) -> None:
        """Add the names of float tensors that hold NaN or an infinity to `non_finite`, if given."""
        self._non_finite = non_finite
        self._partial = b""
        self._head = bytearray()
        self._header: Header | None = None
        self._header_bytes = 8
        self._pending: Iterator[TensorSpec] = iter(())
        self._current: TensorSpec | None = None
        self._hash = hashlib.sha256()
        self._position = 0
        self._digests: dict[str, str] = {}

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        """Process the next bytes of the file.

        Raises:
            MalformedSafetensors: as soon as the bytes cannot be a prefix of a valid file.
        """
        view = memoryview(chunk)
        while self._header is None and view:
            take = view[: self._header_bytes - len(self._head)]
            self._head += take
            view = view[len(take) :]
            if len(self._head) == 8 == self._header_bytes:
                self._header_bytes = 8 + header_length(bytes(self._head))
            elif len(self._head) == self._header_bytes:
                self._header = parse_header(bytes(self._head[8:]))
                self._head.clear()
                self._pending = iter(self._header.tensors)
                self._advance()
        if self._header is not None:
            self._consume(view)

    def _advance(self) -> None:
        """Finish each tensor that ends at this position and start the next; some may be empty."""
        while True:
            if self._current is not None:
                if self._position < self._current.end:
                    return
                self._digests[self._current.name] = self._hash.hexdigest()
            self._current = next(self._pending, None)
            self._hash = hashlib.sha256()
            if self._current is None:
                return

    def _consume(self, view: memoryview) -> None:
        while len(view):
            if self._current is None:
                raise MalformedSafetensors("The file is longer than its header says.")
            take = view[: self._current.end - self._position]
            self._hash.update(take)
            if self._non_finite is not None and self._current.dtype in NON_FINITE_BITS:
                self._check_finite(self._current, take, self._non_finite)
            self._position += len(take)
            view = view[len(take) :]
            self._advance()

    def _check_finite(self, tensor: TensorSpec, chunk: memoryview, found: set[str]) -> None:
        kind, least = NON_FINITE_BITS[tensor.dtype]
        # A chunk may begin and end within an element; a tensor ends with a whole one.
        data = self._partial + chunk if self._partial else chunk
        whole = len(data) - len(data) % np.dtype(kind).itemsize
        self._partial = bytes(data[whole:])
        bits = np.frombuffer(data[:whole], kind)
        if ((bits & (np.iinfo(kind).max >> 1)) >= least).any():
            found.add(tensor.name)

    def finish(self) -> tuple[Header, dict[str, str]]:
        """The header and each tensor's SHA-256 (hex), after the whole file.

        Raises:
            MalformedSafetensors: the file ended early.
        """
        if self._header is None:
            raise MalformedSafetensors("The file ends inside its header. Was it cut off?")
        if self._current is not None:
            raise MalformedSafetensors(
                f"The file ends inside tensor {self._current.name!r}: "
                f"{self._position} of {self._header.data_bytes} data bytes are "
                "there. Was it cut off? Save or copy it again."
            )
        return self._header, self._digests
