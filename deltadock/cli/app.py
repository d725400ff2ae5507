"""The commands of `deltadock`, and their options."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltadock import words
from deltadock.cli import chat, doctor, fleet, jobs, login, offline, push, registry, tenants
from deltadock.cli.outcome import ReportingGroup, on_interrupt
from deltadock.cli.output import AsJson, print_json, print_resources, print_table, say
from deltadock.cli.server import Url
from deltadock.extras import EMBEDDED, MODEL, check_installed
from deltadock.version import DOCS, __version__

if TYPE_CHECKING:
    from deltadock.client.resources import Key

PUSH = "Push and ship"
TALK = "Try"
WATCH = "Watch"
NODES = "Nodes"
OFFLINE = "Offline: checkpoint folders, no service"
RUNNING = "Run a Deltadock"

app = typer.Typer(
    cls=ReportingGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Store and serve fine-tuned LLMs as deltas of about one bit per weight.",
    epilog="Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 the server does not answer "
    f"or is busy, 4 the followed job failed, 130 interrupted.\n\nDocs: {DOCS}/tutorial.md",
)

for panel, commands in {
    PUSH: (push.push, registry.ls, registry.show, registry.pull, registry.rm, registry.undo,
           registry.alias, registry.compare),
    TALK: (chat.run, chat.generate),
    WATCH: (jobs.jobs, jobs.logs, jobs.cancel, jobs.retry, doctor.doctor),
    NODES: (fleet.ps, fleet.drain, fleet.resume, fleet.evict),
    OFFLINE: (offline.preview, offline.compress, offline.evaluate, offline.merge, offline.inspect,
              offline.verify, offline.methods),
}.items():  # fmt: skip
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command("chat", rich_help_panel=TALK, help="The same as `run`.")(chat.run)
app.add_typer(push.bases, name="bases", rich_help_panel=PUSH)
app.command(rich_help_panel=RUNNING)(login.login)
app.command(rich_help_panel=RUNNING)(login.logout)

Home = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="Folder for data, caches and logs; by default DELTADOCK_HOME, or .deltadock here.",
    ),
]
ApiPort = Annotated[int, typer.Option(min=1, max=65535, help="Port of the api and dashboard.")]
NodePort = Annotated[int, typer.Option(min=1, max=65535, help="Port of the inference node.")]


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    url: Url = None,
) -> None:
    """Parse the options that precede a command."""
    if url is not None:
        from deltadock.client.connection import URL_VARIABLE

        os.environ[URL_VARIABLE] = url


@app.command(rich_help_panel=RUNNING)
def up(
    home: Home = None,
    host: Annotated[
        str, typer.Option(help="Address of the api. Not loopback: first make a key.")
    ] = "127.0.0.1",
    api_port: ApiPort = 8000,
    node_port: NodePort = 8100,
) -> None:
    """Run api, worker, node and broker on this machine. Ctrl-C stops them."""
    check_installed(*EMBEDDED)
    typer.echo("Starting Deltadock ...")  # its modules take seconds to import
    from deltadock.cli.system import up as run

    run(home, api_port, node_port, host)


@app.command(rich_help_panel=RUNNING)
def topology(
    home: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for data, caches and logs; by default a temporary one.",
        ),
    ] = None,
    api_port: ApiPort = 8000,
    node_port: NodePort = 8100,
) -> None:
    """Like `up`, on Postgres, Valkey and an S3 server, as in docker-compose.yml."""
    from deltadock.cli.system import topology as run

    run(home, api_port, node_port)


@app.command(rich_help_panel=RUNNING)
def node(
    base: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Base checkpoint folder.")
    ] = None,
    api: Annotated[str | None, typer.Option(help="URL of the api to register with.")] = None,
    delta: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Delta file to load; may be repeated."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8100,
) -> None:
    """Run one inference node, registered with an api or standalone, until SIGTERM."""
    check_installed(*MODEL)
    from deltadock.cli.node import node as run
    from deltadock.cli.processes import check_port

    check_port(port, "--port")
    run(base, api, delta or [], host, port)


keys = typer.Typer(
    no_args_is_help=True,
    help="API keys: of the server that you use, or with --home in the database directly.",
)
app.add_typer(keys, name="keys", rich_help_panel=RUNNING)
app.add_typer(tenants.tenants, name="tenants", rich_help_panel=RUNNING)

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
    from deltadock.cli.keys import create

    _show_new_key(create(home, url, name, tenant, scopes.split(","), days), as_json=as_json)


def _show_new_key(made: "Key", *, as_json: bool) -> None:
    if as_json:
        print_resources(made)
        return
    expiry = "never expires" if made.expires_at is None else f"expires {words.ago(made.expires_at)}"
    say(
        f"{made.name}: {' '.join(made.scopes)}, of tenant {made.tenant}, {expiry}. "
        "The key is shown only now:"
    )
    typer.echo(made.key)


@keys.command("ls", hidden=True)
@keys.command("list")
def list_keys(home: Home = None, as_json: AsJson = False, url: Url = None) -> None:
    """Print all keys, newest first."""
    from deltadock.cli.keys import list_all

    found = list_all(home, url)
    if as_json:
        print_resources(found)
        return
    print_table(
        ("id", "tenant", "name", "prefix", "scopes", "expires", "last used", "state"),
        (
            (
                key.id, key.tenant, key.name, key.prefix, " ".join(key.scopes),
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
    from deltadock.cli.keys import revoke

    revoked = revoke(home, url, key)
    if as_json:
        print_resources(revoked)
    else:
        say(f"{revoked.prefix} ({revoked.name}) is revoked.")


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
    from deltadock.cli.keys import rotate

    _show_new_key(rotate(home, url, key, grace_hours), as_json=as_json)
    say(f"{key} works for {words.duration(3600 * grace_hours)} more.")


@app.command(rich_help_panel=RUNNING)
def demo(
    host: Annotated[
        str, typer.Option(help="Address of the api. Not loopback: others may look on, with a key.")
    ] = "127.0.0.1",
    api_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the api; by default a free one.")
    ] = None,
    node_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the node; by default a free one.")
    ] = None,
) -> None:
    """Compress the sample fine-tune and compare it with its delta over HTTP."""
    check_installed(*EMBEDDED)
    from deltadock.cli.demo import demo as run

    with on_interrupt("The demo's processes have ended, and its data is removed."):
        run(host, api_port, node_port)


@app.command(rich_help_panel=RUNNING)
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


@app.command(rich_help_panel=RUNNING)
def gc(
    home: Home = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be removed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove stored bytes that nothing needs any more; workers do so every hour."""
    from deltadock.cli.storage import collect

    collect(home, dry_run=dry_run, as_json=as_json)


