"""Compress a checkpoint: from two folders and a goal to a delta file and its report.

Weights are streamed, one decoder block in memory at a time. Encoded blocks go to a block store at
once, so that an interrupted compression resumes; the artifact's bytes do not depend on that.
"""

import re
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from deltadock.compression.adapters.importing import import_adapter
from deltadock.compression.checkpoints import CheckpointPair, open_pair
from deltadock.compression.kept import BlockStore
from deltadock.compression.options import (
    SAMPLED,
    CompressOptions,
    Goal,
    MethodInfo,
    Source,
)
from deltadock.compression.preview import carried_bytes, preview_size
from deltadock.compression.progress import Progress, ProgressReporter
from deltadock.compression.report import UNRELATED, Report
from deltadock.compression.residence import scratch_for
from deltadock.compression.search import FIRST_BITS, fit_size, reach_bound
from deltadock.compression.session import CompressionSession
from deltadock.compression.shapes import TensorShape, shapes_of
from deltadock.errors import DeltadockError

RESERVE: Final = 1.25
"""Budget that the first decompositions serve, relative to the first budget tried: a search for a
size seldom goes further."""


def compress(
    base: Path,
    finetuned: Path,
    out: Path,
    options: CompressOptions,
    *,
    calibration: Sequence[Source] | Path | None,
    progress: Callable[[Progress], None] | None = None,
    store: BlockStore | None = None,
    device: str = "cpu",
    base_name: str = "",
    scratch_folder: Path | None = None,
) -> Report:
    """Compress `finetuned` against `base` into the delta file `out`.

    Args:
        base, finetuned: checkpoint folders; for the method `lora`, `finetuned` is an adapter's.
        out: the delta file; appears complete or not at all.
        options: method, goal, seed and solver.
        calibration: the text's sources. Without any, text is sampled from the fine-tune.
        progress: called at every step; whatever it raises (`Cancelled`) ends the compression.
        store: keeps encoded blocks for a later run with the same inputs.
        device: torch device.
        base_name: what the base is called, as of `import_adapter`.
        scratch_folder: an existing folder for what memory does not hold; None: `TMPDIR`.

    Raises:
        InvalidInput: a subclass names what is wrong with the input and what to do.
    """
    started = time.monotonic()
    info, goal = options.check()
    sources = [Source(calibration)] if isinstance(calibration, Path) else list(calibration or ())
    reporter = ProgressReporter(progress)
    # Of its own: another compression to this file may run at the same time.
    unfinished = out.with_name(f"{out.name}.{uuid.uuid4().hex}.unfinished")
    try:
        if info.imports_adapter:
            report = import_adapter(
                base,
                finetuned,
                unfinished,
                options,
                calibration=sources,
                progress=reporter,
                device=device,
                base_name=base_name,
            )
        else:
            measured = goal is not None and goal.is_bound
            if measured and not sources:
                sources = [SAMPLED]
            pair = open_pair(base, finetuned, reporter)
            if UNRELATED in pair.notes:  # for the job's log, hours before its report
                reporter.report("reading", 1, 1, UNRELATED)
            reserve = _reserve(pair, info, goal)
            with scratch_for(torch.device(device), scratch_folder) as scratch:
                session = CompressionSession(
                    pair, options, sources, scratch, progress=reporter, store=store,
                    device=device, reserve=reserve,
                )  # fmt: skip
                report = reach_goal(session, goal, unfinished)
        reporter.finish()
        unfinished.replace(out)
    except DeltadockError as error:
        error.message = _without_paths(error.message, base, finetuned)
        error.args = (error.message,)
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    report.seconds = time.monotonic() - started
    return report


def _without_paths(message: str, base: Path, finetuned: Path) -> str:
    """An error's text that names the checkpoints, and files relative to them.

    Where a worker has them is nobody's business. A folder that there is not, and a relative path,
    is left as it was given.
    """
    names = {
        str(path): name
        for folder, name in ((base, "the base"), (finetuned, "the fine-tune"))
        if folder.is_dir()
        for path in (folder.absolute(), folder.resolve())
    }
    for path in sorted(names, key=len, reverse=True):  # one folder may be in the other
        message = re.sub(rf"{re.escape(path)}/(?=\w)", f"{names[path]}'s ", message)
        message = re.sub(rf"{re.escape(path)}(?![\w.-])", names[path], message)
    return message[:1].upper() + message[1:] if message.startswith("the ") else message


def reach_goal(session: CompressionSession, goal: Goal | None, out: Path) -> Report:
    """Write the artifact that meets a goal, and measure it.

    Args:
        session: may have written other artifacts before.
        goal: None for a method of one size.
        out: the delta file.

    Raises:
        InvalidGoal: the method cannot reach it on this pair.
    """
    if goal is not None and goal.is_bound:
        return reach_bound(session.attempt, session.measure, out, session.info, goal)
    limit = _byte_limit(session.pair, goal)
    if goal is None or limit is None:
        report = session.compress(None if goal is None else goal.value, out)
    else:
        guess = _first_guess(session.pair, session.info, goal)
        bits = fit_size(session.draft_bytes, session.info, limit, guess, session.budgeted_weights)
        report = session.compress(bits, out)
    session.measure(report, out)
    return report


def _byte_limit(pair: CheckpointPair, goal: Goal | None) -> float | None:
    """The bytes that a size goal allows; None for other goals."""
    if goal is None or not goal.is_size:
        return None
    return goal.value if goal.kind == "target_bytes" else pair.finetuned.bf16_bytes / goal.value


def _reserve(pair: CheckpointPair, info: MethodInfo, goal: Goal | None) -> float | None:
    """The budget that decompositions serve when a goal takes several drafts; else None.

    Raises:
        InvalidGoal: as `_first_guess`.
    """
    if goal is None or goal.kind == "bits":
        return None
    return RESERVE * (_first_guess(pair, info, goal) or FIRST_BITS)


def _first_guess(pair: CheckpointPair, info: MethodInfo, goal: Goal | None) -> float:
    """The first budget to try for a size goal; 0 for other goals.

    Raises:
        InvalidGoal: the size is far below the smallest that the method can make.
    """
    limit = _byte_limit(pair, goal)
    if goal is None or limit is None:
        return 0.0
    manifests = pair.finetuned.manifest, pair.base.manifest
    carried = carried_bytes(*manifests)
    return preview_size(pair_shapes(pair), info.name, goal, carried=carried).bits or 0.0


def pair_shapes(pair: CheckpointPair) -> list[TensorShape]:
    """As `shapes_of`, with tensors of another dtype than the base's compared by their values."""
    return [
        shape._replace(changed=shape.changed and not pair.recast(shape.name).in_value, recast=False)
        for shape in shapes_of(pair.finetuned.manifest, pair.base.manifest)
    ]
