"""`deltadock model`: a model's card, tags and rule."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltadock import words
from deltadock.cli.output import AsJson, print_resources, print_rows
from deltadock.cli.server import Url, complete_model, connect

if TYPE_CHECKING:
    from deltadock.client.resources import Model
    from deltadock.client.routes import ModelChanges


def model(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="project/model.", autocompletion=complete_model)
    ],
    tags: Annotated[
        list[str] | None, typer.Option("--tag", metavar="TAG", help="Add a tag; repeat for more.")
    ] = None,
    untags: Annotated[
        list[str] | None, typer.Option("--untag", metavar="TAG", help="Remove a tag.")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A Markdown file, the model's new card."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="A newer version becomes the default when it is ready, if its KL is at most this.",
        ),
    ] = None,
    max_increase: Annotated[
        float | None,
        typer.Option(min=0, help="And at most so much above the current default's; by default 0."),
    ] = None,
    no_rule: Annotated[
        bool, typer.Option("--no-rule", help="The default moves only by hand.")
    ] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Show a model: its card, tags, aliases and rule; with options, change it before."""
    if max_increase is not None and max_kl is None:
        raise typer.BadParameter(
            "it belongs to a rule: give --max-kl too.", param_hint="--max-increase"
        )
    if no_rule and max_kl is not None:
        raise typer.BadParameter("give a rule or none.", param_hint="--no-rule")
    changes: ModelChanges = {}
    if card is not None:
        changes["description"] = card.read_text(encoding="utf-8")
    if max_kl is not None:
        changes["rule"] = {"max_kl": max_kl, "max_increase": max_increase or 0.0}
    elif no_rule:
        changes["rule"] = None
    with connect(url) as client:
        found = client.model(name)
        if tags or untags:
            kept = dict.fromkeys([*found.tags, *(tags or ())])
            changes["tags"] = [tag for tag in kept if tag not in (untags or ())]
        if changes:
            found = client.change_model(name, **changes)
    if as_json:
        print_resources(found)
    else:
        print_rows(_rows(found))


def _rows(model: "Model") -> list[tuple[str, str]]:
    aliases = [f"{one.alias} (version {one.version})" for one in model.aliases or ()]
    return [
        ("model", model.name),
        ("last version", str(model.last_version)),
        ("aliases", ", ".join(aliases) or "none"),
        ("tags", ", ".join(model.tags) or "none"),
        ("new default", _rule(model)),
        ("created", words.ago(model.created_at)),
        *((("card", model.description),) if model.description else ()),
    ]


def _rule(model: "Model") -> str:
    if model.rule is None:
        return "by hand"
    rule = model.rule
    return f"if its KL is at most {rule.max_kl:g}, and {rule.max_increase:g} above the default's"
