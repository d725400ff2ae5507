"""The attacks by name; each module beside this one adds its own."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.serial import pack_header
from tests.artifacts.make_golden import MANIFEST

ATTACKS: Final[dict[str, Callable[[], bytes]]] = {}
"""Files that must be refused: name of the trick to what makes the file."""

DEFUSED: Final[dict[str, Callable[[], bytes]]] = {}
"""Files that are read like any other, at no more cost than any other."""

Make = Callable[[], bytes]
Segments = Mapping[str, tuple[str, npt.NDArray[Any]]]


def attack(make: Make) -> Make:
    """Register a trick under its function's name."""
    ATTACKS[make.__name__] = make
    return make


def defused(make: Make) -> Make:
    """Register a trick that comes to nothing."""
    DEFUSED[make.__name__] = make
    return make


def add_all(tricks: Mapping[str, Make]) -> None:
    """Register tricks that one line tells."""
    ATTACKS.update(tricks)


def forged(record: Any, segments: Segments, **others: Any) -> bytes:
    """A file with one tensor `t`, further `others`, and every hash right."""
    named = {f"t:{key}": segment for key, segment in segments.items()}
    hashes = {
        key: hashlib.sha256(data.tobytes()).hexdigest() for key, (_, data) in segments.items()
    }
    manifest = {**MANIFEST, "tensors": {"t": {**record, "sha256": hashes}, **others}}
    document = json.dumps(manifest)
    digest = hashlib.sha256(document.encode()).hexdigest()
    metadata = {"format": "deltadock/1", "manifest": document, "manifest_sha256": digest}
    head, order = pack_header(named, metadata)
    return head + b"".join(named[name][1].tobytes() for name in order)


def words(count: int) -> tuple[str, npt.NDArray[np.uint32]]:
    """A packed segment of zeros."""
    return "U32", np.zeros(count, np.uint32)


def halves(*shape: int) -> tuple[str, npt.NDArray[np.float16]]:
    """Scales of one."""
    return "F16", np.ones(shape, np.float16)
