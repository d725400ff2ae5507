"""Ids of rows and nodes: a prefix for the type and 26 random base32 characters."""

import secrets
from typing import Final

ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
RANDOM_CHARACTERS: Final = 26
"""130 bits: unique without a database round trip, and unguessable."""


def new_id(prefix: str) -> str:
    """A new id such as `dlt_k3v5...` for `prefix="dlt"`."""
    return f"{prefix}_{''.join(secrets.choice(ALPHABET) for _ in range(RANDOM_CHARACTERS))}"
