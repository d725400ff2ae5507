"""The database as a whole: `deltadock migrate`, `backup`, `restore` and `audit export`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltadock.cli.options import Home
from deltadock.cli.output import AsJson, output, print_json, working
from deltadock.cli.server import check_works_here
from deltadock.words import counted

if TYPE_CHECKING:
    from deltadock.settings import Settings
    from deltadock.storage.database import Database

audit = typer.Typer(no_args_is_help=True, help="The audit log, read from the database directly.")


def migrate(as_json: AsJson = False) -> None:
    """Upgrade the database at DELTADOCK_DATABASE_URL to this version's schema."""
    from deltadock.settings import get_settings
    from deltadock.storage.database import migrate as run
    from deltadock.storage.database import normalise_url

    url = get_settings().sqlalchemy_url
    revision = run(url)
    database = normalise_url(url).render_as_string()
    if as_json:
        print_json({"database": database, "revision": revision})
    else:
        typer.echo(f"{database} is at revision {revision}.")


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write the database to a file; the service may run meanwhile."""
    from deltadock.settings import deployed_in
    from deltadock.storage import backup as files

    check_works_here(home)
    with _database(deployed_in(home)) as database, working("writing the rows"):
        rows = files.backup(database, file)
    if as_json:
        print_json({"file": str(file), "rows": rows})
    else:
        output.print(f"Wrote {_in_tables(rows)} to {file}.", soft_wrap=True)


def restore(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A backup.")
    ],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Fill an empty database from a backup; exits with 1 if a row lacks its blob."""
    from deltadock.settings import settings_in
    from deltadock.storage import backup as files
    from deltadock.storage.actor import COMMAND, acting
    from deltadock.storage.blobs import make_blob_store
    from deltadock.storage.reconciliation import missing_blobs

    check_works_here(home)
    settings = settings_in(home)
    with acting(COMMAND), working("restoring the rows"):
        rows = files.restore(settings.sqlalchemy_url, file)
    with _database(settings) as database, working("looking for each row's blobs"):
        missing = missing_blobs(database, make_blob_store(settings))
    if as_json:
        print_json({"rows": rows, "missing": missing})
    else:
        output.print(f"Restored {_in_tables(rows)}.", soft_wrap=True)
        for digest in missing:
            output.print(f"missing {digest}", soft_wrap=True)
        output.print(f"Missing in the store: {counted(len(missing), 'blob')}.", soft_wrap=True)
    if missing:
        raise typer.Exit(1)


def _in_tables(rows: Mapping[str, int]) -> str:
    return f"{counted(sum(rows.values()), 'row')} of {counted(len(rows), 'table')}"


@audit.command("export")
def export_audit(
    after: Annotated[int, typer.Option(min=0, help="Only records after the one with this id.")] = 0,
    home: Home = None,
) -> None:
    """Print the records of all tenants as lines of JSON, oldest first."""
    from deltadock.api.audit import AuditRecord
    from deltadock.settings import deployed_in
    from deltadock.storage.repositories import AuditRepository, KeyRepository
    from deltadock.storage.tenancy import EVERY_TENANT

    check_works_here(home)
    with _database(deployed_in(home)) as database, database.read_scope() as session:
        names = {key.id: key.name for key in KeyRepository(session, EVERY_TENANT).all()}
        for row in AuditRepository(session, EVERY_TENANT).export(after):
            typer.echo(AuditRecord.of(row, names).model_dump_json())


@contextmanager
def _database(settings: "Settings") -> "Iterator[Database]":
    from deltadock.storage.database import Database

    database = Database(settings.sqlalchemy_url)
    try:
        yield database
    finally:
        database.dispose()
