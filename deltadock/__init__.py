"""Deltadock's public names.

- `Client`, `AsyncClient`: clients of a running Deltadock's REST interface.
- `load_delta`: load a delta into a `transformers` model in place; returns a `LoadedDelta`.
- `from_pretrained`: a fine-tuned model and its tokenizer, from its base and its delta.
- `DeltadockError`: base class of all errors, see `deltadock.errors`.

The clients and loaders are imported on first use, so that `import deltadock` loads neither httpx
nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from deltadock.errors import DeltadockError
from deltadock.extras import needed_extras
from deltadock.version import __version__

if TYPE_CHECKING:
    from deltadock.client.asynchronous import AsyncClient
    from deltadock.client.blocking import Client
    from deltadock.client.loading import LoadedDelta, from_pretrained, load_delta

__all__ = [
    "AsyncClient",
    "Client",
    "DeltadockError",
    "LoadedDelta",
    "__version__",
    "from_pretrained",
    "load_delta",
]

_LAZY: Final = {
    "AsyncClient": "deltadock.client.asynchronous",
    "Client": "deltadock.client.blocking",
    "LoadedDelta": "deltadock.client.loading",
    "from_pretrained": "deltadock.client.loading",
    "load_delta": "deltadock.client.loading",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with needed_extras():
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
