"""The files of jobs on this machine: a folder per attempt.

No two attempts share a folder: a worker that has lost its lease unnoticed may still be writing, and
one that has ended a job may still be removing. What an attempt has fetched goes to the next one by
renaming the folder, which only one process can do.
"""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from deltadock.settings import Settings
from deltadock.storage.leases import died_here

LEFT: Final = "left"
"""In an owner's place: the attempt has ended, and the job has not."""
DROPPED: Final = "dropped"
"""In a job's place: being removed."""


class AttemptFiles:
    """Files of the job's attempt by `owner`."""

    def __init__(self, settings: Settings, job_id: str, owner: str) -> None:
        self._attempts = _attempts(settings)
        self._job_id = job_id
        self._folder = self._of(owner)

    def enter(self) -> Path:
        """The folder, with what another attempt on this machine has left, if one has."""
        self._attempts.mkdir(parents=True, exist_ok=True)
        for other in self._attempts.glob(f"{self._job_id}.*"):
            owner = other.name.removeprefix(f"{self._job_id}.")
            if (owner == LEFT or died_here(owner)) and _renamed(other, self._folder):
                break
        self._folder.mkdir(exist_ok=True)
        return self._folder

    def leave(self) -> None:
        """Leave the files for another attempt."""
        if not _renamed(self._folder, self._of(LEFT)):
            self.drop()

    def drop(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _of(self, owner: str) -> Path:
        return self._attempts / f"{self._job_id}.{owner}"


def drop_unneeded(settings: Settings, needed: Callable[[str, str | None], bool]) -> int:
    """Remove the folders that no attempt will use; returns how many.

    Args:
        settings: of this machine's workers.
        needed: whether a job's files are, given its id and their owner, or None for those that an
            attempt has left.
    """
    dropped = 0
    for folder in _attempts(settings).glob("*"):
        job_id, _, owner = folder.name.partition(".")
        if job_id != DROPPED and needed(job_id, None if owner == LEFT else owner):
            continue
        # Renamed first, since another attempt may enter it at the same time.
        renamed = folder.with_name(f"{DROPPED}.{uuid.uuid4().hex}")
        if _renamed(folder, renamed):
            shutil.rmtree(renamed, ignore_errors=True)
            dropped += 1
    return dropped


def _attempts(settings: Settings) -> Path:
    return settings.cache_folder / "attempts"


def _renamed(folder: Path, target: Path) -> bool:
    """Rename a folder; False if another process has, or the target has files."""
    try:
        folder.rename(target)
    except OSError:
        return False
    return True
