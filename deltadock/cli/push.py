"""`deltadock push` and `deltadock bases`: from a folder to a delta on the server."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deltadock import words
from deltadock.cli.jobs import follow
from deltadock.cli.options import (
    CALIBRATION,
    Bits,
    MaxKl,
    MinAgreement,
    Ratio,
    Seed,
    TargetBytes,
    parse_source,
)
from deltadock.cli.outcome import Hint, on_interrupt
from deltadock.cli.output import (
    AsJson,
    errors,
    print_changed,
    print_json,
    print_resources,
    print_rows,
    print_table,
    say,
)
from deltadock.cli.server import Url, complete_base, complete_method, connect
from deltadock.compression.options import METHODS
from deltadock.errors import NotFound, UnsupportedModel
from deltadock.model_target import not_served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltadock.client.blocking import BytesProgress, Client
    from deltadock.client.resources import Base, Checkpoint, Delta
    from deltadock.client.routes import GoalOptions

FINETUNES = "finetunes"
"""Project of fine-tunes that are pushed without a name."""

NOTHING_SENT = "Nothing of the checkpoint has been sent: the same command starts over."

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", exists=True, file_okay=False, help="Hugging Face checkpoint folder."
    ),
]
BaseName = Annotated[
    str, typer.Argument(metavar="BASE", help="Its name.", autocompletion=complete_base)
]

bases = typer.Typer(help="Bases, against which deltas are compressed. Without a command: list.")


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", exists=True, file_okay=False,
            help="Hugging Face checkpoint folder, or a PEFT LoRA adapter's.",
        ),
    ],
    base: Annotated[
        str,
        typer.Option("--base", "-b", help="Name of a base.", autocompletion=complete_base),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name", "-n", help="project/model; by default finetunes/ and the folder's name."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Compression method, by default the server's, for a PEFT adapter lora; see "
            "`deltadock methods`.",
            autocompletion=complete_method,
        ),
    ] = None,
    bits: Bits = None,
    target_bytes: TargetBytes = None,
    ratio: Ratio = None,
    max_kl: MaxKl = None,
    min_agreement: MinAgreement = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help=".txt or .jsonl; repeat for a mixture. 'sampled', the default: text sampled from "
            "the fine-tune.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seed: Seed = 0,
    priority: Annotated[
        Literal["high", "normal", "low"], typer.Option(help="Of the job among your own.")
    ] = "normal",
    parent: Annotated[
        str | None, typer.Option(help="The delta whose fine-tune this one continues.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Commit of the training code.")] = None,
    wait: Annotated[bool, typer.Option(help="Follow the job until it has ended.")] = True,
    as_json: AsJson = False,
    url: Url = None,
) -> None:  # fmt: skip
    """Upload a fine-tune, compress it against its base, and follow the job.

    Only what the server lacks is sent; the same command continues a push that was interrupted.
    """
    with on_interrupt(NOTHING_SENT) as hint, connect(url) as client:
        from deltadock.client.routes import checked_name

        sources = [parse_source(text) for text in calibration or ()]
        model = checked_name(name or f"{FINETUNES}/{folder.resolve().name}")
        goal: GoalOptions = {
            "bits": bits, "target_bytes": target_bytes, "ratio": ratio, "max_kl": max_kl,
            "min_agreement": min_agreement,
        }  # fmt: skip
        _check_base(client, base)
        with _upload_bar(hint) as progress:
            pushed = client.push(
                folder,
                model,
                base,
                method=method,
                calibration={source.path or "sampled": source.weight for source in sources} or None,
                seed=seed,
                priority=priority,
                parent=parent,
                commit=commit,
                progress=progress,
                **goal,
            )
        hint.text = f"The job goes on. Follow it: deltadock logs -f {pushed.job.id}"
        say(f"{pushed.delta.reference} is {pushed.job.state}: job {pushed.job.id}")
        found = METHODS.get(pushed.delta.method)
        if not sources and not pushed.job.is_final and found and found.needs_calibration:
            say(
                "Note: the fine-tune writes the calibration text itself, which takes minutes. A "
                "text of your own with --calibration is faster: docs/how-to/calibration.md"
            )
        before = pushed.delta.lineage.commit if pushed.delta.lineage else None
        if commit not in (None, before):
            say(f"Note: it was pushed before, of the commit {before}, which stays.")
        if wait:
            follow(client, pushed.job.id)
        delta = client.delta(pushed.delta.id)
        notes = client.report(delta.id).notes if delta.state == "ready" else []
        model_type = client.base(delta.base.id).checkpoint.model_type
    if as_json:
        print_json({"delta": delta.model_dump(mode="json"), "job": delta.job})
        return
    print_rows([*delta.rows(), *(("note", note) for note in notes)])
    _say_what_next(delta, model_type)


@contextmanager
def _upload_bar(hint: Hint) -> "Iterator[BytesProgress]":
    """The progress of an upload, whose first file or part changes what Ctrl-C says."""
    from deltadock.client.progress import bytes_bar

    with bytes_bar(errors, "checking and hashing", "uploading") as show:

        def progress(name: str, done: int, total: int) -> None:
            hint.text = "What has arrived is kept: the same command continues the upload."
            show(name, done, total)

        yield progress


def _warn_of_family(folder: Path) -> None:
    """Say what cannot be done with a base of this family, before it is uploaded."""
    from deltadock.artifacts.folder import read_headers
    from deltadock.compression.families import check_family

    try:
        check_family(read_headers(folder).config)
    except UnsupportedModel as error:
        say(f"Note: {error.message}")


def _check_base(client: "Client", base: str) -> None:
    """Raise NotFound with what to do, if there is no such base."""
    try:
        client.base(base)
    except NotFound as error:
        if Path(base).is_dir():
            raise NotFound(
                f"{base} is a folder, not the name of a base: register it with "
                f"`deltadock bases add {base}`, then push with its name."
            ) from error
        if error.details.get("deleted"):
            raise
        names = ", ".join(found.name for found in client.bases()) or "none yet"
        raise NotFound(
            f"There is no base {base!r}. There are: {names}. `deltadock bases add DIR` adds one."
        ) from error


def _say_what_next(delta: "Delta", model_type: str) -> None:
    if delta.state != "ready":
        say(f"Follow it: deltadock logs -f {delta.job}")
        return
    say(not_served(model_type) or f"Try it: deltadock run {delta.reference}")
    if delta.default_version not in (None, delta.version):
        say(
            f"{delta.name} still means version {delta.default_version}: "
            f"deltadock alias {delta.reference} default"
        )


@bases.callback(invoke_without_command=True)
def list_by_default(context: typer.Context, as_json: AsJson = False, url: Url = None) -> None:
    """List the bases, unless a command follows."""
    if context.invoked_subcommand is None:
        list_bases(as_json, url)
    elif as_json or url:
        raise typer.BadParameter("options of a command follow it.")


@bases.command("ls", hidden=True)
@bases.command("list")
def list_bases(as_json: AsJson = False, url: Url = None) -> None:
    """List the bases."""
    with connect(url) as client:
        found = list(client.bases())
    if as_json:
        print_resources(found)
        return
    print_table(
        ("base", "kind", "size", "shared", "created"),
        (
            (
                base.name,
                base.checkpoint.model_type,
                words.size(base.checkpoint.total_bytes),
                "yes" if base.shared else "no",
                words.ago(base.created_at),
            )
            for base in found
        ),
        "There is no base yet. Add one: deltadock bases add DIR",
    )


@bases.command("rm")
def remove_base(name: BaseName, as_json: AsJson = False, url: Url = None) -> None:
    """Delete a base that no delta needs; `bases undo` brings it back for some days."""
    with connect(url) as client:
        base = client.base(name)
        client.delete_base(base.id)
    said = f"Deleted {base.name}. Bring it back: deltadock bases undo {base.name}"
    print_changed(base, said, as_json=as_json)


@bases.command("undo")
def restore_base(name: BaseName, as_json: AsJson = False, url: Url = None) -> None:
    """Restore a deleted base."""
    with connect(url) as client:
        base = client.restore_base(name)
    print_changed(base, f"{base.name} is back.", as_json=as_json)


@bases.command("share")
def share_base(name: BaseName, as_json: AsJson = False, url: Url = None) -> None:
    """Let every tenant use a base of the operator's."""
    with connect(url) as client:
        base = client.share_base(name)
    print_changed(base, f"Every tenant may use {base.name}.", as_json=as_json)


@bases.command("unshare")
def unshare_base(name: BaseName, as_json: AsJson = False, url: Url = None) -> None:
    """Keep a base to the operator's tenant again; deltas of others stay."""
    with connect(url) as client:
        base = client.share_base(name, shared=False)
    said = f"Only the operator's tenant may use {base.name}."
    print_changed(base, said, as_json=as_json)


@bases.command("add")
def add_base(
    folder: Folder,
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="By default the folder's name.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Upload a checkpoint and register it as a base."""
    with on_interrupt(NOTHING_SENT) as hint, connect(url) as client:
        from deltadock.client.routes import checked_base_name

        chosen = checked_base_name(name or folder.resolve().name)
        _warn_of_family(folder)
        with _upload_bar(hint) as progress:
            checkpoint: Checkpoint = client.upload_folder(folder, progress, base=chosen)
        base: Base = client.create_base(chosen, checkpoint.digest)
    if as_json:
        print_resources(base)
        return
    say(f"{base.name} is a base: {checkpoint.model_type}, {words.size(checkpoint.total_bytes)}")
    say(f"Push a fine-tune of it: deltadock push DIR --base {base.name} --name project/model")
