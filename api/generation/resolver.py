"""From what a client calls a model to what the node is to run."""

from sqlalchemy.orm import Session

from deltadock.api.deltas.service import require_ready
from deltadock.api.generation.target import Target
from deltadock.errors import NotFound
from deltadock.storage.models import BaseRow, DeltaRow
from deltadock.storage.repositories import BaseRepository, DeltaRepository


def resolve(session: Session, model: str) -> Target:
    """What `model` stands for now.

    It may be a delta's id, `project/model` (its highest ready version), `project/model:version`,
    or a base's id or name.

    Raises:
        NotFound: it stands for nothing.
        NotReady: the delta has no artifact.
    """
    found = find(session, model)
    return target_of_delta(found) if isinstance(found, DeltaRow) else target_of_base(found)


def find(session: Session, model: str) -> DeltaRow | BaseRow:
    """The delta or base that `model` names, see `resolve`.

    Raises:
        NotFound: it stands for nothing.
    """
    found = _find_delta(DeltaRepository(session), model) or BaseRepository(session).find(model)
    if found is None:
        raise NotFound(f"There is no model {model!r}; GET /v1/models lists them.")
    return found


def target_of_delta(delta: DeltaRow) -> Target:
    """The base with the delta's artifact; NotReady if it has none."""
    return Target(delta.base.checkpoint_digest, require_ready(delta))


def target_of_base(base: BaseRow) -> Target:
    """The bare base."""
    return Target(base.checkpoint_digest, None)


def _find_delta(deltas: DeltaRepository, model: str) -> DeltaRow | None:
    if found := deltas.find(model):
        return found
    name, _, version = model.partition(":")
    if not version:
        return deltas.find_latest(name)
    is_number = version.isascii() and version.isdecimal() and len(version) < 10
    return deltas.find_version(name, int(version)) if is_number else None
