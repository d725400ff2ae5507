"""The format of API keys, and the HMAC that is stored of them.

    ddk_Zr5TnQ0a_9sX2...pLkR3nQ1
        |        |        +----- CRC-32 of all before it, 6 characters
        |        +-------------- 32 random characters, 190 bits
        +----------------------- prefix, 8 random characters: names the key in lists

Characters are base62. The checksum lets secret scanners recognise keys, and a mistyped key be
refused without a query.
"""

import hashlib
import hmac
import re
import secrets
import string
import zlib
from pathlib import Path
from typing import Final

from deltadock.settings import Settings
from deltadock.trust import kept_secret

ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
PREFIX_CHARACTERS: Final = 8
RANDOM_CHARACTERS: Final = 32
CHECKSUM_CHARACTERS: Final = 6

_KEY: Final = re.compile(
    rf"(ddk_[0-9A-Za-z]{{{PREFIX_CHARACTERS}}})_"
    rf"[0-9A-Za-z]{{{RANDOM_CHARACTERS}}}([0-9A-Za-z]{{{CHECKSUM_CHARACTERS}}})"
)


def new_key() -> str:
    """A new random key."""
    prefix, secret = (
        "".join(secrets.choice(ALPHABET) for _ in range(length))
        for length in (PREFIX_CHARACTERS, RANDOM_CHARACTERS)
    )
    body = f"ddk_{prefix}_{secret}"
    return body + _checksum(body)


def prefix_of(key: str) -> str | None:
    """The key's prefix, such as `ddk_Zr5TnQ0a`; None if it is not a well-formed key."""
    match = _KEY.fullmatch(key)
    if match is None or _checksum(key[:-CHECKSUM_CHARACTERS]) != match.group(2):
        return None
    return match.group(1)


def hmac_of(key: str, secret: str) -> str:
    """HMAC-SHA256 (hex) of the key under the server's secret."""
    return hmac.new(secret.encode(), key.encode(), hashlib.sha256).hexdigest()


def key_secret(settings: Settings) -> str:
    """The server's secret: the setting, else that of the home, made at its first use."""
    if settings.key_secret is not None:
        return settings.key_secret.get_secret_value()
    return kept_secret(settings.home / "key.secret")


def local_key_path(home: Path) -> Path:
    """The file in which `deltadock up` keeps the key of its own machine."""
    return home / "api.key"


def _checksum(text: str) -> str:
    number, digits = zlib.crc32(text.encode()), ""
    for _ in range(CHECKSUM_CHARACTERS):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
