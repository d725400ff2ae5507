"""Seed data: a base, and deltas in every state."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from deltadock.storage.blobs import BlobStore
from deltadock.storage.database import Database
from deltadock.storage.repositories import (
    BaseRepository,
    CheckpointRepository,
    DeltaRepository,
    JobRepository,
)
from deltadock.storage.repositories.jobs import JobProgress
from deltadock.storage.tables import BaseRow, CheckpointRow, DeltaRow, JobState
from deltadock.storage.tenancy import LOCAL_TENANT

WORKER = "worker-1"
PROJECTIONS = {
    "self_attn.q_proj": (1024, 1024),
    "self_attn.k_proj": (256, 1024),
    "self_attn.v_proj": (256, 1024),
    "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (2816, 1024),
    "mlp.up_proj": (2816, 1024),
    "mlp.down_proj": (1024, 2816),
}

READY = (
    ("support/triage", 1.0),
    ("maths/skills", 1.0),
    ("maths/skills", 2.0),
    ("code/review", 1.0),
    ("search/rewriter", 0.5),
    ("support/triage", 1.25),
    ("sales/notes", 1.0),
)


class Seeded(NamedTuple):
    """Ids of the seeded deltas."""

    ready: Sequence[str]
    compressing: str
    queued: str
    failed: str


def digest_of(text: str) -> str:
    """A SHA-256 for this text."""
    return hashlib.sha256(text.encode()).hexdigest()


def report(layers: int = 24, bits: float | None = 1.0, seed: int = 0) -> dict[str, Any]:
    """A compression report of a model with this many layers."""
    chance = random.Random(seed)
    budget = bits or 16.0
    matrices = [
        _matrix(f"model.layers.{layer}.{name}.weight", shape, layer / layers, budget, chance)
        for layer in range(layers)
        for name, shape in PROJECTIONS.items()
    ]
    norms = ("input_layernorm", "post_attention_layernorm")
    others = [
        {
            "name": "model.embed_tokens.weight",
            "kind": "rows",
            "shape": [32768, 1024],
            "bytes": 2_236_416,
        },
        *(
            {
                "name": f"model.layers.{layer}.{name}.weight",
                "kind": "exact",
                "shape": [1024],
                "bytes": 2048,
            }
            for layer in range(layers)
            for name in norms
        ),
    ]
    parameters = 33_554_432 + sum(m["shape"][0] * m["shape"][1] for m in matrices)
    artifact = sum(part["bytes"] for part in [*matrices, *others]) + 61_440
    kl = 0.011 / budget**1.6 * chance.uniform(0.8, 1.2)
    return {
        "method": "adamix",
        "nominal_bits": bits,
        "artifact_bytes": artifact,
        "checkpoint_bytes": 2 * parameters,
        "parameters": parameters,
        "base_digest": digest_of("base weights"),
        "calibration": {"sha256": digest_of("calibration"), "tokens": 131_072, "seed": seed},
        "matrices": matrices,
        "other_tensors": others,
        "kl": kl,
        "kl_base": 1.8437,
        "agreement": 1 - 2.2 * kl,
        "nll": 1.2019 + kl / 3,
        "nll_finetuned": 1.2019,
        "nll_base": 2.9514,
        "seconds": 412.7,
        "ratio": 2 * parameters / artifact,
        "true_bits": 8 * artifact / parameters,
    }


def _matrix(
    name: str, shape: tuple[int, int], depth: float, bits: float, chance: random.Random
) -> dict[str, Any]:
    full = min(shape)
    kept = round(full * min(1.0, (0.3 + 0.12 * depth) * bits**0.7 * chance.uniform(0.85, 1.15)))
    shares = {8: 0.01, 6: 0.02, 5: 0.04, 4: 0.13, 3: 0.27}
    widths = {str(width): round(kept * share) for width, share in shares.items()}
    widths["2"] = kept - sum(widths.values())
    codes = sum(int(width) * count for width, count in widths.items())
    return {
        "name": name,
        "shape": list(shape),
        "kind": "svd",
        "bytes": codes * sum(shape) // 8 + 512,
        "error": (0.01 + 0.05 * depth**2) / bits * chance.lognormvariate(0, 0.45),
        "rank": kept,
        "widths": widths,
        "damping": 0.01,
        "gap": 0.0,
        "fallbacks": [],
        "spectrum": [
            [place, round(0.4 * (1 + depth) * place**-0.6, 5), width, width]
            for place, width in ((1, 8), (4, 6), (12, 4), (40, 3), (kept, 2), (full, 0))
        ],
    }


def seed(database: Database, blobs: BlobStore) -> Seeded:
    """Add a base, the `READY` deltas, and one compressing, one queued and one failed delta."""
    with database.session_scope() as session:
        base = add_base(session, "pilot-0.3b", report()["checkpoint_bytes"])
        ready = [add_delta(session, base, name, bits) for name, bits in READY]
        for number, delta in enumerate(ready):
            finish(session, blobs, delta, report(bits=delta.bits, seed=number))
        failed = add_delta(session, base, "legal/contracts-de", 1.0)
        fail(session, failed)
        queued = add_delta(session, base, "medical/summaries", 1.5)
        compressing = add_delta(session, base, "code/sql-writer", 0.5)
        start(session, compressing)
        return Seeded([delta.id for delta in ready], compressing.id, queued.id, failed.id)


def add_base(session: Session, name: str, size: int) -> BaseRow:
    """Add a base with a new checkpoint."""
    checkpoint = CheckpointRepository(session, LOCAL_TENANT).add(
        CheckpointRow(
            digest=digest_of(name),
            weights_digest=digest_of(f"{name} weights"),
            model_type="llama",
            total_bytes=size,
            has_chat_template=False,
        )
    )
    return BaseRepository(session, LOCAL_TENANT).add(name, checkpoint)[0]


def add_delta(session: Session, base: BaseRow, name: str, bits: float) -> DeltaRow:
    """Add a queued delta of a new fine-tune."""
    words = f"{name} {bits}"
    tuned = CheckpointRepository(session, LOCAL_TENANT).add(
        CheckpointRow(
            digest=digest_of(words),
            weights_digest=digest_of(f"{words} weights"),
            model_type="llama",
            total_bytes=base.checkpoint.total_bytes,
            has_chat_template=True,
        )
    )
    return DeltaRepository(session, LOCAL_TENANT).add(
        name=name,
        base=base,
        checkpoint_digest=tuned.digest,
        method="adamix",
        bits=bits,
        options={
            "seed": 0,
            "solver": "exact",
            "goal": {"kind": "bits", "value": bits},
            "calibration": {
                "sources": [{"digest": digest_of("calibration"), "weight": 1.0}],
                "tokens": 131_072,
                "length": 2048,
            },
        },
        fingerprint=digest_of(f"{words} fingerprint"),
    )


def start(session: Session, delta: DeltaRow) -> None:
    """Start a delta's job and advance it to block 9 of 24."""
    job_id = delta.job.id
    JobRepository(session, LOCAL_TENANT).acquire(job_id, WORKER, 600)
    advance(session, job_id, 9)


