"""A running api with seeded data and a stub node, for the dashboard's tests and its pictures.

`python -m tests.system.dashboard FOLDER` takes screenshots of every page at 1280 and 390 px, light
and dark, with nothing stored and with deltas in every state.
"""

import math
import os
import random
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import Browser, Page, ViewportSize
from sqlalchemy.orm import Session

from deltadock.api.access.sessions import Sessions
from deltadock.cli.processes import Child, free_ports
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore, make_blob_store
from deltadock.storage.database import Database, database_now, migrate
from deltadock.storage.repositories import (
    BaseRepository,
    DeltaRepository,
    JobRepository,
    KeyRepository,
    NodeRepository,
    UploadRepository,
)
from deltadock.storage.tables import (
    DeltaRow,
    JobState,
    NodeSampleRow,
    UploadKind,
    UploadState,
)
from deltadock.storage.tenancy import LOCAL_TENANT
from tests import browser as chromium
from tests import seed
from tests.api.support import StandInNode, issue_key, serving

WIDE: Final[ViewportSize] = {"width": 1280, "height": 860}
PHONE: Final[ViewportSize] = {"width": 390, "height": 844}
PLAIN_PAGES: Final = {
    "list": "/",
    "choice": "/compare",
    **{
        name: f"/{name}"
        for name in (
            "new", "try", "jobs", "bases", "nodes", "keys", "storage", "audit", "docs", "nothing",
        )
    },
}  # fmt: skip


@dataclass
class Site:
    """A running api on seeded data, with a stub node."""

    url: str
    settings: Settings
    database: Database
    blobs: BlobStore
    node: StandInNode
    node_url: str
    seeded: seed.Seeded

    def new_delta(self, name: str) -> DeltaRow:
        """Add an upload and a delta of it that a worker is compressing."""
        with self.database.session_scope() as session:
            base = BaseRepository(session, LOCAL_TENANT).find("pilot-0.3b")
            assert base is not None
            delta = seed.add_delta(session, base, name, 1.0)
            upload = UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
            upload.state, upload.checkpoint_digest = UploadState.COMPLETE, delta.checkpoint_digest
            seed.start(session, delta)
            return delta

    def finish(self, delta_id: str) -> None:
        """Make a delta ready, as its worker does."""
        with self.database.session_scope() as session:
            delta = DeltaRepository(session, LOCAL_TENANT).find(delta_id)
            assert delta is not None
            seed.finish(session, self.blobs, delta, seed.report(layers=4))

    def cancel(self, delta_id: str) -> None:
        """End a running job as its worker does when asked to."""
        with self.database.session_scope() as session:
            assert JobRepository(session, LOCAL_TENANT).finish(
                self.job_id(session, delta_id),
                seed.WORKER,
                JobState.CANCELLED,
                error_code="cancelled",
                error_message="Cancelled on request.",
            )

    def job_id(self, session: Session, delta_id: str) -> str:
        delta = DeltaRepository(session, LOCAL_TENANT).find(delta_id)
        assert delta is not None
        return delta.job.id

    def pages(self) -> Mapping[str, str]:
        """The path of every page, and of a delta in every state."""
        ready = self.seeded.ready
        return PLAIN_PAGES | {
            "delta": f"/deltas/{ready[1]}",
            "running": f"/deltas/{self.seeded.compressing}",
            "queued": f"/deltas/{self.seeded.queued}",
            "failed": f"/deltas/{self.seeded.failed}",
            "model": "/models/maths/skills",
            "compare": f"/compare?delta={ready[1]}&delta={ready[2]}",
            "base": "/bases/pilot-0.3b",
        }


@contextmanager
def running_site(folder: Path) -> Iterator[Site]:
    """The api on a seeded database in `folder`, with a stub node."""
    settings, node = Settings(home=folder / "home"), StandInNode()
    with running_api(folder, settings) as url, serving(node.app()) as node_url:
        database = Database(settings.sqlalchemy_url)
        blobs = make_blob_store(settings)
        seeded = seed.seed(database, blobs)
        with database.session_scope() as session:
            NodeRepository(session).put(
                "node_a", node_url, lives_seconds=3600, base_digest=None, adopts=True,
                draining=False, capacity=8, admitted=0, delta_slots=4, deltas=[],
            )  # fmt: skip
        yield Site(url, settings, database, blobs, node, node_url, seeded)
        database.dispose()


