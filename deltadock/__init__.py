"""Deltadock's public names.

`Client` talks to a running Deltadock; `load_delta` turns a `transformers` model into its fine-tune
and back. They are imported on first use: a process that needs neither loads no HTTP client and no
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from deltadock.errors import DeltadockError
from deltadock.version import __version__

if TYPE_CHECKING:
    from deltadock.client.http import Client
    from deltadock.client.loading import load_delta

__all__ = ["Client", "DeltadockError", "__version__", "load_delta"]

_LAZY: Final = {"Client": "deltadock.client.http", "load_delta": "deltadock.client.loading"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
