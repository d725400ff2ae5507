"""Immutable blobs named by SHA-256, in a local folder or on S3."""

from deltadock.settings import Settings
from deltadock.storage.blobs.parts import PartedFile
from deltadock.storage.blobs.port import BlobStore, BlobWriter, StoredEntry

__all__ = ["BlobStore", "BlobWriter", "PartedFile", "StoredEntry", "make_blob_store"]


def make_blob_store(settings: Settings) -> BlobStore:
    """The store that the settings select. Connects to nothing and creates nothing yet."""
    if settings.blob_store == "s3":
        # boto3 is slow to import.
        from deltadock.storage.blobs.s3 import S3BlobStore

        return S3BlobStore(settings)
    from deltadock.storage.blobs.local import LocalBlobStore

    return LocalBlobStore(settings.blob_folder)
