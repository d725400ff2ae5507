"""What a compression keeps for a later one with the same inputs: text, blocks and scales.

A key is a hash of everything that decides the bytes under it, so that nothing needs to be dropped
when an input changes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from deltadock.artifacts.encodings import Encoded
from deltadock.compression.calibration.sources import file_sha256
from deltadock.compression.checkpoints import CheckpointPair
from deltadock.compression.options import CompressOptions, Source
from deltadock.version import __version__


class BlockStore(Protocol):
    """Stores encoded blocks, so that an interrupted compression can resume."""

    def get(self, key: str) -> bytes | None:
        """Return the data stored under `key`, or None."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`."""
        ...


class NothingKept:
    """The store of a compression that is not resumed."""

    def get(self, key: str) -> None:
        """None."""

    def put(self, key: str, data: bytes) -> None:
        """Forget the data."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of what one compression keeps.

    Attributes:
        pair: the two checkpoints.
        options: all of them count.
        device: torch device, of which only the kind counts.
        reserve: see `CompressionSession`.
    """

    pair: CheckpointPair
    options: CompressOptions
    device: str
    reserve: float | None

    def text(self, sources: Sequence[Source], max_length: int) -> str:
        """Key of the calibration text, of windows of at most `max_length` tokens."""
        texts = [
            (None if one.path is None else file_sha256(one.path), one.weight) for one in sources
        ]
        inputs = {
            "tokenizer_of": self.pair.base.manifest.digest if self.pair.tokenizer_base else None,
            "texts": texts,
            "length": max_length,
            "calibration": asdict(self.options.calibration),
            "seed": self.options.seed,
        }
        return f"sampled/{self._hash(inputs)}"

    def draft(self, bits: float | None, calibration: str | None) -> str:
        """What the keys of a draft's blocks and scales begin with.

        Args:
            bits: the budget.
            calibration: SHA-256 (hex) of the windows; None: there are none.
        """
        inputs = {
            "base": self.pair.base.manifest.digest,
            "calibration": calibration,
            **asdict(self.options),
            "bits": bits,
            "reserve": self.reserve,
        }
        return self._hash(inputs)

    def _hash(self, inputs: dict[str, Any]) -> str:
        always = {
            "versions": [__version__, torch.__version__],
            "finetuned": self.pair.finetuned.manifest.digest,
            "device": self.device.partition(":")[0],
        }
        return hashlib.sha256(json.dumps(always | inputs, sort_keys=True).encode()).hexdigest()


def changed_segments(
    before: Mapping[str, Encoded], after: Mapping[str, Encoded]
) -> dict[str, Encoded]:
    """The tensors of `after` with the segments alone that `before` does not share with it."""
    changed = {}
    for name, one in after.items():
        old = before[name].segments
        segments = {key: data for key, data in one.segments.items() if data is not old[key]}
        if segments:
            changed[name] = Encoded(one.record, segments)
    return changed


def with_segments(
    before: Mapping[str, Encoded], changed: Mapping[str, Encoded]
) -> dict[str, Encoded]:
    """The inverse of `changed_segments`: its `after`."""
    return {
        name: Encoded(one.record, {**one.segments, **changed[name].segments})
        if name in changed
        else one
        for name, one in before.items()
    }
