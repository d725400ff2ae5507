"""The dashboard in a real browser, against a real server."""

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Request, ViewportSize, expect
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse

from deltadock.api.access.sessions import Sessions
from deltadock.cli.processes import Child, free_ports
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore, make_blob_store
from deltadock.storage.database import Database, migrate
from deltadock.storage.models import DeltaRow, JobState
from deltadock.storage.repositories import (
    BaseRepository,
    DeltaRepository,
    JobRepository,
    KeyRepository,
    NodeRepository,
)
from deltadock.storage.tenancy import LOCAL_TENANT
from tests import browser as chromium
from tests import seed
from tests.api.support import StandInNode, issue_key, serving

WIDE: Final[ViewportSize] = {"width": 1280, "height": 860}
PHONE: Final[ViewportSize] = {"width": 390, "height": 844}


@dataclass
class Site:
    """A running api on a seeded database, with a stub node."""

    url: str
    settings: Settings
    database: Database
    blobs: BlobStore
    node: StandInNode
    seeded: seed.Seeded
    key: str
    key_id: str

    def new_delta(self, name: str) -> DeltaRow:
        """Add a delta that a worker is compressing."""
        with self.database.session_scope() as session:
            base = BaseRepository(session, LOCAL_TENANT).find("pilot-0.3b")
            assert base is not None
            delta = seed.add_delta(session, base, name, 1.0)
            seed.start(session, delta)
            return delta

    def finish(self, delta_id: str) -> None:
        """Make a delta ready, as its worker does."""
        with self.database.session_scope() as session:
            delta = DeltaRepository(session, LOCAL_TENANT).find(delta_id)
            assert delta is not None
            seed.finish(session, self.blobs, delta, seed.report(layers=4))

    def job_id(self, session: Session, delta_id: str) -> str:
        delta = DeltaRepository(session, LOCAL_TENANT).find(delta_id)
        assert delta is not None
        return delta.job.id


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("dashboard")
    settings = Settings(home=folder / "home")
    migrate(settings.sqlalchemy_url)
    database = Database(settings.sqlalchemy_url)
    blobs = make_blob_store(settings)
    blobs.prepare()
    seeded = seed.seed(database, blobs)
    key = issue_key(settings)
    with database.read_scope() as session:
        key_id = KeyRepository(session, LOCAL_TENANT).all()[0].id
    node = StandInNode()
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "deltadock.api.main:app", "--port", str(port)]
    with serving(node.app()) as node_url:
        environment = os.environ | {
            "DELTADOCK_HOME": str(settings.home),
        }
        with Child("api", command, log=folder / "api.log", env=environment) as child:
            child.wait_until(partial(_answers, port))
            with database.session_scope() as session:
                NodeRepository(session).put(
                    "node_a", node_url, lives_seconds=3600, base_digest=None, adopts=True,
                    draining=False, capacity=8, admitted=0, delta_slots=4, deltas=[],
                )  # fmt: skip
            yield Site(
                f"http://127.0.0.1:{port}", settings, database, blobs, node, seeded, key, key_id
            )
            child.stop()
    database.dispose()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.open_browser() as browser:
        yield browser


