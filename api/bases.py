"""Bases: checkpoints registered under a name, against which deltas are compressed."""

from datetime import datetime
from typing import Annotated, Any, Final, Self

from fastapi import Path, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from deltadock.api.access import Caller, CallerDep
from deltadock.api.dependencies import ReadSession, ResourcesDep, UnitOfWork, WriteUnit
from deltadock.api.idempotency import OnceDep
from deltadock.api.paging import After, Cursor, Limit
from deltadock.api.routing import api_router
from deltadock.api.schemas import EXAMPLE_DIGEST, EXAMPLE_TIME, CheckpointOut, Digest, RequestBody
from deltadock.api.unknown import MOST_NAMES, unknown
from deltadock.artifacts.checkpoint import ADAPTER_TYPE
from deltadock.errors import Conflict, Forbidden, IdempotencyKeyReused, InvalidInput, NotFound
from deltadock.names import PART_PATTERN
from deltadock.problems import problems
from deltadock.storage.cache import MANIFEST_BYTES
from deltadock.storage.repositories import BaseRepository, CheckpointRepository
from deltadock.storage.repositories.blobs import lock_blobs
from deltadock.storage.tables import BaseRow, CheckpointRow

router = api_router("/v1/bases", tags=["bases"])

BaseRef = Annotated[str, Path(description="A base's id or name.", examples=["tiny-base"])]


class BaseIn(RequestBody):
    """A checkpoint to register as a base."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "tiny-base", "checkpoint": EXAMPLE_DIGEST}]}
    )

    name: str = Field(
        pattern=PART_PATTERN,
        description="Letters, digits, '.', '_' and '-'; at most 96.",
    )
    checkpoint: Digest


class BaseChange(RequestBody):
    """What to change of a base."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"shared": True}]})

    shared: bool = Field(description="Whether every tenant may read it and compress against it.")


class BaseOut(BaseModel):
    """A base."""

    id: str = Field(examples=["base_k7wq2mzv5c3xj6nhy4tbr2dfsa"])
    name: str = Field(examples=["tiny-base"])
    checkpoint: CheckpointOut
    shared: bool = Field(description="Whether every tenant may compress against it.")
    created_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, base: BaseRow) -> Self:
        """Convert a row."""
        return cls(
            id=base.id,
            name=base.name,
            checkpoint=CheckpointOut.of(base.checkpoint),
            shared=base.shared,
            created_at=base.created_at,
        )


class ManifestFileOut(BaseModel):
    """One file of a checkpoint."""

    path: str = Field(examples=["model.safetensors"])
    size: int = Field(examples=[988_097_824])
    sha256: str = Field(examples=[EXAMPLE_DIGEST])


class ManifestTensorOut(BaseModel):
    """One tensor of a checkpoint."""

    name: str = Field(examples=["model.norm.weight"])
    dtype: str = Field(examples=["BF16"])
    shape: list[int] = Field(examples=[[896]])
    file: str = Field(examples=["model.safetensors"])
    sha256: str = Field(examples=[EXAMPLE_DIGEST], description="Of the tensor's bytes.")


class ManifestOut(BaseModel):
    """What a checkpoint consists of; its SHA-256, as canonical JSON, is the checkpoint's digest."""

    files: list[ManifestFileOut]
    tensors: list[ManifestTensorOut]
    config: dict[str, Any] = Field(description="The parsed config.json.")


class BasePage(BaseModel):
    """Bases by name. `next` is the next page's `after`; null on the last page."""

    data: list[BaseOut]
    next: str | None


_CURSOR: Final = Cursor("bases", str, str)


def page_of_bases(session: Session, tenant_id: str, *, limit: int, after: str | None) -> BasePage:
    """A page of the bases that the tenant sees.

    Raises:
        NotFound: `after` is not a cursor.
    """
    found = BaseRepository(session, tenant_id).page(limit=limit + 1, after=_CURSOR.read(after))
    page, following = _CURSOR.page(found, limit, lambda base: [base.name, base.id])
    return BasePage(data=[BaseOut.of(base) for base in page], next=following)


def require_checkpoint(session: Session, tenant_id: str, digest: str) -> CheckpointRow:
    """The checkpoint with this digest.

    Raises:
        NotFound: the tenant has not uploaded it.
    """
    checkpoint = CheckpointRepository(session, tenant_id).find(digest)
    if checkpoint is None:
        raise NotFound(f"There is no checkpoint {digest}; upload and complete it first.")
    return checkpoint


