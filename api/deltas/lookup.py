"""Finding a delta by its id or name, or saying why there is none."""

from typing import NoReturn

from sqlalchemy.orm import Session

from deltadock.api.unknown import MOST_NAMES, unknown
from deltadock.errors import NotFound, NotReady
from deltadock.names import DEFAULT, parse_reference
from deltadock.storage.repositories import DeltaRepository, ModelRepository
from deltadock.storage.repositories.shown import ShownDelta, ShownJob
from deltadock.storage.tables import DeltaRow, JobRow, JobState


def require_delta(session: Session, tenant_id: str, reference: str) -> DeltaRow:
    """The delta with this id, or what the name means now.

    Raises:
        NotFound: there is none, or it was deleted.
        NotReady: a bare name has no default version yet.
    """
    deltas = DeltaRepository(session, tenant_id)
    return deltas.resolve(reference) or _missing(deltas, reference)


def show_delta(session: Session, tenant_id: str, reference: str) -> ShownDelta:
    """As `require_delta`, the columns that answers show."""
    deltas = DeltaRepository(session, tenant_id)
    return deltas.show(reference) or _missing(deltas, reference)


def require_ready(delta: DeltaRow | ShownDelta) -> str:
    """The artifact's digest.

    Raises:
        NotReady: the compression is unfinished, failed or was cancelled.
    """
    if delta.job.state is not JobState.READY or delta.artifact_digest is None:
        raise NotReady(
            f"{delta.name}:{delta.version} {_standing(delta.job)} See GET /v1/jobs/{delta.job.id}.",
            state=delta.job.state,
            job=delta.job.id,
        )
    return delta.artifact_digest


def _missing(deltas: DeltaRepository, reference: str) -> NoReturn:
    named = parse_reference(reference)
    newest = deltas.newest(named.name) if named else None
    if named is not None and newest is not None and named.version is None:
        if named.alias != DEFAULT:
            models = ModelRepository(deltas.session, deltas.tenant)
            model = models.find(named.name)
            known = [row.alias for row in models.aliases(model)] if model else []
            names = ", ".join(f"@{alias}" for alias in known) or "none yet"
            raise NotFound(f"{named.name} has no alias @{named.alias}. It has: {names}.")
        raise NotReady(
            f"{named.name} has no default version: its newest, {named.name}:{newest.version}, "
            f"{_standing(newest.job)} See GET /v1/jobs/{newest.job.id}.",
            state=newest.job.state,
            job=newest.job.id,
            newest=f"{newest.name}:{newest.version}",
        )
    if (gone := deltas.deleted(reference)) is not None:
        name = f"{gone.name}:{gone.version}"
        restore = f"/v1/deltas/{name}/restore"
        raise NotFound(
            f"{name} was deleted; POST {restore} brings it back.", deleted=name, restore=restore
        )
    if named is not None and newest is not None:
        raise NotFound(
            f"{named.name} has no version {named.version}; its newest is {newest.version}."
        )
    name = named.name if named else reference
    near = ModelRepository(deltas.session, deltas.tenant).names_near(name, limit=MOST_NAMES)
    raise unknown("delta", reference, "/v1/deltas", near, name)


def _standing(job: JobRow | ShownJob) -> str:
    """What has become of a version's job, as the end of a sentence."""
    match job.state:
        case JobState.FAILED:
            return f"has failed ({job.error_code}): {job.error_message}"
        case JobState.CANCELLED:
            return "was cancelled."
        case JobState.READY:
            return "is ready."
        case _:
            return f"is not ready yet ({job.state})."