@pytest.fixture
def page(site: Site, browser: Browser) -> Iterator[Page]:
    """A page that fails the test on console errors or requests to other hosts."""
    context = browser.new_context(base_url=site.url, viewport=WIDE)
    page = context.new_page()
    page.goto(f"/sign-in?token={Sessions(site.settings).link_token(site.key_id)}")
    errors: list[str] = []
    hosts: set[str] = set()

    def on_console(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            errors.append(message.text)

    page.on("console", on_console)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    yield page
    context.close()
    assert errors == []
    assert hosts == {urlsplit(site.url).netloc}


def test_shows_every_delta(site: Site, page: Page, tmp_path: Path) -> None:
    page.goto("/")
    rows = page.locator("#deltas tbody tr")
    for delta_id in (*site.seeded.ready, site.seeded.queued, site.seeded.failed):
        expect(page.locator(f"#{delta_id}")).to_be_visible()
    assert rows.count() >= len(seed.READY) + 3
    expect(page.locator(f"#{site.seeded.failed}")).to_contain_text("non_finite_weights")
    expect(page.locator(f"#{site.seeded.ready[0]} .state")).to_have_text("ready")
    assert page.screenshot(path=tmp_path / "list.png", full_page=True)


def test_progress_updates_until_the_job_ends(site: Site, page: Page) -> None:
    delta = site.new_delta("live/list")
    asked: list[str] = []

    def count(request: Request) -> None:
        if delta.id in request.url:
            asked.append(request.url)

    page.on("request", count)
    page.goto("/")
    row = page.locator(f"#{delta.id}")
    expect(row.locator("progress")).to_have_attribute("value", "40.0")
    row.locator("a").focus()
    ready = int(page.locator("#totals strong").first.inner_text())
    with site.database.session_scope() as session:
        seed.advance(session, site.job_id(session, delta.id), 18)
    expect(row.locator("progress")).to_have_attribute("value", "70.0")
    expect(row).to_contain_text("18/24 · 70 %")
    expect(row.locator("a")).to_be_focused()  # a refresh keeps the keyboard focus
    site.finish(delta.id)
    expect(row.locator(".state")).to_have_text("ready")
    expect(row.locator("progress")).to_have_count(0)
    expect(page.locator("#totals strong").first).to_have_text(str(ready + 1))
    settled = len(asked)
    page.wait_for_timeout(2500)
    assert len(asked) == settled, "a finished row still polls"


def test_a_deltas_page_updates_until_its_report(site: Site, page: Page, tmp_path: Path) -> None:
    delta = site.new_delta("live/page")
    page.goto(f"/deltas/{delta.id}")
    expect(page.locator("[aria-current=step]")).to_have_text("compressing")
    expect(page.locator("#job [role=status]")).to_have_text("Compressing, block 9 of 24")
    with site.database.session_scope() as session:
        seed.advance(session, site.job_id(session, delta.id), 21)
    expect(page.locator("#percent")).to_have_text("80 %")
    assert page.screenshot(path=tmp_path / "running.png")
    site.finish(delta.id)
    expect(page.locator(".heading .state")).to_have_text("ready")
    expect(page.locator("#job")).to_have_count(0)
    expect(page.locator("svg.grid").first.locator(".cell")).to_have_count(4 * 7)


def test_a_job_can_be_cancelled_and_retried(site: Site, page: Page) -> None:
    delta = site.new_delta("live/cancel")
    page.goto(f"/deltas/{delta.id}")
    asked: list[str] = []

    def accept(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.accept()

    page.on("dialog", accept)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Cancelling")).to_be_disabled()
    assert asked == ["Stop compressing live/cancel:1?"]
    with site.database.session_scope() as session:
        job = JobRepository(session, LOCAL_TENANT).find(site.job_id(session, delta.id))
        assert job is not None
        assert job.cancel_requested
        assert JobRepository(session, LOCAL_TENANT).finish(
            job.id,
            seed.WORKER,
            JobState.CANCELLED,
            error_code="cancelled",
            error_message="Cancelled on request.",
        )
    expect(page.locator(".card.error")).to_contain_text("finished blocks are not recomputed")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("#job [role=status]")).to_have_text("Queued")


def test_charts_have_a_cell_per_matrix(site: Site, page: Page, tmp_path: Path) -> None:
    report = seed.report(bits=seed.READY[1][1], seed=1)
    page.goto(f"/deltas/{site.seeded.ready[1]}")
    grids = page.locator("svg.grid")
    assert grids.count() == 2
    for index in range(2):
        expect(grids.nth(index).locator(".cell")).to_have_count(len(report["matrices"]))
    used = sum(len([n for n in m["widths"].values() if n]) for m in report["matrices"])
    assert grids.nth(1).locator("rect:not(.ground)").count() >= used
    page.get_by_text("All 168 matrices as a table").click()
    expect(page.locator("#matrices tbody tr")).to_have_count(168)
    expect(page.locator("#matrices")).to_be_visible()
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.get_by_role("button", name="Copy the base digest").click()
    assert page.evaluate("window.copied") == report["base_digest"]
    page.reload()
    assert page.screenshot(path=tmp_path / "delta.png", full_page=True)


def test_nodes_and_their_deltas_update(site: Site, page: Page, tmp_path: Path) -> None:
    with site.database.read_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(site.seeded.ready[0])
        assert delta is not None
        artifact, base = delta.artifact_digest, delta.base.checkpoint_digest

    def heartbeat(**held: object) -> None:
        deltas = [{"digest": artifact, "bytes": 416_992, "references": 2, "pinned": True} | held]
        with site.database.session_scope() as session:
            NodeRepository(session).put(
                "node_b", "http://10.0.0.7:8100", lives_seconds=60, base_digest=base, adopts=False,
                draining=False, capacity=80, admitted=3, delta_slots=32, deltas=deltas,
            )  # fmt: skip

    heartbeat(tier="device")
    page.goto("/nodes")
    card = page.get_by_label("Node http://10.0.0.7:8100", exact=True)
    expect(card).to_contain_text("3 of 80 sequences")
    expect(card).to_contain_text("1 of 32 device slots")
    row = card.locator("tbody tr")
    expect(row.get_by_role("link")).to_have_text(f"{delta.name}:{delta.version}")
    expect(row).to_contain_text("pinned")
    assert page.screenshot(path=tmp_path / "nodes.png", full_page=True)
    row.get_by_role("link").focus()
    heartbeat(tier="disk", references=0, pinned=False)
    expect(row).to_contain_text("disk")
    expect(row.get_by_role("link")).to_be_focused()
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.screenshot(path=tmp_path / "nodes-phone.png", full_page=True)
    row.get_by_role("link").click()
    expect(page.locator("h1")).to_contain_text(delta.name)
    with site.database.session_scope() as session:
        NodeRepository(session).drop("node_b")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone_and_follow_the_colour_scheme(
    site: Site, page: Page, tmp_path: Path, scheme: str
) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size(PHONE)
    for name, path in (("list", "/"), ("delta", f"/deltas/{site.seeded.ready[1]}")):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red = int(ground.removeprefix("rgb(").split(",")[0])
        assert (red < 128) == (scheme == "dark")
        assert page.screenshot(path=tmp_path / f"{name}-{scheme}.png", full_page=True)


def test_base_and_delta_generate_side_by_side(site: Site, page: Page) -> None:
    site.node.requests.clear()
    page.goto(f"/deltas/{site.seeded.ready[0]}")
    page.get_by_label("Prompt").fill("17 + 25 =")
    page.get_by_label("Max tokens").fill("8")
    page.get_by_role("button", name="Generate").click()
    for answer in page.locator(".answer").all():
        expect(answer.locator("output")).to_have_text(" 42", use_inner_text=True)
        expect(answer.locator("p")).to_contain_text("3 tokens, stop")
    asked = site.node.requests
    assert {"deltadock-artifact" in request["headers"] for request in asked} == {True, False}
    assert [request["body"]["prompt"] for request in asked] == ["17 + 25 ="] * 2
    assert [request["body"]["max_tokens"] for request in asked] == [8] * 2


def test_hostile_text_is_escaped(site: Site, page: Page) -> None:
    name = "<script>window.hurt=1</script>/<img src=x onerror=window.hurt=1>"
    delta = site.new_delta(name)
    site.node.answer = JSONResponse(
        {
            **{"id": "cmpl-1", "created": 0, "model": "m"},
            "choices": [
                {"index": 0, "text": "<img src=x onerror=window.hurt=1>", "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
    )
    try:
        for path in ("/", f"/deltas/{delta.id}"):
            page.goto(path)
            expect(page.get_by_text(name).first).to_be_visible()
        page.goto(f"/deltas/{site.seeded.ready[0]}")
        page.get_by_label("Prompt").fill("?")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("output").first).to_contain_text("<img")
        assert page.evaluate("window.hurt") is None
    finally:
        site.node.answer = None


def test_the_api_docs_work_offline(page: Page) -> None:
    page.goto("/docs")
    expect(page.get_by_text("/v1/deltas/{delta_id}/report")).to_be_visible()
