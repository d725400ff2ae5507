"""Where finished blocks are kept, so that an interrupted run goes on where it was."""

from typing import Protocol


class WorkStore(Protocol):
    """Keeps what was made of each block until the artifact is written."""

    def get(self, key: str) -> bytes | None:
        """What was put under `key`, or None."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`."""
        ...


class NoWorkStore:
    """Keeps nothing."""

    def get(self, key: str) -> bytes | None:
        return None

    def put(self, key: str, data: bytes) -> None:
        pass
