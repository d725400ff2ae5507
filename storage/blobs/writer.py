"""Writing with all or nothing: what is not committed is discarded."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

Chunk = bytes | bytearray | memoryview


class Writer(ABC):
    """Takes bytes; leaving the `with` block without a commit discards them."""

    @abstractmethod
    def write(self, *chunks: Chunk) -> None:
        """Append the chunks."""

    @abstractmethod
    def discard(self) -> None:
        """Drop uncommitted bytes. Raises nothing: the sweeper drops what a failing store keeps."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()
