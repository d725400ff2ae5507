"""Parse and validate the manifest in a delta file's header metadata."""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from deltadock.artifacts.checkpoint import check_path
from deltadock.artifacts.container import MAX_NAME
from deltadock.errors import InvalidArtifact, InvalidCheckpoint

FORMAT: Final = "deltadock/1"
"""Format name and major version; a minor version may follow, as in `deltadock/1.2`."""

WITH_DEFLATED_FILES: Final = "deltadock/1.1"
"""The format of a file whose manifest has deflated files, which readers of 1.0 reject."""

DEFLATED_FROM: Final = 4096
"""Bytes from which on a carried text file is deflated."""

MAX_CARRIED_BYTES: Final = 32 * 2**20
"""Maximum size of the files that a delta carries, together."""

READABLE: Final = re.compile(r"deltadock/1(\.[1-9][0-9]{0,3})?", re.ASCII)

METADATA_KEYS: Final = frozenset({"format", "manifest", "manifest_sha256"})
"""The keys of the header's metadata."""

REQUIRED_KEYS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "base_digest": str,
    "method": str,
    "tensors": dict,
    "files": dict,
    "checkpoint_bytes": int,
    "parameters": int,
    "nominal_bits": (int, float, type(None)),
}

DISPLAYED_KEYS: Final = ("base_digest", "finetuned_digest", "model_type", "method", "version")
"""Keys whose values are displayed unescaped."""


def readable_format(manifest: Mapping[str, Any]) -> str:
    """The format string for a file with this manifest.

    A minor version is stored in the manifest too, where the manifest's hash covers it.

    Raises:
        InvalidArtifact: this version does not support it.
    """
    version = manifest.get("format", FORMAT)
    if not isinstance(version, str) or not READABLE.fullmatch(version):
        raise InvalidArtifact(f"A manifest names an impossible format: {version!r:.40}.")
    return version


def stored_file(text: str) -> str | dict[str, Any]:
    """A carried text file as the manifest has it: as it is, or deflated if that is shorter."""
    raw = text.encode()
    if len(raw) < DEFLATED_FROM:
        return text
    deflated = base64.b64encode(zlib.compress(raw, 9)).decode()
    return {"deflated": deflated, "bytes": len(raw)} if len(deflated) < len(raw) else text


def file_text(stored: str | Mapping[str, Any]) -> str:
    """Undo `stored_file`, allocating no more than the size that the manifest gives.

    Raises:
        InvalidArtifact: the data are not a zlib stream of UTF-8 text of this size.
    """
    if isinstance(stored, str):
        return stored
    size, stream = stored["bytes"], zlib.decompressobj()
    try:
        # A limit of 0 would mean no limit.
        raw = stream.decompress(base64.b64decode(stored["deflated"], validate=True), size + 1)
        text = raw.decode()
    except (ValueError, zlib.error) as error:
        raise InvalidArtifact("A deflated file is not zlib data of UTF-8 text.") from error
    if len(raw) != size or not stream.eof or stream.unused_data:
        raise InvalidArtifact("A deflated file is not of the size that the manifest gives.")
    return text


def parse_manifest(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The manifest in a header's metadata; unknown keys are preserved.

    Raises:
        InvalidArtifact: the manifest is damaged, invalid, or of another major version.
    """
    manifest = _load(metadata)
    for key, kind in REQUIRED_KEYS.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise InvalidArtifact(f"The manifest's {key!r} is missing or wrong.")
    for key in ("checkpoint_bytes", "parameters"):
        if not 0 <= manifest[key] < 2**63:
            raise InvalidArtifact(f"The manifest's {key!r} is impossible.")
    for key in DISPLAYED_KEYS:
        _check_name(manifest.get(key, "-"), f"The manifest's {key!r}")
    for name in manifest["tensors"]:
        _check_name(name, "A tensor's name")
    matrices = manifest.get("matrices", {})
    if not isinstance(matrices, dict) or not all(isinstance(m, dict) for m in matrices.values()):
        raise InvalidArtifact("The manifest's 'matrices' is wrong.")
    _check_files(manifest["files"], manifest.get("binary_files", {}))
    return manifest


def _load(metadata: Mapping[str, str]) -> dict[str, Any]:
    version = metadata.get("format", "")
    if not READABLE.fullmatch(version):
        advice = "Upgrade Deltadock." if version.startswith("deltadock/") else "Is it a checkpoint?"
        raise InvalidArtifact(
            f"It has the format {version!r:.40}; this version reads {FORMAT!r}. {advice}"
        )
    if metadata.keys() != METADATA_KEYS:
        raise InvalidArtifact("It has no manifest with its hash, or more beside them.")
    document = metadata["manifest"]
    try:
        if hashlib.sha256(document.encode()).hexdigest() != metadata["manifest_sha256"]:
            raise InvalidArtifact("The manifest is damaged. Fetch it again.")
        manifest = json.loads(
            document,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_no_duplicates,
        )
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact("It has no readable manifest.") from error
    if not isinstance(manifest, dict):
        raise InvalidArtifact("The manifest is not an object.")
    if readable_format(manifest) != version:
        raise InvalidArtifact("The manifest is of another minor version than its file.")
    return manifest


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError(f"{text:.20} is no float64")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("duplicate key")
    return entries


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable():
        raise InvalidArtifact(f"{what} is not plain text of at most {MAX_NAME} characters.")


def _check_files(texts: Mapping[str, Any], binary: Any) -> None:
    if not isinstance(binary, dict) or texts.keys() & binary.keys():
        raise InvalidArtifact("The manifest's 'binary_files' is wrong.")
    deflated = {name: content for name, content in texts.items() if _is_deflated(content)}
    for name, content in [*texts.items(), *binary.items()]:
        if not _may_include(name, None if name in deflated else content):
            raise InvalidArtifact(f"{name!r:.80} is no file that a delta may carry.")
    if sum(content["bytes"] for content in deflated.values()) > MAX_CARRIED_BYTES:
        raise InvalidArtifact(f"Its files are over {MAX_CARRIED_BYTES} bytes when inflated.")
    for content in deflated.values():
        file_text(content)
    for name, encoded in binary.items():
        try:
            base64.b64decode(encoded, validate=True)
        except (ValueError, TypeError) as error:
            raise InvalidArtifact(f"{name!r} is not base64.") from error


def _is_deflated(content: Any) -> bool:
    """Whether this is a deflated file's entry, of a size that is allowed."""
    if not isinstance(content, dict):
        return False
    size = content.get("bytes")
    return (
        content.keys() == {"deflated", "bytes"}
        and isinstance(content["deflated"], str)
        and type(size) is int
        and 0 <= size <= MAX_CARRIED_BYTES
    )


def _may_include(name: str, text: object) -> bool:
    """Whether a delta may include this file: config or tokenizer text, never weights."""
    if "/" in name or name.endswith((".safetensors", ".safetensors.index.json")):
        return False
    try:
        check_path(name)
        if isinstance(text, str):
            text.encode()
    except (InvalidCheckpoint, UnicodeEncodeError):
        return False
    return isinstance(text, str | None)
