"""Ways to damage a delta file, each decided by a random generator alone."""

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.artifacts.support import container, split

VALUES: Final[list[Any]] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 127, 128, 255, 256, 4096,
    65535, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**40 + 1, 2**48, 2**53, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**30, 0.0, 0.5, 1.0, -0.0, 1e-45, 3.5e38, 1e308, "", "0", "a", "svd", "rows",
    "low-rank", "sparse", "sparse24", "sum", "stack", "transposed", "new-rows", "alias", "exact",
    "zeros", "midrise", "row", "shared", "U8", "F16", "BF16", "F32", "U32", "I32", "F8_E4M3", "\0",
    "\ud800", "../x.json", "é", "x" * 600, [], {}, [[]], [{}], [0], [2**40, 2**40], [0, 2**40],
    [2**40, 0], [1] * 17, {"kind": "sum"}, {"count": 1, "bits": 1},
]  # fmt: skip
"""Replacement values."""

TOKENS: Final = [
    b"", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1e999", b"NaN", b"Infinity",
    b"null", b"\x00", b"\xff", b"\xed\xa0\x80", b"\\u0041", b"\\ud800", b" ", b"\t", b"[[[[[[[[",
    b'"a":1,', b"9" * 30, b"/**/", b"\xef\xbb\xbf",
]  # fmt: skip

Parts = tuple[Any, Any, bytes]
"""A file's header and manifest, parsed, and its data."""


def parts_of(file: bytes) -> Parts:
    header, data = split(file)
    return header, json.loads(header["__metadata__"]["manifest"]), data


def _join(header: Any, manifest: Any, data: bytes) -> bytes:
    """A file with this manifest and its correct hash."""
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        document = json.dumps(manifest)
        metadata["manifest"] = document
        metadata["manifest_sha256"] = hashlib.sha256(document.encode()).hexdigest()
    return container(header, data)


def _some_tensors(rng: random.Random, whole: Parts) -> Parts:
    """The file reduced to one to three of its tensors and the targets of their aliases."""
    header, manifest, data = whole
    records = manifest["tensors"]
    names = rng.sample(sorted(records), rng.randint(1, 3))
    names += [records[name]["of"] for name in names if "of" in records[name]]
    kept = {
        name: spec for name, spec in header.items() if name.rpartition(":")[0] in names
    }  # fmt: skip
    specs: dict[str, Any] = {"__metadata__": dict(header["__metadata__"])}
    pieces, position = [], 0
    for name, spec in sorted(kept.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = spec["data_offsets"]
        specs[name] = {**spec, "data_offsets": [position, position + end - begin]}
        pieces.append(data[begin:end])
        position += end - begin
    chosen = {**manifest, "tensors": {name: records[name] for name in names}}
    return _copy(specs), _copy(chosen), b"".join(pieces)


def _copy(tree: Any) -> Any:
    return json.loads(json.dumps(tree))


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found: Any = ()
    if isinstance(tree, dict):
        found = list(tree.items())
    elif isinstance(tree, list):
        found = list(enumerate(tree))
    for key, value in found:
        yield tree, key
        yield from _nodes(value)


def _damage(rng: random.Random, tree: Any) -> None:
    """Mutate one to three values of a JSON tree: replace, increment, delete or copy."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        nodes = list(_nodes(tree))
        if not nodes:
            return
        parent, key = rng.choice(nodes)
        value, action = parent[key], rng.random()
        if action < 0.35 and isinstance(value, int):
            parent[key] = value + rng.choice([-1, 1, 2, -value, value, 2**32, 2**63])
        elif action < 0.65:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif action < 0.75:
            del parent[key]
        elif action < 0.9:
            other, place = rng.choice(nodes)
            parent[key] = copy.deepcopy(other[place])
        elif isinstance(parent, dict):
            parent[rng.choice(["x", "deflated", "of", "parts", "kind"])] = value
        else:
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(value))


def _random_bytes(rng: random.Random, parts: Parts) -> bytes:
    raw = rng.randbytes(rng.randrange(200))
    shape = rng.randrange(4)
    if shape == 0:
        return raw
    if shape == 1:
        return container(raw)
    return container((b"{" + raw + b"}") if shape == 2 else b'{"__metadata__":{' + raw + b"}}")


def _raw(rng: random.Random, parts: Parts) -> bytes:
    """Flip, delete, insert or truncate bytes anywhere."""
    file = bytearray(_join(*parts))
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(8 if rng.random() < 0.1 else max(len(file), 1))
        action = rng.random()
        if action < 0.6 and at < len(file):
            file[at] ^= 1 << rng.randrange(8)
        elif action < 0.8:
            del file[at : at + rng.choice([1, 2, 8, len(file)])]
        else:
            file[at:at] = rng.randbytes(rng.choice([1, 8, 128]))
    return bytes(file)


def _header_text(rng: random.Random, parts: Parts) -> bytes:
    """Insert tokens into the header's text and correct its length."""
    header, data = split(_join(*parts))
    raw = bytearray(json.dumps(header, separators=(",", ":")).encode())
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(raw))
        raw[at : at + rng.choice([0, 1, 4])] = rng.choice(TOKENS)
    return container(bytes(raw), data)


