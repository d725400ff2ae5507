"""`deltadock ls`, `show`, `pull`, `rm`, `undo`, `alias` and `compare`."""

import hashlib
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from deltadock import words
from deltadock.cli.chat import answer_greedily
from deltadock.cli.options import check_file
from deltadock.cli.outcome import on_interrupt
from deltadock.cli.output import (
    AsJson,
    as_dict,
    errors,
    print_changed,
    print_json,
    print_resources,
    print_rows,
    print_table,
    say,
    up_to,
)
from deltadock.cli.server import (
    STATES,
    Reference,
    State,
    Url,
    complete_base,
    complete_method,
    complete_model,
    connect,
)
from deltadock.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    NotReady,
    Unavailable,
    UnsupportedModel,
)

COMPARED_COLUMNS = 100
"""Of a comparison that goes to a pipe, in which answers would make long lines."""
MOVES_SHOWN = 200

if TYPE_CHECKING:
    from deltadock.client.blocking import Client
    from deltadock.client.resources import AliasMove, Artifact, Delta, Metrics, Model


def ls(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="WORDS", help="Words, or their beginnings, of the model's name or card.",
            autocompletion=complete_model,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="Only of this base.", autocompletion=complete_base),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Only of this method.", autocompletion=complete_method)
    ] = None,
    state: Annotated[
        State | None, typer.Option(metavar="STATE", help=f"Only in this state: {STATES}.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Only versions of this project/model.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Only of models with this tag.")] = None,
    sort: Annotated[
        Literal["newest", "name", "size", "kl"], typer.Option(help="What comes first.")
    ] = "newest",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 50,
    as_json: AsJson = False,
    url: Url = None,
) -> None:  # fmt: skip
    """List the deltas."""
    filters = {"base": base, "method": method, "state": state, "name": name, "tag": tag}
    with connect(url) as client:
        listed = client.deltas(**filters, text=text, sort=sort, limit=min(limit + 1, 200))
        with up_to(limit, listed) as shown:
            if as_json:
                print_resources(shown)
            else:
                _print_deltas(shown, filtered=bool(text) or any(filters.values()))


def _print_deltas(shown: "list[Delta]", *, filtered: bool) -> None:
    print_table(
        ("name", "aliases", "base", "method", "size", "ratio", "KL", "state", "created"),
        (
            (
                delta.reference,
                ", ".join(delta.aliases),
                delta.base.name,
                delta.method,
                words.size(delta.artifact.bytes if delta.artifact else None),
                words.ratio(_metrics(delta).ratio),
                words.significant(_metrics(delta).kl),
                delta.state
                if delta.state == "ready" or delta.error is not None
                else f"{delta.state}, {words.progress(delta.percent)}",
                words.ago(delta.created_at),
            )
            for delta in shown
        ),
        "No delta matches. `deltadock ls` lists all."
        if filtered
        else "There is no delta yet. `deltadock push DIR --base BASE` makes one.",
        spare=("created", "base", "method"),
    )


def _metrics(delta: "Delta") -> "Metrics":
    from deltadock.client.resources import Metrics

    return delta.metrics or Metrics()


