"""Safetensors files built by hand, including invalid ones."""

import json
from typing import Any

Json = Any


def container(header: Json, data: bytes = b"") -> bytes:
    """A file of this header (JSON-able, or the raw bytes) and this data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def split(file: bytes) -> tuple[Json, bytes]:
    """Header (parsed) and data of a well-formed file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> Json:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
