"""The dashboard in a real browser, against a real server."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Dialog,
    Page,
    Request,
    Route,
    expect,
)
from starlette.responses import JSONResponse, Response

from deltadock import words
from deltadock.api.dashboard.snippets import CHAT, PROMPTS
from deltadock.storage.repositories import DeltaRepository, JobRepository, NodeRepository
from deltadock.storage.tables import JobState
from deltadock.storage.tenancy import LOCAL_TENANT
from tests import browser as chromium
from tests import seed
from tests.api.deltas.test_adapters import adapter_files
from tests.api.support import CONFIG, weights
from tests.system.conftest import SAMPLES, Stored
from tests.system.dashboard import PHONE, WIDE, Site, running_site, signed_in

expect.set_options(timeout=20_000)  # a busy machine
GENERAL_PROMPT: Final = PROMPTS[CHAT][0]
AXE: Final = {"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"]}
SCROLLED_TABLES: Final = """[...document.querySelectorAll(".scroll")]
  .filter((region) => region.scrollWidth > region.clientWidth && region.querySelector("table"))
  .map((region) => region.ariaLabel)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("dashboard")) as site:
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.open_browser() as browser:
        yield browser


@pytest.fixture
def page(site: Site, browser: Browser) -> Iterator[Page]:
    """A page, signed in, that fails the test on console errors or requests to other hosts."""
    page = signed_in(browser, site.url, site.settings)
    errors: list[str] = []
    hosts: set[str] = set()

    def on_console(message: ConsoleMessage) -> None:
        # Chromium reports what the api and pages refuse too; they show it.
        refused = "status of 4" in message.text and "/static/" not in message.location["url"]
        if message.type in {"error", "warning"} and not refused:
            errors.append(message.text)

    page.on("console", on_console)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    yield page
    page.context.close()
    assert errors == []
    assert hosts == {urlsplit(site.url).netloc}


def test_shows_every_delta(site: Site, page: Page) -> None:
    page.goto("/")
    rows = page.locator("#deltas tbody tr")
    for delta_id in (*site.seeded.ready, site.seeded.queued, site.seeded.failed):
        expect(page.locator(f"#{delta_id}")).to_be_visible()
    assert rows.count() >= len(seed.READY) + 3
    expect(page.locator(f"#{site.seeded.failed}")).to_contain_text("non_finite_weights")
    expect(page.locator(f"#{site.seeded.ready[0]} .state")).to_have_text("ready")


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
    row.locator("th a").focus()
    ready = int(page.locator("#totals strong").first.inner_text())
    with site.database.session_scope() as session:
        seed.advance(session, site.job_id(session, delta.id), 18)
    expect(row.locator("progress")).to_have_attribute("value", "70.0")
    expect(row).to_contain_text("70 %")
    expect(row.locator("th a")).to_be_focused()  # a refresh keeps the keyboard focus
    site.finish(delta.id)
    expect(row.locator(".state")).to_have_text("ready")
    expect(row.locator("progress")).to_have_count(0)
    expect(page.locator("#totals strong").first).to_have_text(str(ready + 1))
    settled = len(asked)
    page.wait_for_timeout(2500)
    assert len(asked) == settled, "a finished row still polls"


def test_a_deltas_page_updates_until_its_report(site: Site, page: Page) -> None:
    delta = site.new_delta("live/page")
    page.goto(f"/deltas/{delta.id}")
    expect(page.locator("[aria-current=step]")).to_have_text("compressing")
    expect(page.locator("#job [role=status]")).to_have_text("Compressing")
    expect(page.locator("#job")).to_contain_text("block 10 of 24, matrix 1 of 7")
    with site.database.session_scope() as session:
        seed.advance(session, site.job_id(session, delta.id), 21)
    expect(page.locator("#percent")).to_have_text("80 %")
    site.finish(delta.id)
    expect(page.locator(".heading .state")).to_have_text("ready")
    expect(page.locator("#job")).to_have_count(0)
    expect(page.locator(".cells").first.locator(".cell")).to_have_count(4 * 7)


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
    with site.database.read_scope() as session:
        job = JobRepository(session, LOCAL_TENANT).find(site.job_id(session, delta.id))
        assert job is not None
        assert job.cancel_requested
    site.cancel(delta.id)
    expect(page.locator("#job")).to_contain_text("It was stopped on request")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("#job [role=status]")).to_contain_text("Queued")


