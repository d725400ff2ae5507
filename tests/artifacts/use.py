"""Exercise every operation of a reader on a file."""

from math import prod
from pathlib import Path

import numpy as np

from deltadock.artifacts.encodings import (
    DELTA_ENCODINGS,
    FACTORED_ENCODINGS,
    decode_dense,
    parts,
    stored_array,
)
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.summary import summarize

MOST_ELEMENTS = 1 << 16
"""Largest tensor that is decoded: a loader compares shapes with its base first."""


def use(path: Path) -> list[str]:
    """Open a file, decode everything, and return the damaged segments."""
    with Artifact(path) as artifact, np.errstate(all="ignore"):
        summarize(artifact)
        assert artifact.files.keys().isdisjoint(artifact.binary_files)
        damaged = list(artifact.damaged())
        for name in artifact.records:
            encoded = artifact.resolved(name)
            if prod(encoded.record["shape"]) > MOST_ELEMENTS:
                continue
            kind = encoded.record["kind"]
            if kind in DELTA_ENCODINGS:
                assert artifact.dense(name).shape == tuple(encoded.record["shape"])
            else:
                stored_array(encoded)
            if kind in FACTORED_ENCODINGS:
                artifact.factors(name)
            if kind == "exact":
                artifact.exact(name)
            if kind == "new-rows":
                for part in parts(encoded):
                    if part is not None:
                        decode_dense(part)
        return damaged
