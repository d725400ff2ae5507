"""Deltadock's public names.

- `Client`: client of a running Deltadock's REST interface.
- `load_delta`: load a delta into a `transformers` model in place; returns a `LoadedDelta`.
- `DeltadockError`: base class of all errors, see `deltadock.errors`.

`Client` and `load_delta` are imported on first use, so that `import deltadock` loads neither httpx
nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from deltadock.errors import DeltadockError
from deltadock.version import __version__

if TYPE_CHECKING:
    from deltadock.client.http import Client
    from deltadock.client.loading import LoadedDelta, load_delta

__all__ = ["Client", "DeltadockError", "LoadedDelta", "__version__", "load_delta"]

_LAZY: Final = {
    "Client": "deltadock.client.http",
    "LoadedDelta": "deltadock.client.loading",
    "load_delta": "deltadock.client.loading",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
