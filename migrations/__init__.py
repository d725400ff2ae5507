"""Alembic's migrations; `storage.database.migrate(url)` applies them."""