def test_charts_have_a_cell_per_matrix(site: Site, page: Page) -> None:
    report = seed.report(bits=seed.READY[1][1], seed=1)
    page.goto(f"/deltas/{site.seeded.ready[1]}")
    expect(page.locator("#spectra-title")).to_have_text("Decay of singular values")
    grids = page.locator(".cells")
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


def test_nodes_and_their_deltas_update(site: Site, page: Page) -> None:
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
    page.on("dialog", lambda dialog: dialog.accept())
    stub = page.get_by_label(f"Node {site.node_url}", exact=True)
    with page.expect_response("**/drain") as drained:
        stub.get_by_role("button", name="Drain").click()
    assert drained.value.status == 204
    assert site.node.requests[-1]["path"] == "/v1/drain"
    card = page.get_by_label("Node http://10.0.0.7:8100", exact=True)
    expect(card).to_contain_text("3 of 80 sequences")
    expect(card).to_contain_text("1 of 32 device slots")
    row = card.locator("tbody tr")
    expect(row.get_by_role("link")).to_have_text(f"{delta.name}:{delta.version}")
    expect(row).to_contain_text("pinned")
    row.get_by_role("link").focus()
    heartbeat(tier="disk", references=0, pinned=False)
    expect(row).to_contain_text("disk")
    expect(row.get_by_role("link")).to_be_focused()
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    row.get_by_role("link").click()
    expect(page.locator("h1")).to_contain_text(delta.name)
    with site.database.session_scope() as session:
        NodeRepository(session).drop("node_b")


def test_every_page_fits_a_phone_and_is_accessible(site: Site, page: Page) -> None:
    """At 390 px nothing but charts overflows; axe finds nothing serious, light and dark."""
    pages = {n: path for n, path in site.pages().items() if n not in {"docs", "nothing"}}
    dark = {"delta", "list", "nodes"}
    page.set_viewport_size(PHONE)
    for name, path in pages.items():
        for scheme in ("light", "dark") if name in dark else ("light",):
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            page.goto(path)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
            assert page.evaluate(SCROLLED_TABLES) == [], path
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            red = int(ground.removeprefix("rgb(").split(",")[0])
            assert (red < 128) == (scheme == "dark")
            found = Axe().run(page, options=AXE).response["violations"]
            assert [
                (name, rule["id"], [node["html"] for node in rule["nodes"]][:3])
                for rule in found
                if rule["impact"] in {"serious", "critical"}
            ] == []


def test_long_names_and_messages_stay_inside_their_pages(site: Site, page: Page) -> None:
    name = f"{'a' * 96}/{'b' * 96}"
    ready, failed = site.new_delta(name), site.new_delta(name)
    site.finish(ready.id)
    with site.database.session_scope() as session:
        assert JobRepository(session, LOCAL_TENANT).finish(
            site.job_id(session, failed.id),
            seed.WORKER,
            JobState.FAILED,
            error_code="internal_error",
            error_message="x" * 500,
        )
    pages = (
        "/", "/jobs", f"/deltas/{ready.id}", f"/deltas/{failed.id}", f"/models/{name}",
        f"/compare?delta={ready.id}&delta={site.seeded.ready[0]}", f"/try?model={name}",
    )  # fmt: skip
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        for path in pages:
            page.goto(path)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


