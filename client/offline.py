"""The offline commands: two folders, no service."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from compression.catalogue import check_method
from deltadock.errors import Conflict, NotFound

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

    from kernels.device import choose_device

    if device == "auto":
        return str(choose_device(device))
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device != "cpu" and device not in cuda and not (device == "cuda" and cuda):
        raise typer.BadParameter(f"there is no device {device!r} here", param_hint="--device")
    return device


def check_writable(out: Path, report: Path | None) -> None:
    """Refuse places that cannot be written to before hours of work depend on them.

    Raises:
        Conflict: `out` exists.
        NotFound: a file's folder does not exist.
    """
    if out.exists():
        raise Conflict(f"{out} exists already; choose another name or remove it.")
    for path in (out, report):
        if path is not None and not path.parent.is_dir():
            raise NotFound(f"There is no folder {path.parent}; make it first.")


def compress(
    base: Folder,
    finetuned: Folder,
    out: Annotated[Path, typer.Option(help="The delta file to write.")],
    method: Annotated[str, typer.Option(help="See `deltadock methods`.")] = "adamix",
    bits: Annotated[
        float | None,
        typer.Option(help="Code bits per weight of a linear layer, 0.1 to 8; adamix: 1.0."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help=".txt or .jsonl")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    solver: Annotated[str, typer.Option(help="exact or scip")] = "exact",
    report: Annotated[Path | None, typer.Option(help="Where to write the report (JSON).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n]")] = "auto",
) -> None:
    """Compress a fine-tuned checkpoint against its base."""
    if bits is None and method != "exact":
        bits = 1.0
    check_method(method, bits)
    if solver not in ("exact", "scip"):
        raise typer.BadParameter("choose exact or scip", param_hint="--solver")
    check_writable(out, report)
    chosen_device = resolve_device(device)
    from compression.pipeline import compress as run
    from compression.run import CompressOptions

    chosen: Literal["exact", "scip"] = "scip" if solver == "scip" else "exact"
    with progress_bar() as bar:
        task = bar.add_task("validating", total=1.0)
        try:
            result = run(
                base,
                finetuned,
                out,
                CompressOptions(method=method, bits=bits, seed=seed, solver=chosen),
                calibration=calibration,
                progress=lambda at: bar.update(
                    task, completed=at.fraction, description=f"{at.stage}: {at.message}"
                ),
                device=chosen_device,
            )
        except BaseException:
            # The delta file is there before it has been measured; a run that fails leaves none.
            out.unlink(missing_ok=True)
            raise
        bar.update(task, completed=1.0, description="done")
    document = result.to_dict()
    if report is not None:
        report.write_text(json.dumps(document, indent=2) + "\n")
    print_report(document)


def print_report(document: dict[str, Any]) -> None:
    """The report's figures as a table."""
    table = Table(show_header=False, box=None)

    def figure(key: str, form: str, unit: str = "") -> str:
        value = document.get(key)
        return "–" if value is None else f"{value:{form}}{unit}"

    megabytes = (
        f"{document['artifact_bytes'] / 1e6:.2f} of {document['checkpoint_bytes'] / 1e6:.2f}"
    )
    for label, text in (
        ("method", document["method"]),
        ("size", f"{megabytes} MB"),
        ("ratio", figure("ratio", ".2f", " x (whole artifact over bf16 checkpoint)")),
        (
            "bits per weight",
            f"{figure('true_bits', '.3f')} true, {figure('nominal_bits', 'g')} nominal",
        ),
        ("KL to the fine-tune", figure("kl", ".5f", " nats per token")),
        ("KL of the bare base", figure("kl_base", ".5f", " nats per token")),
        ("same top token", figure("agreement", ".2%")),
        (
            "NLL delta / fine-tuned / base",
            " / ".join(figure(key, ".4f") for key in ("nll", "nll_finetuned", "nll_base")),
        ),
        ("time", figure("seconds", ".1f", " s")),
    ):
        table.add_row(label, text)
    output.print(table)


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
    from compression.evaluation import evaluate as run

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
    from artifacts.export import merge as run

    run(base, delta, out)
    typer.echo(f"Wrote {out}")


def inspect(
    delta: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Show what is in a delta file."""
    from artifacts.reader import Artifact
    from artifacts.summary import summarize

    with Artifact(delta) as artifact:
        totals, rows = summarize(artifact)
    if as_json:
        print_json({**totals, "tensors": [asdict(row) for row in rows]})
        return
    headings = ("kind", "shape", "rank", "ranks at width", "error", "bytes")
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
    from artifacts.reader import Artifact

    with Artifact(delta) as artifact:
        artifact.check_intact()
        typer.echo(f"{delta}: every hash is right, sha256 {artifact.digest}")


def methods() -> None:
    """List the compression methods."""
    from compression.catalogue import METHODS

    table = Table("method", "bits", "what it does")
    for info in METHODS.values():
        budget = "–" if info.bits_min is None else f"{info.bits_min:g} to {info.bits_max:g}"
        table.add_row(info.name, budget, info.title)
    output.print(table)
