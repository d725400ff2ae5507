"""From an artifact to the changes that a delta slot holds."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple, Protocol

import torch

from deltadock.artifacts.compatibility import check_same_config, vocabulary
from deltadock.artifacts.encodings import Encoded, decode_factors, inflate, parts
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import fits_base, packed_delta, stored_tensor
from deltadock.errors import BaseMismatch, InvalidArtifact
from deltadock.inference.model.model import BaseModel
from deltadock.inference.model.weight_deltas import (
    EncodedDelta,
    NewRows,
    RowsDelta,
    TensorDelta,
    WeightDelta,
    low_rank,
    nbytes,
    pinned,
)
from deltadock.inference.prompts.tokenizer import Tokenizer

CONFIG: Final = "config.json"


class DeltaSource(Protocol):
    """What the node asks of a delta file."""

    @property
    def base_digest(self) -> str:
        """Weights digest of the base that the delta was made for."""

    @property
    def files(self) -> Mapping[str, str | None]:
        """Text files that differ from the base's, by name; None for those the delta lacks."""

    @property
    def names(self) -> Iterable[str]:
        """The tensors that differ from the base's."""

    def change(self, name: str, shape: torch.Size) -> TensorDelta:
        """What the delta does to the tensor `name`, which has this shape in the base."""


class ArtifactSource:
    """An artifact file on disk as a DeltaSource."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self.base_digest = artifact.base_digest
        self.files: Mapping[str, str | None] = artifact.manifest["files"]
        self.names = tuple(artifact.records)

    def change(self, name: str, shape: torch.Size) -> TensorDelta:
        """The change as compact as the artifact has it; it keeps no file mapped."""
        encoded = self._artifact.resolved(name)
        if not fits_base(encoded.record, shape):
            raise InvalidArtifact(f"The delta's {name!r} is of another shape than its base's.")
        kind = encoded.record["kind"]
        if kind == "exact":
            tensor = stored_tensor(encoded)
            if tensor.shape == shape:
                return tensor
            return NewRows(*tensor.tensor_split([shape[0]]))
        if kind == "new-rows":
            (part,) = parts(encoded)
            return NewRows(None if part is None else _change(part), stored_tensor(encoded))
        return _change(encoded)


def _change(encoded: Encoded) -> WeightDelta:
    """What a record that stands for a delta does to a tensor of its shape."""
    kind = encoded.record["kind"]
    if kind == "svd":
        return packed_delta(encoded)
    if kind == "low-rank":
        factors = decode_factors(encoded)
        # Copies: an array taken from the file is read-only and keeps the file mapped.
        return low_rank(*map(torch.tensor, (factors.u, factors.s, factors.v)))
    if kind == "rows":
        return RowsDelta.of(inflate(encoded))
    coded = EncodedDelta(encoded.copy())
    coded.dense()  # what cannot be decoded is refused now, not in the midst of a pass
    return coded


@dataclass(frozen=True, slots=True)
class HostDelta:
    """A delta in host memory: its changes, packed, and its own tokenizer."""

    changes: Mapping[str, TensorDelta]
    tokenizer: Tokenizer
    nbytes: int
    """Bytes of the changes."""


class PlacedDelta(NamedTuple):
    """A delta in a slot: what is needed of it besides the weights there."""

    tokenizer: Tokenizer
    nbytes: int


def read_delta(
    source: DeltaSource, model: BaseModel, weights_digest: str, base_files: Mapping[str, str]
) -> HostDelta:
    """Read every change of a delta; its own files win over the base's.

    Raises:
        BaseMismatch: the delta was made for another base than the one with `weights_digest`.
        ArchitectureMismatch: its config.json makes other use of the weights than the base's.
        InvalidArtifact: it changes tensors that the base lacks or that have another shape, or its
            tensors and its config.json do not agree in how many tokens there are.
    """
    if source.base_digest != weights_digest:
        raise BaseMismatch(
            f"The delta was made for the base {source.base_digest}, not for {weights_digest}. "
            "Name the base it was made for."
        )
    config = _own_config(source.files)
    if config is not None and CONFIG in base_files:
        check_same_config(json.loads(base_files[CONFIG]), config, any_vocabulary=True)
    changes = model.fit(
        {name: source.change(name, model.base_shape(name)) for name in source.names}
    )
    _check_vocabulary(config, model.vocabulary_with(changes))
    if model.device.type == "cuda":
        changes = {name: pinned(change) for name, change in changes.items()}
    files = {**base_files, **source.files}
    return HostDelta(
        changes,
        Tokenizer({name: text for name, text in files.items() if text is not None}),
        sum(map(nbytes, changes.values())),
    )


def place_delta(model: BaseModel, slot: int, delta: HostDelta) -> None:
    """Put a delta into an empty slot that no running sequence is on.

    On a GPU the copies have a stream of their own, so that they run beside the passes; when this
    returns, they have arrived.
    """
    with _beside_the_passes(model.device):
        model.install(slot, model.place(delta.changes))


def merge_delta(model: BaseModel, slot: int) -> None:
    """Give merged weights to a slot; the passes go on."""
    with torch.inference_mode(), _beside_the_passes(model.device):
        model.merge(slot)
    model.use_merged(slot)


@contextmanager
def _beside_the_passes(device: torch.device) -> Iterator[None]:
    """ScheduledChunk on a stream of its own on a GPU, which is done when the block ends."""
    if device.type != "cuda":
        yield
        return
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loads: what is freed on a stream is used again on that stream alone."""
    return torch.cuda.Stream(device)


def _own_config(files: Mapping[str, str | None]) -> dict[str, Any] | None:
    """The delta's config.json, if it has one that is not its base's.

    Raises:
        InvalidArtifact: it is no JSON object.
    """
    text = files.get(CONFIG)
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"The delta's {CONFIG} is not JSON.") from error
    if not isinstance(config, dict):
        raise InvalidArtifact(f"The delta's {CONFIG} is not a JSON object.")
    return config


def _check_vocabulary(config: Mapping[str, Any] | None, tokens: int) -> None:
    """Refuse tensors with rows for more or fewer tokens than the delta's own config says.

    Raises:
        InvalidArtifact: with both numbers.
    """
    said = None if config is None else vocabulary(config)
    if said is not None and said != tokens:
        raise InvalidArtifact(
            f"The delta's {CONFIG} says that there are {said} tokens, but its tensors have rows "
            f"for {tokens}. Save the fine-tune again and compress it anew."
        )
