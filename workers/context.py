"""What the tasks of one worker process share."""

from dataclasses import dataclass
from functools import cache
from typing import Self

from deltadock.settings import Settings, get_settings
from deltadock.storage.blobs import BlobStore, make_blob_store
from deltadock.storage.database import Database


@dataclass(frozen=True)
class Context:
    """Settings, metadata and blobs."""

    settings: Settings
    database: Database
    blobs: BlobStore

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The context that the settings describe; nothing is contacted yet."""
        return cls(settings, Database(settings.sqlalchemy_url), make_blob_store(settings))


@cache
def get_context() -> Context:
    """The context of this process, made at first use: never before a fork."""
    return Context.of(get_settings())