@app.command(rich_help_panel=RUNNING)
def reconcile(home: Home = None, as_json: AsJson = False) -> None:
    """Compare the database with the blob store; exits with 1 if a row lacks its blob."""
    from deltadock.cli.storage import check

    if not check(home, as_json=as_json):
        raise typer.Exit(1)


audit = typer.Typer(no_args_is_help=True, help="The audit log, read from the database directly.")
app.add_typer(audit, name="audit", rich_help_panel=RUNNING)


@audit.command("export")
def export_audit(
    after: Annotated[int, typer.Option(min=0, help="Only records after the one with this id.")] = 0,
    home: Home = None,
) -> None:
    """Print the records of all tenants as lines of JSON, oldest first."""
    from deltadock.cli.records import export_audit as run

    run(home, after)


@app.command(rich_help_panel=RUNNING)
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write the database to a file; the service may run meanwhile."""
    from deltadock.cli.records import backup as run

    run(home, file, as_json=as_json)


@app.command(rich_help_panel=RUNNING)
def restore(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A backup.")
    ],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Fill an empty database from a backup; exits with 1 if a row lacks its blob."""
    from deltadock.cli.records import restore as run

    if not run(home, file, as_json=as_json):
        raise typer.Exit(1)


@app.command("version", rich_help_panel=RUNNING)
def print_version(as_json: AsJson = False) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": __version__})
    else:
        typer.echo(__version__)
