"""What is in a delta file, in figures: per tensor and in total. numpy only."""

from dataclasses import dataclass
from typing import Any

from artifacts.reader import Artifact


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One changed tensor: bytes in the file, rank and how many ranks have each width (V/U)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    rank: int | None
    widths: dict[str, int]
    error: float | None


def summarize(artifact: Artifact) -> tuple[dict[str, Any], list[TensorSummary]]:
    """Totals (JSON-able) and one row a changed tensor.

    `ratio` and `true_bits` count the whole file against every weight of the checkpoint at
    bfloat16; `nominal_bits` is the budget for linear layers.
    """
    matrices = artifact.manifest.get("matrices", {})
    rows = []
    for name, record in artifact.records.items():
        runs = record["ranks"] if record["kind"] == "svd" else []
        error = matrices.get(name, {}).get("error")
        widths: dict[str, int] = {}
        for run in runs:
            v, u = run["v_bits"], run["u_bits"]
            label = str(v) if v == u else f"{v}/{u}"
            widths[label] = widths.get(label, 0) + run["count"]
        rows.append(
            TensorSummary(
                name,
                record["kind"],
                tuple(record["shape"]),
                artifact.tensor_bytes(name),
                sum(run["count"] for run in runs) if record["kind"] == "svd" else None,
                widths,
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