def _header_values(rng: random.Random, parts: Parts) -> bytes:
    header, manifest, data = parts
    _damage(rng, header)
    return container(header, data) if rng.random() < 0.5 else _join(header, manifest, data)


def _manifest_values(rng: random.Random, parts: Parts) -> bytes:
    header, manifest, data = parts
    _damage(rng, rng.choice([manifest, manifest["tensors"], manifest["tensors"]]))
    return _join(header, manifest, data)


def _both(rng: random.Random, parts: Parts) -> bytes:
    """Replace one number throughout records, shapes and sizes: consistent lies."""
    header, manifest, data = parts
    numbers = sorted({n for _, n in map(_value, _nodes(manifest["tensors"])) if n})
    old, new = rng.choice(numbers or [1]), rng.choice([0, 1, 2, 3, 8, 2**20, 2**40])
    for tree in (header, manifest["tensors"]):
        for parent, key in list(_nodes(tree)):
            if _value((parent, key))[1] == old:
                parent[key] = new
    position = 0
    for spec in header.values():
        if "data_offsets" in spec:
            size = 1
            for side in spec["shape"]:
                size *= side
            size *= {"U8": 1, "F16": 2, "BF16": 2, "I64": 8}.get(spec["dtype"], 4)
            spec["data_offsets"] = [position, position + size]
            position += size
    return _join(header, manifest, (data + bytes(4096))[: min(position, 8192)])


def _value(node: tuple[Any, Any]) -> tuple[Any, int]:
    value = node[0][node[1]]
    return node, value if isinstance(value, int) and not isinstance(value, bool) else 0


def _data(rng: random.Random, parts: Parts) -> bytes:
    """Change data, usually with correct hashes, as a malicious writer would."""
    header, manifest, data = parts
    other = bytearray(data)
    for _ in range(rng.choice([1, 4, 64])):
        if other:
            other[rng.randrange(len(other))] = rng.choice([0, 1, 127, 128, 254, 255])
    if rng.random() < 0.7:
        for full, spec in header.items():
            name, _, key = full.rpartition(":")
            if full != "__metadata__":
                piece = bytes(other[slice(*spec["data_offsets"])])
                manifest["tensors"][name]["sha256"][key] = hashlib.sha256(piece).hexdigest()
    return _join(header, manifest, bytes(other))


MUTATIONS: Final[list[Callable[[random.Random, Parts], bytes]]] = [
    _random_bytes, _raw, _header_text, _header_values, _manifest_values, _manifest_values, _both,
    _data,
]  # fmt: skip


def case(seed: int, number: int, wholes: list[Parts]) -> tuple[str, bytes]:
    """The mutation's name and the mutated file."""
    rng = random.Random(f"{seed}/{number}")
    mutation = rng.choice(MUTATIONS)
    parts = _some_tensors(rng, rng.choice(wholes))
    return mutation.__name__.strip("_"), mutation(rng, parts)
