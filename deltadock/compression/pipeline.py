"""A whole checkpoint: from two folders to a delta file and its report.

Weights are streamed, one decoder block in memory at a time. What was made of a block is handed to
the work store at once, so that an interrupted run goes on where it was. The artifact's bytes do
not depend on how often that happened.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deltadock.compression.calibration.options import Source
from deltadock.compression.catalogue import MethodInfo
from deltadock.compression.goal import Goal, goal_for
from deltadock.compression.importing import import_delta
from deltadock.compression.maker import Maker
from deltadock.compression.report import Report
from deltadock.compression.run import CompressOptions, Progress, Run, open_run
from deltadock.compression.scratch import Scratch
from deltadock.compression.search import fit_size, reach_bound
from deltadock.compression.sizes import carried_bytes, preview, shapes_of
from deltadock.compression.work import NoWorkStore, WorkStore
from deltadock.errors import InvalidGoal


def _ignore(progress: Progress) -> None:
    pass


def compress(
    base: Path,
    finetuned: Path,
    out: Path,
    options: CompressOptions,
    *,
    calibration: Sequence[Source] | Path | None,
    progress: Callable[[Progress], None] = _ignore,
    work: WorkStore | None = None,
    device: str = "cpu",
) -> Report:
    """Compress `finetuned` against `base` into the delta file `out`.

    Args:
        base, finetuned: checkpoint folders; for the method `lora`, `finetuned` is an adapter's.
        out: the delta file; appears complete or not at all.
        options: method, goal, seed and solver.
        calibration: where the text is from; none is text sampled from the fine-tune for methods
            that need calibration, while for others, for which it measures the result, nothing is.
        progress: told of every step; what it raises (`Cancelled`) ends the run.
        work: keeps finished blocks for a later run with the same inputs.
        device: torch device.

    Raises:
        InvalidInput: a subclass names what is wrong with the input and what to do.
    """
    started = time.monotonic()
    info, _ = goal_for(options.method, **options.goals())
    sources = [Source(calibration)] if isinstance(calibration, Path) else list(calibration or ())
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        if info.imports_adapter:
            report = import_delta(
                base,
                finetuned,
                unfinished,
                options,
                calibration=sources,
                progress=progress,
                device=device,
            )
        else:
            report = _compress(
                (base, finetuned, unfinished), options, sources, progress, work, device
            )
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    report.seconds = time.monotonic() - started
    return report


def _compress(
    paths: tuple[Path, Path, Path],
    options: CompressOptions,
    sources: Sequence[Source],
    progress: Callable[[Progress], None],
    work: WorkStore | None,
    device: str,
) -> Report:
    base, finetuned, out = paths
    info, goal = goal_for(options.method, **options.goals())
    measured = goal is not None and goal.kind in ("max_kl", "min_agreement")
    if measured and not (sources or info.needs_calibration):
        raise InvalidGoal(f"{goal} is measured on calibration text. Give some.")
    run = open_run(base, finetuned, options, progress)
    _first_guess(run, info, goal)
    with Scratch() as scratch:
        maker = Maker(run, info, scratch, work or NoWorkStore(), device)
        if options.method != "exact" or sources:
            maker.prepare(sources)
        return reach(maker, goal, out)


def reach(maker: Maker, goal: Goal | None, out: Path) -> Report:
    """The artifact that a goal asks for, by a maker that is prepared.

    Args:
        maker: may have made others before.
        goal: None for a method of one size.
        out: the delta file.

    Raises:
        InvalidGoal: the method cannot reach it on this pair.
    """
    if goal is None or goal.kind == "bits":
        return maker.make(None if goal is None else goal.value, out)
    limit = _most_bytes(maker.run, goal)
    if limit is None:
        return reach_bound(maker.make, out, maker.info, goal)
    guess = _first_guess(maker.run, maker.info, goal)
    bits = fit_size(lambda bits: maker.draft(bits, out), maker.info, limit, guess, maker.weights)
    return maker.make(bits, out)


def _most_bytes(run: Run, goal: Goal | None) -> float | None:
    """The bytes that a goal allows; None where it is of another kind."""
    if goal is None or goal.kind not in ("target_bytes", "ratio"):
        return None
    return goal.value if goal.kind == "target_bytes" else run.finetuned.bf16_bytes / goal.value


def _first_guess(run: Run, info: MethodInfo, goal: Goal | None) -> float:
    """The budget to try first for a size; 0 where the goal is none.

    Raises:
        InvalidGoal: before any work, where the size is far below all that the method can make.
    """
    limit = _most_bytes(run, goal)
    if goal is None or limit is None:
        return 0.0
    manifests = run.finetuned.manifest, run.base.manifest
    shapes, carried = shapes_of(*manifests), carried_bytes(*manifests)
    try:
        return preview(shapes, info.name, goal, carried=carried).bits or 0.0
    except InvalidGoal:
        assert info.bits_min is not None, "a method with a goal has a budget"
        least = preview(shapes, info.name, Goal("bits", info.bits_min), carried=carried)
        # An estimate, which of small models is too high.
        if limit < least.artifact_bytes / 2:
            raise
        return info.bits_min
