"""The dashboard's pages as HTML from the server."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from html import unescape
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from deltadock.api.dashboard.operations import timelines
from deltadock.api.dashboard.snippets import CHAT, PROMPTS, SAMPLE_BASE, examples, prompts
from deltadock.api.dependencies import Resources
from deltadock.api.fleet import TIERS
from deltadock.api.main import create_app
from deltadock.artifacts.folder import scan_folder
from deltadock.settings import Settings
from deltadock.storage.api_keys import local_key_path
from deltadock.storage.repositories import (
    BaseRepository,
    DeltaRepository,
    JobRepository,
    KeyRepository,
    NodeRepository,
    TotalsRepository,
)
from deltadock.storage.tables import CheckpointRow, DeltaRow, JobState, NodeSampleRow, Scope
from deltadock.storage.tenancy import LOCAL_TENANT
from tests import seed
from tests.api.support import bearer, issue_key

SAMPLES = Path(__file__).parents[3] / "samples"
PAGES = (
    "/", "/deltas/{delta}", "/deltas/nothing", "/parts/totals", "/parts/deltas/{delta}/row",
    "/models/maths/skills", "/new", "/try", "/compare", "/jobs", "/bases", "/bases/pilot-0.3b",
    "/nodes", "/keys", "/storage", "/audit", "/docs",
)  # fmt: skip


@dataclass
class Site:
    """The app, called without a socket, and its resources."""

    http: TestClient
    resources: Resources

    def text(self, path: str, status: int = 200) -> str:
        answer = self.http.get(path)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        return answer.text


@pytest.fixture
def empty(tmp_path: Path, migrated_file: Path) -> Iterator[Site]:
    settings = Settings(home=tmp_path)
    shutil.copy(migrated_file, settings.home)
    app = create_app(settings)
    resources: Resources = app.state.resources
    resources.blobs.prepare()
    yield Site(TestClient(app, headers=bearer(issue_key(settings))), resources)
    resources.database.dispose()


@pytest.fixture
def seeded(empty: Site) -> seed.Seeded:
    return seed.seed(empty.resources.database, empty.resources.blobs)


@pytest.fixture
def site(empty: Site, seeded: seed.Seeded) -> Site:
    return empty


def test_says_how_to_start_when_nothing_is_stored(empty: Site) -> None:
    page = unescape(empty.text("/"))
    assert "No deltas yet" in page
    assert 'href="/docs"' in page
    assert "deltadock push ./finetuned --base my-base" in page
    assert "<b>optimix</b>" in page
    assert page.count('href="/new"') >= 2


def test_lists_every_delta_with_its_figures(site: Site, seeded: seed.Seeded) -> None:
    page = site.text("/")
    for name, _bits in seed.READY:
        assert name in page
    row = site.text(f"/parts/deltas/{seeded.ready[0]}/row")
    report = site.http.get(f"/v1/deltas/{seeded.ready[0]}/report").json()
    for figure in (
        f"{report['ratio']:.1f} ×",
        f"{100 * report['agreement']:.1f} %",
        f"{report['kl']:#.3g}",
        f"{report['artifact_bytes'] / 1e6:.1f} MB",
    ):
        assert f">{figure}</td>" in row
    assert "pilot-0.3b" in page
    assert "pilot-0.3b" in site.text("/bases")


def test_a_delta_without_figures_is_not_chosen_to_be_tried(site: Site, seeded: seed.Seeded) -> None:
    """It may lack a tokenizer."""
    with site.resources.database.session_scope() as session:
        base = BaseRepository(session, LOCAL_TENANT).find("pilot-0.3b")
        assert base is not None
        delta = seed.add_delta(session, base, "a/first", 1.0)
        unmeasured = seed.report(layers=4) | {"kl": None}
        seed.finish(session, site.resources.blobs, delta, unmeasured)
    page = site.text("/try")
    assert '<option value="a/first">' in page
    assert 'data-model="a/first"' not in page
    assert page.count("data-model=") == 2


def test_totals_count_shared_bytes_once(site: Site, seeded: seed.Seeded) -> None:
    """A second name for an artifact adds a delta but no bytes."""
    with site.resources.database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        before = TotalsRepository(session, LOCAL_TENANT).read()
        first = deltas.find(seeded.ready[0])
        assert first is not None
        twin = deltas.add(
            name="again/same",
            base=first.base,
            checkpoint_digest=first.checkpoint_digest,
            method=first.method,
            bits=first.bits,
            options=first.options,
            fingerprint=first.fingerprint,
        )
        deltas.share_result(twin, first)
        after = TotalsRepository(session, LOCAL_TENANT).read()
    assert before.deltas == len(seed.READY)
    assert after == before._replace(deltas=before.deltas + 1)
    assert before.checkpoint_bytes == len(seed.READY) * seed.report()["checkpoint_bytes"]
    assert f"<strong>{after.deltas}</strong> ready deltas" in site.text("/parts/totals")


def test_only_unfinished_rows_poll(site: Site, seeded: seed.Seeded) -> None:
    for delta, again in (
        (seeded.compressing, True),
        (seeded.queued, True),
        (seeded.failed, False),
        (seeded.ready[0], False),
    ):
        answer = site.http.get(f"/parts/deltas/{delta}/row")
        assert ("hx-trigger" in answer.text) is again
        assert (answer.headers.get("hx-trigger") == "job-ended") is not again


def test_what_is_deleted_says_so_and_can_be_restored(site: Site, seeded: seed.Seeded) -> None:
    site.http.delete(f"/v1/deltas/{seeded.queued}")
    row = site.http.get(f"/parts/deltas/{seeded.queued}/row")
    assert (row.status_code, row.text, row.headers["hx-reswap"]) == (200, "", "delete")
    assert site.http.get(f"/parts/deltas/{seeded.queued}/job").headers["hx-refresh"] == "true"
    for path in (seeded.queued, "medical/summaries:1", "medical/summaries"):
        page = site.text(f"/deltas/{path}", status=404)
        assert "<b>medical/summaries:1</b> was deleted" in page
        undo = page.split('data-api="POST ')[1].split('"')[0]
    assert site.http.post(undo).status_code == 200
    site.text(f"/deltas/{seeded.queued}")
    with site.resources.database.session_scope() as session:
        seed.add_base(session, "unused", 8)
    site.http.delete("/v1/bases/unused")
    page = site.text("/bases/unused", status=404)
    assert 'data-api="POST /v1/bases/unused/restore"' in page


def test_a_job_reloads_its_page_when_it_ends(site: Site, seeded: seed.Seeded) -> None:
    path = f"/parts/deltas/{seeded.compressing}/job"
    running = site.http.get(path)
    assert "block 10 of 24, matrix 1 of 7" in running.text
    assert "block 9" not in running.text  # done: blocks are counted one way, from 1
    assert "hx-refresh" not in running.headers
    with site.resources.database.session_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(seeded.compressing)
        assert delta is not None
        assert JobRepository(session, LOCAL_TENANT).finish(
            delta.job.id, seed.WORKER, JobState.CANCELLED
        )
    assert site.http.get(path).headers["hx-refresh"] == "true"


def test_a_failure_shows_its_code_and_advice(site: Site, seeded: seed.Seeded) -> None:
    job_path = f"/v1/jobs/{site.http.get(f'/v1/deltas/{seeded.failed}').json()['job']}"
    page = unescape(site.text(f"/deltas/{seeded.failed}"))
    assert "non_finite_weights" in page
    assert "of the fine-tune holds NaN or an infinity" in page
    assert "What to do" not in page, "the message says it"
    for text in (page, site.text("/jobs")):  # the weights stay as they are
        assert f"{job_path}/retry" not in text
    assert 'id="try"' not in page
    with site.resources.database.session_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(seeded.queued)
        assert delta is not None
        jobs, job_id = JobRepository(session, LOCAL_TENANT), delta.job.id
        jobs.acquire(job_id, seed.WORKER, 600)
        jobs.finish(
            job_id, seed.WORKER, JobState.FAILED,
            error_code="worker_lost", error_message="The worker was lost.",
        )  # fmt: skip
    page = unescape(site.text(f"/deltas/{seeded.queued}"))
    assert "Give the worker more memory" in page
    assert 'id="retry"' in page


def test_shows_provenance(site: Site, seeded: seed.Seeded) -> None:
    page = site.text(f"/deltas/{seeded.ready[1]}")
    delta = site.http.get(f"/v1/deltas/{seeded.ready[1]}").json()
    for digest in (
        delta["artifact"]["digest"],
        delta["checkpoint"],
        delta["calibration"]["sources"][0]["digest"],
        delta["base"]["checkpoint"],
        seed.report()["base_digest"],
    ):
        assert f'data-copy="{digest}"' in page
    assert f'href="/v1/deltas/{delta["id"]}/artifact"' in page
    assert "131,072 tokens" in page


def test_shows_goal_and_calibration_sources(site: Site, seeded: seed.Seeded) -> None:
    with site.resources.database.session_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(seeded.queued)
        assert delta is not None
        sources = [{"digest": "a" * 64, "weight": 3.0}, {"digest": None, "weight": 1.0}]
        delta.options = {
            **delta.options,
            "goal": {"kind": "max_kl", "value": 0.02},
            "calibration": {"sources": sources, "tokens": 4096, "length": 128},
        }
    assert "KL at most 0.02" in site.text("/")
    page = site.text(f"/deltas/{seeded.queued}")
    assert "adamix, KL at most 0.02 on" in page
    assert f'data-copy="{"a" * 64}"' in page
    assert "sampled from the fine-tune × 1" in page


def test_shows_a_report_without_matrices_and_quality(site: Site, seeded: seed.Seeded) -> None:
    """The method `exact` compresses no matrix and measures no quality."""
    lean = {
        "method": "exact",
        "nominal_bits": None,
        "artifact_bytes": 2000,
        "checkpoint_bytes": 9000,
        "ratio": 4.5,
        "other_tensors": [{"name": "model.norm.weight", "kind": "exact", "bytes": 1500}],
    }
    with site.resources.database.session_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(seeded.queued)
        assert delta is not None
        seed.finish(session, site.resources.blobs, delta, lean)
    page = site.text(f"/deltas/{seeded.queued}")
    assert "4.50 ×" in page
    assert "model.norm.weight" in page
    assert "Output error" not in page
    site.text("/")


def test_says_how_to_start_a_node_when_none_is_registered(site: Site) -> None:
    page = unescape(site.text("/nodes"))
    assert "No inference node is there" in page
    assert "deltadock node --base FOLDER --api http://testserver/" in page
    assert 'aria-current="page">Nodes' in page
    assert "<html" not in site.text("/parts/nodes")


def test_shows_tiers_and_requests_of_nodes_as_the_api_does(site: Site) -> None:
    deltas = [
        {"digest": digest * 64, "tier": tier, "bytes": 416_992, "references": 2, "pinned": False}
        for digest, tier in zip("abc", TIERS, strict=True)
    ]
    with site.resources.database.session_scope() as session:
        NodeRepository(session).put(
            "node_a", "http://10.0.0.7:8100", lives_seconds=60, base_digest=None, adopts=True,
            draining=False, capacity=80, admitted=3, delta_slots=32, deltas=deltas,
        )  # fmt: skip
    page = site.text("/nodes")
    assert re.findall('<td data-label="Tier">(.*?)</td>', page) == [
        held["tier"] for held in site.http.get("/v1/nodes").json()["data"][0]["deltas"]
    ]
    assert re.findall('<td data-label="In flight" class="number">(.*?)</td>', page) == ["2"] * 3


def test_a_nodes_last_hour_and_buttons_are_for_operators(site: Site) -> None:
    usage = {
        "tokens_per_second": 812.5, "first_token_seconds": 0.21, "inter_token_seconds": 0.018,
        "memory_bytes": 21 * 10**9, "memory_limit": 85 * 10**9,
    }  # fmt: skip
    held = {"digest": "a" * 64, "tier": "device", "bytes": 8, "references": 0, "pinned": False}
    with site.resources.database.session_scope() as session:
        for number in range(3):
            node = NodeRepository(session).put(
                "node_a", "http://10.0.0.7:8100", lives_seconds=60, base_digest=None, adopts=True,
                draining=number == 2, capacity=8, admitted=number, delta_slots=4, deltas=[held],
                usage=usage,
            )  # fmt: skip
            node.sampled_at = None
    page = unescape(site.text("/parts/nodes"))
    for figure in ("812", "210 ms", "18 ms", "21.0 GB", "of 85.0 GB", "Resume", "Evict"):
        assert figure in page
    assert page.count("<polyline") == 8, "six charts, three lines for the tiers"
    reader = bearer(issue_key(site.resources.settings, scopes=[Scope.READ]))
    others = site.http.get("/parts/nodes", headers=reader).text
    assert "812" in others
    assert not any(word in others for word in ("Resume", "Evict", "<polyline"))


def test_an_idle_nodes_charts_are_of_what_is_known() -> None:
    samples = [
        NodeSampleRow(
            at=datetime(2026, 11, 22, 8, minute, tzinfo=UTC), admitted=0, device=0, host=0, disk=0,
            tokens_per_second=0.0, memory_bytes=10**9,
        )
        for minute in range(2)
    ]  # fmt: skip
    titles = [title for title, _ in timelines(samples)]
    assert titles == ["Tokens per second", "Memory", "Sequences", "Deltas by tier"]
    assert timelines(samples[:1]) == []


def test_the_fine_tune_answers_beside_its_delta(site: Site, seeded: seed.Seeded) -> None:
    with site.resources.database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        delta = deltas.find(seeded.ready[1])
        assert delta is not None
        exact = deltas.add(
            name="maths/skills-finetuned", base=delta.base, method="exact", bits=None,
            options={"seed": 0, "solver": "exact", "goal": None, "calibration": None},
            checkpoint_digest=delta.checkpoint_digest, fingerprint="exact",
        )  # fmt: skip
        seed.finish(session, site.resources.blobs, exact, seed.report(layers=1))
    page = site.text(f"/deltas/{seeded.ready[1]}")
    answers = re.findall(r'<h3 id="answer-\d">(.*?) <small>(.*?)</small>', page)
    assert answers == [
        ("pilot-0.3b", "bare base"),
        ("maths/skills-finetuned:1", "the fine-tune"),
        ("maths/skills:1", "adamix"),
    ]
    assert len(re.findall(r'<h3 id="answer-\d">', site.text(f"/deltas/{exact.id}"))) == 2


def test_examples_find_the_servers_own_key_and_chat_where_the_model_can(
    site: Site, seeded: seed.Seeded
) -> None:
    path = f"/deltas/{seeded.ready[0]}"
    page = unescape(site.text(path))
    assert 'export DELTADOCK_API_KEY="ddk_..."' in page
    assert "$DELTADOCK_API_URL/v1/chat/completions" in page
    assert 'value="chat" checked' in page
    key = local_key_path(site.resources.settings.home)
    key.write_text("kept")
    assert f'export DELTADOCK_API_KEY="$(cat {key})"' in unescape(site.text(path))
    reader = bearer(issue_key(site.resources.settings, scopes=[Scope.READ]))
    shown = site.http.get(path, headers=reader).text
    assert "with your API key:" in shown
    assert str(key) not in shown
    with site.resources.database.session_scope() as session:
        base = BaseRepository(session, LOCAL_TENANT).find("pilot-0.3b")
        assert base is not None
        delta = seed.add_delta(session, base, "plain/text", 1.0)
        seed.finish(session, site.resources.blobs, delta, seed.report(layers=1))
        tuned = session.get_one(CheckpointRow, delta.checkpoint_digest)
        tuned.has_chat_template = False
    page = unescape(site.text(f"/deltas/{delta.id}"))
    assert "$DELTADOCK_API_URL/v1/completions" in page
    assert 'value="plain" checked' in page


def test_only_models_on_the_samples_base_have_its_prompts(
    shared: tuple[Site, seed.Seeded],
) -> None:
    site, seeded = shared
    assert scan_folder(SAMPLES / "base").digest == SAMPLE_BASE
    assert "sort h b d a" not in site.text(f"/deltas/{seeded.ready[0]}")
    assert prompts([("other",)]) == PROMPTS
    assert prompts([("other",), ("tuned", SAMPLE_BASE)])[CHAT] == ("sort h b d a", *PROMPTS[CHAT])
    shown = examples("a/b", ("tuned", SAMPLE_BASE), chats=True)
    assert shown["CLI"].startswith("deltadock run a/b 'sort h b d a'")


def test_a_delta_names_the_key_that_asked_for_it(site: Site, seeded: seed.Seeded) -> None:
    with site.resources.database.session_scope() as session:
        key = KeyRepository(session, LOCAL_TENANT).all()[0]
        key.name = "ci of maths"
        session.get_one(DeltaRow, seeded.ready[0]).created_by = key.id
    page = site.text(f"/deltas/{seeded.ready[0]}")
    assert "by the key <b>ci of maths</b>" in page
    assert key.id not in page


def test_names_are_escaped(site: Site) -> None:
    name = "<script>alert(1)</script>/<b onclick='x'>\"&"
    with site.resources.database.session_scope() as session:
        base = BaseRepository(session, LOCAL_TENANT).find("pilot-0.3b")
        assert base is not None
        outcome = seed.report(layers=1)
        outcome["matrices"][0]["name"] = f"model.layers.0.{name}"
        outcome["matrices"][0]["fallbacks"] = [name]
        outcome["other_tensors"][0]["name"] = name
        delta = seed.add_delta(session, base, name, 1.0)
        seed.finish(session, site.resources.blobs, delta, outcome)
    for path in ("/", f"/deltas/{delta.id}"):
        page = site.text(path)
        assert "<script>alert" not in page
        assert "<b onclick" not in page
        assert name in unescape(page)


def test_pages_load_nothing_from_other_hosts(site: Site, seeded: seed.Seeded) -> None:
    for path in PAGES:
        answer = site.http.get(path.format(delta=seeded.ready[0]))
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert "http:" not in answer.text.replace("http://testserver", "")
        assert "https:" not in answer.text
        assert " style=" not in answer.text
        assert " onclick=" not in answer.text


def test_keys_that_may_not_change_anything_see_no_way_to(site: Site, seeded: seed.Seeded) -> None:
    """They see why, and what only others may do is on no page, whatever the state of a delta."""
    assert site.http.delete(f"/v1/deltas/{seeded.ready[-1]}").status_code == 204
    states = (seeded.ready[0], seeded.compressing, seeded.queued, seeded.failed, seeded.ready[-1])
    paths = [
        *(
            page
            for page in PAGES
            if "{" not in page and page not in ("/keys", "/storage", "/audit")
        ),
        *(f"/deltas/{delta}" for delta in states),
        *(f"/parts/deltas/{delta}/job" for delta in (seeded.compressing, seeded.queued)),
        "/parts/jobs",
        "/parts/nodes",
    ]
    reader = bearer(issue_key(site.resources.settings, scopes=[Scope.READ]))
    for path in paths:
        page = site.http.get(path, headers=reader).text
        assert "data-api=" not in page, path
        assert 'href="/new' not in page, path
        assert 'type="file"' not in page, path
        assert 'id="prompt"' not in page, path
        if "/parts/" not in path:
            assert "what needs the scope <b>write</b> is not shown" in page, path
            assert "what needs the scope" not in site.http.get(path).text, path
    assert "Asking a model needs a key with the scope <b>infer</b>" in site.http.get(
        f"/deltas/{seeded.ready[0]}", headers=reader
    ).text  # fmt: skip


def test_asset_urls_contain_a_content_hash(site: Site) -> None:
    page = site.text("/")
    for name in ("app.css", "app.js", "htmx.min.js", "icon.svg"):
        address = page.split(f"/static/{name}?v=")[1][:12]
        answer = site.http.get(f"/static/{name}?v={address}")
        assert answer.status_code == 200, name
        assert answer.headers["etag"]


def test_errors_are_html_pages(site: Site) -> None:
    page = unescape(site.text("/deltas/nothing", status=404))
    assert """There is no delta 'nothing'; <a href="/">Deltas</a> lists them.""" in page
    assert "/v1/" not in page.split("<main")[1].split("<footer")[0]
    assert "is not a cursor of this list" in unescape(site.text("/?after=nothing", status=404))
    unknown = site.http.get("/nothing", headers={"Accept": "text/html"})
    assert (unknown.status_code, "There is no page /nothing." in unknown.text) == (404, True)
    assert site.http.get("/nothing").json()["code"] == "not_found"


def test_deltas_are_paginated(site: Site) -> None:
    with site.resources.database.session_scope() as session:
        base = BaseRepository(session, LOCAL_TENANT).find("pilot-0.3b")
        assert base is not None
        for _ in range(50):
            seed.add_delta(session, base, "many/versions", 1.0)
    first = site.text("/")
    assert "support/triage" not in first
    older = first.split('href="/?after=')[1].split('"')[0]
    second = site.text(f"/?after={older}")
    assert "support/triage" in second
    assert 'rel="next"' not in second


def test_pages_are_not_in_the_openapi_document(site: Site) -> None:
    paths = site.http.get("/openapi.json").json()["paths"]
    assert all(path.startswith(("/v1/", "/healthz", "/readyz", "/metrics")) for path in paths)


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, migrated_file: Path
) -> Iterator[tuple[Site, seed.Seeded]]:
    """A seeded site for tests that change nothing of the others'."""
    settings = Settings(home=tmp_path_factory.mktemp("shared"))
    shutil.copy(migrated_file, settings.home)
    app = create_app(settings)
    resources: Resources = app.state.resources
    resources.blobs.prepare()
    seeded = seed.seed(resources.database, resources.blobs)
    yield Site(TestClient(app, headers=bearer(issue_key(settings))), resources), seeded
    resources.database.dispose()