@contextmanager
def running_api(folder: Path, settings: Settings) -> Iterator[str]:
    """An api with nothing stored but a key; yields its URL."""
    migrate(settings.sqlalchemy_url)
    make_blob_store(settings).prepare()
    issue_key(settings)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "deltadock.api.main:app", "--port", str(port)]
    environment = os.environ | {"DELTADOCK_HOME": str(settings.home)}
    with Child("api", command, log=folder / "api.log", env=environment) as child:
        child.wait_until(partial(_answers, port))
        yield f"http://127.0.0.1:{port}"
        child.stop()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def signed_in(browser: Browser, url: str, settings: Settings) -> Page:
    """A page in a context of its own, signed in with the first key."""
    database = Database(settings.sqlalchemy_url)
    with database.read_scope() as session:
        key_id = KeyRepository(session, LOCAL_TENANT).all()[-1].id  # newest first
    database.dispose()
    page = browser.new_context(base_url=url, viewport=WIDE).new_page()
    page.goto(f"/sign-in?token={Sessions(settings).link_token(key_id)}")
    return page


def _add_a_busy_node(site: Site) -> None:
    """A node with an hour behind it, and a delta that was cancelled."""
    delta = site.new_delta("legal/letters")
    site.cancel(delta.id)
    with site.database.session_scope() as session:
        found = DeltaRepository(session, LOCAL_TENANT).with_ids(site.seeded.ready)
        held: list[dict[str, Any]] = [
            {"digest": one.artifact_digest, "bytes": one.artifact_bytes, "references": number % 3,
             "tier": ("device", "device", "host", "disk")[number % 4], "pinned": number == 0}
            for number, one in enumerate(found)
        ]  # fmt: skip
        usage = {
            "tokens_per_second": 812.5, "first_token_seconds": 0.21, "inter_token_seconds": 0.018,
            "memory_bytes": 31 * 10**9, "memory_limit": 85 * 10**9,
        }  # fmt: skip
        NodeRepository(session).put(
            "node_b", "http://10.0.0.7:8100", lives_seconds=3600, adopts=False, draining=False,
            base_digest=found[0].base.checkpoint_digest, capacity=80, admitted=23, delta_slots=32,
            deltas=held, usage=usage,
        )  # fmt: skip
        now, chance = database_now(session), random.Random(0)
        for minute in range(1, 60):
            load = 0.5 + 0.4 * math.sin(minute / 9) + chance.uniform(0, 0.1)
            session.add(
                NodeSampleRow(
                    node_id="node_b", at=now - timedelta(minutes=minute), admitted=int(40 * load),
                    device=min(4, 60 - minute), host=max(0, 20 - minute // 3), disk=30,
                    tokens_per_second=1500 * load, first_token_seconds=0.1 + 0.2 * load,
                    inter_token_seconds=0.01 + 0.01 * load,
                    memory_bytes=int((24 + 9 * load) * 1e9), memory_limit=85 * 10**9,
                )
            )  # fmt: skip


def _take(page: Page, folder: Path, pages: Mapping[str, str], state: str) -> None:
    for name, path in pages.items():
        page.goto(path)
        if name == "docs":
            page.locator(".opblock-tag").first.wait_for()
        for size in (WIDE, PHONE):
            page.set_viewport_size(size)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
                taken = folder / f"{state}-{name}-{size['width']}-{scheme}.png"
                page.screenshot(path=taken, full_page=name != "docs")


def main(folder: Path) -> None:
    """Take all screenshots."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, chromium.open_browser() as browser:
        empty, full = Path(temporary, "empty"), Path(temporary, "full")
        empty.mkdir()
        full.mkdir()
        settings = Settings(home=empty / "home")
        with running_api(empty, settings) as url:
            _take(signed_in(browser, url, settings), folder, PLAIN_PAGES, "empty")
        with running_site(full) as site:
            _add_a_busy_node(site)
            _take(signed_in(browser, site.url, site.settings), folder, site.pages(), "full")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
