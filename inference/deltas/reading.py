"""From an artifact to the changes that a delta slot holds."""

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple, Protocol

import torch

from artifacts.compatibility import check_same_config, vocabulary
from artifacts.encoding import inflated
from artifacts.export import exact_tensor
from artifacts.packed import packed_delta
from artifacts.reader import Artifact
from deltadock.errors import BaseMismatch, InvalidArtifact, UnsupportedModel
from inference.model.changes import Change, Coded, CodedRows, low_rank, nbytes, pinned
from inference.model.model import BaseModel
from inference.prompts.tokens import Tokenizer

CONFIG: Final = "config.json"

MERGE: Final = (
    "A node serves deltas with the base's own vocabulary only: write the checkpoint that it stands "
    "for with `deltadock merge` and serve that."
)


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

    def change(self, name: str, shape: torch.Size) -> Change:
        """What the delta does to the tensor `name`, which has this shape in the base."""


class ArtifactSource:
    """An artifact file on disk as a DeltaSource."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self.base_digest = artifact.base_digest
        self.files: Mapping[str, str | None] = artifact.manifest["files"]
        self.names = tuple(artifact.records)

    def change(self, name: str, shape: torch.Size) -> Change:
        """The change as compact as the artifact has it; it keeps no file mapped."""
        encoded = self._artifact.resolved(name)
        kind = encoded.record["kind"]
        if kind == "new-rows":
            raise UnsupportedModel(f"The delta adds rows to {name!r}. {MERGE}")
        if encoded.record["shape"] != list(shape):
            raise InvalidArtifact(f"The delta's {name!r} is of another shape than its base's.")
        if kind == "exact":
            return exact_tensor(self._artifact, name)
        if kind == "svd":
            return packed_delta(encoded)
        if kind == "low-rank":
            factors = self._artifact.factors(name)
            # Copies: an array taken from the file is read-only and keeps the file mapped.
            return low_rank(*map(torch.tensor, (factors.u, factors.s, factors.v)))
        if kind == "rows":
            return CodedRows.of(inflated(encoded))
        coded = Coded(encoded.copy())
        coded.dense()  # what cannot be decoded is refused now, not in the midst of a pass
        return coded


@dataclass(frozen=True, slots=True)
class HostDelta:
    """A delta in host memory: its changes, packed, and its own tokenizer."""

    changes: Mapping[str, Change]
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
        InvalidArtifact: it changes tensors that the base lacks or that have another shape.
        UnsupportedModel: its vocabulary is larger than the base's.
    """
    if source.base_digest != weights_digest:
        raise BaseMismatch(
            f"The delta was made for the base {source.base_digest}, not for {weights_digest}. "
            "Name the base it was made for."
        )
    _check_config(base_files, source.files)
    changes = model.fit(
        {name: source.change(name, model.base_shape(name)) for name in source.names}
    )
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
    stream = _copy_stream(model.device) if model.device.type == "cuda" else None
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        model.install(slot, model.place(delta.changes))
    if stream is not None:
        stream.synchronize()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loads: what is freed on a stream is used again on that stream alone."""
    return torch.cuda.Stream(device)


def _check_config(base_files: Mapping[str, str], own_files: Mapping[str, str | None]) -> None:
    """Refuse a delta that the base's modelling code would run otherwise than its fine-tune.

    Raises:
        ArchitectureMismatch: naming the key that differs.
        InvalidArtifact: its config.json is no JSON object.
        UnsupportedModel: its vocabulary is larger than the base's.
    """
    base, own = base_files.get(CONFIG), own_files.get(CONFIG)
    if base is None or own is None:
        return
    try:
        config = json.loads(own)
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"The delta's {CONFIG} is not JSON.") from error
    if not isinstance(config, dict):
        raise InvalidArtifact(f"The delta's {CONFIG} is not a JSON object.")
    before = json.loads(base)
    tokens = vocabulary(before), vocabulary(config)
    if tokens[0] is not None and tokens[1] is not None and tokens[0] < tokens[1]:
        raise UnsupportedModel(
            f"The delta's vocabulary has {tokens[1]} tokens, its base's {tokens[0]}. {MERGE}"
        )
    check_same_config(before, config)
