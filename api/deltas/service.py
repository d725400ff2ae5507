"""Creating, finding, listing and deleting deltas."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

from sqlalchemy.orm import Session

from deltadock.api.access import Caller
from deltadock.api.bases import require_base, require_checkpoint
from deltadock.api.comparison import compare
from deltadock.api.deltas.lookup import require_delta, require_ready
from deltadock.api.deltas.schemas import CalibrationIn, DeltaDetail, DeltaIn, TextSource
from deltadock.api.dependencies import Resources, UnitOfWork
from deltadock.api.paging import Cursor
from deltadock.api.quotas import check_delta, check_job, within_bytes
from deltadock.artifacts.checkpoint import ADAPTER_TYPE
from deltadock.compression.options import MethodInfo
from deltadock.compression.preview import preview_size
from deltadock.errors import DeltadockError, NotFound, refused_by_state
from deltadock.storage.documents import DeltaOptions, MixtureOptions
from deltadock.storage.repositories import (
    DeltaRepository,
    JobRepository,
    UploadRepository,
    WebhookRepository,
)
from deltadock.storage.repositories.blobs import lock_blobs
from deltadock.storage.repositories.deltas import Lineage
from deltadock.storage.repositories.listing import ANY_DELTA, DeltaFilter, DeltaSort, key_of
from deltadock.storage.repositories.shown import ShownDelta
from deltadock.storage.tables import BaseRow, DeltaRow, JobState
from deltadock.version import __version__


def detail_of(session: Session, delta: DeltaRow | ShownDelta) -> DeltaDetail:
    """The delta with its lineage."""
    lineage = DeltaRepository(session, delta.tenant_id).lineage(delta.id)
    return DeltaDetail.of_row(delta, lineage)


@dataclass(frozen=True, slots=True)
class Compared:
    """A request whose fine-tune was compared with its base, before the transaction."""

    base: str
    """Id of the base, or its name if there is none."""
    error: DeltadockError | None
    """Why it cannot be compressed."""


def compare_delta(resources: Resources, caller: Caller, body: DeltaIn) -> Compared:
    """Compare the request's fine-tune with its base; `request_delta` raises the error.

    A repeated request with an idempotency key gets its first answer, whatever is wrong by now.
    """
    base_id = body.base
    try:
        with resources.database.read_scope() as session:
            base = require_base(session, caller.tenant_id, body.base)
            base_id = base.id
            checkpoint = require_checkpoint(session, caller.tenant_id, body.checkpoint)
        method, goal = body.check_goal(is_adapter=checkpoint.model_type == ADAPTER_TYPE)
        shapes, carried = compare(
            resources.blobs, base.checkpoint_digest, checkpoint.digest, method, goal,
            has_text=body.calibration is not None,
        )  # fmt: skip
        with refused_by_state():
            if goal is not None and goal.is_size:
                preview_size(shapes, method.name, goal, carried=carried)
    except DeltadockError as error:
        return Compared(base_id, error)
    return Compared(base_id, None)


def request_delta(
    unit: UnitOfWork, resources: Resources, caller: Caller, body: DeltaIn, compared: Compared
) -> tuple[DeltaRow, bool]:
    """Create a delta; returns it and whether a compression was started.

    A repeated request returns the existing delta, ready or unfinished; if its job failed or was
    cancelled, the job continues with the new priority. A delta without a commit gets that of the
    repetition. If the tenant has a ready delta of another name with the same inputs, its artifact
    is shared: equal inputs give equal bytes.

    Raises:
        NotFound: no such base, checkpoint or calibration text.
        Conflict: the method does not fit: an adapter needs 'lora', a whole model another one.
        QuotaExceeded, RateLimited: the tenant may have no more deltas or jobs.
        UnknownMethod, BitsOutOfRange, ArchitectureMismatch.
        InvalidGoal: it is invalid, or no artifact of the method is as small as it asks for.
        UnchangedCheckpoint: the checkpoint equals the base.
        Conflict: the name is a deleted model's.
    """
    session, tenant_id = unit.session, caller.tenant_id
    # What the job needs is not dropped from here on.
    lock_blobs(session, body.checkpoint, *_texts(body))
    base = require_base(session, tenant_id, compared.base)
    checkpoint = require_checkpoint(session, tenant_id, body.checkpoint)
    parent = require_delta(session, tenant_id, body.parent) if body.parent else None
    method, goal = body.check_goal(is_adapter=checkpoint.model_type == ADAPTER_TYPE)
    is_bound = goal is not None and goal.is_bound
    calibration = _calibration(
        session, tenant_id, body, needed=method.needs_calibration or is_bound
    )
    if compared.error is not None:
        raise compared.error
    options: DeltaOptions = {
        "seed": body.seed,
        "solver": body.solver,
        "goal": {"kind": goal.kind, "value": goal.value} if goal else None,
        "calibration": calibration,
    }
    deltas = DeltaRepository(session, tenant_id)
    fingerprint = _fingerprint(base, body.checkpoint, method, options)
    same = deltas.find_same(fingerprint)
    for delta in same:
        if delta.name == body.name:
            delta.code_commit = delta.code_commit or body.commit
            return delta, False
    ready = next((twin for twin in same if _keeps_artifact(session, resources, twin)), None)
    if ready is None and (ended := deltas.find_ended(fingerprint, body.name)):
        check_job(session, tenant_id, more=1)
        ended.code_commit = ended.code_commit or body.commit
        ended.job.priority = body.priority
        JobRepository(session, tenant_id).retry(ended.job.id)
        unit.after_commit.append(partial(resources.tasks.send_compress, ended.job.id))
        return require_delta(session, tenant_id, ended.id), True
    delta = deltas.add(
        name=body.name,
        base=base,
        checkpoint_digest=checkpoint.digest,
        method=method.name,
        bits=goal.bits if goal else None,
        options=options,
        fingerprint=fingerprint,
        priority=body.priority,
        lineage=Lineage(
            parent_id=parent.id if parent else None,
            recipe=body.recipe,
            code_version=__version__,
            code_commit=body.commit,
        ),
        created_by=caller.key_id,
    )
    check_delta(session, tenant_id, starts_job=ready is None)
    if ready is not None:
        deltas.share_result(delta, ready)
        WebhookRepository(session, tenant_id).publish_outcome(delta)
        return require_delta(session, tenant_id, delta.id), False
    unit.after_commit.append(partial(resources.tasks.send_compress, delta.job.id))
    return require_delta(session, tenant_id, delta.id), True


_CURSORS: Final = {
    DeltaSort.NEWEST: Cursor(DeltaSort.NEWEST, datetime, str),
    DeltaSort.NAME: Cursor(DeltaSort.NAME, str, int),
    DeltaSort.SIZE: Cursor(DeltaSort.SIZE, int, str),
    DeltaSort.KL: Cursor(DeltaSort.KL, float, str),
}


def _keeps_artifact(session: Session, resources: Resources, twin: DeltaRow) -> bool:
    """Whether the delta is ready; its artifact is then locked, and so stays."""
    if twin.job.state is not JobState.READY:
        return False
    digest = require_ready(twin)
    lock_blobs(session, digest)
    return resources.blobs.exists(digest)


def page_of_deltas(
    session: Session,
    tenant_id: str,
    *,
    limit: int,
    after: str | None,
    wanted: DeltaFilter = ANY_DELTA,
    sort: DeltaSort = DeltaSort.NEWEST,
) -> tuple[Sequence[ShownDelta], str | None]:
    """A page of deltas, and the next page's `after` (None on the last page).

    Raises:
        NotFound: `after` is not a cursor of this sort.
    """
    cursor = _CURSORS[sort]
    found = DeltaRepository(session, tenant_id).page(
        limit=limit + 1, wanted=wanted, sort=sort, after=cursor.read(after)
    )
    return cursor.page(found, limit, lambda delta: key_of(delta, sort))


def delete_delta(session: Session, caller: Caller, reference: str) -> None:
    """Delete a delta and cancel its job if it is unfinished.

    Raises:
        NotFound: there is none.
        Conflict: an alias means it.
    """
    delta = require_delta(session, caller.tenant_id, reference)
    DeltaRepository(session, caller.tenant_id).delete(delta, deleted_by=caller.key_id)
    JobRepository(session, caller.tenant_id).request_cancel(delta.job.id)


def restore_delta(session: Session, tenant_id: str, delta_id: str) -> DeltaRow:
    """Restore a deleted delta.

    Raises:
        NotFound: there is none, or its bytes have been given up.
        QuotaExceeded: the tenant has as many deltas, or bytes, as it may.
    """
    with within_bytes(session, tenant_id):
        restored = DeltaRepository(session, tenant_id).restore(delta_id)
    if restored is None:
        raise NotFound(f"There is no deleted delta {delta_id!r} that could be restored.")
    check_delta(session, tenant_id, starts_job=False)
    return require_delta(session, tenant_id, restored.id)


def _calibration(
    session: Session, tenant_id: str, body: DeltaIn, *, needed: bool
) -> MixtureOptions | None:
    """The requested mixture, or the default one if needed, for calibration or measurement.

    In the form of a delta's options.

    Raises:
        NotFound: the tenant has not uploaded a text.
    """
    requested = body.calibration
    if requested is None:
        return CalibrationIn().to_options({}) if needed else None
    if not isinstance(requested, CalibrationIn):
        requested = CalibrationIn(sources=[requested])
    uploads = UploadRepository(session, tenant_id)
    suffixes: dict[str, str] = {}
    for digest in _texts(body):
        suffix = uploads.calibration_suffix(digest)
        if suffix is None:
            raise NotFound(f"There is no calibration text {digest}; upload and complete it first.")
        suffixes[digest] = suffix
    return requested.to_options(suffixes)


def _texts(body: DeltaIn) -> list[str]:
    """Digests of the requested calibration texts."""
    match body.calibration:
        case CalibrationIn() as mixture:
            return mixture.digests
        case TextSource() as text:
            return [text.digest]
        case _:
            return []


def _fingerprint(base: BaseRow, checkpoint: str, method: MethodInfo, options: DeltaOptions) -> str:
    inputs = {
        "base": base.checkpoint_digest,
        "checkpoint": checkpoint,
        "method": method.name,
        "options": options,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
