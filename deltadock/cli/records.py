"""The database as a whole: `deltadock backup`, `restore` and `audit export`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import typer

from deltadock.api.audit import AuditRecord
from deltadock.cli.output import output, print_json, working
from deltadock.settings import Settings, deployed_in, settings_in
from deltadock.storage import backup as files
from deltadock.storage.actor import COMMAND, acting
from deltadock.storage.blobs import make_blob_store
from deltadock.storage.database import Database
from deltadock.storage.reconciliation import missing_blobs
from deltadock.storage.repositories import AuditRepository
from deltadock.storage.tenancy import EVERY_TENANT
from deltadock.words import counted


def backup(home: Path | None, path: Path, *, as_json: bool) -> None:
    """Write the database to a new file."""
    with _database(deployed_in(home)) as database, working("writing the rows"):
        rows = files.backup(database, path)
    if as_json:
        print_json({"file": str(path), "rows": rows})
    else:
        output.print(f"Wrote {_in_tables(rows)} to {path}.", soft_wrap=True)


def restore(home: Path | None, path: Path, *, as_json: bool) -> bool:
    """Fill an empty database; returns whether the store has every blob that its rows need."""
    settings = settings_in(home)
    with acting(COMMAND), working("restoring the rows"):
        rows = files.restore(settings.sqlalchemy_url, path)
    with _database(settings) as database, working("looking for each row's blobs"):
        missing = missing_blobs(database, make_blob_store(settings))
    if as_json:
        print_json({"rows": rows, "missing": missing})
        return not missing
    output.print(f"Restored {_in_tables(rows)}.", soft_wrap=True)
    for digest in missing:
        output.print(f"missing {digest}", soft_wrap=True)
    output.print(f"Missing in the store: {counted(len(missing), 'blob')}.", soft_wrap=True)
    return not missing


def _in_tables(rows: Mapping[str, int]) -> str:
    return f"{counted(sum(rows.values()), 'row')} of {counted(len(rows), 'table')}"


def export_audit(home: Path | None, after: int) -> None:
    """Print the records of all tenants that follow the record `after`, as lines of JSON."""
    with _database(deployed_in(home)) as database, database.read_scope() as session:
        for row in AuditRepository(session, EVERY_TENANT).export(after):
            typer.echo(AuditRecord.of(row).model_dump_json())


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.sqlalchemy_url)
    try:
        yield database
    finally:
        database.dispose()
