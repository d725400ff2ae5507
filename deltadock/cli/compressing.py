"""The offline commands that make a delta file, or tell how large it would be."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.table import Table

from deltadock.cli.offline import Folder, output, print_json, progress_bar, resolve_device
from deltadock.compression.calibration.options import (
    LENGTH,
    TOKENS,
    CalibrationOptions,
    Source,
    check_weights,
)
from deltadock.compression.catalogue import default_method
from deltadock.compression.goal import Goal, goal_for
from deltadock.compression.sizes import SizePreview
from deltadock.errors import Conflict, NotFound

DEFAULT_METHOD: Final = default_method().name
SAMPLED: Final = "sampled"
GOALS: Final = "Size, one of"
CALIBRATION: Final = "Calibration"

Method = Annotated[str, typer.Option(help="See `deltadock methods`.")]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Bits per weight of what is compressed; 1.0 where none of these is given.",
        rich_help_panel=GOALS,
    ),
]
TargetBytes = Annotated[
    int | None, typer.Option(help="Most bytes of the delta file.", rich_help_panel=GOALS)
]
Ratio = Annotated[
    float | None,
    typer.Option(help="Least bf16 checkpoint bytes per byte.", rich_help_panel=GOALS),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="The smallest that keeps this KL to the fine-tune, nats per held-out token.",
        rich_help_panel=GOALS,
    ),
]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        help="The smallest that keeps this share of equal top tokens, such as 0.98.",
        rich_help_panel=GOALS,
    ),
]


def parse_source(text: str) -> Source:
    """`PATH` or `PATH:WEIGHT`, with `sampled` for text that the fine-tune writes.

    Raises:
        typer.BadParameter: there is no such file, or the weight is no number.
    """
    for name, weight in ((text, "1"), text.rpartition(":")[::2]):
        if name == SAMPLED or (name and Path(name).is_file()):
            try:
                return Source(None if name == SAMPLED else Path(name), float(weight))
            except ValueError:
                break
    raise typer.BadParameter(
        f"{text!r} is neither a file nor FILE:WEIGHT nor {SAMPLED!r}", param_hint="--calibration"
    )


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
    method: Method = DEFAULT_METHOD,
    bits: Bits = None,
    target_bytes: TargetBytes = None,
    ratio: Ratio = None,
    max_kl: MaxKl = None,
    min_agreement: MinAgreement = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help=".txt, or .jsonl with text, messages, prompt and completion, or prompt; several "
            "make a mixture. 'sampled', and none: text that the fine-tune writes.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="Most tokens that calibrate.", rich_help_panel=CALIBRATION)
    ] = TOKENS,
    calibration_length: Annotated[
        int,
        typer.Option(
            help="Tokens of a window; shorter for short models.", rich_help_panel=CALIBRATION
        ),
    ] = LENGTH,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    solver: Annotated[str, typer.Option(help="exact or scip")] = "exact",
    report: Annotated[Path | None, typer.Option(help="Where to write the report (JSON).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n]")] = "auto",
) -> None:
    """Compress a fine-tuned checkpoint against its base."""
    _, goal = goal_for(
        method, bits=bits, target_bytes=target_bytes, ratio=ratio, max_kl=max_kl,
        min_agreement=min_agreement,
    )  # fmt: skip
    if solver not in ("exact", "scip"):
        raise typer.BadParameter("choose exact or scip", param_hint="--solver")
    sources = [parse_source(text) for text in calibration or ()]
    check_weights([source.weight for source in sources])
    amount = CalibrationOptions(calibration_tokens, calibration_length)
    amount.check()
    check_writable(out, report)
    chosen_device = resolve_device(device)
    from deltadock.compression.pipeline import compress as run
    from deltadock.compression.run import CompressOptions

    chosen: Literal["exact", "scip"] = "scip" if solver == "scip" else "exact"
    options = CompressOptions(
        method=method, bits=goal.bits if goal else None, target_bytes=target_bytes, ratio=ratio,
        max_kl=max_kl, min_agreement=min_agreement, seed=seed, solver=chosen, calibration=amount,
    )  # fmt: skip
    with progress_bar() as bar:
        task = bar.add_task("validating", total=1.0)
        result = run(
            base,
            finetuned,
            out,
            options,
            calibration=sources,
            progress=lambda at: bar.update(
                task, completed=at.fraction, description=f"{at.stage}: {at.message}"
            ),
            device=chosen_device,
        )
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


def preview(
    finetuned: Folder,
    base: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False,
            help="Its base; without one, every tensor is taken as changed.",
        ),
    ] = None,
    method: Method = DEFAULT_METHOD,
    bits: Bits = None,
    target_bytes: TargetBytes = None,
    ratio: Ratio = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:  # fmt: skip
    """Tell how large a delta would be, from the tensors' shapes alone."""
    _, goal = goal_for(method, bits=bits, target_bytes=target_bytes, ratio=ratio)
    size = _preview(finetuned, base, method, goal)
    if as_json:
        print_json(size.to_dict())
        return
    table = Table("part", "tensors", "weights", "bytes", box=None)
    for part in size.parts:
        counts = (part.tensors, part.weights) if part.tensors else ("", "")
        table.add_row(part.kind, *(f"{n:,}" if n else "" for n in counts), f"{part.bytes:,}")
    output.print(table)
    budget = "" if size.bits is None else f" at {size.bits:.4g} bit"
    output.print(
        f"{method}{budget}: {size.artifact_bytes / 1e6:,.2f} of "
        f"{size.checkpoint_bytes / 1e6:,.2f} MB, ratio {size.ratio:.2f}, "
        f"{size.true_bits:.3f} true bits per weight"
    )


def _preview(finetuned: Path, base: Path | None, method: str, goal: Goal | None) -> SizePreview:
    from deltadock.artifacts.checkpoint import scan_folder
    from deltadock.artifacts.compatibility import check_same_architecture
    from deltadock.compression.sizes import carried_bytes, preview, read_shapes, shapes_of

    if base is None:
        return preview(read_shapes(finetuned), method, goal)
    before, after = scan_folder(base), scan_folder(finetuned)
    check_same_architecture(before, after)
    shapes, carried = shapes_of(after, before), carried_bytes(after, before)
    return preview(shapes, method, goal, carried=carried)
