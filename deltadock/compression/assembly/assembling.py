"""What the methods leave: embeddings, small tensors, tokenizer files, the manifest, the report."""

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.artifacts.encodings import encode_alias, encode_exact, quantize_rows_midrise
from deltadock.compression.assembly.composing import with_added_rows
from deltadock.compression.calibration.windows import CalibrationSet
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.model.weights import Checkpoint, raw
from deltadock.compression.report import Report, TensorReport
from deltadock.compression.run import Run
from deltadock.errors import TooLarge
from deltadock.version import __version__

EMBEDDING_BITS: Final = 4
"""Width of an embedding's rows; a tied embedding is the output head as well."""

CARRIED_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja")
MAX_CARRIED_BYTES: Final = 32 * 2**20

CarriedFiles = tuple[dict[str, str | None], dict[str, str]]
"""Text files (None: the fine-tune has none of this name), and others in base64."""


def encode_others(run: Run, model: BlockwiseModel | None) -> list[TensorReport]:
    """Every changed tensor that no method took: embeddings row by row, the rest exactly.

    A copy of another tensor, in base and fine-tune alike, is its alias: a tied head on disk.
    """
    others = []
    stored = {run.content(name): name for name in run.encoded}
    embedding = None if model is None else model.embedding
    # The embedding first: what is a copy of it must not be kept exactly in its place.
    for name in sorted(run.finetuned.entries, key=lambda name: name != embedding):
        entry = run.finetuned.entries[name]
        if name in run.encoded or not run.changed(name):
            continue
        twin = stored.setdefault(run.content(name), name)
        if twin != name:
            run.encoded[name] = encode_alias(twin, entry.shape, entry.dtype)
            others.append(TensorReport(name, "alias", list(entry.shape), 0))
            continue
        lossy = run.options.method != "exact"
        if lossy and name == embedding and run.is_float(name):
            encoded = quantize_rows_midrise(run.delta(name).numpy(), EMBEDDING_BITS, entry.dtype)
            if run.added_rows(name):
                encoded = with_added_rows(run, name, encoded)
        else:
            encoded = encode_exact(
                raw(run.finetuned.tensor(name), entry.dtype), entry.dtype, entry.shape
            )
        run.encoded[name] = encoded
        others.append(TensorReport(name, encoded.record["kind"], list(entry.shape), encoded.nbytes))
    return others


def carried_files(base: CheckpointManifest, tuned: Checkpoint) -> CarriedFiles:
    """Config and tokenizer files that differ from the base's.

    Raises:
        TooLarge: together they are over `MAX_CARRIED_BYTES`.
    """
    before = {file.path: file.sha256 for file in base.files}
    after = {file.path: file.sha256 for file in tuned.manifest.files}
    differing = [
        path
        for path in sorted(before.keys() | after.keys())
        if "/" not in path
        and path.endswith(CARRIED_SUFFIXES)
        and not path.endswith(".safetensors.index.json")
        and before.get(path) != after.get(path)
    ]
    texts, others = read_carried(tuned.folder, [path for path in differing if path in after])
    return texts | {path: None for path in differing if path not in after}, others


def read_carried(folder: Path, paths: Iterable[str]) -> CarriedFiles:
    """These files of a folder, as an artifact carries them.

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


def make_manifest(
    run: Run, bits: float | None, data: CalibrationSet | None, carried: CarriedFiles
) -> dict[str, Any]:
    """Everything of the artifact's manifest but the tensors' records."""
    texts, others = carried
    return {
        "base_digest": run.base.manifest.weights_digest,
        "finetuned_digest": run.finetuned.manifest.weights_digest,
        "model_type": run.base.manifest.config["model_type"],
        "method": run.options.method,
        "nominal_bits": bits,
        "settings": {"solver": run.options.solver, "embedding_bits": EMBEDDING_BITS},
        "seed": run.options.seed,
        "calibration": _calibration(run, data),
        "checkpoint_bytes": run.finetuned.bf16_bytes,
        "parameters": run.finetuned.parameters,
        "version": __version__,
        "files": texts,
        "binary_files": others,
        "matrices": {
            matrix.name: {
                "error": matrix.error,
                "damping": matrix.damping,
                "fallbacks": matrix.fallbacks,
            }
            for matrix in run.matrices
        },
    }


def make_report(
    run: Run, bits: float | None, out: Path, data: CalibrationSet | None, others: list[TensorReport]
) -> Report:
    return Report(
        method=run.options.method,
        nominal_bits=bits,
        artifact_bytes=out.stat().st_size,
        checkpoint_bytes=run.finetuned.bf16_bytes,
        parameters=run.finetuned.parameters,
        base_digest=run.base.manifest.weights_digest,
        calibration=_calibration(run, data),
        distillation=run.distilled,
        matrices=run.matrices,
        other_tensors=others,
    )


def _calibration(run: Run, data: CalibrationSet | None) -> dict[str, Any] | None:
    if data is None:
        return None
    return {
        "sha256": data.sha256,
        "tokens": data.tokens,
        "length": data.train.shape[1],
        "seed": run.options.seed,
        "sources": data.sources,
    }