def test_versions_stand_together_under_their_model(shared: tuple[Site, seed.Seeded]) -> None:
    site, _ = shared
    page = site.text("/")
    groups = re.findall('scope="rowgroup"><a href="/models/(.*?)">', page)
    assert groups == ["support/triage", "maths/skills"]
    for sort in ("size", "kl"):  # an order that models would break
        assert "rowgroup" not in site.text(f"/?sort={sort}")
    assert "1 running" in page
    assert "1 failed" in page


def test_a_models_page_shows_its_card_aliases_and_history(
    shared: tuple[Site, seed.Seeded],
) -> None:
    site, _ = shared
    site.http.patch(
        "/v1/registry/maths/skills",
        json={"description": "# Use\n<script>alert(1)</script> *well*", "tags": ["maths"]},
    )
    site.http.put("/v1/registry/maths/skills/aliases/prod", json={"version": 2, "reason": "Best."})
    page = site.text("/models/maths/skills")
    assert "<h3>Use</h3>" in page
    assert "<em>well</em>" in page
    assert "<script>alert" not in page
    assert '<span class="alias">prod</span></dt><dd><a href="/deltas/' in page
    assert "nothing → :2 by tests<small>Best.</small>" in page
    assert 'href="/?tag=maths"' in page
    site.text("/models/no/body", status=404)


