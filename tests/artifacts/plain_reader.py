"""A reader of delta files made from docs/format.md alone: no numpy, nothing of this project."""

import json
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

from tests.artifacts.support import split

Matrix = list[list[float]]
Fetch = Callable[[str], list[Any]]

FORMS = {
    "BOOL": "?", "U8": "B", "I8": "b", "F8_E4M3": "B", "F8_E5M2": "B", "U16": "H", "I16": "h",
    "F16": "e", "BF16": "H", "U32": "I", "I32": "i", "F32": "f", "U64": "Q", "I64": "q", "F64": "d",
}  # fmt: skip
PLANES = {3: [2, 1], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1]}


def unpack(words: list[int], count: int, n: int, bits: int) -> list[list[int]]:
    """The vectors of one run, whose words are taken from the front of `words`."""
    vectors = [[0] * n for _ in range(count)]
    start, below = 0, bits
    for plane in PLANES.get(bits, [bits]):
        below -= plane
        for vector in vectors:
            for e in range(n):
                word = words[start + e * plane // 32]
                vector[e] += (word >> plane * (e % (32 // plane)) & (2**plane - 1)) << below
            start += math.ceil(n * plane / 32)
    del words[: 32 * math.ceil(start / 32)]
    return vectors


def centre(bits: int) -> float:
    return (2**bits - 1) / 2


def svd(record: Any, fetch: Fetch) -> Matrix:
    h_out, h_in = record["shape"]
    sides = {}
    for side, n in (("v", h_in), ("u", h_out)):
        words, vectors = fetch(side), []
        for run in record["ranks"]:
            bits = run[f"{side}_bits"]
            for codes in unpack(words, run["count"], n, bits):
                vectors.append([code - centre(bits) for code in codes])
                if record["grid"] == "zeros":
                    zero = fetch(f"{side}.zero")[len(vectors) - 1]
                    vectors[-1] = [code - zero for code in codes]
        assert words == []
        sides[side] = vectors
    gain = record["gain"] if record["grid"] == "midrise" else 1
    s = [value * gain for value in fetch("s")]
    rows = fetch("row_scale") if record.get("row_scale") else [1] * h_out
    columns = fetch("column_scale") if record.get("column_scale") else [1] * h_in
    return [
        [
            rows[i] * columns[j] * sum(u[i] * k * v[j]
                                       for u, k, v in zip(sides["u"], s, sides["v"], strict=True))
            for j in range(h_in)
        ]
        for i in range(h_out)
    ]  # fmt: skip


def rows(record: Any, fetch: Fetch) -> Matrix:
    height, width = record["shape"]
    delta = [[0.0] * width for _ in range(height)]
    index = fetch("index") if record.get("index") else list(range(height))
    columns = fetch("column_scale") if record.get("column_scale") else [1] * width
    words, stored = fetch("codes"), 0
    for run in record["runs"]:
        for codes in unpack(words, run["count"], width, run["bits"]):
            shared = record["scale"] == "shared"
            scale = fetch("scale")[0] if shared else fetch("scale")[stored] * record["gain"]
            delta[index[stored]] = [
                scale * (code - centre(run["bits"])) * column
                for code, column in zip(codes, columns, strict=True)
            ]
            stored += 1
    assert words == []
    return delta


def low_rank(record: Any, fetch: Fetch) -> Matrix:
    (h_out, h_in), rank = record["shape"], record["rank"]
    u, v = fetch("u"), fetch("v")
    if record["factor_dtype"] == "BF16":
        u, v = ([struct.unpack("<f", struct.pack("<I", x << 16))[0] for x in f] for f in (u, v))
    return [
        [
            record["scaling"] * sum(u[i * rank + k] * v[k * h_in + j] for k in range(rank))
            for j in range(h_in)
        ]
        for i in range(h_out)
    ]


def sparse(record: Any, fetch: Fetch) -> Matrix:
    (height, width), bits = record["shape"], record["bits"]
    delta = [[0.0] * width for _ in range(height)]
    fours = math.ceil(width / 4)
    if record["kind"] == "sparse24":
        where = [
            (i, 4 * (number // 2) + position)
            for i, row in enumerate(unpack(fetch("positions"), height, 2 * fours, 2))
            for number, position in enumerate(row)
        ]
        codes = [code for row in unpack(fetch("codes"), height, 2 * fours, bits) for code in row]
    else:
        marks = unpack(fetch("bitmap"), height, width, 1)
        where = [(i, j) for i, row in enumerate(marks) for j, mark in enumerate(row) if mark]
        codes = unpack(fetch("codes"), 1, record["kept"], bits)[0]
    groups = math.ceil(width / record["group"])
    for (i, j), code in zip(where, codes, strict=True):
        if j < width:
            scale = fetch("scale")[i * groups + j // record["group"]] * record["gain"]
            delta[i][j] = (code - centre(bits)) * scale
    return delta


def delta_of(record: Any, fetch: Fetch) -> Any:
    """The delta of one record, nested lists; None for a part without one."""
    if record is None:
        return None
    kinds = {"svd": svd, "rows": rows, "low-rank": low_rank, "sparse24": sparse, "sparse": sparse}
    if record["kind"] in kinds:
        return kinds[record["kind"]](record, fetch)
    found = [
        delta_of(part, lambda key, number=number: fetch(f"{number}/{key}"))
        for number, part in enumerate(record["parts"])
    ]
    if record["kind"] == "sum":
        return [[sum(entry) for entry in zip(*r, strict=True)] for r in zip(*found, strict=True)]
    if record["kind"] == "transposed":
        return [list(column) for column in zip(*found[0], strict=True)]
    if record["kind"] == "stack":
        _, height, width = record["shape"]
        return [[[0.0] * width] * height if part is None else part for part in found]
    assert record["kind"] == "new-rows"
    return found[0]


def dtype_of(record: Any, key: str) -> str:
    """The dtype of a segment by the tables of docs/format.md, where the file says U8."""
    kind, (number, _, inner) = record["kind"], key.partition("/")
    if inner:
        return dtype_of(record["parts"][int(number)], inner)
    if kind in {"exact", "new-rows"}:
        return str(record["dtype"])
    if kind == "low-rank":
        return str(record["factor_dtype"])
    if key == "index":
        return "I32"
    if key in {"u", "v", "codes", "bitmap", "positions"}:
        return "U32"
    wide = record.get("scale") == "shared" if key == "scale" else record.get("grid") == "zeros"
    return "F32" if wide and key in {"s", "scale"} else "F16"


def is_deflated(record: Any, key: str) -> bool:
    number, _, inner = key.partition("/")
    if "deflated" in record or not inner:
        return "deflated" in record
    return is_deflated(record["parts"][int(number)], inner)


def read(file: bytes) -> dict[str, Any]:
    """Every tensor's delta, or raw data where it is exact; (delta, data) where there are both."""
    header, data = split(file)
    records = json.loads(header["__metadata__"]["manifest"])["tensors"]

    def read_one(name: str) -> Any:
        record = records[name]
        if record["kind"] == "alias":
            return read_one(record["of"])

        def fetch(key: str) -> list[Any]:
            spec = header[f"{name}:{key}"]
            raw, dtype = data[slice(*spec["data_offsets"])], spec["dtype"]
            if is_deflated(record, key):
                raw, dtype = zlib.decompress(raw), dtype_of(record, key)
            return [value for (value,) in struct.iter_unpack("<" + FORMS[dtype], raw)]

        if record["kind"] == "exact":
            return fetch("data")
        delta = delta_of(record, fetch)
        return (delta, fetch("data")) if record["kind"] == "new-rows" else delta

    return {name: read_one(name) for name in records}
