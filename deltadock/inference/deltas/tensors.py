"""Read one tensor's delta from its artifact; also for engines that have no model of ours."""

import torch

from deltadock.artifacts.encodings import Encoded, decode_factors, inflate, parts
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import fits_base, packed_delta, stored_tensor
from deltadock.errors import InvalidArtifact
from deltadock.inference.model.weight_deltas import (
    EncodedDelta,
    NewRows,
    RowsDelta,
    TensorDelta,
    WeightDelta,
    low_rank,
)


def read_tensor_delta(artifact: Artifact, name: str, shape: torch.Size) -> TensorDelta:
    """The delta of the tensor `name`, of this shape in the base, as compact as in the artifact.

    It does not keep the file mapped.

    Raises:
        InvalidArtifact: the record does not fit the shape, or cannot be decoded.
    """
    encoded = artifact.resolved(name)
    if not fits_base(encoded.record, shape):
        raise InvalidArtifact(f"The delta's {name!r} is of another shape than its base's.")
    kind = encoded.record["kind"]
    if kind == "exact":
        tensor = stored_tensor(encoded)
        if tensor.shape == shape:
            return tensor
        return NewRows(*tensor.tensor_split([shape[0]]))
    if kind == "new-rows":
        (old,) = parts(encoded)
        return NewRows(None if old is None else _weight_delta(old), stored_tensor(encoded))
    return _weight_delta(encoded)


def _weight_delta(encoded: Encoded) -> WeightDelta:
    """The weight delta that a record encodes."""
    kind = encoded.record["kind"]
    if kind == "svd":
        return packed_delta(encoded)
    if kind == "low-rank":
        factors = decode_factors(encoded)
        # Copies: an array taken from the file is read-only and keeps the file mapped.
        return low_rank(*map(torch.tensor, (factors.u, factors.s, factors.v)))
    if kind == "rows":
        return RowsDelta.of(inflate(encoded))
    delta = EncodedDelta(encoded.copy())
    delta.dense()  # raise decoding errors now, not during a pass
    return delta
