"""Edits of the golden file."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from tests.artifacts.make_golden import GOLDEN
from tests.artifacts.support import container, split

FILE = GOLDEN.read_bytes()
DATA_OFFSET = 8 + int.from_bytes(FILE[:8], "little")


def rewritten(edit: Callable[[Any, Any], object], data: bytes | None = None) -> bytes:
    """The golden file after `edit(header, manifest)`."""
    header, old = split(FILE)
    manifest = json.loads(header["__metadata__"]["manifest"])
    edit(header, manifest)
    if "manifest" in header.get("__metadata__", {}):
        document = json.dumps(manifest)
        digest = hashlib.sha256(document.encode(errors="surrogatepass")).hexdigest()
        header["__metadata__"].update(manifest=document, manifest_sha256=digest)
    return container(header, old if data is None else data)


def drop(*keys: str | int) -> Callable[[Any, Any], object]:
    def edit(_header: Any, manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return edit


def put(*keys: str | int, value: object) -> Callable[[Any, Any], object]:
    def edit(_header: Any, manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return edit
