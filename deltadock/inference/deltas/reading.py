"""Read a delta from its artifact into host memory, and install it in a slot."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import torch

from deltadock.artifacts.compatibility import vocabulary
from deltadock.artifacts.configs import check_same_forward, expand
from deltadock.artifacts.names import is_head
from deltadock.artifacts.reader import Artifact
from deltadock.errors import BaseMismatch, InvalidArtifact
from deltadock.inference.deltas.tensors import read_tensor_delta
from deltadock.inference.deltas.tiers import DiskTier
from deltadock.inference.model.model import DeltaModel, RowSettings
from deltadock.inference.model.weight_deltas import TensorDelta, in_one_buffer
from deltadock.inference.prompts.tokenizer import Tokenizer

CONFIG: Final = "config.json"


@dataclass(frozen=True, slots=True)
class HostDelta:
    """A delta in host memory: its tensors, packed, and its tokenizer."""

    tensors: Mapping[str, TensorDelta]
    tokenizer: Tokenizer
    nbytes: int
    """Bytes of the tensors."""
    settings: RowSettings | None = None
    """What its config.json changes; None: nothing."""


class PlacedDelta(NamedTuple):
    """A delta in a slot: what requests need besides the weights."""

    tokenizer: Tokenizer
    nbytes: int


def read_delta(
    artifact: Artifact, model: DeltaModel, weights_digest: str, base_files: Mapping[str, str]
) -> HostDelta:
    """Read a delta's tensors and tokenizer; its own files override the base's.

    Raises:
        BaseMismatch: the delta is for another base than the one with `weights_digest`.
        ArchitectureMismatch: its config.json uses the weights differently, in a way that cannot
            be served per delta.
        UnsupportedModel: its config.json cannot be read.
        InvalidArtifact: its tensors do not fit the base's, or its config.json states another
            vocabulary size than its tensors have.
    """
    if artifact.base_digest != weights_digest:
        raise BaseMismatch(
            f"The delta was made for the base {artifact.base_digest}, not for {weights_digest}. "
            "Name the base it was made for."
        )
    own_files: Mapping[str, str | None] = artifact.files
    config = _own_config(own_files)
    settings = None
    if config is not None and check_same_forward(json.loads(base_files[CONFIG]), config):
        settings = model.row_settings(expand(config))
    parameters = {
        name: model.parameter_name(name)
        for name, record in artifact.records.items()
        # A copy of a tied embedding's delta.
        if not (model.tied and is_head(name) and record["kind"] == "alias")
    }
    tensors = model.fit(
        {
            parameter: read_tensor_delta(artifact, name, model.base_shape(parameter))
            for name, parameter in parameters.items()
        }
    )
    _check_vocabulary(config, model.vocabulary_with(tensors))
    if model.device.type == "cuda":
        tensors = in_one_buffer(tensors)
    files = {**base_files, **own_files}
    return HostDelta(
        tensors,
        Tokenizer({name: text for name, text in files.items() if text is not None}),
        sum(tensor.nbytes for tensor in tensors.values()),
        settings,
    )


def place_delta(model: DeltaModel, slot: int, delta: HostDelta) -> None:
    """Install a delta in an empty slot that no running sequence uses.

    On a GPU the copies run on a side stream, concurrently with passes, and are complete on return:
    one of the delta from page-locked memory, and two of a few bytes for each table.
    """
    with _side_stream(model.device):
        model.install(slot, model.place(delta.tensors), delta.settings)


def remove_delta(model: DeltaModel, slot: int) -> None:
    """Empty a slot that no running sequence uses, on the stream that fills it."""
    with _side_stream(model.device):
        model.remove(slot)


def merge_delta(model: DeltaModel, slot: int) -> None:
    """Compute and enable merged weights of a slot, concurrently with passes."""
    with torch.inference_mode(), _side_stream(model.device):
        model.merge(slot)
    model.use_merged(slot)


@dataclass(frozen=True, slots=True)
class ModelDevice:
    """A base's model, in whose slots deltas from a disk are installed.

    Attributes:
        model: the base's.
        disk: the artifacts' files.
        weights_digest: the base's.
        files: the base's tokenizer and config files.
    """

    model: DeltaModel
    disk: DiskTier
    weights_digest: str
    files: Mapping[str, str]

    @property
    def merged_slot(self) -> int | None:
        """The slot that has merged weights."""
        return self.model.merged_slot

    def read(self, digest: str) -> HostDelta:
        """As `read_delta`."""
        with self.disk.open(digest) as path, Artifact(path) as artifact:
            return read_delta(artifact, self.model, self.weights_digest, self.files)

    def place(self, slot: int, delta: HostDelta) -> None:
        """As `place_delta`."""
        place_delta(self.model, slot, delta)

    def remove(self, slot: int) -> None:
        """As `remove_delta`."""
        remove_delta(self.model, slot)

    def merge(self, slot: int) -> None:
        """As `merge_delta`."""
        merge_delta(self.model, slot)


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a side stream of a GPU, synchronized at the end.

    It begins after what the engine has launched: a sequence leaves its slot when its last pass is
    launched, and the block may overwrite, or free for a later block to reuse, what that pass reads.
    Memory that the block allocates is only ever reused on this stream, so in such a block.
    """
    if device.type != "cuda":
        yield
        return
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all loads: the allocator reuses memory per stream."""
    return torch.cuda.Stream(device)


def _own_config(files: Mapping[str, str | None]) -> dict[str, Any] | None:
    """The delta's config.json, if it differs from the base's.

    Raises:
        InvalidArtifact: it is not a JSON object.
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
    """Compare the tensors' vocabulary size with the delta's config.json.

    Raises:
        InvalidArtifact: they differ.
    """
    stated = None if config is None else vocabulary(config)
    if stated is not None and stated != tokens:
        raise InvalidArtifact(
            f"The delta's {CONFIG} states {stated} tokens, but its tensors have rows "
            f"for {tokens}. Save the fine-tune again and compress it anew."
        )
