"""From the encodings of linear maps to an artifact's tensors, carried files and manifest."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from deltadock.artifacts.checkpoint import CONFIG, CheckpointManifest
from deltadock.artifacts.compatibility import differing_files, with_vocabulary
from deltadock.artifacts.encodings import (
    Encoded,
    SvdMatrix,
    Vectors,
    encode_alias,
    encode_exact,
    encode_new_rows,
    encode_stack,
    encode_svd,
    encode_transposed,
    quantize_rows_midrise,
)
from deltadock.artifacts.manifest import MAX_CARRIED_BYTES, WITH_DEFLATED_FILES, stored_file
from deltadock.artifacts.tensors import apply_delta
from deltadock.compression.calibration.windows import CalibrationSet
from deltadock.compression.checkpoints import CheckpointPair, CheckpointReader, MatrixRef, to_numpy
from deltadock.compression.options import CompressOptions
from deltadock.compression.report import MatrixReport, TensorReport
from deltadock.errors import TooLarge
from deltadock.version import __version__

EMBEDDING_BITS: Final = 4
"""Width of an embedding's rows; a tied embedding is the output head as well."""

CarriedFiles = tuple[dict[str, str | None], dict[str, str]]
"""Text files (None: the fine-tune lacks a file of the base), and binary files in base64."""


def append_rows(pair: CheckpointPair, name: str, encoded: Encoded | None) -> Encoded:
    """Append the rows that a larger vocabulary adds to a tensor, stored exactly.

    `encoded` is the encoding of the base's rows, None if they have not changed.
    """
    entry, added = pair.finetuned.entries[name], pair.added_rows(name)
    rows = to_numpy(pair.finetuned.tensor(name)[-added:], entry.dtype)
    return encode_new_rows(encoded, rows, entry.shape[0] - added, entry.dtype)


def compose_tensors(
    pair: CheckpointPair, refs: Sequence[MatrixRef], encodings: Mapping[str, Encoded | None]
) -> dict[str, Encoded]:
    """Encode each tensor from its maps; skip tensors of which a map has no encoding.

    Args:
        pair: the two checkpoints.
        refs: the maps; of a tensor that stacks experts, all parts in order.
        encodings: by the maps' keys; None: the map has not changed.
    """
    by_tensor: dict[str, list[MatrixRef]] = {}
    for ref in refs:
        by_tensor.setdefault(ref.name, []).append(ref)
    composed = {}
    for name, parts in by_tensor.items():
        if any(ref.key not in encodings for ref in parts):
            continue
        stored = [
            encode_transposed(encoded) if ref.transposed and encoded is not None else encoded
            for ref in parts
            for encoded in [encodings[ref.key]]
        ]
        if pair.added_rows(name):
            composed[name] = append_rows(pair, name, stored[0])
        elif parts[0].part is not None and any(stored):
            composed[name] = encode_stack(stored)
        elif stored[0] is not None:
            composed[name] = stored[0]
    return composed


def encode_unchanged(pair: CheckpointPair, name: str) -> Encoded | None:
    """Encode a tensor that is the base's in another dtype; None if no delta has its shape.

    As a delta of no ranks, which readers of every version apply: the result has its dtype.
    """
    entry = pair.finetuned.entries[name]
    if pair.added_rows(name):
        return append_rows(pair, name, None)
    if len(entry.shape) not in (2, 3) or 0 in entry.shape:
        return None
    *stacked, h_out, h_in = entry.shape
    u, v = (Vectors(np.zeros((0, n), np.uint8), np.zeros(0, np.int64), None) for n in (h_out, h_in))
    one = encode_svd(SvdMatrix(u, np.zeros(0, np.float32), v), entry.dtype)
    return encode_stack([one, *[None] * (stacked[0] - 1)]) if stacked else one


def overflows(pair: CheckpointPair, name: str, encoded: Encoded) -> bool:
    """Whether base plus delta is beyond float16, the one dtype whose range weights may fill."""
    if pair.finetuned.entries[name].dtype != "F16":
        return False
    return not bool(apply_delta(encoded, pair.base.tensor(name)).isfinite().all())


