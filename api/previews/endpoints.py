"""Route of size previews."""

from fastapi import APIRouter

from deltadock.api.bases.service import get_base, get_checkpoint, read_manifest
from deltadock.api.dependencies import ReadSession, ResourcesDep
from deltadock.api.previews.schemas import PreviewIn, PreviewOut
from deltadock.api.problems import problems
from deltadock.artifacts.compatibility import check_same_architecture
from deltadock.compression.preview import carried_bytes, preview_size, shapes_of
from deltadock.errors import (
    ArchitectureMismatch,
    BitsOutOfRange,
    InvalidGoal,
    InvalidInput,
    NotFound,
    UnknownMethod,
)

router = APIRouter(prefix="/v1/previews", tags=["deltas"])


@router.post(
    "",
    responses=problems(
        NotFound, InvalidInput, UnknownMethod, BitsOutOfRange, InvalidGoal, ArchitectureMismatch
    ),
)
def preview_delta(body: PreviewIn, session: ReadSession, resources: ResourcesDep) -> PreviewOut:
    """Predict the size of a delta from the tensors' shapes; nothing is kept."""
    _, goal = body.check_goal()
    base = read_manifest(resources.blobs, get_base(session, body.base).checkpoint_digest)
    tuned = read_manifest(resources.blobs, get_checkpoint(session, body.checkpoint).digest)
    check_same_architecture(base, tuned)
    shapes = shapes_of(tuned, base)
    return PreviewOut.of(
        preview_size(shapes, body.method, goal, carried=carried_bytes(tuned, base))
    )
