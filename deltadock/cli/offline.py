"""The offline commands: checkpoint folders and delta files, without a service."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer

from deltadock import words
from deltadock.cli.options import (
    CALIBRATION,
    Bits,
    MaxKl,
    Method,
    MinAgreement,
    Ratio,
    Seed,
    TargetBytes,
    check_file,
    parse_source,
)
from deltadock.cli.outcome import on_interrupt
from deltadock.cli.output import (
    AsJson,
    errors,
    output,
    print_json,
    print_rows,
    print_table,
    working,
)
from deltadock.compression.options import (
    LENGTH,
    TOKENS,
    CalibrationOptions,
    Goal,
    MethodInfo,
    check_text_bytes,
    check_weights,
    default_method,
    goal_for,
)
from deltadock.compression.preview import SizePreview
from deltadock.compression.progress import Forecast, Progress
from deltadock.errors import Conflict, DeltadockError, InvalidInput, NotFound

if TYPE_CHECKING:
    from deltadock.client.routes import GoalOptions

Folder = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="Hugging Face checkpoint folder.")
]
DeltaFile = Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Delta file.")]
DeltaArgument = Annotated[
    Path, typer.Argument(metavar="DELTA", exists=True, dir_okay=False, help="Delta file.")
]


def resolve_device(device: str) -> str:
    """The torch device for `--device`.

    Raises:
        typer.BadParameter: this machine has no such device.
    """
    import torch

    from deltadock.kernels import choose_device

    if device == "auto":
        return str(choose_device(device))
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device != "cpu" and device not in cuda and not (device == "cuda" and cuda):
        raise typer.BadParameter(f"this machine has no device {device!r}", param_hint="--device")
    return device


def check_writable(out: Path, report: Path | None) -> None:
    """Check the output paths before a compression that may take hours.

    Raises:
        Conflict: `out` exists.
        InvalidInput: it is standard output.
        NotFound: a parent folder does not exist.
    """
    check_file(out)
    if out.exists():
        raise Conflict(f"{out} already exists. Choose another name or remove it.")
    for path in (out, report):
        if path is not None and not path.parent.is_dir():
            raise NotFound(f"The folder {path.parent} does not exist. Create it first.")


def compress(
    base: Folder,
    finetuned: Folder,
    out: Annotated[Path, typer.Option(help="Delta file to write.")],
    method: Method = None,
    bits: Bits = None,
    target_bytes: TargetBytes = None,
    ratio: Ratio = None,
    max_kl: MaxKl = None,
    min_agreement: MinAgreement = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help=".txt, or .jsonl with text, messages, prompt and completion, or prompt; repeat "
            "for a mixture. 'sampled', the default: text sampled from the fine-tune.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="Maximum number of calibration tokens.", rich_help_panel=CALIBRATION)
    ] = TOKENS,
    calibration_length: Annotated[
        int,
        typer.Option(
            help="Tokens per window; less if the model's context is shorter.",
            rich_help_panel=CALIBRATION,
        ),
    ] = LENGTH,
    seed: Seed = 0,
    solver: Annotated[
        str, typer.Option(help="Solver of the bit allocation: exact or scip.")
    ] = "exact",
    report: Annotated[Path | None, typer.Option(help="Report file to write (JSON).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Compress a fine-tuned checkpoint against its base.

    After Ctrl-C or a crash the same command continues after the last finished block.
    """
    goals: GoalOptions = {
        "bits": bits, "target_bytes": target_bytes, "ratio": ratio, "max_kl": max_kl,
        "min_agreement": min_agreement,
    }  # fmt: skip
    info, goal = _choose(base, finetuned, method, goals, has_text=bool(calibration))
    if solver not in ("exact", "scip"):
        raise typer.BadParameter("choose exact or scip", param_hint="--solver")
    sources = [parse_source(text) for text in calibration or ()]
    check_weights([source.weight for source in sources])
    for source in sources:
        if source.path is not None:
            check_text_bytes(source.path.name, source.path.stat().st_size)
    amount = CalibrationOptions(calibration_tokens, calibration_length)
    amount.check()
    check_writable(out, report)
    chosen_device = resolve_device(device)
    from deltadock.client.progress import left_text, work_bar
    from deltadock.compression.options import CompressOptions
    from deltadock.compression.pipeline import compress as run

    chosen: Literal["exact", "scip"] = "scip" if solver == "scip" else "exact"
    options = CompressOptions(
        method=info.name, goal=goal, seed=seed, solver=chosen, calibration=amount
    )  # fmt: skip
    blocks = BlockFolder(out.with_name(f"{out.name}.blocks"))
    forecast = Forecast()
    with (
        blocks,
        on_interrupt("The same command continues after the last finished block."),
        work_bar(errors) as bar,
    ):

        def show(update: Progress) -> None:
            line = f"{update.stage}: {update.message}"
            left = left_text(forecast.seconds_left(update))
            bar(line.partition(", ")[0], f"{line}{left}", update.fraction)

        result = run(
            base,
            finetuned,
            out,
            options,
            calibration=sources,
            progress=show,
            store=blocks,
            device=chosen_device,
        )
    document = result.to_dict()
    if report is not None:
        report.write_text(json.dumps(document, indent=2) + "\n")
    if as_json:
        print_json(document)
    else:
        print_report(document)


