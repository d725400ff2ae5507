"""Hooks of `mkdocs build` (mkdocs.yml): pages made from the code, and links into the repository.

The home page is README.md. The pages of commands, routes, settings and decisions are made from the
typer app, the OpenAPI document, `Settings` and docs/adr at each build, so that they cannot drift.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from deltadock.api.main import create_app
from deltadock.cli.app import app
from deltadock.settings import Settings

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/deltadock/deltadock/blob/main/"
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
ERRORS = range(400, 600)
GIB = 2**30


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(),
        "reference/commands.md": commands(),
        "reference/routes.md": routes(create_app(Settings()).openapi()),
        "reference/settings.md": settings(),
        "adr/index.md": decisions(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    for plot in (ROOT / "benchmarks/results").glob("*.svg"):
        files.append(File.generated(config, f"images/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside docs/ to the repository; a missing file fails the build."""
    home = page.file.src_uri == "index.md"
    folder = "" if home else posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if path.startswith("docs/"):
            path = path.removeprefix("docs/") if home else match[1]
            return f"{path}/index.md" if path.endswith("adr") else path
        if path.endswith(".svg"):
            return posixpath.relpath(f"docs/images/{posixpath.basename(path)}", folder or "docs")
        if not (ROOT / path.partition("#")[0]).exists():
            raise PluginError(f"{page.file.src_uri}: {match[1]} does not exist")
        return REPOSITORY + path

    return LINK.sub(target, markdown)


def commands() -> str:
    """Every command with its arguments and options, from the typer app."""
    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="deltadock")


def settings() -> str:
    """Every environment variable, from the fields of `Settings`."""
    rows = [
        (f"`DELTADOCK_{name.upper()}`", default(field.default), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    return "# Settings\n\nEnvironment variables, the same for every process.\n\n" + table(
        ("variable", "default", "meaning"), rows
    )


def default(value: object) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, int) and value >= GIB:
        return f"{value // GIB} GiB"
    return f"`{json.dumps(value, default=str)}`".replace('"', "")


def decisions() -> str:
    """A list of docs/adr."""
    titles = [
        (path.name, path.read_text().splitlines()[0].removeprefix("# "))
        for path in sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    ]
    lines = [re.sub(r"^(\d+)\. (.*)", rf"\1. [\2]({name})", title) for name, title in titles]
    return "# Decisions\n\n" + "\n".join(lines) + "\n"


def routes(document: dict[str, Any]) -> str:
    """Every route and object of the HTTP API, from its OpenAPI document."""
    parts = ["# Routes of the HTTP API"]
    by_tag: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            described = "\n\n".join(operation_parts(method, path, operation))
            by_tag.setdefault(operation["tags"][0], []).append(described)
    for tag, described in by_tag.items():
        parts += [f"## {tag.capitalize()}", *described]
    parts.append("## Objects")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts += [f"### {short(name)}", *filter(None, [schema.get("description")])]
        rows = [
            (f"`{field}`" + ("" if field in schema.get("required", ()) else " (optional)"),
             type_of(value), value.get("description", ""))
            for field, value in schema.get("properties", {}).items()
        ]  # fmt: skip
        parts.append(table(("field", "type", "meaning"), rows) if rows else type_of(schema))
    return "\n\n".join(parts) + "\n"


def operation_parts(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### `{method.upper()} {path}`"
    yield operation["description"]
    if parameters := operation.get("parameters"):
        rows = [
            (f"`{p['name']}`", p["in"], type_of(p["schema"]), p.get("description", ""))
            for p in parameters
        ]
        yield table(("parameter", "in", "type", "meaning"), rows)
    if body := operation.get("requestBody"):
        yield "Body: " + ", ".join(media(body))
    errors = []
    for status, response in operation["responses"].items():
        if int(status) in ERRORS:
            errors.append(status)
        else:
            answer = ", ".join(media(response)) or "nothing"
            yield f"{status}: {answer}. {response['description']}."
    yield "Errors: " + ", ".join(sorted(errors)) + "."


def media(described: dict[str, Any]) -> Iterator[str]:
    """The types of a body, as `application/json` unless said otherwise."""
    for name, content in described.get("content", {}).items():
        schema = content.get("schema", {})
        yield type_of(schema) if name == "application/json" else f"`{name}`"


def short(schema: str) -> str:
    """The name of a schema, without the module that tells two of one name apart."""
    return schema.removeprefix("deltadock__api__").replace("__schemas", "").replace("__", ".")


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema's type in a few words, with a link to an object's table."""
    if "$ref" in schema:
        name = short(schema["$ref"].rpartition("/")[2])
        return f"[{name}](#{name.lower().replace('.', '')})"
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            return " or ".join(dict.fromkeys(type_of(one) for one in schema[choice]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    kind = schema.get("type", "any")
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")
        )
        if key in schema
    ]  # fmt: skip
    return " ".join([" or ".join(kind) if isinstance(kind, list) else kind, *bounds])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return (
            "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |"
        )

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