def show(
    name: Reference,
    report: Annotated[bool, typer.Option("--report", help="The whole report, as JSON.")] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Show a delta: its figures, aliases, job and lineage."""
    with connect(url) as client:
        delta = _newest_at_least(client, name)
        ready = delta.state == "ready" and not as_json
        measured = client.report(delta.id) if report or ready else None
    if report and measured is not None:
        print_json(as_dict(measured))
    elif as_json:
        print_resources(delta)
    else:
        notes = measured.notes if measured is not None else []
        print_rows([*delta.rows(), *_lineage(delta), *(("note", note) for note in notes)])


def _newest_at_least(client: "Client", name: str) -> "Delta":
    """What the name means; of a model without a ready version the newest."""
    try:
        return client.delta(name)
    except NotReady as error:
        if newest := error.details.get("newest"):
            return client.delta(str(newest))
        raise


def _lineage(delta: "Delta") -> Iterable[tuple[str, str]]:
    if delta.lineage is not None:
        yield from (("parent", delta.lineage.parent),) if delta.lineage.parent else ()
        yield from (("commit", delta.lineage.commit),) if delta.lineage.commit else ()
    yield "job", delta.job


def pull(
    name: Reference,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write; by default MODEL-VERSION.delta."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another file.")] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Download a delta's file and verify it; continues a download that was interrupted."""
    from deltadock.client.progress import bytes_bar

    if out is not None:
        check_file(out)
    with connect(url) as client:
        delta = client.delta(name)
        if delta.artifact is None:
            raise NotReady(f"{delta.reference} is {delta.state}; deltadock logs -f {delta.job}")
        path = out or Path(f"{delta.name.partition('/')[2]}-{delta.version}.delta")
        if path.is_dir():
            path /= f"{delta.name.partition('/')[2]}-{delta.version}.delta"
        if not path.parent.is_dir():
            raise NotFound(f"There is no folder {path.parent}. Make it, or choose another --out.")
        is_there = path.exists() and _is_artifact(path, delta.artifact)
        if path.exists() and not is_there and not force:
            raise Conflict(
                f"{path} exists, and is not {delta.reference}. Choose another name with --out, or "
                "replace it with --force."
            )
        if not is_there:
            with (
                on_interrupt("The same command continues the download."),
                bytes_bar(errors, "connecting", "downloading") as bar,
            ):
                client.download(delta.id, path, bar)
    if as_json:
        print_json({"delta": as_dict(delta), "path": str(path)})
    else:
        size = words.size(delta.artifact.bytes)
        already = "already there, " if is_there else ""
        say(f"{path}: {already}{size}, sha256 {delta.artifact.digest}")


def _is_artifact(path: Path, artifact: "Artifact") -> bool:
    """Whether a file has the artifact's bytes."""
    if path.stat().st_size != artifact.bytes:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == artifact.digest


def rm(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME", help="Deltas; with --all, models.", autocompletion=complete_model
        ),
    ],
    whole: Annotated[bool, typer.Option("--all", help="Whole models with all versions.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Delete deltas, or whole models (--all). `undo` brings versions back for some days."""
    from deltadock.client.resources import FINAL_STATES

    with connect(url) as client:
        if whole:
            _remove_models(client, names, yes=yes, as_json=as_json)
            return
        removed = [_removable(client, name) for name in names]  # all exist before one is deleted
        for delta in removed:
            client.delete(delta.id)
            if not as_json:
                ended = "" if delta.state in FINAL_STATES else f" and cancelled its job {delta.job}"
                undoing = f"Bring it back: deltadock undo {delta.reference}"
                say(f"Deleted {delta.reference}{ended}. {undoing}")
    if as_json:
        print_resources(removed)


def _removable(client: "Client", name: str) -> "Delta":
    """What the name means.

    Raises:
        NotReady: the model has no ready version; the message names the one to delete.
    """
    try:
        return client.delta(name)
    except NotReady as error:
        if newest := error.details.get("newest"):
            raise NotReady(f"{error.message} To delete it: deltadock rm {newest}") from error
        raise


def _remove_models(client: "Client", names: list[str], *, yes: bool, as_json: bool) -> None:
    models = [client.model(name) for name in names]
    for model in models:
        if not yes:
            if not sys.stdin.isatty():
                raise InvalidInput(f"This deletes all of {model.name}: confirm with --yes.")
            typer.confirm(
                f"Delete {model.name} with {words.counted(model.last_version, 'version')}? Each "
                "can be brought back for some days; the name is for no other model.",
                abort=True,
                err=True,
            )
        client.delete_model(model.name)
        if not as_json:
            say(f"Deleted {model.name}. Bring its newest version back: deltadock undo {model.name}")
    if as_json:
        print_resources(models)


def undo(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A deleted delta: project/model:version or id; project/model is the last deleted.",
        ),
    ],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Restore a deleted delta."""
    with connect(url) as client:
        delta = client.restore(name)
    if as_json:
        print_resources(delta)
    else:
        say(f"{delta.reference} is back, {delta.state}.")


def alias(
    name: Reference,
    alias: Annotated[
        str | None,
        typer.Argument(
            metavar="ALIAS", help="Such as prod; `default` is what the bare name means."
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--rm", help="Remove the alias.")] = False,
    history: Annotated[
        bool, typer.Option("--history", help="Who moved what, when and why.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", "-m", help="For the history.")] = "",
    expected: Annotated[
        int | None,
        typer.Option(help="Refuse unless it means this version now; 0: none.", min=0),
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Let an alias mean a version: `deltadock alias maths/skills:3 prod`. Without ALIAS: list."""
    model_name = name.partition("@")[0].partition(":")[0]
    if alias is None and (remove or reason or expected is not None):
        raise typer.BadParameter(
            f"name the alias too, as in `deltadock alias {model_name} prod --rm`.",
            param_hint="ALIAS",
        )
    with connect(url) as client:
        if history:
            moves = (m for m in client.alias_moves(model_name) if alias in (None, m.alias))
            none = (
                f"No alias of {model_name} was moved yet."
                if alias is None
                else f"{model_name}@{alias} was not moved yet."
            )
            _print_moves(list(islice(moves, MOVES_SHOWN)), none, as_json=as_json)
        elif alias is None:
            _print_aliases(client.model(model_name), as_json=as_json)
        elif remove:
            client.remove_alias(model_name, alias)
            said = f"{model_name}@{alias} is removed."
            print_changed(client.model(model_name), said, as_json=as_json)
        else:
            delta = client.delta(name)
            model = client.move_alias(
                delta.name, alias, delta.version, reason=reason, expected=expected
            )
            said = f"{model_name}@{alias} means version {delta.version}."
            print_changed(model, said, as_json=as_json)


def _print_moves(moves: "list[AliasMove]", none: str, *, as_json: bool) -> None:
    if as_json:
        print_resources(moves)
        return
    print_table(
        ("when", "alias", "from", "to", "by", "why"),
        (
            (
                words.ago(move.at), move.alias, words.plain(move.from_version),
                words.plain(move.to_version), move.moved_by_name or move.moved_by or "rule",
                move.reason,
            )
            for move in moves
        ),
        none,
    )  # fmt: skip


def _print_aliases(model: "Model", *, as_json: bool) -> None:
    if as_json:
        print_resources(model)
        return
    print_table(
        ("alias", "version", "moved"),
        (
            (found.alias, str(found.version), words.ago(found.moved_at))
            for found in model.aliases or ()
        ),
        f"{model.name} has no alias yet: no version is ready.",
    )


class _Answer(NamedTuple):
    """What a model answered, or why it did not."""

    text: str
    error: str | None = None

    def fields(self) -> dict[str, str]:
        """Those of a JSON document."""
        return {"answer": self.text} if self.error is None else {"error": self.error}

    def __str__(self) -> str:
        return self.text if self.error is None else f"({self.error})"


def _answer_or_error(client: "Client", delta: "Delta", prompt: str, max_tokens: int) -> _Answer:
    """One that is not served has figures to compare all the same."""
    try:
        return _Answer(answer_greedily(client, delta.id, prompt, max_tokens))
    except (NotReady, UnsupportedModel, Unavailable) as error:
        return _Answer("", error.message)


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME", help="Two to four deltas.", autocompletion=complete_model
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Let each answer as in `run`, greedily.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 64,
    as_json: AsJson = False,
    url: Url = None,
) -> None:  # fmt: skip
    """Compare deltas: figures side by side, and answers to a prompt; differences are marked."""
    if not 2 <= len(names) <= 4:
        raise typer.BadParameter("give two to four deltas", param_hint="NAME")
    with connect(url) as client:
        found = [client.delta(name) for name in names]
        answers = [
            _answer_or_error(client, delta, prompt, max_tokens)
            for delta in found
            if prompt is not None
        ]
    if as_json:
        fields = [answer.fields() for answer in answers] or [{}] * len(found)
        print_json([as_dict(delta) | more for delta, more in zip(found, fields, strict=True)])
        return
    columns = [dict(delta.rows()) for delta in found]
    for column in columns:
        if "sha256" in column:  # enough to tell them apart
            column["sha256"] = column["sha256"][:16]
    labels = dict.fromkeys(label for column in columns for label in column if label != "delta")
    rows = []
    for label in labels:
        values = [column.get(label, words.MISSING) for column in columns]
        rows.append(("≠" if len(set(values)) > 1 else "", label, *values))
    if answers:
        rows.append(("≠" if len(set(answers)) > 1 else "", "answer", *map(str, answers)))
    print_table(("", "", *(delta.reference for delta in found)), rows, "", piped=COMPARED_COLUMNS)
    if len({tuple(delta.lineage.calibration) for delta in found if delta.lineage}) > 1:
        say("KL and agreement are of different texts, so they do not say which is better.")