def finish(session: Session, blobs: BlobStore, delta: DeltaRow, outcome: dict[str, Any]) -> None:
    """Finish a delta with this report and a placeholder artifact."""
    jobs, job_id = JobRepository(session, LOCAL_TENANT), delta.job.id
    jobs.acquire(job_id, WORKER, 600)
    DeltaRepository(session, LOCAL_TENANT).set_result(
        delta,
        artifact_digest=blobs.put_bytes(delta.id.encode()),
        artifact_bytes=outcome["artifact_bytes"],
        report=outcome,
    )
    jobs.finish(job_id, WORKER, JobState.READY)


def fail(session: Session, delta: DeltaRow) -> None:
    """Fail a delta's job with NaN in its weights."""
    jobs, job_id = JobRepository(session, LOCAL_TENANT), delta.job.id
    where = "model.layers.3.mlp.up_proj.weight"
    jobs.acquire(job_id, WORKER, 600)
    jobs.advance(job_id, WORKER, JobProgress(JobState.VALIDATING, 3, 40, 2.5, where))
    jobs.finish(
        job_id,
        WORKER,
        JobState.FAILED,
        error_code="non_finite_weights",
        error_message=(
            f"Tensor {where!r} of the fine-tune holds NaN or an infinity. The training that wrote "
            "it has diverged; upload an earlier checkpoint."
        ),
    )


def advance(session: Session, job_id: str, block: int, blocks: int = 24) -> None:
    """Advance the job to this block."""
    percent, message = 10 + 80 * block / blocks, f"block {block + 1} of {blocks}, matrix 1 of 7"
    progress = JobProgress(JobState.COMPRESSING, block, blocks, percent, message)
    moved = JobRepository(session, LOCAL_TENANT).advance(job_id, WORKER, progress)
    assert moved, "the worker lost its lease"
