"""What an arriving file is checked against while it streams."""

import codecs
import hashlib
from typing import Final, Protocol

from deltadock.artifacts.checkpoint import FileEntry, FileInspector, TensorEntry, check_path
from deltadock.errors import InvalidCalibration, TooLarge
from deltadock.storage.models import UploadKind

CALIBRATION_SUFFIXES: Final = (".txt", ".jsonl")
MAX_CALIBRATION_BYTES: Final = 64 << 20
"""Workers read a text whole; the tokens that calibration takes of it fit many times over."""


class Inspector(Protocol):
    """Sees every byte once, in order; raises as soon as they cannot be right."""

    def update(self, chunk: bytes, /) -> None:
        """Take the next bytes."""

    def finish(self) -> tuple[FileEntry, list[TensorEntry]]:
        """What the whole file was."""


def make_inspector(kind: UploadKind, path: str) -> Inspector:
    """The inspector for a file of an upload.

    Raises:
        UnsafeFile, InvalidCheckpoint, InvalidCalibration: the path alone rules the file out.
    """
    return FileInspector(path) if kind is UploadKind.CHECKPOINT else CalibrationInspector(path)


class CalibrationInspector:
    """Hashes a text and checks that it is UTF-8 and not too long."""

    def __init__(self, path: str) -> None:
        stem, dot, suffix = path.rpartition(".")
        if f"{dot}{suffix}" not in CALIBRATION_SUFFIXES:
            raise InvalidCalibration("A calibration text is one .txt or .jsonl file.")
        check_path(f"{stem}.txt")
        self._path = path
        self._size = 0
        self._hash = hashlib.sha256()
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def update(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if self._size + len(chunk) > MAX_CALIBRATION_BYTES:
            raise TooLarge(
                f"A calibration text may hold {MAX_CALIBRATION_BYTES} bytes, far more than "
                "calibration reads. Upload a part of it."
            )
        self._decode(chunk)
        self._hash.update(chunk)
        self._size += len(chunk)

    def finish(self) -> tuple[FileEntry, list[TensorEntry]]:
        """The file's entry; a text has no tensors."""
        self._decode(b"", final=True)
        if not self._size:
            raise InvalidCalibration("The calibration text is empty.")
        return FileEntry(self._path, self._size, self._hash.hexdigest()), []

    def _decode(self, chunk: bytes, *, final: bool = False) -> None:
        try:
            self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise InvalidCalibration(
                f"The calibration text is not UTF-8 near byte {self._size + error.start}."
            ) from error