def test_compares_two_to_four_deltas(shared: tuple[Site, seed.Seeded]) -> None:
    site, seeded = shared
    pair = "&".join(f"delta={delta}" for delta in seeded.ready[1:3])
    page = site.text(f"/compare?{pair}")
    differing = re.findall('class="differs"><th scope="row">(.*?)<', page)
    assert {"KL to the fine-tune", "Goal", "Fine-tune"} <= set(differing)
    assert not {"Method", "Base", "Seed"} & set(differing)
    assert page.count("<circle") == 2
    assert page.count(">best<") == 4
    choice = site.text(f"/compare?delta={seeded.ready[0]}&delta=&utm_source=x")
    assert choice.count('name="delta"') == 4
    assert f'value="{seeded.ready[0]}"' in choice
    assert '<option value="maths/skills">' in choice
    many = "&".join(f"delta={delta}" for delta in seeded.ready[:5])
    site.text(f"/compare?{many}", status=422)


def test_marks_a_kl_of_another_text(site: Site, seeded: seed.Seeded) -> None:
    first, second = seeded.ready[1:3]
    path = f"/compare?delta={first}&delta={second}"
    assert "on another text" not in site.text(path)
    with site.resources.database.session_scope() as session:
        row = session.get_one(DeltaRow, second)
        row.options = {**row.options, "calibration": None}
    page = site.text(path)
    assert page.count("on another text") == 2, "the title of its dot, and the explanation"
    assert "does not compare" in page
    assert "of different texts" in page
    assert "on another text" not in site.text(f"/deltas/{first}"), "it is of another fine-tune"
    with site.resources.database.session_scope() as session:
        row = session.get_one(DeltaRow, first)
        row.options = {**row.options, "calibration": None}
    assert "of different texts" in site.text(path), "each was sampled from its own fine-tune"
    with site.resources.database.session_scope() as session:
        twin, row = session.get_one(DeltaRow, first), session.get_one(DeltaRow, second)
        row.checkpoint_digest = twin.checkpoint_digest
    assert "on another text" not in site.text(path)
    assert "of different texts" not in site.text(path)