def require_base(session: Session, tenant_id: str, id_or_name: str) -> BaseRow:
    """The base with this id or name.

    Raises:
        NotFound: there is none.
    """
    bases = BaseRepository(session, tenant_id)
    base = bases.find(id_or_name)
    if base is not None:
        return base
    if (deleted := bases.find_deleted(id_or_name)) is not None:
        restore = f"/v1/bases/{deleted.name}/restore"
        raise NotFound(
            f"The base {deleted.name} was deleted; POST {restore} brings it back.",
            deleted=deleted.name,
            restore=restore,
        )
    known = (base.name for base in bases.page(limit=MOST_NAMES))
    raise unknown("base", id_or_name, "/v1/bases", known)


@router.post(
    "",
    status_code=201,
    responses={
        200: {"model": BaseOut, "description": "It was registered already"},
        **problems(InvalidInput, NotFound, Conflict, IdempotencyKeyReused),
    },
)
def register_base(
    body: BaseIn, caller: CallerDep, unit: WriteUnit, once: OnceDep, response: Response
) -> BaseOut:
    """Register a complete checkpoint as a base; repeating the request answers 200."""
    return once.answer(BaseOut, body, response, lambda: _register(body, caller, unit, response))


def _register(body: BaseIn, caller: Caller, unit: UnitOfWork, response: Response) -> BaseOut:
    lock_blobs(unit.session, body.checkpoint)  # from here on it is not dropped
    checkpoint = require_checkpoint(unit.session, caller.tenant_id, body.checkpoint)
    if checkpoint.model_type == ADAPTER_TYPE:
        raise Conflict(
            "This checkpoint is a PEFT adapter, not a whole model. Upload the base that it was "
            "trained on."
        )
    base, is_new = BaseRepository(unit.session, caller.tenant_id).add(body.name, checkpoint)
    if not is_new:
        response.status_code = 200
    return BaseOut.of(base)


@router.get("", responses=problems(NotFound))
def list_bases(
    caller: CallerDep, session: ReadSession, after: After = None, limit: Limit = 50
) -> BasePage:
    """List the tenant's bases and the shared ones, by name."""
    return page_of_bases(session, caller.tenant_id, limit=limit, after=after)


@router.get("/{base}", responses=problems(NotFound))
def get_base(base: BaseRef, caller: CallerDep, session: ReadSession) -> BaseOut:
    """Get one base."""
    return BaseOut.of(require_base(session, caller.tenant_id, base))


@router.get("/{base}/manifest", response_model=ManifestOut, responses=problems(NotFound))
def get_base_manifest(
    base: BaseRef, caller: CallerDep, session: ReadSession, resources: ResourcesDep
) -> Response:
    """Get the digests of a base's files and tensors: what a fine-tune changes of it."""
    row = require_base(session, caller.tenant_id, base)
    content = resources.blobs.read(row.checkpoint_digest, MANIFEST_BYTES)
    return Response(content, media_type="application/json")


@router.patch("/{base}", responses=problems(Forbidden, InvalidInput, NotFound))
def change_base(base: BaseRef, body: BaseChange, caller: CallerDep, unit: WriteUnit) -> BaseOut:
    """Share a base of the operator's tenant with every tenant, or end that.

    Deltas that other tenants have compressed against it stay.
    """
    row = _own_base(unit.session, caller, base)
    BaseRepository(unit.session, caller.tenant_id).share(row, body.shared)
    return BaseOut.of(row)


@router.delete("/{base}", status_code=204, responses=problems(NotFound, Conflict))
def delete_base(base: BaseRef, caller: CallerDep, unit: WriteUnit) -> None:
    """Delete a base that no delta needs; for some days it can be restored.

    Its name is kept for the same checkpoint, which is dropped after those days.
    """
    row = _own_base(unit.session, caller, base)
    BaseRepository(unit.session, caller.tenant_id).delete(row)


@router.post("/{base}/restore", responses=problems(NotFound))
def restore_base(base: BaseRef, caller: CallerDep, unit: WriteUnit) -> BaseOut:
    """Restore a deleted base, as long as its checkpoint is kept."""
    bases = BaseRepository(unit.session, caller.tenant_id)
    row = bases.find_deleted(base)
    if row is None:
        raise NotFound(f"There is no deleted base {base!r}.")
    lock_blobs(unit.session, row.checkpoint_digest)  # from here on it is not dropped
    require_checkpoint(unit.session, caller.tenant_id, row.checkpoint_digest)
    bases.restore(row)
    return BaseOut.of(row)


def _own_base(session: Session, caller: Caller, base: str) -> BaseRow:
    """The tenant's base; raises NotFound for a shared one too."""
    row = require_base(session, caller.tenant_id, base)
    if row.tenant_id != caller.tenant_id:
        raise NotFound(f"Your tenant has no base {base!r} of its own.")
    return row
