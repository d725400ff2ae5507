"""The offline commands: two folders, no service."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

Folder = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="A Hugging Face checkpoint folder.")
]
File = Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A file.")]

# Progress goes to stderr, so that --json leaves nothing but JSON on stdout.
# Names come from files that others wrote: without markup, brackets in them are only brackets.
errors = Console(stderr=True, markup=False)
TABLE_WIDTH = 120
output = Console(markup=False)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with the stage's name, a percentage and the time so far."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=not errors.is_terminal) as bar:
        yield bar


def print_json(data: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def resolve_device(device: str) -> str:
    """The device to compute on, refused as a usage error where this machine lacks it."""
    import torch

    from deltadock.kernels.device import choose_device

    if device == "auto":
        return str(choose_device(device))
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device != "cpu" and device not in cuda and not (device == "cuda" and cuda):
        raise typer.BadParameter(f"there is no device {device!r} here", param_hint="--device")
    return device


def evaluate(
    base: Folder,
    delta: File,
    finetuned: Folder,
    text: File,
    window: Annotated[int, typer.Option(min=16, help="Tokens that are run together.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n]")] = "auto",
) -> None:
    """Measure a delta against its fine-tune and base on a text."""
    from deltadock.compression.evaluation import evaluate as run

    with progress_bar() as bar:
        task = bar.add_task("comparing outputs", total=1.0)
        quality = run(
            base,
            finetuned,
            delta,
            text,
            window=window,
            progress=lambda done, total: bar.update(task, completed=done / total),
            device=resolve_device(device),
        )
    if as_json:
        print_json(asdict(quality))
        return
    table = Table(show_header=False, box=None)
    for name, value in asdict(quality).items():
        table.add_row(name, f"{value:.6g}")
    output.print(table)


def merge(
    base: Folder,
    delta: File,
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
) -> None:
    """Write the ordinary checkpoint that a delta stands for."""
    from deltadock.artifacts.export import merge as run

    run(base, delta, out)
    typer.echo(f"Wrote {out}")


def inspect(
    delta: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Show what is in a delta file."""
    from deltadock.artifacts.reader import Artifact
    from deltadock.artifacts.summary import summarize

    with Artifact(delta) as artifact:
        totals, rows = summarize(artifact)
    if as_json:
        print_json({**totals, "tensors": [asdict(row) for row in rows]})
        return
    headings = ("kind", "shape", "rank", "count at width", "error", "bytes")
    table = Table(Column("tensor", no_wrap=True), *headings, box=None)
    for row in rows:
        table.add_row(
            row.name,
            row.kind,
            "x".join(map(str, row.shape)),
            "" if row.rank is None else str(row.rank),
            " ".join(f"{count}@{width}" for width, count in row.widths.items()),
            "" if row.error is None else f"{row.error:.2e}",
            f"{row.bytes:,}",
        )
    # Names that are cut off tell nothing apart; a narrow terminal may break the lines.
    Console(width=max(output.width, TABLE_WIDTH)).print(table)
    for name, value in totals.items():
        text = f"{value:.4f}" if isinstance(value, float) else value
        if isinstance(value, dict):
            text = ", ".join(f"{key} {part}" for key, part in sorted(value.items()))
        typer.echo(f"{name:17} {text}")


def verify(delta: Annotated[Path, typer.Argument(exists=True, dir_okay=False)]) -> None:
    """Check every hash in a delta file."""
    from deltadock.artifacts.reader import Artifact

    with Artifact(delta) as artifact:
        artifact.check_intact()
        typer.echo(f"{delta}: every hash is right, sha256 {artifact.digest}")


def methods() -> None:
    """List the compression methods."""
    from deltadock.compression.catalogue import METHODS

    table = Table("method", "bits", "what it does")
    for info in METHODS.values():
        budget = "–" if info.bits_min is None else f"{info.bits_min:g} to {info.bits_max:g}"
        table.add_row(info.name, budget, info.title)
    output.print(table)
