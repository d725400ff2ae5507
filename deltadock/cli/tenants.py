"""`deltadock tenants`: tenants with their use and limits; for operators."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from deltadock.cli.output import AsJson, print_resources, print_table, say
from deltadock.cli.server import Url, connect
from deltadock.words import grouped, parse_size, size

if TYPE_CHECKING:
    from deltadock.client.resources import Tenant
    from deltadock.client.routes import TenantLimits

NONE: Final = "none"

tenants = typer.Typer(
    no_args_is_help=True,
    help="Tenants, with what they use and may use; with the operator's admin key.",
)

TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's name or id.")]
MaxBytes = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Of files and artifacts, such as 500GB; none: no limit."),
]
MaxDeltas = Annotated[str | None, typer.Option(metavar="N", help="A number, or none.")]
MaxJobs = Annotated[
    str | None, typer.Option(metavar="N", help="Unfinished ones at once: a number, or none.")
]
Requests = Annotated[str | None, typer.Option(metavar="N", help="A number, or none.")]
Tokens = Annotated[
    str | None, typer.Option(metavar="N", help="Of prompts and answers: a number, or none.")
]


@tenants.command("ls", hidden=True)
@tenants.command("list")
def list_tenants(as_json: AsJson = False, url: Url = None) -> None:
    """Print all tenants with their use and limits."""
    with connect(url) as client:
        found = [client.tenant(one.id) for one in client.tenants()]  # lists have no usage
    if as_json:
        print_resources(found)
    else:
        _print(found)


@tenants.command("create")
def create_tenant(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new tenant's name.")],
    max_bytes: MaxBytes = None,
    max_deltas: MaxDeltas = None,
    max_jobs: MaxJobs = None,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Make a tenant, without limits unless some are given."""
    limits = _limits(
        max_bytes=max_bytes, max_deltas=max_deltas, max_jobs=max_jobs,
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
    )  # fmt: skip
    with connect(url) as client:
        made = client.create_tenant(name, **limits)
    if as_json:
        print_resources(made)
        return
    say(f"{made.name} is a tenant. Make its first key:")
    say(f"deltadock keys create --tenant {made.name} --name admin --scopes read,write,infer,admin")


@tenants.command("set")
def set_limits(
    tenant: TenantName,
    max_bytes: MaxBytes = None,
    max_deltas: MaxDeltas = None,
    max_jobs: MaxJobs = None,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Change limits of a tenant; those that are not given stay, and so does what is stored."""
    limits = _limits(
        max_bytes=max_bytes, max_deltas=max_deltas, max_jobs=max_jobs,
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
    )  # fmt: skip
    if not limits:
        raise typer.BadParameter("give a limit, such as --max-deltas 100 or --max-deltas none")
    with connect(url) as client:
        client.change_tenant(tenant, **limits)
        changed = client.tenant(tenant)
    if as_json:
        print_resources(changed)
    else:
        _print([changed])


def _limits(**given: str | None) -> "TenantLimits":
    """The limits that are given, by name; None: no limit.

    Raises:
        typer.BadParameter: one is neither a number nor `none`.
    """
    limits: dict[str, int | None] = {}
    for name, text in given.items():
        if text is None:
            continue
        try:
            number = parse_size if name == "max_bytes" else int
            limits[name] = None if text == NONE else number(text)
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is neither a number nor {NONE!r}",
                param_hint=f"--{name.replace('_', '-')}",
            ) from None
    return cast("TenantLimits", limits)


def _print(found: "list[Tenant]") -> None:
    print_table(
        ("tenant", "bytes", "deltas", "jobs", "requests/min", "tokens/min"),
        (
            (
                tenant.name,
                _use(size, tenant.usage.bytes, tenant.limits.max_bytes),
                _use(grouped, tenant.usage.deltas, tenant.limits.max_deltas),
                _use(grouped, tenant.usage.jobs, tenant.limits.max_jobs),
                _rate(tenant.limits.requests_per_minute),
                _rate(tenant.limits.tokens_per_minute),
            )
            for tenant in found
            if tenant.usage is not None
        ),
        "",
    )


def _use(text: Callable[[int], str], used: int, limit: int | None) -> str:
    return text(used) if limit is None else f"{text(used)} of {text(limit)}"


def _rate(limit: int | None) -> str:
    return grouped(limit)