class BlockFolder:
    """Keeps encoded blocks of a compression in a folder, which the first one makes.

    A context manager that removes it when the compression is complete or refused.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, DeltadockError):
            shutil.rmtree(self._folder, ignore_errors=True)

    def get(self, key: str) -> bytes | None:
        """The block kept under `key`, or None."""
        path = self._path(key)
        return path.read_bytes() if path.exists() else None

    def put(self, key: str, data: bytes) -> None:
        """Keep a block."""
        self._folder.mkdir(exist_ok=True)
        staged = self._path(key).with_suffix(".part")
        staged.write_bytes(data)
        staged.replace(self._path(key))

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.block"


def texts_of(sources: list[dict[str, Any]]) -> str:
    """Texts that were calibrated or measured on, in words."""
    texts = (
        f"{words.counted(source['tokens'], 'token')} "
        + (f"of {source['sha256'][:12]}" if source["sha256"] else "sampled from the fine-tune")
        for source in sources
    )
    return ", ".join(texts) or words.MISSING


def size_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The method and size of an artifact, in words."""
    size, of = (words.size(figures[name]) for name in ("artifact_bytes", "checkpoint_bytes"))
    true, nominal = words.significant(figures["true_bits"]), words.budget(figures["nominal_bits"])
    return [
        ("method", figures["method"]),
        ("size", f"{size} of {of}"),
        ("ratio", f"{words.ratio(figures['ratio'])} (whole artifact over bf16 checkpoint)"),
        ("bits per weight", f"{true} true, {nominal} nominal"),
    ]


def quality_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of a `Quality`, in words; a report without them has None."""
    losses = (figures[key] for key in ("nll", "nll_finetuned", "nll_base"))
    return [
        ("KL to the fine-tune", words.nats(figures["kl"])),
        ("KL of the bare base", words.nats(figures["kl_base"])),
        ("top-1 agreement", words.percentage(figures["agreement"])),
        ("NLL delta / fine-tuned / base", " / ".join(words.significant(x, 4) for x in losses)),
    ]


def print_report(document: dict[str, Any]) -> None:
    """Print the report's figures as a table."""

    print_rows(
        (
            *size_rows(document),
            *quality_rows(document),
            ("measured on", texts_of(document["measured_on"])),
            ("time", words.duration(document["seconds"])),
        )
    )
    for note in document["notes"]:
        output.print(note)


def preview(
    finetuned: Folder,
    base: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False,
            help="Base checkpoint folder; without it, every tensor counts as changed.",
        ),
    ] = None,
    method: Method = None,
    bits: Bits = None,
    target_bytes: TargetBytes = None,
    ratio: Ratio = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Predict the size of a delta from the tensors' shapes."""
    goals: GoalOptions = {"bits": bits, "target_bytes": target_bytes, "ratio": ratio}
    info, goal = _choose(base, finetuned, method, goals, has_text=False)
    if base is None and info.imports_adapter:
        raise InvalidInput(
            "An adapter becomes a delta of its base: name the base's folder, --base."
        )
    with working("reading the checkpoints"):
        size = _preview(finetuned, base, info, goal)
    if as_json:
        print_json(size.to_dict())
        return
    print_table(
        ("part", "tensors", "weights", "bytes"),
        (
            (
                part.kind,
                words.grouped(part.tensors) if part.tensors else "",
                words.grouped(part.weights) if part.tensors else "",
                words.grouped(part.bytes),
            )
            for part in size.parts
        ),
        "",
    )
    budget = "" if size.bits is None else f" at {size.bits:.4g} bit"
    output.print(
        f"{info.name}{budget}: {words.size(size.artifact_bytes)} of "
        f"{words.size(size.checkpoint_bytes)}, ratio {words.ratio(size.ratio)}, "
        f"{words.significant(size.true_bits)} true bits per weight"
    )


def _choose(
    base: Path | None, finetuned: Path, method: str | None, goals: "GoalOptions", *, has_text: bool
) -> tuple[MethodInfo, Goal | None]:
    """The method, by default that of the kind of checkpoint, and its goal.

    Raises:
        InvalidInput, Conflict: they do not fit together, or not the folders' configurations.
    """
    from deltadock.artifacts.checkpoint import ADAPTER_TYPE
    from deltadock.artifacts.folder import read_headers
    from deltadock.compression.checks import check_compressible

    of = read_headers(finetuned).config
    is_adapter = of["model_type"] == ADAPTER_TYPE
    info, goal = goal_for(method or default_method(is_adapter=is_adapter).name, **goals)
    before = of if base is None else read_headers(base).config
    check_compressible(before, of, info, goal, has_text=has_text)
    return info, goal


