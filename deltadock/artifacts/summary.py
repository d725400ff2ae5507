"""Summarize a delta file: figures per tensor and in total."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltadock.artifacts.encodings.composed import COMPOSED
from deltadock.artifacts.reader import Artifact


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One changed tensor: encoding, bytes in the file, rank, and a histogram of bit widths.

    `widths` counts ranks (as `V/U` if the widths differ), rows, or the kept entries of a sparse
    tensor. `rank` is None if nothing is factored; for a composition it is the sum over its parts.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    rank: int | None
    widths: dict[str, int]
    error: float | None


def encoding_name(record: Mapping[str, Any]) -> str:
    """The encoding of a record and its parts: `sum(svd, rows)`."""
    kind: str = record["kind"]
    if kind == "alias":
        kind = f"alias of {record['of']}"
    elif kind in COMPOSED:
        inner = dict.fromkeys(encoding_name(part) for part in _parts(record))
        kind = f"{kind}({', '.join(inner)})"
    return f"{kind}, deflated" if "deflated" in record else kind


def rank_of(record: Mapping[str, Any]) -> int | None:
    """Total rank of a record and its parts; None if nothing is factored."""
    if record["kind"] == "svd":
        return sum(int(run["count"]) for run in record["ranks"])
    if record["kind"] == "low-rank":
        return int(record["rank"])
    ranks = [rank for part in _parts(record) if (rank := rank_of(part)) is not None]
    return sum(ranks) if ranks else None


def widths_of(record: Mapping[str, Any]) -> dict[str, int]:
    """Counts of ranks, rows or entries by bit width, over a record and its parts."""
    widths: Counter[str] = Counter()
    if record["kind"] == "svd":
        for run in record["ranks"]:
            v, u = run["v_bits"], run["u_bits"]
            widths[str(v) if v == u else f"{v}/{u}"] += run["count"]
    elif record["kind"] == "rows":
        for run in record["runs"]:
            widths[str(run["bits"])] += run["count"]
    elif record["kind"] == "sparse":
        widths[str(record["bits"])] += record["kept"]
    elif record["kind"] == "sparse24":
        rows, columns = record["shape"]
        widths[str(record["bits"])] += 2 * rows * -(-columns // 4)
    for part in _parts(record):
        widths.update(widths_of(part))
    return dict(widths)


def _parts(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    known = record["kind"] in COMPOSED
    return [part for part in record["parts"] if part is not None] if known else []


def summarize(artifact: Artifact) -> tuple[dict[str, Any], list[TensorSummary]]:
    """Totals (JSON-able), and one row per changed tensor.

    `ratio` and `true_bits` compare the whole file with every weight of the checkpoint at bfloat16;
    `nominal_bits` is the budget of the compressed matrices.
    """
    matrices = artifact.manifest.get("matrices", {})
    rows = []
    for name, record in artifact.records.items():
        error = matrices.get(name, {}).get("error")
        rows.append(
            TensorSummary(
                name,
                encoding_name(record),
                tuple(record["shape"]),
                artifact.tensor_bytes(name),
                rank_of(record),
                widths_of(record),
                error if isinstance(error, float) else None,
            )
        )
    manifest = artifact.manifest
    totals = {
        "artifact_bytes": artifact.nbytes,
        "checkpoint_bytes": manifest["checkpoint_bytes"],
        "ratio": manifest["checkpoint_bytes"] / artifact.nbytes,
        "nominal_bits": manifest["nominal_bits"],
        "true_bits": 8 * artifact.nbytes / max(manifest["parameters"], 1),
        "method": manifest["method"],
        "base_digest": manifest["base_digest"],
        "digest": artifact.digest,
        "seed": manifest.get("seed"),
        "calibration": manifest.get("calibration"),
        "files": sorted(manifest["files"]),
        "version": manifest.get("version"),
    }
    return totals, rows