def test_base_and_delta_generate_side_by_side(site: Site, page: Page) -> None:
    site.node.requests.clear()
    page.goto(f"/deltas/{site.seeded.ready[0]}")
    expect(page.get_by_label("Chat")).to_be_checked()  # for the fine-tune has a template
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#prompt-problem")).to_contain_text("Write a prompt")
    page.get_by_label("Plain text").check()
    page.get_by_label("Prompt").fill("17 + 25 =")
    page.get_by_label("Max tokens").fill("8")
    page.get_by_role("button", name="Generate").click()
    for answer in page.locator(".answer").all():
        expect(answer.locator("output")).to_have_text(" 42", use_inner_text=True)
        expect(answer.locator(".figures")).to_contain_text("3 tokens")
        expect(answer.locator(".figures")).to_contain_text("tokens/s")
    asked = site.node.requests
    assert {"deltadock-artifact" in request["headers"] for request in asked} == {True, False}
    assert [request["body"]["prompt"] for request in asked] == ["17 + 25 ="] * 2
    assert [request["body"]["max_tokens"] for request in asked] == [8] * 2
    notes = page.get_by_text("It has no chat template")
    assert [note.is_visible() for note in notes.all()] == [False, False]
    page.get_by_label("Chat").check()
    assert [note.is_visible() for note in notes.all()] == [True, False]
    expect(page.get_by_role("button", name="Once upon a time")).to_be_hidden()
    page.get_by_role("button", name=GENERAL_PROMPT, exact=True).click()
    for _ in range(2):
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    chats = [r["body"]["messages"] for r in asked if r["path"] == "/v1/chat/completions"]
    assert list(map(len, chats)) == [1, 3]  # the base, which has no template, continues the text
    assert chats[0][0]["content"] == GENERAL_PROMPT
    prompts = [r["body"]["prompt"] for r in asked if r["path"] == "/v1/completions"]
    assert prompts[2:] == [GENERAL_PROMPT] * 2
    page.get_by_role("link", name="Side by side with others").click()
    expect(page.locator(".answer")).to_have_count(2)


def test_a_refused_prompt_leaves_the_chat(site: Site, page: Page) -> None:
    site.node.requests.clear()
    page.goto(f"/deltas/{site.seeded.ready[0]}")
    button, prompt = page.get_by_role("button", name="Generate"), page.get_by_label("Prompt")
    refusal = {
        "error": {"message": "The prompt has 900 tokens.", "code": "context_length_exceeded"}
    }
    site.node.answer = JSONResponse(refusal, 400)
    try:
        prompt.fill("far too long")
        button.click()
        answers = page.locator(".answer")
        for answer in answers.all():
            expect(answer.locator(".figures")).to_contain_text("The prompt has 900 tokens.")
            expect(answer.locator("output")).to_be_empty()
    finally:
        site.node.answer = None
    red = answers.first.locator(".figures").evaluate("e => getComputedStyle(e).color")
    page.get_by_role("button", name="Clear").click()
    expect(answers.first.locator(".figures")).to_be_empty()
    expect(page.locator(".answer.error")).to_have_count(0)
    hint = answers.first.get_by_text("It has no chat template")
    expect(hint).to_be_visible()
    assert hint.evaluate("e => getComputedStyle(e).color") != red
    prompt.fill("short")
    prompt.press("Control+Enter")
    expect(answers.last.locator(".figures")).to_contain_text("tokens/s")
    asked = [r["body"] for r in site.node.requests if r["path"] == "/v1/chat/completions"]
    assert [message["content"] for message in asked[-1]["messages"]] == ["short"]
    expect(answers.last.locator(".turn.user")).to_have_text(["short"])


def test_a_generation_can_be_stopped(site: Site, page: Page) -> None:
    site.node.gate, site.node.gone = threading.Event(), threading.Event()
    try:
        page.goto("/try?model=pilot-0.3b")
        page.get_by_label("Prompt").fill("?")
        page.get_by_role("button", name="Generate").click()
        assert site.node.gate.wait(10)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".answer .figures")).to_have_text("Stopped.")
        assert site.node.gone.wait(10)
    finally:
        site.node.gate = None


def test_hostile_text_is_escaped(site: Site, page: Page) -> None:
    name = "<script>window.hurt=1</script>/<img src=x onerror=window.hurt=1>"
    delta = site.new_delta(name)
    text = {"choices": [{"index": 0, "text": "<img src=x onerror=window.hurt=1>"}]}
    site.node.answer = Response(f"data: {json.dumps(text)}\n\n", media_type="text/event-stream")
    try:
        for path in ("/", f"/deltas/{delta.id}"):
            page.goto(path)
            expect(page.get_by_text(name).first).to_be_visible()
        page.goto(f"/deltas/{site.seeded.ready[0]}")
        page.get_by_label("Prompt").fill("?")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator(".answer output").first).to_contain_text("<img")
        assert page.evaluate("window.hurt") is None
    finally:
        site.node.answer = None