def _preview(
    finetuned: Path, base: Path | None, info: MethodInfo, goal: Goal | None
) -> SizePreview:
    from deltadock.artifacts.compatibility import check_differs, check_same_architecture
    from deltadock.artifacts.folder import read_headers, scan_folder
    from deltadock.compression.preview import carried_bytes, preview_size
    from deltadock.compression.shapes import read_shapes, shapes_of

    if base is None:
        return preview_size(read_shapes(finetuned), info.name, goal)
    if info.imports_adapter:  # whose tensors all count, so that no digests are needed
        return preview_size(shapes_of(read_headers(finetuned), read_headers(base)), info.name, goal)
    before, after = scan_folder(base), scan_folder(finetuned)
    check_same_architecture(before, after)
    check_differs(before, after)
    shapes, carried = shapes_of(after, before), carried_bytes(after, before)
    if any(shape.recast for shape in shapes):  # only their values tell what has changed
        from deltadock.compression.checkpoints import open_pair
        from deltadock.compression.pipeline import pair_shapes

        shapes = pair_shapes(open_pair(base, finetuned))
    return preview_size(shapes, info.name, goal, carried=carried)


def evaluate(
    base: Folder,
    delta: DeltaFile,
    finetuned: Annotated[
        Path,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Hugging Face checkpoint folder, or a PEFT adapter's.",
        ),
    ],
    text: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help=".txt or .jsonl, as for calibration."),
    ],
    window: Annotated[int, typer.Option(min=16, help="Tokens per window.")] = 256,
    as_json: AsJson = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")] = "auto",
) -> None:
    """Measure a delta against its fine-tune and base on a text."""
    from deltadock.artifacts.checkpoint import ADAPTER_CONFIG
    from deltadock.artifacts.folder import folder_files
    from deltadock.client.progress import work_bar
    from deltadock.compression.adapters.importing import evaluate_adapter
    from deltadock.compression.quality import evaluate as evaluate_model

    is_adapter = ADAPTER_CONFIG in folder_files(finetuned)
    run = evaluate_adapter if is_adapter else evaluate_model
    with work_bar(errors) as show:
        show("", "reading the checkpoints", None)
        quality = run(
            base,
            finetuned,
            delta,
            text,
            window=window,
            progress=lambda done, total: show("", "comparing outputs", done / total),
            device=resolve_device(device),
        )
    figures = asdict(quality)
    if as_json:
        print_json(figures)
    else:
        print_rows([*quality_rows(figures), ("tokens", words.grouped(quality.tokens))])


def merge(
    base: Folder,
    delta: DeltaFile,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    as_json: AsJson = False,
) -> None:
    """Merge a delta into its base and write a full checkpoint."""
    from deltadock.artifacts.export import merge as run

    with working("merging"):
        run(base, delta, out)
    if as_json:
        print_json({"out": str(out)})
    else:
        typer.echo(f"Wrote {out}")


def export(
    base: Folder,
    delta: DeltaFile,
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    as_json: AsJson = False,
) -> None:
    """Write a delta of low-rank products as a PEFT adapter."""
    from deltadock.compression.adapters.exporting import export_adapter

    with working("exporting"):
        export_adapter(base, delta, out)
    if as_json:
        print_json({"out": str(out)})
    else:
        typer.echo(f"Wrote {out}")


def inspect(delta: DeltaArgument, as_json: AsJson = False) -> None:
    """Show the contents of a delta file."""
    from deltadock.artifacts.reader import Artifact
    from deltadock.artifacts.summary import summarize

    with Artifact(delta) as artifact:
        totals, rows = summarize(artifact)
    if as_json:
        print_json({**totals, "tensors": [asdict(row) for row in rows]})
        return
    print_table(
        ("tensor", "kind", "shape", "rank", "count at width", "error", "bytes"),
        (
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                "" if row.rank is None else str(row.rank),
                " ".join(f"{count}@{width}" for width, count in row.widths.items()),
                words.significant(row.error),
                words.grouped(row.bytes),
            )
            for row in rows
        ),
        "No tensor differs from the base's.",
    )
    calibration = totals["calibration"] or {}
    print_rows(
        [
            *size_rows(totals),
            ("base", totals["base_digest"]),
            ("sha256", totals["digest"]),
            ("seed", str(totals["seed"])),
            ("calibrated on", texts_of(calibration.get("sources", []))),
            ("files", ", ".join(totals["files"])),
            ("version", str(totals["version"])),
            ("hashes", f"not verified; deltadock verify {delta} does it"),
        ]
    )


def verify(delta: DeltaArgument, as_json: AsJson = False) -> None:
    """Verify every hash in a delta file."""
    from deltadock.artifacts.reader import Artifact

    with Artifact(delta) as artifact:
        with working("verifying"):
            artifact.check_intact()
        if as_json:
            print_json({"path": str(delta), "sha256": artifact.digest})
        else:
            typer.echo(f"{delta}: all hashes match, sha256 {artifact.digest}")


def methods(as_json: AsJson = False) -> None:
    """List the compression methods."""
    from deltadock.compression.options import METHODS

    if as_json:
        print_json([asdict(info) for info in METHODS.values()])
        return
    print_table(
        ("method", "bits", "what it does"),
        (
            (
                info.name,
                words.MISSING
                if info.bits_min is None
                else f"{info.bits_min:g} to {info.bits_max:g}",
                info.title,
            )
            for info in METHODS.values()
        ),
        "",
    )
