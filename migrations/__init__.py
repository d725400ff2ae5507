"""Alembic's migrations; `deltadock.storage.database.migrate(url)` applies them."""
