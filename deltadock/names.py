"""Names: `project/model`, a version of it `project/model:3`, an alias `project/model@prod`.

The bare name means the alias `default`.
"""

import re
from typing import Final, NamedTuple

PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
"""Of a name: the project, or the model."""
DIGEST: Final = r"[0-9a-f]{64}"
"""A SHA-256."""
ALIAS: Final = r"[a-z][a-z0-9._-]{0,63}"
DEFAULT: Final = "default"

PART_PATTERN: Final = rf"^{PART}$"
DIGEST_PATTERN: Final = rf"^{DIGEST}$"
NAME_PATTERN: Final = rf"^{PART}/{PART}$"
TAG_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
NODE_PATTERN: Final = r"^node_[a-z0-9]{1,32}$"

VERSIONED: Final = rf"{PART}/{PART}(?:(?::|@v)[1-9][0-9]{{0,8}}|@{ALIAS})?"
"""Of a name with or without a version or an alias."""
ALIAS_PATTERN: Final = rf"^(?!v[0-9]+$){ALIAS}$"

SOURCE_PATTERN: Final = r"^(?:file:///|s3://[^/]|hf://[^/@]+/[^/@]+(?:@.|$))"
"""Of the places that uploads are imported from."""

_VERSION: Final = re.compile(r"v[0-9]+")
_REFERENCE: Final = re.compile(
    rf"(?P<name>{PART}/{PART})(?:(?::|@v)(?P<version>[1-9][0-9]{{0,8}})|@(?P<alias>{ALIAS}))?"
)


class ModelReference(NamedTuple):
    """A name with the version or else the alias that it selects."""

    name: str
    version: int | None
    alias: str


def parse_reference(text: str) -> ModelReference | None:
    """The reference that `text` writes; None if it is none."""
    match = _REFERENCE.fullmatch(text)
    if match is None or (match["alias"] and _VERSION.fullmatch(match["alias"])):
        return None
    version = int(match["version"]) if match["version"] else None
    return ModelReference(match["name"], version, match["alias"] or DEFAULT)


def is_alias(text: str) -> bool:
    """Whether an alias may be called so; `v3` means a version."""
    return re.fullmatch(ALIAS, text) is not None and _VERSION.fullmatch(text) is None