def encode_remaining(
    pair: CheckpointPair,
    compressed: Mapping[str, Encoded],
    *,
    embedding: str | None,
    embedding_bits: int | None,
) -> tuple[dict[str, Encoded], list[TensorReport]]:
    """Encode every changed tensor that the method did not compress.

    A tensor with the content of another one, in base and fine-tune alike (a tied head that is
    stored on disk), becomes its alias; one that is the base's in another dtype takes no room; the
    rest is stored exactly.

    Args:
        pair: the two checkpoints.
        compressed: encodings of the compressed tensors.
        embedding: the tensor of the input embedding, if known.
        embedding_bits: width of its rows, if it is to be quantized.
    """
    encoded: dict[str, Encoded] = {}
    reports = []
    by_content = {pair.content(name): name for name in compressed}
    # The embedding first: its copies are to be aliases of it, not the reverse.
    for name in sorted(pair.finetuned.entries, key=lambda name: name != embedding):
        entry = pair.finetuned.entries[name]
        if name in compressed or not pair.changed(name):
            continue
        original = by_content.setdefault(pair.content(name), name)
        if original != name:
            encoded[name] = encode_alias(original, entry.shape, entry.dtype)
            reports.append(TensorReport(name, "alias", list(entry.shape), 0))
            continue
        one: Encoded | None = None
        recast = pair.recast(name)
        if recast.in_bits or (recast.in_value and embedding_bits is not None):
            one = encode_unchanged(pair, name)
        elif name == embedding and embedding_bits is not None and pair.is_float(name):
            delta = pair.delta(MatrixRef(name)).numpy()
            one = quantize_rows_midrise(delta, embedding_bits, entry.dtype)
            if pair.added_rows(name):
                one = append_rows(pair, name, one)
        if one is None or overflows(pair, name, one):
            data = to_numpy(pair.finetuned.tensor(name), entry.dtype)
            one = encode_exact(data, entry.dtype, entry.shape)
        encoded[name] = one
        reports.append(TensorReport(name, one.record["kind"], list(entry.shape), one.nbytes))
    return encoded, reports


def carried_files(base: CheckpointManifest, finetuned: CheckpointReader) -> CarriedFiles:
    """Config and tokenizer files that differ from the base's.

    Raises:
        TooLarge: together they are over `MAX_CARRIED_BYTES`.
    """
    differing = differing_files(base, finetuned.manifest)
    texts, others = read_carried(
        finetuned.folder, [path for path, file in differing.items() if file]
    )
    if finetuned.vocabulary is not None:
        config = with_vocabulary(finetuned.manifest.config, finetuned.vocabulary)
        texts[CONFIG] = json.dumps(config, indent=2)
    return texts | {path: None for path, file in differing.items() if file is None}, others


def read_carried(folder: Path, paths: Iterable[str]) -> CarriedFiles:
    """Read these files of a folder in the artifact's form.

    Raises:
        TooLarge: together they are over `MAX_CARRIED_BYTES`.
    """
    texts: dict[str, str | None] = {}
    others: dict[str, str] = {}
    size = 0
    for path in paths:
        size += (folder / path).stat().st_size
        if size > MAX_CARRIED_BYTES:
            raise TooLarge(
                f"The fine-tune's config and tokenizer files that differ from the base's are "
                f"over {MAX_CARRIED_BYTES} bytes. Leave out what serving does not need."
            )
        content = (folder / path).read_bytes()
        try:
            texts[path] = content.decode("utf-8")
        except UnicodeDecodeError:
            others[path] = base64.b64encode(content).decode()
    return texts, others


def build_manifest(
    base: CheckpointReader,
    options: CompressOptions,
    carried: CarriedFiles,
    *,
    finetuned_digest: str,
    parameters: int,
    bits: float | None = None,
    data: CalibrationSet | None = None,
    settings: Mapping[str, Any] | None = None,
    matrices: Sequence[MatrixReport] = (),
) -> dict[str, Any]:
    """The artifact's manifest without the tensors' records (see docs/format.md)."""
    texts, others = carried
    files = {name: None if text is None else stored_file(text) for name, text in texts.items()}
    deflated = any(isinstance(content, dict) for content in files.values())
    return {
        **({"format": WITH_DEFLATED_FILES} if deflated else {}),
        "base_digest": base.manifest.weights_digest,
        "finetuned_digest": finetuned_digest,
        "model_type": base.manifest.config["model_type"],
        "method": options.method,
        "nominal_bits": bits,
        "settings": dict(settings or {}),
        "seed": options.seed,
        "calibration": calibration_record(data, options.seed),
        "checkpoint_bytes": 2 * parameters,
        "parameters": parameters,
        "version": __version__,
        "files": files,
        "binary_files": others,
        "matrices": {
            matrix.name: {
                "error": matrix.error,
                "damping": matrix.damping,
                "fallbacks": matrix.fallbacks,
            }
            for matrix in matrices
        },
    }


def calibration_record(data: CalibrationSet | None, seed: int) -> dict[str, Any] | None:
    """The calibration text as manifest and report describe it."""
    if data is None:
        return None
    return {
        "sha256": data.sha256,
        "tokens": data.tokens,
        "length": data.train.shape[1],
        "seed": seed,
        "sources": data.sources,
    }
