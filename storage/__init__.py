"""Metadata (SQLAlchemy models, repositories, sessions) and blobs (local folder, S3)."""