def test_scripts_write_sizes_counts_and_times_as_everything_else_does(page: Page) -> None:
    page.goto("/")
    sizes = [0, 999, 1000, 1005, 99_950, 999_499, 999_500, 12_345_678, 999_999_999, 2 * 10**12]
    assert page.evaluate("sizes => sizes.map(size)", sizes) == list(map(words.size, sizes))
    values = [0.000123, 0.9995, 9.9951, 13.2014, 999.4, 999.6, 12_345.6]
    assert page.evaluate("values => values.map(significant)", values) == [
        words.significant(value) for value in values
    ]
    counts = [0, 1, 2, 32_768]
    assert page.evaluate("all => all.map((one) => counted(one, 'job'))", counts) == [
        words.counted(count, "job") for count in counts
    ]
    now = datetime.now(UTC)
    passed = [1, 50, 3590, 5 * 3600, 86_400, 3 * 86_400, -400, -90_000, 90 * 86_400]
    times = [now - timedelta(seconds=seconds) for seconds in passed]
    written = page.evaluate("times => times.map(ago)", [time.isoformat() for time in times])
    assert written == list(map(words.ago, times))


def test_the_api_docs_work_offline(page: Page) -> None:
    profiler = page.context.new_cdp_session(page)
    profiler.send("Profiler.enable")
    profiler.send("Profiler.startPreciseCoverage", {"callCount": True})
    page.goto("/docs")
    page.get_by_role("link", name="methods", exact=True).click()
    page.get_by_text("/v1/methods", exact=True).click()
    expect(page.get_by_text("Controls Accept header")).to_be_visible()
    # What prepares the whole description for each operation would take seconds.
    calls = {
        function["functionName"]: function["ranges"][0]["count"]
        for script in profiler.send("Profiler.takePreciseCoverage")["result"]
        for function in script["functions"]
    }
    assert calls["resolved"] > 0
    assert calls.get("resolveSubtree", 0) == 0
    expect(page.get_by_role("button", name="Authorize")).to_have_count(0)
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()  # with the session
    expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    page.get_by_role("link", name="deltas", exact=True).click()
    expect(page.get_by_text("/v1/deltas/{delta_id}/report")).to_be_visible()
    page.get_by_text("/v1/deltas/{delta_id}/report").click()
    operation = page.locator(".opblock", has_text="/v1/deltas/{delta_id}/report")
    operation.get_by_role("tab", name="Schema").first.click()
    expect(operation.get_by_text("ReportOut").first).to_be_visible()  # by reference
    page.emulate_media(color_scheme="dark")
    expect(page.locator("html")).to_have_class("dark-mode")


def test_an_alias_moves_and_a_card_is_written_by_hand(page: Page) -> None:
    page.goto("/models/maths/skills")
    page.get_by_label("Card, in Markdown").fill("# Skills\nSolves **exercises**.")
    page.get_by_label("Tags, with spaces between").fill("maths school")
    page.get_by_role("button", name="Save").first.click()
    expect(page.locator(".prose strong")).to_have_text("exercises")
    form = page.get_by_role("form", name="Move an alias")
    expect(form.get_by_label("Alias")).to_have_value("")  # an absent-minded click moves nothing
    form.get_by_label("Alias").fill("v2")
    form.get_by_role("button", name="Move").click()
    expect(form.locator(".problem")).to_contain_text("cannot be an alias")
    form.get_by_label("Alias").fill("prod")
    form.get_by_label("Version").select_option("2")
    form.get_by_label("Reason").fill("Evaluated.")
    form.get_by_role("button", name="Move").click()
    expect(page.locator(".history li").first).to_contain_text("nothing → :2")
    page.goto("/?text=exercises")
    expect(page.locator("#deltas tbody tr[id]")).to_have_count(2)
    for box in page.locator("input[form=compare]").all():
        box.check()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#comparison thead a")).to_have_count(2)


def test_a_delta_is_deleted_and_restored(site: Site, page: Page) -> None:
    delta = site.new_delta("live/deleted")
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(f"/deltas/{delta.id}")
    page.set_viewport_size({"width": 390, "height": 500})  # the button is further down
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("main")).to_contain_text("live/deleted:1 was deleted.")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("h1")).to_have_text("live/deleted:1")
    page.goto("/bases/pilot-0.3b")
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#said")).to_contain_text("deltas need the base 'pilot-0.3b'")
    expect(page.locator("#said")).to_be_in_viewport()


