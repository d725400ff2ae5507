"""The Python client, the `deltadock` command and what starts whole systems."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.loading import load_delta

__all__ = ["load_delta"]


def __getattr__(name: str) -> Any:
    # When it is asked for: it brings torch and transformers, which most commands do without.
    if name == "load_delta":
        from client.loading import load_delta

        return load_delta
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
