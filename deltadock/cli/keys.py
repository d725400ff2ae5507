"""`deltadock keys`: API keys."""

from typing import TYPE_CHECKING, Annotated

import typer

from deltadock import words
from deltadock.cli.options import Home
from deltadock.cli.output import AsJson, print_changed, print_resources, print_table, say
from deltadock.cli.server import Url

if TYPE_CHECKING:
    from deltadock.client.resources import Key

keys = typer.Typer(
    no_args_is_help=True,
    help="API keys: of the server that you use, or with --home in the database directly.",
)

KeyRef = Annotated[str, typer.Argument(metavar="KEY", help="The key's id, prefix or name.")]


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    scopes: Annotated[
        str, typer.Option(help="Of read, write, infer and admin, with commas between them.")
    ] = "read,write,infer",
    tenant: Annotated[
        str | None, typer.Option(help="The tenant's name or id; by default one's own.")
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0, help="Days until it expires; by default never.")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Make a key and print it: the key is shown only then."""
    from deltadock.cli.key_store import create

    _show_new_key(create(home, url, name, tenant, scopes.split(","), days), as_json=as_json)


def _show_new_key(made: "Key", *, as_json: bool) -> None:
    if as_json:
        print_resources(made)
        return
    expiry = "never expires" if made.expires_at is None else f"expires {words.ago(made.expires_at)}"
    say(
        f"{made.name}: {' '.join(made.scopes)}, of tenant {made.tenant_name}, {expiry}. "
        "The key is shown only now:"
    )
    typer.echo(made.key)


@keys.command("ls", hidden=True)
@keys.command("list")
def list_keys(home: Home = None, as_json: AsJson = False, url: Url = None) -> None:
    """Print all keys, newest first."""
    from deltadock.cli.key_store import list_all

    found = list_all(home, url)
    if as_json:
        print_resources(found)
        return
    print_table(
        ("id", "tenant", "name", "prefix", "scopes", "expires", "last used", "state"),
        (
            (
                key.id, key.tenant_name, key.name, key.prefix, " ".join(key.scopes),
                words.ago(key.expires_at) if key.expires_at else "never",
                words.ago(key.last_used_at), key.state,
            )
            for key in found
        ),
        "There is no key yet: deltadock keys create --name NAME",
    )  # fmt: skip


@keys.command("revoke")
def revoke_key(key: KeyRef, home: Home = None, as_json: AsJson = False, url: Url = None) -> None:
    """Revoke a key."""
    from deltadock.cli.key_store import revoke

    revoked = revoke(home, url, key)
    print_changed(revoked, f"{revoked.prefix} ({revoked.name}) is revoked.", as_json=as_json)


@keys.command("rotate")
def rotate_key(
    key: KeyRef,
    grace_hours: Annotated[
        float, typer.Option(min=0, help="Hours for which the old key keeps working.")
    ] = 24.0,
    home: Home = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Make a key with the same name and scopes, and let the old one expire."""
    from deltadock.cli.key_store import rotate

    _show_new_key(rotate(home, url, key, grace_hours), as_json=as_json)
    say(f"{key} works for {words.duration(3600 * grace_hours)} more.")
