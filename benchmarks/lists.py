"""Latency of every list with many deltas.

    python -m benchmarks.lists [--deltas 100000] [--requests 200] [--runs 3]
                               [--database sqlite postgres] [--folder FOLDER]

Fills a new database with models of five versions, nine in ten ready, each with an uploaded
fine-tune, a file in the blob store and a report as of 24 layers (41 KB), and with 2,000 jobs that
wait; in FOLDER, if one is named, where the next run finds it. Then sends requests to the app in
this process, one at a time, and prints wall time and this process's processor time of a request,
client included, in milliseconds. On a machine with other work the wall time's p99 is mostly theirs:
the best of several runs counts.
"""

import argparse
import asyncio
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
from sqlalchemy import Connection, create_engine, insert, text, update

from benchmarks.harness import processor
from deltadock.api.main import create_app
from deltadock.api.memory import tune_memory
from deltadock.cli.services import postgres
from deltadock.settings import Settings
from deltadock.storage.api_keys import key_secret
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.database import Database, migrate, normalise_url
from deltadock.storage.repositories import KeyRepository
from deltadock.storage.tables import (
    AliasRow,
    BaseRow,
    BlobUseRow,
    CheckpointRow,
    DeltaRow,
    JobPriority,
    JobRow,
    JobState,
    ModelRow,
    ModelTermRow,
    NodeRow,
    Scope,
    TermKind,
    TotalsRow,
    UploadFileRow,
    UploadKind,
    UploadRow,
    UploadState,
)
from deltadock.storage.tenancy import LOCAL_TENANT

BATCH: Final = 500
VERSIONS: Final = 5
BASES: Final = 10
HELD: Final = 1000
"""Deltas on the node."""
QUEUED: Final = 2000
"""The newest deltas, whose jobs wait."""
START: Final = datetime(2026, 1, 1, tzinfo=UTC)
ERROR: Final = {"error_code": "unavailable", "error_message": "The store does not answer."}
WORDS: Final = ("maths", "code", "legal", "medical", "sales", "support", "search", "notes")

ROUTES: Final = (
    "/v1/deltas",
    "/v1/deltas?after={cursor}",
    "/v1/deltas?sort=name",
    "/v1/deltas?sort=size",
    "/v1/deltas?sort=kl",
    "/v1/deltas?base=base-3",
    "/v1/deltas?method=bitdelta",
    "/v1/deltas?state=failed",
    "/v1/deltas?state=ready&sort=kl",
    "/v1/deltas?text=legal",
    "/v1/deltas?tag=rare",
    "/v1/deltas?name={name}",
    "/v1/deltas/{name}",
    "/v1/models",
    "/v1/models?limit=1000",
    "/v1/models/{name}",
    "/v1/registry",
    "/v1/registry?text=med%20no",
    "/v1/registry?tag=rare",
    "/v1/registry/{name}",
    "/v1/registry/{name}/history",
    "/v1/resolve/{name}",
    "/v1/bases",
    "/v1/jobs",
    "/v1/jobs?state=failed&state=cancelled",
    "/v1/jobs?state=queued",
    "/v1/jobs/{job}",
    "/v1/uploads",
    "/v1/uploads?state=open",
    "/v1/keys",
    "/v1/tenants",
    "/v1/tenants/local",
    "/v1/nodes",
    "/",
    "/?state=ready&sort=kl",
    "/parts/totals",
    "/nodes",
    "/keys",
    "/jobs",
    "/bases",
    "/storage",
    "/deltas/{name}",
)


REPORT: Final = {
    "method": "adamix",
    "kl": 0.01,
    "matrices": [
        {
            "name": f"model.layers.{layer}.{name}.weight", "shape": [4096, 11_008], "kind": "svd",
            "bytes": 1_234_567, "error": 0.0123456789, "rank": 1234,
            "widths": {"8": 10, "6": 20, "4": 100, "3": 400, "2": 704}, "damping": 0.01, "gap": 0.0,
            "fallbacks": [],
        }
        for layer in range(24)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ],
}  # fmt: skip
"""A report as of a model with 24 layers."""


