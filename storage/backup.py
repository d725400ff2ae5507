"""Backup and restore of the database: a zip file with one NDJSON file per table.

    manifest.json     {"format": 1, "revision", "version", "created_at",
                       "tables": {name: {"rows", "sha256"}}}
    <table>.ndjson    one row a line: {column: value}, times in ISO 8601, by primary key

The file is the same for SQLite and Postgres, so that it also moves a registry from one to the
other. It holds no blobs; after a restore, `missing_blobs` lists those that the store lacks.
"""

import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

from sqlalchemy import (
    Connection,
    Integer,
    Table,
    bindparam,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.orm import Session

from deltadock.errors import Conflict, InvalidInput
from deltadock.storage.blobs.local import NO_HARD_LINKS, sync_folder
from deltadock.storage.database import Database, current_revision, head_revision, migrate
from deltadock.storage.repositories.audit import record
from deltadock.storage.tables import AuditAction, TableRow, UtcDateTime
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.version import __version__

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
BATCH: Final = 500
Row = dict[str, Any]


def backup(database: Database, path: Path) -> dict[str, int]:
    """Write every table at one moment to a new file; returns the number of rows by table.

    The file has secrets of webhooks, so that only its owner may read it. It is on the disk when
    this returns.

    Raises:
        Conflict: the file exists, or the database is of another version of Deltadock.
    """
    check_revision(database)
    # Of its own: another backup to this name may run at the same time.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    if path.exists():
        raise _exists(path)
    try:
        with database.snapshot() as connection, _new_file(partial) as file:
            tables = _write(connection, file)
            file.flush()
            os.fsync(file.fileno())
        _name(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return {name: entry["rows"] for name, entry in tables.items()}


def _name(partial: Path, path: Path) -> None:
    """Give a file its name, durably.

    Raises:
        Conflict: another file has it.
    """
    try:
        try:
            os.link(partial, path)  # fails if it exists, unlike a rename
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            _new_file(path).close()
            partial.replace(path)
    except FileExistsError as error:
        raise _exists(path) from error
    sync_folder(path.parent)


def _exists(path: Path) -> Conflict:
    return Conflict(f"{path} exists already. Choose another name; backups are not overwritten.")


def check_revision(database: Database) -> None:
    """Check that the database has this version's schema.

    Raises:
        Conflict: it has another one.
    """
    found, wanted = current_revision(database.engine), head_revision()
    if found != wanted:
        raise Conflict(
            f"The database is at revision {found}, and this version of Deltadock needs {wanted}. "
            "Run `deltadock migrate`, or use the version that the database belongs to."
        )


def _new_file(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _write(connection: Connection, file: IO[bytes]) -> dict[str, Row]:
    tables = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for table in TableRow.metadata.sorted_tables:
            digest, count = hashlib.sha256(), 0
            rows = connection.execution_options(yield_per=BATCH).execute(
                select(table).order_by(*table.primary_key.columns)
            )
            with archive.open(f"{table.name}.ndjson", "w", force_zip64=True) as entry:
                for row in rows.mappings():
                    line = json.dumps(dict(row), default=datetime.isoformat).encode() + b"\n"
                    digest.update(line)
                    entry.write(line)
                    count += 1
            tables[table.name] = {"rows": count, "sha256": digest.hexdigest()}
        manifest = {
            "format": FORMAT,
            "revision": head_revision(),
            "version": __version__,
            "created_at": datetime.now().astimezone().isoformat(),
            "tables": tables,
        }
        archive.writestr(MANIFEST, json.dumps(manifest, indent=2))
    return tables


def restore(url: str, path: Path) -> dict[str, int]:
    """Fill an empty database, which is migrated first, from a backup; all of it or nothing.

    Returns the number of rows by table.

    Raises:
        InvalidInput: the file is no backup, damaged, or of another schema.
        Conflict: the database is not empty.
    """
    with _open(path) as archive:
        manifest = _check(archive, path)
        migrate(url)
        database = Database(url)
        try:
            with database.engine.begin() as connection:
                _require_empty(connection)
                for table in TableRow.metadata.sorted_tables:
                    _fill(connection, table, _rows(archive, table))
                with Session(connection) as session:
                    record(
                        session, LOCAL_TENANT, AuditAction.RESTORE, path.name,
                        created_at=manifest["created_at"],
                    )  # fmt: skip
                    session.flush()
        finally:
            database.dispose()
    return {name: entry["rows"] for name, entry in manifest["tables"].items()}


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f"{path} is not a backup of Deltadock, or it is cut off: {error}"
        ) from error


def _check(archive: zipfile.ZipFile, path: Path) -> Row:
    """The manifest of a backup whose tables all have the digests that it names.

    Raises:
        InvalidInput: they do not, or it is of another format or schema.
    """
    try:
        manifest: Row = json.loads(archive.read(MANIFEST))
        if manifest["format"] != FORMAT:
            raise InvalidInput(
                f"{path} has format {manifest['format']}; this version reads format {FORMAT}."
            )
        if manifest["revision"] != head_revision():
            raise InvalidInput(
                f"{path} is of revision {manifest['revision']} (Deltadock {manifest['version']}), "
                f"and this version has {head_revision()}. Restore it with that version, then "
                "upgrade and run `deltadock migrate`."
            )
        for table in TableRow.metadata.sorted_tables:
            digest = hashlib.sha256()
            with archive.open(f"{table.name}.ndjson") as entry:
                while block := entry.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != manifest["tables"][table.name]["sha256"]:
                raise InvalidInput(f"{path} is damaged: {table.name} has another SHA-256.")
    except (KeyError, ValueError, zipfile.BadZipFile, OSError) as error:
        raise InvalidInput(f"{path} is damaged, or no backup of Deltadock: {error}") from error
    return manifest


def _require_empty(connection: Connection) -> None:
    """Remove the rows that a new database has: the operator's tenant with its totals.

    Raises:
        Conflict: there are others.
    """
    tables = TableRow.metadata.tables
    connection.execute(delete(tables["totals"]).where(tables["totals"].c.tenant_id == LOCAL_TENANT))
    for table in tables.values():
        query = select(func.count()).select_from(table)
        if table.name == "tenants":
            query = query.where(table.c.id != LOCAL_TENANT)
        if connection.scalar(query):
            raise Conflict(
                f"The database is not empty: {table.name} has rows. Restore into a new one."
            )
    connection.execute(delete(tables["tenants"]))


def _rows(archive: zipfile.ZipFile, table: Table) -> Iterator[Row]:
    times = [column.name for column in table.columns if isinstance(column.type, UtcDateTime)]
    with archive.open(f"{table.name}.ndjson") as entry:
        for line in entry:
            row: Row = json.loads(line)
            for name in times:
                row[name] = row[name] and datetime.fromisoformat(row[name])
            yield row


def _fill(connection: Connection, table: Table, rows: Iterator[Row]) -> None:
    # A column that refers to the same table is set when all rows are there.
    to_itself = [key.parent.name for key in table.foreign_keys if key.column.table is table]
    (key,) = list(table.primary_key.columns)[:1]
    later: list[Row] = []
    while batch := list(islice(rows, BATCH)):
        for row in batch:
            references = {name: row[name] for name in to_itself if row[name] is not None}
            if references:
                later.append({"row": row[key.name], **references})
                row.update(dict.fromkeys(references))
        connection.execute(insert(table), batch)
    for references in later:
        connection.execute(update(table).where(key == bindparam("row")), references)
    if connection.dialect.name == "postgresql" and isinstance(key.type, Integer):
        connection.execute(
            text(
                f"SELECT setval(pg_get_serial_sequence('{table.name}', '{key.name}'), "
                f"(SELECT coalesce(max({key.name}), 1) FROM {table.name}))"
            )
        )