def test_jobs_move_and_are_cancelled_in_their_list(site: Site, page: Page) -> None:
    delta = site.new_delta("live/jobs")
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto("/jobs?show=running")
    job = page.get_by_label("Job of live/jobs:1", exact=True)
    with site.database.session_scope() as session:
        seed.advance(session, site.job_id(session, delta.id), 18)
    expect(job).to_contain_text("70 %, block 19 of 24")
    page.get_by_role("button", name="Cancel live/jobs:1").click()
    expect(job.get_by_role("button", name="Cancelling")).to_be_disabled()
    page.get_by_role("link", name="Log of live/jobs:1").click()
    expect(page.locator(".log li").first).to_be_visible()


def test_a_log_shows_its_newest_line_until_the_reader_scrolls_up(site: Site, page: Page) -> None:
    delta = site.new_delta("live/log")

    def write(text: str) -> None:
        with site.database.session_scope() as session:
            jobs, job = JobRepository(session, LOCAL_TENANT), site.job_id(session, delta.id)
            for number in range(30):
                jobs.write_log(job, f"{text} {number}")

    lines = page.locator(".log li")
    write("first")
    page.goto(f"/deltas/{delta.id}#log")
    expect(lines.filter(has_text="first 29")).to_be_attached()
    page.get_by_text("Log of the job").evaluate("summary => summary.scrollIntoView()")
    expect(lines.filter(has_text="first 29")).to_be_in_viewport()
    write("second")
    expect(lines.filter(has_text="second 29")).to_be_in_viewport()
    page.locator(".log").evaluate("log => log.scrollTo(0, 0)")
    write("third")
    expect(lines.filter(has_text="third 29")).to_be_attached()
    expect(lines.filter(has_text="first 0")).to_be_in_viewport()


def test_what_is_unknown_cannot_be_asked(site: Site, page: Page) -> None:
    page.goto("/try?model=nobody/knows")
    expect(page.get_by_text("No base or delta has this name.")).to_be_visible()
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    page.goto("/try?model=nobody/knows&model=pilot-0.3b")
    page.get_by_label("Prompt").fill("?")
    site.node.requests.clear()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".answer .figures").last).to_contain_text("tokens/s")
    assert len(site.node.requests) == 1


def test_a_key_is_made_shown_once_and_revoked(page: Page) -> None:
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto("/keys")
    page.get_by_label("Name").fill("ci")
    page.get_by_role("button", name="Make").click()
    expect(page.locator("#said code")).to_contain_text("ddk_")
    expect(page.locator("#keys tr", has_text="ci ddk_")).to_contain_text("valid")
    expect(page.get_by_label("Name")).to_be_empty()
    page.reload()
    expect(page.locator("#said")).to_be_hidden()
    page.get_by_role("button", name="Revoke ci").click()
    expect(page.locator("#keys tr", has_text="ci ddk_")).to_contain_text("revoked")


