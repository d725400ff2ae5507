"""Ids of rows: a prefix that says what the row is, and 26 random base32 characters."""

import secrets
from typing import Final

ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
RANDOM_CHARACTERS: Final = 26
"""130 bits: ids are unique without asking the database, and cannot be guessed."""


def new_id(prefix: str) -> str:
    """A new id such as `dlt_k3v5...` for `prefix="dlt"`."""
    return f"{prefix}_{''.join(secrets.choice(ALPHABET) for _ in range(RANDOM_CHARACTERS))}"
