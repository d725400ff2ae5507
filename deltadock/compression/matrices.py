"""The matrices of a checkpoint pair that methods compress."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from deltadock.artifacts.names import block_of, is_embedding
from deltadock.compression.checkpoints import CheckpointPair, MatrixRef
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.shapes import TensorShape

Role = Literal["linear", "head", "embedding"]


@dataclass(frozen=True, slots=True)
class DeltaMatrix:
    """A matrix that differs from the base's and can be compressed.

    Attributes:
        ref: the linear map in the checkpoint.
        role: a block's layer, the output head, or the input embedding (which may be tied to it).
        block: index of the block; the head and the embedding follow the last block.
    """

    ref: MatrixRef
    role: Role
    block: int


@dataclass(frozen=True, slots=True)
class Targets:
    """What a method compresses of a pair.

    Attributes:
        matrices: those that differ from the base's, in the order of the model.
        blocks: number of decoder blocks.
        embedding: the tensor of the input embedding, if known.
    """

    matrices: Sequence[DeltaMatrix]
    blocks: int
    embedding: str | None

    @classmethod
    def none(cls, pair: CheckpointPair) -> Self:
        """Of a method that stores every tensor exactly."""
        return cls((), 0, _embedding(pair))

    @classmethod
    def of_model(cls, pair: CheckpointPair, model: BlockwiseModel, *, with_embedding: bool) -> Self:
        """The matrices that a model multiplies by."""
        matrices = changed_matrices(pair, model, with_embedding=with_embedding)
        return cls(matrices, len(model.blocks), model.embedding)

    @classmethod
    def by_name(cls, pair: CheckpointPair) -> Self:
        """Of a model that cannot be run: by the names of its tensors."""
        matrices = _named_matrices(pair)
        numbers = (one.block for one in matrices if one.role == "linear")
        return cls(matrices, 1 + max(numbers, default=-1), _embedding(pair))


def _embedding(pair: CheckpointPair) -> str | None:
    return next((name for name in pair.base.entries if is_embedding(name)), None)


def changed_matrices(
    pair: CheckpointPair, model: BlockwiseModel, *, with_embedding: bool
) -> list[DeltaMatrix]:
    """The matrices that differ from the base, in the order of the model, the embedding last."""
    matrices = [
        DeltaMatrix(ref, "linear", index)
        for index, name in enumerate(model.blocks)
        for ref in model.matrices[name]
    ]
    if model.head is not None:
        matrices.append(DeltaMatrix(model.head, "head", len(model.blocks)))
    if with_embedding:
        embedding = MatrixRef(model.embedding)
        matrices.append(DeltaMatrix(embedding, "embedding", len(model.blocks) + 1))
    return _changed(pair, matrices)


def _named_matrices(pair: CheckpointPair) -> list[DeltaMatrix]:
    """As `changed_matrices`, by the names of the tensors."""
    blocks: list[DeltaMatrix] = []
    heads: list[str] = []
    for name, entry in sorted(pair.base.entries.items()):
        role = TensorShape(name, entry.dtype, entry.shape).role
        if role == "output head":
            heads.append(name)
        elif role == "linear layers" and (name.endswith(".weight") or ".experts." in name):
            parts = range(entry.shape[0]) if len(entry.shape) == 3 else (None,)
            block = block_of(name)
            blocks += (DeltaMatrix(MatrixRef(name, part), "linear", block) for part in parts)
    blocks.sort(key=lambda matrix: matrix.block)
    after = blocks[-1].block + 1 if blocks else 0
    tables = {pair.content(name) for name in pair.base.entries if is_embedding(name)}
    own = (name for name in heads if pair.content(name) not in tables)
    return _changed(pair, [*blocks, *(DeltaMatrix(MatrixRef(name), "head", after) for name in own)])


def _changed(pair: CheckpointPair, matrices: Iterable[DeltaMatrix]) -> list[DeltaMatrix]:
    return [
        m
        for m in matrices
        if pair.changed(m.ref.name)
        and pair.is_float(m.ref.name)
        and not pair.recast(m.ref.name).in_value
    ]