def test_uploads_continue_and_become_a_base_and_a_delta(
    site: Site, page: Page, tmp_path: Path
) -> None:
    """From files on disk to an answer; the files are hashed in the browser."""

    def refuse(route: Route) -> None:
        route.fulfill(status=404, json={"detail": "Gone."})

    def retried(route: Route) -> None:
        error = {"code": "storage_full", "message": "The store is full.", "file": None}
        upload = {**route.fetch().json(), "state": "completing", "percent": 0.0, "error": error}
        route.fulfill(json=upload)

    for name, number in (("base", 0), ("tuned", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(CONFIG)
        (tmp_path / name / "model.safetensors").write_bytes(weights(number))
        (tmp_path / name / "trainer.py").write_text("not sent")
    page.goto("/bases")
    page.get_by_label("Name").fill("tiny")
    page.route("**/complete", retried)
    page.route("**/v1/uploads/*", retried)
    page.locator("#base-files input").set_input_files(tmp_path / "base")
    expect(page.locator("#base-files p")).to_have_text("The store is full. Trying again …")
    page.unroute("**/v1/uploads/*")
    page.unroute("**/complete")
    expect(page.locator("#base-files p")).to_contain_text("Here and checked: 2 files")
    page.get_by_role("button", name="Register").click()
    expect(page.locator("h1")).to_have_text("tiny")
    page.get_by_role("link", name="New delta").click()
    (tmp_path / "adapter").mkdir()
    for name, content in adapter_files().items():
        (tmp_path / "adapter" / name).write_bytes(content)
    page.locator("#tuned-files input").set_input_files(tmp_path / "adapter")
    expect(page.locator("#preview")).to_contain_text("True ratio")
    expect(page.locator("#method-said")).to_contain_text("A PEFT adapter")
    expect(page.get_by_label("Method")).to_be_disabled()
    expect(page.get_by_label("Value of the goal")).to_be_hidden()
    page.get_by_role("button", name="Compress").click()
    expect(page.locator("h1")).to_have_text("finetunes/adapter:1")
    expect(page.locator("main")).to_contain_text("lora")
    page.goto("/new?base=tiny")
    (tmp_path / "run" / "checkpoint-50").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-50" / "model.safetensors").write_bytes(weights(1))
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    page.locator("#tuned-files input").set_input_files(tmp_path / "run")
    expect(page.locator("#tuned-files p")).to_contain_text("in inner folders (checkpoint-50).")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes(CONFIG)
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    page.locator("#tuned-files input").set_input_files(tmp_path / "pickled")
    expect(page.locator("#tuned-files p")).to_contain_text("only PyTorch pickles")
    page.route("**/files/model.safetensors", refuse)
    page.locator("#tuned-files input").set_input_files(tmp_path / "tuned")
    expect(page.locator("#tuned-files p")).to_contain_text("Gone. Choose the files again")
    expect(page.get_by_label("Name")).to_have_value("finetunes/tuned")
    page.get_by_label("Name").fill("browser/pushed")
    page.unroute("**/files/model.safetensors")
    page.locator("#tuned-files input").set_input_files(tmp_path / "tuned")
    expect(page.locator("#tuned-files p")).to_contain_text("Here and checked: 2 files")
    preview = page.locator("#preview")
    expect(preview).to_contain_text("True ratio")
    before = preview.inner_text()
    page.get_by_label("Value of the goal").fill("4")
    expect(preview).not_to_have_text(before, use_inner_text=True)
    page.get_by_label("Kind of goal").select_option("max_kl")
    expect(preview).to_contain_text("the smallest that keeps the bound")
    page.get_by_label("Kind of goal").select_option("ratio")
    page.get_by_label("Value of the goal").fill("900")
    expect(page.locator("#new .problem")).to_contain_text("cannot be reached")
    expect(preview).to_have_text("Artifact–")
    page.get_by_label("Kind of goal").select_option("bits")
    page.get_by_role("button", name="Compress").click()
    expect(page.locator("h1")).to_have_text("browser/pushed:1")
    expect(page.locator("#job [role=status]")).to_contain_text("Queued")
    site.finish(page.url.rsplit("/", 1)[1])
    expect(page.locator(".heading .state")).to_have_text("ready")
    page.get_by_label("Prompt").fill("17 + 25 =")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".answer output").last).to_have_text(" 42", use_inner_text=True)


def test_a_running_system_answers_what_the_browser_pushed(
    url: str, stored: Stored, browser: Browser
) -> None:
    """With a real worker and node, signed in by a key."""
    context = browser.new_context(base_url=url, viewport=WIDE)
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.goto("/new")
    page.get_by_label("API key").fill(os.environ["DELTADOCK_API_KEY"])
    page.get_by_role("button", name="Sign in").click()
    page.get_by_label("Name").fill("browser/exact")
    page.get_by_label("Base").select_option(stored.delta["base"]["name"])
    page.locator("#tuned-files input").set_input_files(SAMPLES / "finetuned")
    page.get_by_label("Method").select_option("exact")
    page.get_by_role("button", name="Compress").click()
    expect(page.locator(".heading .state")).to_have_text("ready", timeout=120_000)
    page.get_by_label("Prompt").fill("sort d h f h")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".answer output").last).to_contain_text("d f h h", timeout=120_000)
    environment = {**os.environ, "DELTADOCK_API_URL": url}
    for tab, program in (("curl", "bash"), ("Python", sys.executable), ("OpenAI", sys.executable)):
        example = page.locator(f"#use-{tab} .copy").get_attribute("data-copy")
        command = [program, "-c", example or ""]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "a b d h" in ran.stdout, tab
    context.close()
