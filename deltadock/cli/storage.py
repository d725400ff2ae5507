"""Collecting and checking what the blob store holds: `deltadock gc` and `deltadock reconcile`."""

from typing import Annotated

import typer

from deltadock.cli.options import Home
from deltadock.cli.output import AsJson, output, print_json, print_table, working
from deltadock.cli.server import check_works_here
from deltadock.words import counted, grouped, size


def gc(
    home: Home = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be removed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove stored bytes that nothing needs any more; workers do so every hour."""
    from deltadock.settings import deployed_in
    from deltadock.storage.actor import COMMAND, acting
    from deltadock.storage.blobs import make_blob_store
    from deltadock.storage.collection import Collector
    from deltadock.storage.database import Database
    from deltadock.storage.usage import Usage

    check_works_here(home)
    settings = deployed_in(home)
    collector = Collector(Database(settings.sqlalchemy_url), make_blob_store(settings), settings)
    with acting(COMMAND), working("looking for what nothing needs") as say:

        def progress(so_far: Usage) -> None:
            say(f"removed {counted(so_far.files, 'file')}, {size(so_far.bytes)}")

        collected = collector.try_run() if dry_run else collector.run(progress)
    rows = {str(kind): usage for kind, usage in sorted(collected.usage.items())}
    total = collected.total
    if as_json:
        kinds = {kind: {"files": usage.files, "bytes": usage.bytes} for kind, usage in rows.items()}
        print_json(
            {
                "removed": not dry_run,
                "kinds": kinds,
                "total": total._asdict(),
                "kept": collected.blocked,
            }
        )
        return
    output.print("Would remove:" if dry_run else "Removed:")
    print_table(
        ("kind", "files", "bytes"),
        [
            *((kind, grouped(usage.files), size(usage.bytes)) for kind, usage in rows.items()),
            ("total", grouped(total.files), size(total.bytes)),
        ],
        "",
    )
    for reason in collected.blocked:
        output.print(f"Kept: {reason}", soft_wrap=True)


def reconcile(home: Home = None, as_json: AsJson = False) -> None:
    """Compare the database with the blob store; exits with 1 if a row lacks its blob."""
    from deltadock.settings import deployed_in
    from deltadock.storage.blobs import make_blob_store
    from deltadock.storage.database import Database
    from deltadock.storage.reconciliation import reconcile as compare
    from deltadock.storage.reconciliation import recount

    check_works_here(home)
    settings = deployed_in(home)
    database = Database(settings.sqlalchemy_url)
    with working("comparing rows and blobs"):
        recount(database)
        found = compare(database, make_blob_store(settings))
    if as_json:
        unreferenced = [{"key": entry.key, "bytes": entry.bytes} for entry in found.unreferenced]
        print_json({"missing": list(found.missing), "unreferenced": unreferenced})
    else:
        for digest in found.missing:
            output.print(f"missing {digest}", soft_wrap=True)
        for entry in found.unreferenced:
            output.print(f"unreferenced {entry.key} {size(entry.bytes)}", soft_wrap=True)
        output.print(
            f"Missing: {counted(len(found.missing), 'blob')}. "
            f"Unreferenced: {counted(len(found.unreferenced), 'blob')}."
        )
    if found.missing:
        raise typer.Exit(1)
