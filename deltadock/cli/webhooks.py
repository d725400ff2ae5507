"""`deltadock webhooks`: URLs that are told about events, and the messages to them."""

from typing import Annotated

import typer

from deltadock import words
from deltadock.cli.output import AsJson, print_changed, print_resources, print_table, say, up_to
from deltadock.cli.server import Url, connect

webhooks = typer.Typer(
    no_args_is_help=True,
    help="URLs that are told when a delta is ready or has failed, or an alias has moved.",
)

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The webhook's id.")]


@webhooks.command("ls", hidden=True)
@webhooks.command("list")
def list_webhooks(as_json: AsJson = False, url: Url = None) -> None:
    """List the webhooks, oldest first."""
    with connect(url) as client:
        found = client.webhooks()
    if as_json:
        print_resources(found)
        return
    print_table(
        ("id", "address", "events", "created"),
        ((one.id, one.url, " ".join(one.events), words.ago(one.created_at)) for one in found),
        "There is no webhook yet: deltadock webhooks create ADDRESS",
    )


@webhooks.command("create")
def create_webhook(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="http or https.")],
    events: Annotated[
        str | None,
        typer.Option(
            help="Of delta.ready, delta.failed and alias.moved, with commas between them; by "
            "default all."
        ),
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Tell an address about events, and print the secret that verifies the messages.

    The secret is shown only then.
    """
    with connect(url) as client:
        made = client.create_webhook(address, events.split(",") if events is not None else None)
    if as_json:
        print_resources(made)
        return
    say(f"{made.id} is told about {', '.join(made.events)}. The secret is shown only now:")
    typer.echo(made.secret)


@webhooks.command("rm")
def remove_webhook(webhook: WebhookId, url: Url = None) -> None:
    """Delete a webhook with its messages; what is not sent yet is not sent."""
    with connect(url) as client:
        client.delete_webhook(webhook)
    say(f"{webhook} is deleted.")


@webhooks.command("messages")
def list_messages(
    webhook: WebhookId,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 50,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """List a webhook's messages of the last 30 days, newest first, with what became of them."""
    with connect(url) as client:
        messages = client.webhook_messages(webhook, limit=min(limit + 1, 200))
        with up_to(limit, messages) as shown:
            if as_json:
                print_resources(shown)
                return
            print_table(
                ("id", "event", "state", "attempts", "status", "error", "created"),
                (
                    (
                        one.id, one.event, one.state, str(one.attempts), words.plain(one.status),
                        one.error or "", words.ago(one.created_at),
                    )
                    for one in shown
                ),
                "No message yet.",
                spare=("created",),
            )  # fmt: skip


@webhooks.command("resend")
def resend_message(
    webhook: WebhookId,
    message: Annotated[str, typer.Argument(metavar="MESSAGE", help="The message's id.")],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Send a message again, whatever became of it."""
    with connect(url) as client:
        sent = client.resend_message(webhook, message)
    said = f"{message} is sent again. See: deltadock webhooks messages {webhook}"
    print_changed(sent, said, as_json=as_json)