def fill(connection: Connection, count: int, queued: int) -> None:
    """Insert the rows."""
    chance = random.Random(0)
    digests = [f"{number:064x}" for number in range(BASES)]
    connection.execute(
        insert(CheckpointRow),
        [
            {"digest": digest, "weights_digest": digest, "model_type": "llama",
             "total_bytes": 2**34, "created_at": START}
            for digest in digests
        ],
    )  # fmt: skip
    connection.execute(
        insert(BaseRow),
        [
            {"id": f"base_{n}", "tenant_id": LOCAL_TENANT, "name": f"base-{n}", "shared": False,
             "checkpoint_digest": digest, "created_at": START}
            for n, digest in enumerate(digests)
        ],
    )  # fmt: skip
    for first in range(0, count, BATCH):
        rows: dict[type[Any], list[dict[str, Any]]] = {
            kind: []
            for kind in (
                CheckpointRow, ModelRow, ModelTermRow, DeltaRow, JobRow, AliasRow, UploadRow,
                UploadFileRow, BlobUseRow,
            )
        }  # fmt: skip
        for number in range(first, min(count, first + BATCH)):
            add_rows(rows, number, chance, waits=number >= count - queued)
        for kind, values in rows.items():
            connection.execute(insert(kind), values)
    connection.execute(
        update(TotalsRow).values(deltas=count, all_deltas=count, base_bytes=BASES * 2**34)
    )
    held = [
        {"digest": artifact(number), "tier": "host", "bytes": 1, "references": 0, "pinned": False}
        for number in range(0, count, max(1, count // HELD))
    ]
    far = datetime.now(UTC) + timedelta(days=1)
    connection.execute(
        insert(NodeRow),
        [{"id": "node_a", "url": "http://10.0.0.1", "base_digest": digests[0], "adopts": False,
          "draining": False, "capacity": 1, "admitted": 0, "delta_slots": 1, "deltas": held,
          "started_at": START, "seen_at": START, "expires_at": far}],
    )  # fmt: skip
    if connection.dialect.name == "postgresql":  # as autovacuum does; SQLite has no statistics
        connection.execute(text("ANALYZE"))


def fill_store(store: LocalBlobStore, count: int) -> None:
    """A small file for each artifact."""
    store.prepare()
    for number in range(count):
        path = store.path(artifact(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def artifact(number: int) -> str:
    """The digest of a delta's artifact."""
    return f"{number + 2**32:064x}"


def checkpoint(number: int) -> str:
    """The digest of a delta's fine-tune."""
    return f"{number + 2**34:064x}"


def add_rows(
    rows: dict[type[Any], list[dict[str, Any]]],
    number: int,
    chance: random.Random,
    *,
    waits: bool,
) -> None:
    """Add the rows of one delta; if it `waits` and is not its model's first, its job is queued."""
    group, version = divmod(number, VERSIONS)
    topic, kind = WORDS[group % 8], WORDS[group // 8 % 8]
    name, model_id = f"{topic}/{kind}-{group}", f"mdl_{group}"
    owned = {"tenant_id": LOCAL_TENANT}
    at = START + timedelta(seconds=number)
    if version == 0:
        rows[ModelRow].append(
            {"id": model_id, **owned, "name": name, "description": "", "tags": [], "rule": None,
             "last_version": VERSIONS, "created_at": at}
        )  # fmt: skip
        terms = [(TermKind.WORD, word) for word in {topic, kind, str(group)}]
        terms += [(TermKind.TAG, "rare")] if group % 1000 == 0 else []
        rows[ModelTermRow] += [
            {**owned, "kind": term, "term": word, "model_id": model_id} for term, word in terms
        ]
    state = chance.choices((JobState.READY, JobState.FAILED, JobState.CANCELLED), (90, 9, 1))[0]
    if version == 0:
        state = JobState.READY
    elif waits:
        state = JobState.QUEUED
    is_ready = state is JobState.READY
    rows[CheckpointRow].append(
        {"digest": checkpoint(number), "weights_digest": checkpoint(number), "model_type": "llama",
         "total_bytes": 2**34, "created_at": at}
    )  # fmt: skip
    figures = {"ratio": 12.5, "true_bits": 1.1, "kl": chance.random(), "agreement": 0.98}
    rows[DeltaRow].append(
        {"id": f"dlt_{number}", **owned, "model_id": model_id, "name": name,
         "version": version + 1, "base_id": f"base_{number % BASES}",
         "checkpoint_digest": checkpoint(number),
         "method": "bitdelta" if number % 50 == 0 else "adamix", "bits": 1.0,
         "options": {"seed": 0, "solver": "exact", "goal": None, "calibration": None},
         "fingerprint": artifact(number), "created_at": at,
         "artifact_digest": artifact(number) if is_ready else None,
         "artifact_bytes": chance.randrange(10**9) if is_ready else None,
         "report": REPORT if is_ready else None,
         **(figures if is_ready else dict.fromkeys(figures))}
    )  # fmt: skip
    rows[JobRow].append(
        {"id": f"job_{number}", **owned, "delta_id": f"dlt_{number}", "state": state,
         "priority": JobPriority.NORMAL, "created_at": at, "updated_at": at, "sent_at": at,
         "finished_at": None if state is JobState.QUEUED else at,
         **(dict.fromkeys(ERROR) if is_ready else ERROR)}
    )  # fmt: skip
    if version == 0:
        rows[AliasRow].append(
            {"model_id": model_id, "alias": "default", "delta_id": f"dlt_{number}", "version": 1,
             "moved_at": at}
        )  # fmt: skip
    is_open = number % 1000 == 0
    rows[UploadRow].append(
        {"id": f"upl_{number}", **owned, "kind": UploadKind.CHECKPOINT,
         "state": UploadState.OPEN if is_open else UploadState.COMPLETE,
         "checkpoint_digest": None if is_open else checkpoint(number),
         "created_at": at, "updated_at": at}
    )  # fmt: skip
    rows[UploadFileRow] += [
        {"upload_id": f"upl_{number}", "path": path, "size": size, "sha256": f"{digest:064x}",
         "stored": True, "tensors": []}
        for path, size, digest in (
            ("config.json", 600, 1), ("model.safetensors", 2**30, number + 2**33)
        )
    ]  # fmt: skip
    rows[BlobUseRow].append({**owned, "digest": f"{number + 2**33:064x}", "size": 2**30, "uses": 1})


class Latency(NamedTuple):
    """Milliseconds of a request."""

    p50: float
    p99: float
    cpu_p50: float
    cpu_p99: float

    @classmethod
    def of(cls, spent: list[tuple[float, float]]) -> "Latency":
        """From the seconds of each request: wall time and processor time."""
        wall, cpu = ([1000 * seconds for seconds in column] for column in zip(*spent, strict=True))
        return cls(statistics.median(wall), p99(wall), statistics.median(cpu), p99(cpu))


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[98]


async def measure(
    settings: Settings, count: int, requests: int, runs: int
) -> AsyncIterator[tuple[str, Latency]]:
    """Each route with the best figures of the runs."""
    app = create_app(settings)
    database: Database = app.state.resources.database
    with database.session_scope() as session:
        _, key = KeyRepository(session, LOCAL_TENANT).issue(
            key_secret(settings), name="benchmark", scopes=tuple(Scope)
        )
    chance = random.Random(1)
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://benchmark",
        headers={"Authorization": f"Bearer {key}"},
    )
    async with app.router.lifespan_context(app), client:
        tune_memory()  # as a process does once its app is there
        cursor = (await client.get("/v1/deltas?limit=200")).json()["next"]

        async def spend(route: str) -> tuple[float, float]:
            group = chance.randrange(count // VERSIONS)
            path = route.format(
                cursor=cursor,
                name=f"{WORDS[group % 8]}/{WORDS[group // 8 % 8]}-{group}",
                job=f"job_{chance.randrange(count)}",
            )
            wall, cpu = time.perf_counter(), time.process_time()
            answer = await client.get(path)
            spent = time.perf_counter() - wall, time.process_time() - cpu
            answer.raise_for_status()
            return spent

        for route in ROUTES:
            for _ in range(5):
                await spend(route)
            latencies = [
                Latency.of([await spend(route) for _ in range(requests)]) for _ in range(runs)
            ]
            yield route, Latency(*map(min, zip(*latencies, strict=True)))


@contextmanager
def filled(kind: str, folder: Path, count: int) -> Iterator[Settings]:
    """Settings for a database in the folder; filled, unless it was before."""
    home = folder / f"{kind}-{count}"
    home.mkdir(mode=0o755, exist_ok=True)
    with ExitStack() as services:
        fields = {}
        if kind == "postgres":
            fields = services.enter_context(postgres(home / "postgres")).settings
        settings = Settings.model_validate({"home": home, "log_level": "ERROR", **fields})
        done = home / "filled"
        if done.exists():
            migrate(settings.sqlalchemy_url)
        else:
            prepare(settings, count)
            done.touch()
        yield settings


def prepare(settings: Settings, count: int, queued: int = QUEUED) -> None:
    """Migrate and fill the database, and the blob store."""
    migrate(settings.sqlalchemy_url)
    # The report is the same in every row: it is encoded once.
    report = json.dumps(REPORT)
    engine = create_engine(
        normalise_url(settings.sqlalchemy_url),
        json_serializer=lambda value: report if value is REPORT else json.dumps(value),
    )
    with engine.begin() as connection:
        fill(connection, count, queued)
    engine.dispose()
    fill_store(LocalBlobStore(settings.blob_folder), count)


async def show(settings: Settings, count: int, requests: int, runs: int) -> None:
    """Print the table of one database."""
    async for route, latency in measure(settings, count, requests, runs):
        print(f"{route:42}" + "".join(f"{figure:9.1f}" for figure in latency), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'peak memory of this process, MiB':42}{peak:9.0f}")


def main() -> None:
    """Print the table of each database."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--deltas", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--database", nargs="+", default=["sqlite", "postgres"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(
        f"{processor()}; {options.deltas} deltas, {options.requests} requests a route, the best of "
        f"{options.runs} runs"
    )
    for kind in options.database:
        with (
            tempfile.TemporaryDirectory(prefix="deltadock-lists-")
            if options.folder is None
            else nullcontext(options.folder)
        ) as name:
            folder = Path(name)
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o711)
            with filled(kind, folder, options.deltas) as settings:
                print(f"\n{kind + ', ms':42}{'p50':>9}{'p99':>9}{'CPU p50':>9}{'CPU p99':>9}")
                asyncio.run(show(settings, options.deltas, options.requests, options.runs))


if __name__ == "__main__":
    main()
