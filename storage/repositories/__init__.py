"""Every query. A repository works in the session it is given and never commits."""

from storage.repositories.bases import BaseRepository
from storage.repositories.checkpoints import CheckpointRepository
from storage.repositories.deltas import DeltaRepository
from storage.repositories.jobs import JobRepository
from storage.repositories.nodes import NodeRepository
from storage.repositories.uploads import UploadRepository

__all__ = [
    "BaseRepository",
    "CheckpointRepository",
    "DeltaRepository",
    "JobRepository",
    "NodeRepository",
    "UploadRepository",
]
