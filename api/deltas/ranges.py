"""Byte ranges and validators of downloads (RFC 9110, sections 13 and 14)."""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from deltadock.errors import RangeNotSatisfiable

# Python refuses to parse integers of more than 4,300 digits.
_ONE_RANGE: Final = re.compile(r"bytes=\s*([0-9]{0,4000})-([0-9]{0,4000})\s*", re.IGNORECASE)


class ByteRange(NamedTuple):
    """Bytes `[start, end)`."""

    start: int
    end: int


def requested_range(headers: Mapping[str, str], size: int, etag: str) -> ByteRange | None:
    """The part asked for, or None for the whole.

    A malformed range, another unit and several ranges are ignored, as the RFC lets a server do;
    so is a range of a version (`If-Range`) that this is not.

    Raises:
        RangeNotSatisfiable: the range begins at or behind the end, or asks for the last 0 bytes.
    """
    header = headers.get("range")
    if header is None or headers.get("if-range", etag) != etag:
        return None
    match = _ONE_RANGE.fullmatch(header)
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, end = max(0, size - int(last)), size
        satisfiable = int(last) > 0 and size > 0
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
        satisfiable = start < size
    if not satisfiable:
        raise RangeNotSatisfiable(
            f"{header!r} lies outside the file, which has {size} bytes.", size=size
        )
    return ByteRange(start, end)


def is_unchanged(headers: Mapping[str, str], etag: str) -> bool:
    """Whether `If-None-Match` says that the client has this version already."""
    known = [tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")]
    return etag in known or known == ["*"]
