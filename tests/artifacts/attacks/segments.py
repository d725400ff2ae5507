"""Tricks with what segments hold: indices, marks, zlib data. They show when it is decoded."""

import zlib
from typing import Any

import numpy as np

from tests.artifacts.attacks.records import ONE_SCALE, rows
from tests.artifacts.attacks.registry import attack, defused, forged, halves, words


def indexed(*index: int) -> bytes:
    """Two stored rows of three, said to be these."""
    run = [{"count": 2, "bits": 1}]
    segments = {
        "codes": words(32),
        "scale": ONE_SCALE,
        "index": ("I32", np.array(index, np.int32)),
    }
    return forged(rows(3, 5, run), segments)


@attack
def index_out_of_range() -> bytes:
    return indexed(0, 3)


@attack
def index_far_out_of_range() -> bytes:
    return indexed(0, 2**31 - 1)


@attack
def index_negative() -> bytes:
    """As numpy counts, -1 is the last row."""
    return indexed(0, -1)


@attack
def index_twice() -> bytes:
    return indexed(1, 1)


@attack
def bitmap_that_marks_more_than_there_are() -> bytes:
    record = {"kind": "sparse", "shape": [2, 8], "dtype": "F32", "bits": 1, "group": 8, "gain": 1,
              "kept": 1}  # fmt: skip
    marks = ("U32", np.full(32, 0xFF, np.uint32))
    return forged(record, {"bitmap": marks, "codes": words(32), "scale": halves(2, 1)})


@attack
def positions_that_do_not_ascend() -> bytes:
    record = {"kind": "sparse24", "shape": [2, 8], "dtype": "F32", "bits": 1, "group": 8, "gain": 1}
    segments = {"positions": words(32), "codes": words(32), "scale": halves(2, 1)}
    return forged(record, segments)


def packed(raw: Any, size: int) -> bytes:
    """An exact tensor of `size` bytes whose deflated data are `raw`."""
    data = np.frombuffer(raw, np.uint8)
    record = {"kind": "exact", "shape": [size], "dtype": "U8", "deflated": {"data": len(data)}}
    return forged(record, {"data": ("U8", data)})


@attack
def zip_bomb_under_a_small_shape() -> bytes:
    """60 kB that inflate to 60 MB, where 60 kB are announced."""
    return packed(zlib.compress(bytes(60_000_000), 9), 60_000)


@attack
def zip_bomb_under_a_shape_that_it_cannot_have() -> bytes:
    return packed(zlib.compress(bytes(1000)), HUGE_SIZE)


HUGE_SIZE = 2**40


@attack
def zip_of_nothing() -> bytes:
    return packed(zlib.compress(b""), 1)


@attack
def zip_with_bytes_behind() -> bytes:
    return packed(zlib.compress(bytes(100)) + b"more", 100)


@attack
def zip_cut_off() -> bytes:
    return packed(zlib.compress(bytes(range(100)))[:-1], 100)


@attack
def zip_with_a_wrong_checksum() -> bytes:
    return packed(zlib.compress(bytes(range(100)))[:-1] + b"\0", 100)


@attack
def zip_that_needs_a_dictionary() -> bytes:
    made = zlib.compressobj(zdict=b"deltadock")
    return packed(made.compress(bytes(range(100))) + made.flush(), 100)


@attack
def raw_deflate_without_zlib() -> bytes:
    made = zlib.compressobj(wbits=-15)
    return packed(made.compress(bytes(range(100))) + made.flush(), 100)


@defused
def many_bombs_of_one_small_sum() -> bytes:
    """512 parts of 64 x 1024 codes in 8 bits: 32 MB, were they inflated at once."""
    run = [{"count": 64, "bits": 8}]
    record: Any = rows(64, 1024, run, index=False)
    raw: dict[str, Any] = {"codes": words(16384)[1], "scale": ONE_SCALE[1]}
    for _ in range(3):
        record = {"kind": "sum", "shape": [64, 1024], "dtype": "F32", "parts": [record] * 8}
        raw = {f"{k}/{key}": data for k in range(8) for key, data in raw.items()}
    segments = {
        key: ("U8", np.frombuffer(zlib.compress(data.tobytes(), 9), np.uint8))
        for key, data in raw.items()
    }
    sizes = {key: len(data) for key, (_, data) in segments.items()}
    return forged({**record, "deflated": sizes}, segments)
