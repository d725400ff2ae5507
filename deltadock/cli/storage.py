"""Collecting and checking what the blob store holds: `deltadock gc` and `deltadock reconcile`."""

from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from deltadock.settings import settings_in
from deltadock.storage.actor import COMMAND, acting
from deltadock.storage.blobs import make_blob_store
from deltadock.storage.collection import Collector, reconcile
from deltadock.storage.database import Database

output: Final = Console(highlight=False, soft_wrap=True)


def collect(home: Path | None, *, dry_run: bool) -> None:
    """Remove what nothing needs, or only print it, by kind."""
    settings = settings_in(home)
    collector = Collector(Database(settings.sqlalchemy_url), make_blob_store(settings), settings)
    with acting(COMMAND):
        collected = collector.try_run() if dry_run else collector.run()
    table = Table("kind", "files", "bytes", box=None)
    for kind, usage in sorted(collected.usage.items()):
        table.add_row(kind, str(usage.files), str(usage.bytes))
    total = sum(usage.bytes for usage in collected.usage.values())
    files = sum(usage.files for usage in collected.usage.values())
    table.add_row("total", str(files), str(total))
    output.print("Would remove:" if dry_run else "Removed:")
    output.print(table)
    for reason in collected.blocked:
        output.print(f"Kept: {reason}")


def check(home: Path | None) -> bool:
    """Print where rows and blobs disagree; returns whether every row has its blob."""
    settings = settings_in(home)
    found = reconcile(Database(settings.sqlalchemy_url), make_blob_store(settings))
    for digest in found.missing:
        output.print(f"missing {digest}")
    for entry in found.unreferenced:
        output.print(f"unreferenced {entry.key} {entry.bytes} bytes")
    output.print(
        f"{len(found.missing)} blobs are missing, {len(found.unreferenced)} are unreferenced."
    )
    return not found.missing
