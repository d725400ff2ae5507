"""Accepting compressions, and what may be done with their results."""

import hashlib
import json
from dataclasses import asdict
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from deltadock.api.bases.service import get_base, get_checkpoint, read_manifest
from deltadock.api.deltas.calibration import CalibrationIn, mixture
from deltadock.api.deltas.schemas import DeltaIn
from deltadock.api.dependencies import UnitOfWork
from deltadock.api.resources import Resources
from deltadock.artifacts.checkpoint import ADAPTER_TYPE
from deltadock.artifacts.compatibility import check_same_architecture
from deltadock.compression.options import SIZES
from deltadock.errors import InvalidInput, NotFound, NotReady
from deltadock.storage.models import BaseRow, DeltaRow, JobState
from deltadock.storage.repositories import DeltaRepository, JobRepository, UploadRepository


def get_delta(session: Session, delta_id: str) -> DeltaRow:
    """The delta with this id.

    Raises:
        NotFound: there is none, or it was deleted.
    """
    delta = DeltaRepository(session).find(delta_id)
    if delta is None:
        raise NotFound(f"There is no delta {delta_id!r}; GET /v1/deltas lists them.")
    return delta


def require_ready(delta: DeltaRow) -> str:
    """The artifact's digest.

    Raises:
        NotReady: the delta has no artifact, yet or for good.
    """
    if delta.job.state is not JobState.READY or delta.artifact_digest is None:
        raise NotReady(
            f"Delta {delta.id} is {delta.job.state}; GET /v1/jobs/{delta.job.id} tells more.",
            state=delta.job.state,
            job=delta.job.id,
        )
    return delta.artifact_digest


def request_delta(unit: UnitOfWork, resources: Resources, body: DeltaIn) -> tuple[DeltaRow, bool]:
    """Accept a compression: the delta, and whether there is work to do for it.

    The same request again gets the delta that is ready or on its way. A ready delta with other
    names but the same inputs lends its artifact, for the same inputs give the same bytes.

    Raises:
        NotFound: no such base, checkpoint or calibration text.
        InvalidInput: an adapter that is to be compressed, or a whole model to be imported as one.
        UnknownMethod, BitsOutOfRange, InvalidGoal, ArchitectureMismatch.
    """
    session = unit.session
    base = get_base(session, body.base)
    checkpoint = get_checkpoint(session, body.checkpoint)
    method, goal = body.check_goal()
    is_adapter = checkpoint.model_type == ADAPTER_TYPE
    if is_adapter != method.imports_adapter:
        wanted = "'lora'" if is_adapter else f"another than {method.name!r}"
        kind = "a PEFT adapter" if is_adapter else "a whole model and no PEFT adapter"
        raise InvalidInput(f"The checkpoint is {kind}: the method must be {wanted}.")
    is_bound = goal is not None and goal.kind not in SIZES
    calibration = _calibration(session, body, needed=method.needs_calibration or is_bound)
    if checkpoint.digest != base.checkpoint_digest and not is_adapter:
        check_same_architecture(
            read_manifest(resources.blobs, base.checkpoint_digest),
            read_manifest(resources.blobs, checkpoint.digest),
        )
    options = {
        "seed": body.seed,
        "solver": body.solver,
        "goal": asdict(goal) if goal else None,
        "calibration": calibration.to_options() if calibration else None,
    }
    deltas = DeltaRepository(session)
    fingerprint = _fingerprint(base, body, options)
    same = deltas.find_same(fingerprint)
    for delta in same:
        if delta.name == body.name:
            return delta, False
    delta = deltas.add(
        name=body.name,
        base=base,
        checkpoint_digest=checkpoint.digest,
        method=body.method,
        bits=goal.bits if goal else None,
        options=options,
        fingerprint=fingerprint,
    )
    for twin in same:
        if twin.job.state is JobState.READY:
            deltas.share_result(delta, twin)
            return delta, False
    unit.after_commit.append(partial(resources.tasks.send_compress, delta.job.id))
    return delta, True


def page_of_deltas(
    session: Session, *, limit: int, after: str | None
) -> tuple[list[DeltaRow], str | None]:
    """A page, newest first, and the `after` of the next one.

    Raises:
        InvalidInput: `after` is not what a page ended with.
    """
    deltas = DeltaRepository(session)
    cursor = None
    if after is not None and (cursor := deltas.cursor(after)) is None:
        raise InvalidInput(f"after={after!r} is no delta; take it from the last page's next.")
    found = deltas.page(limit=limit + 1, after=cursor)
    page = list(found[:limit])
    return page, page[-1].id if len(found) > limit else None


def delete_delta(session: Session, delta_id: str) -> None:
    """Hide a delta for good, stopping its job if it is not done.

    Raises:
        NotFound: there is none.
    """
    delta = get_delta(session, delta_id)
    JobRepository(session).request_cancel(delta.job.id)
    DeltaRepository(session).delete(delta)


def _calibration(session: Session, body: DeltaIn, *, needed: bool) -> CalibrationIn | None:
    """What is to calibrate, or only to measure; None: nothing.

    Raises:
        NotFound: a text that was never uploaded.
    """
    if body.calibration is None:
        return CalibrationIn() if needed else None
    wish = mixture(body.calibration)
    uploads = UploadRepository(session)
    for digest in wish.digests:
        if not uploads.has_calibration(digest):
            raise NotFound(f"There is no calibration text {digest}; upload and complete it first.")
    return wish


def _fingerprint(base: BaseRow, body: DeltaIn, options: dict[str, Any]) -> str:
    inputs = {
        "base": base.checkpoint_digest,
        "checkpoint": body.checkpoint,
        "method": body.method,
        "options": options,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
