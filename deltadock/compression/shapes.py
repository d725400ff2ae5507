"""Tensors of a fine-tune as their headers tell of them: shapes, roles by name, what changed.

Plain Python, so that the api can use it.
"""

import math
import re
from pathlib import Path
from typing import Final, Literal, NamedTuple

from deltadock.artifacts.checkpoint import ADAPTER_TYPE, CheckpointManifest
from deltadock.artifacts.compatibility import match_tensors
from deltadock.artifacts.folder import folder_files, read_header
from deltadock.artifacts.names import EMBEDDINGS, HEADS, is_in_block
from deltadock.errors import InvalidCheckpoint

Role = Literal["linear layers", "output head", "embeddings", "other tensors"]
ROLES: Final[tuple[Role, ...]] = (
    "linear layers",
    "output head",
    "embeddings",
    "other tensors",
)
FLOATS: Final = frozenset({"BF16", "F16", "F32", "F64"})
_NOT_COMPRESSED: Final = re.compile(
    r"norm|conv|visual|vision|image|audio|router|rotary|relative|position|(^|\.)wpe\."
)


class TensorShape(NamedTuple):
    """A tensor of the fine-tune: its name, safetensors dtype, shape, and whether it changed.

    One that was saved in another dtype than the base's counts as changed, though its values may be
    the same (`recast`): only reading both tells. One of an adapter (`added`) is no weight of the
    model that it makes of its base.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    changed: bool = True
    recast: bool = False
    added: bool = False

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def role(self) -> Role:
        """The tensor's role in the model, by its name."""
        if self.dtype not in FLOATS or len(self.shape) < 2 or _NOT_COMPRESSED.search(self.name):
            return "other tensors"
        parts = self.name.removesuffix(".weight").split(".")
        if len(self.shape) == 2 and parts[-1] in EMBEDDINGS:
            return "embeddings"
        if len(self.shape) == 2 and parts[-1] in HEADS and not is_in_block(self.name):
            return "output head"
        if len(self.shape) <= 3 and is_in_block(self.name) and parts[-1] != "bias":
            return "linear layers"
        return "other tensors"


def read_shapes(folder: Path) -> list[TensorShape]:
    """Read the tensors of a checkpoint folder from file headers; all count as changed.

    Raises:
        InvalidCheckpoint: there are no safetensors files, or one is malformed.
    """
    shapes = [
        TensorShape(spec.name, spec.dtype, spec.shape)
        for path in sorted(folder_files(folder))
        if path.endswith(".safetensors")
        for spec in read_header(folder, path).tensors
    ]
    if not shapes:
        raise InvalidCheckpoint(f"{folder} holds no .safetensors file with weights.")
    return shapes


def shapes_of(
    finetuned: CheckpointManifest, base: CheckpointManifest | None = None
) -> list[TensorShape]:
    """The fine-tune's tensors; without a base, all count as changed.

    Of an adapter: the base's, and its own.
    """
    if base is None:
        return [TensorShape(t.name, t.dtype, t.shape) for t in finetuned.tensors]
    if finetuned.config["model_type"] == ADAPTER_TYPE:
        kept = (TensorShape(t.name, t.dtype, t.shape, changed=False) for t in base.tensors)
        own = (TensorShape(t.name, t.dtype, t.shape, added=True) for t in finetuned.tensors)
        return [*kept, *own]
    before = {t.name: (t.dtype, t.shape, t.sha256) for t in base.tensors}
    return [
        TensorShape(
            name,
            t.dtype,
            t.shape,
            before.get(name) != (t.dtype, t.shape, t.sha256),
            name in before and before[name][0] != t.dtype,
        )
        for name, t in sorted(match_tensors(base, finetuned).items())
    ]