def test_jobs_are_listed_by_state(shared: tuple[Site, seed.Seeded]) -> None:
    site, seeded = shared
    assert seeded.failed in site.text("/jobs")
    failed = site.text("/jobs?show=failed")
    assert seeded.failed in failed
    assert seeded.queued not in failed
    assert "non_finite_weights" in failed
    running = site.text("/jobs?show=running")
    assert "block 10 of 24" in running
    assert "elapsed" not in running
    assert "No cancelled jobs" in site.text("/jobs?show=cancelled")


def test_a_model_without_a_ready_version_leads_to_its_newest(site: Site) -> None:
    answer = site.http.get("/deltas/medical/summaries", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/deltas/medical/summaries:1")
    assert "medical/summaries:1" in site.text("/deltas/medical/summaries")
    site.text("/deltas/medical/summaries@prod", status=404)


def test_a_cancelled_job_is_no_alarm(site: Site, seeded: seed.Seeded) -> None:
    site.http.post(f"/v1/jobs/{site.http.get(f'/v1/deltas/{seeded.queued}').json()['job']}/cancel")
    page = site.text(f"/deltas/{seeded.queued}")
    assert '<h2 id="error-title">Cancelled</h2>' in page
    assert "card error" not in page
    assert "<small>cancelled" not in site.text(f"/parts/deltas/{seeded.queued}/row")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"notes": ["KL, agreement and loss are not measured. Too short."]}, "Too short."),
        ({"matrices": []}, "bit for bit"),
        ({}, "without a text to measure on"),
    ],
)
def test_says_why_there_is_no_kl(
    site: Site, seeded: seed.Seeded, more: dict[str, object], why: str
) -> None:
    report = {**seed.report(layers=1), "kl": None, "agreement": None, "nll": None, **more}
    with site.resources.database.session_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(seeded.queued)
        assert delta is not None
        seed.finish(session, site.resources.blobs, delta, report)
    assert why in site.text(f"/deltas/{seeded.queued}").split('id="why-no-kl"')[1].split("</p>")[0]


def test_readers_see_no_keys(shared: tuple[Site, seed.Seeded]) -> None:
    site, _ = shared
    key = issue_key(site.resources.settings, scopes=[Scope.READ])
    reader = TestClient(site.http.app, headers=bearer(key))
    assert 'href="/keys"' not in reader.get("/").text
    for path in ("/keys", "/audit", "/storage"):
        refused = reader.get(path)
        assert refused.status_code == 403
        assert refused.headers["Content-Type"].startswith("text/html")
        assert "This needs the scope admin; the key has read." in refused.text
        assert f'href="{path}"' in site.text("/")


def test_the_first_page_is_light(shared: tuple[Site, seed.Seeded]) -> None:
    site, _ = shared
    page = site.text("/")
    files = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    sizes = {path: len(site.http.get(path).content) for path in files}
    assert len(page.encode()) + sum(sizes.values()) < 200_000, sizes
