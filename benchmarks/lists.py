"""Latency of every list with many deltas, against a bare SELECT by primary key.

    python -m benchmarks.lists [--deltas 100000] [--requests 200] [--database sqlite postgres]

Fills a new database with models of five versions, nine in ten ready, each with a report as of 24
layers (41 KB), then sends requests to the app in this process and prints p50 and p99 in
milliseconds. The bare SELECT of one row runs in between, and the ratio is of the medians.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, insert, select, text, update
from starlette.testclient import TestClient

from benchmarks.harness import processor
from deltadock.api.main import create_app
from deltadock.cli.services import postgres
from deltadock.settings import Settings
from deltadock.storage.api_keys import key_secret
from deltadock.storage.database import Database, migrate
from deltadock.storage.models import (
    AliasRow,
    BaseRow,
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
)
from deltadock.storage.repositories import KeyRepository
from deltadock.storage.tenancy import LOCAL_TENANT

BATCH: Final = 500
VERSIONS: Final = 5
BASES: Final = 10
HELD: Final = 1000
"""Deltas on the node."""
START: Final = datetime(2026, 1, 1, tzinfo=UTC)
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
    "/v1/registry?text=med%20no",
    "/v1/resolve/{name}",
    "/v1/bases",
    "/v1/jobs",
    "/v1/jobs?state=failed&state=cancelled",
    "/v1/nodes",
    "/",
    "/parts/totals",
    "/nodes",
)


def report_text() -> str:
    """A report as of a model with 24 layers, as JSON."""
    matrices = [
        {
            "name": f"model.layers.{layer}.{name}.weight", "shape": [4096, 11_008], "kind": "svd",
            "bytes": 1_234_567, "error": 0.0123456789, "rank": 1234,
            "widths": {"8": 10, "6": 20, "4": 100, "3": 400, "2": 704}, "damping": 0.01, "gap": 0.0,
            "fallbacks": [],
        }
        for layer in range(24)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]  # fmt: skip
    return json.dumps({"method": "adamix", "kl": 0.01, "matrices": matrices})


def fill(connection: Connection, count: int) -> None:
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
    report = json.loads(report_text())
    for first in range(0, count, BATCH):
        rows: dict[type[Any], list[dict[str, Any]]] = {
            kind: [] for kind in (ModelRow, ModelTermRow, DeltaRow, JobRow, AliasRow)
        }
        for number in range(first, min(count, first + BATCH)):
            add_rows(rows, number, chance, report)
        for kind, values in rows.items():
            connection.execute(insert(kind), values)
    connection.execute(update(TotalsRow).values(deltas=count, base_bytes=BASES * 2**34))
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


def artifact(number: int) -> str:
    """The digest of a delta's artifact."""
    return f"{number + 2**32:064x}"


def add_rows(
    rows: dict[type[Any], list[dict[str, Any]]], number: int, chance: random.Random, report: Any
) -> None:
    """Add the rows of one delta."""
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
    is_ready = state is JobState.READY or version == 0
    state = JobState.READY if is_ready else state
    figures = {"ratio": 12.5, "true_bits": 1.1, "kl": chance.random(), "agreement": 0.98}
    rows[DeltaRow].append(
        {"id": f"dlt_{number}", **owned, "model_id": model_id, "name": name,
         "version": version + 1, "base_id": f"base_{number % BASES}",
         "checkpoint_digest": f"{number % BASES:064x}",
         "method": "bitdelta" if number % 50 == 0 else "adamix", "bits": 1.0,
         "options": {"seed": 0, "solver": "exact", "goal": None, "calibration": None},
         "fingerprint": artifact(number), "created_at": at,
         "artifact_digest": artifact(number) if is_ready else None,
         "artifact_bytes": chance.randrange(10**9) if is_ready else None,
         "report": report if is_ready else None,
         **(figures if is_ready else dict.fromkeys(figures))}
    )  # fmt: skip
    rows[JobRow].append(
        {"id": f"job_{number}", **owned, "delta_id": f"dlt_{number}", "state": state,
         "priority": JobPriority.NORMAL, "created_at": at, "updated_at": at, "sent_at": at,
         "finished_at": at}
    )  # fmt: skip
    if version == 0:
        rows[AliasRow].append(
            {"model_id": model_id, "alias": "default", "delta_id": f"dlt_{number}", "version": 1,
             "moved_at": at}
        )  # fmt: skip


def milliseconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def measure(settings: Settings, count: int, requests: int) -> Iterator[Sequence[object]]:
    """Rows of the table: route, p50, p99, and the median against the bare SELECT's."""
    app = create_app(settings)
    database: Database = app.state.resources.database
    with database.session_scope() as session:
        _, key = KeyRepository(session, LOCAL_TENANT).issue(
            key_secret(settings), name="benchmark", scopes=tuple(Scope)
        )
    chance = random.Random(1)

    def read_one() -> None:
        wanted = f"dlt_{chance.randrange(count)}"
        with database.engine.connect() as connection:
            connection.execute(select(DeltaRow.name).where(DeltaRow.id == wanted)).one()

    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as client:
        cursor = client.get("/v1/deltas?limit=200").json()["next"]
        for route in ROUTES:
            times, bare = [], []
            for number in range(requests + 5):
                group = chance.randrange(count // VERSIONS)
                name = f"{WORDS[group % 8]}/{WORDS[group // 8 % 8]}-{group}"
                path = route.format(cursor=cursor, name=name)
                spent = milliseconds(lambda: client.get(path).raise_for_status())  # noqa: B023
                if number >= 5:
                    times.append(spent)
                    bare.append(milliseconds(read_one))
            p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
            yield route, p50, p99, p50 / statistics.median(bare)


@contextmanager
def filled(kind: str, folder: Path, count: int) -> Iterator[Settings]:
    """Settings for a filled database."""
    home = folder / kind
    home.mkdir(mode=0o755)
    if kind == "sqlite":
        settings = Settings(home=home, log_level="ERROR")
        prepare(settings, count)
        yield settings
        return
    with postgres(home / "postgres") as service:
        settings = Settings.model_validate({"home": home, "log_level": "ERROR", **service.settings})
        prepare(settings, count)
        yield settings


def prepare(settings: Settings, count: int) -> None:
    """Migrate and fill the database."""
    migrate(settings.sqlalchemy_url)
    database = Database(settings.sqlalchemy_url)
    with database.engine.begin() as connection:
        fill(connection, count)
    database.dispose()


def main() -> None:
    """Print the table of each database."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deltas", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--database", nargs="+", default=["sqlite", "postgres"])
    arguments = parser.parse_args()
    print(f"{processor()}; {arguments.deltas} deltas, {arguments.requests} requests a route")
    for kind in arguments.database:
        with tempfile.TemporaryDirectory(prefix="deltadock-lists-") as name:
            Path(name).chmod(0o711)
            with filled(kind, Path(name), arguments.deltas) as settings:
                print(f"\n{kind:42} {'p50 ms':>8} {'p99 ms':>8} {'x SELECT':>9}")
                for route, p50, p99, ratio in measure(
                    settings, arguments.deltas, arguments.requests
                ):
                    print(f"{route:42} {p50:8.1f} {p99:8.1f} {ratio:9.1f}", flush=True)


if __name__ == "__main__":
    main()
