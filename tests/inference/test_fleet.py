"""Three node processes behind one api: routing and failover."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deltadock.api.dependencies import Resources
from deltadock.api.main import create_app
from deltadock.artifacts.folder import scan_folder
from deltadock.cli.processes import Child, free_ports
from deltadock.names import DEFAULT
from deltadock.settings import Settings
from deltadock.storage.database import migrate
from deltadock.storage.repositories import (
    BaseRepository,
    DeltaRepository,
    JobRepository,
    ModelRepository,
)
from deltadock.storage.tables import CheckpointRow, JobState
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import bearer, issue_key, serving
from tests.inference.support import PROMPT, Site, expected_text, write_delta
from tests.waiting import wait_until

TALK: Any = [{"role": "user", "content": [{"type": "text", "text": "17 + 25 ="}]}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant]"
SECRET = "of nodes and their api"


@dataclass
class Fleet:
    """An api in this process, and nodes in their own, by their ports."""

    site: Site
    url: str
    key: str
    resources: Resources
    nodes: dict[int, Child]

    def publish(self, name: str, artifact: str) -> str:
        """Store a name's next version, which the name means from now on; returns its id."""
        with self.resources.database.session_scope() as session:
            base = BaseRepository(session, LOCAL_TENANT).find("tiny")
            assert base is not None
            deltas, jobs = (
                DeltaRepository(session, LOCAL_TENANT),
                JobRepository(session, LOCAL_TENANT),
            )
            delta = deltas.add(
                name=name, base=base, checkpoint_digest=self.site.base, method="test", bits=None,
                options={}, fingerprint=artifact,
            )  # fmt: skip
            job = delta.job.id
            deltas.set_result(delta, artifact_digest=artifact, artifact_bytes=1, report={})
            assert jobs.acquire(job, "worker", 60)
            assert jobs.finish(job, "worker", JobState.READY)
            models = ModelRepository(session, LOCAL_TENANT)
            model = models.find(name, lock=True)
            assert model is not None
            models.move(model, DEFAULT, delta, reason="published")
            return delta.id

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def ask(self, model: str) -> str:
        """Sixteen greedy tokens."""
        with self.client() as client:
            answer = client.completions.create(
                model=model, prompt=PROMPT, max_tokens=16, temperature=0
            )
        return answer.choices[0].text

    def known(self) -> dict[int, dict[str, Any]]:
        """The api's view of each node, by port."""
        listed = httpx.get(f"{self.url}/v1/nodes", headers=bearer(self.key)).json()["data"]
        return {int(node["url"].rpartition(":")[2]): node for node in listed}

    def holding(self, artifact: str) -> list[int]:
        """Ports of the nodes that have the delta in a slot."""
        return [
            port
            for port, node in self.known().items()
            if any(h["artifact"] == artifact and h["tier"] == "device" for h in node["deltas"])
        ]

    def sent(self) -> int:
        """Requests that the api has sent to nodes and that have not ended."""
        return self.resources.fleet._sent.total()


@pytest.fixture(scope="module")
def fleet(site: Site, tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    base = site.home / "base-0"
    manifest = scan_folder(base)
    settings = Settings.model_validate(
        {"home": site.home, "broker_url": redis_url, "node_secret": SECRET}
    )
    migrate(settings.sqlalchemy_url)
    app = create_app(settings)
    resources: Resources = app.state.resources
    with resources.database.session_scope() as session:
        checkpoint = CheckpointRow(
            digest=site.base, weights_digest=manifest.weights_digest, model_type="qwen2",
            total_bytes=1,
        )  # fmt: skip
        session.add(checkpoint)
        BaseRepository(session, LOCAL_TENANT).add("tiny", checkpoint)
    with serving(app) as url, ExitStack() as stack:
        nodes = {}
        for port in free_ports(3):
            environment = os.environ | {
                "DELTADOCK_HOME": str(folder / str(port)),
                "DELTADOCK_DEVICE": "cpu",
                "DELTADOCK_NODE_SECRET": SECRET,
                "DELTADOCK_NODE_HEARTBEAT_SECONDS": "1",
                "OMP_NUM_THREADS": "1",
            }
            (folder / str(port)).mkdir()
            (folder / str(port) / "blobs").symlink_to(site.home / "blobs")
            command = [
                *(sys.executable, "-m", "deltadock", "node", "--base", base, "--api", url),
                *("--port", str(port)),
            ]
            log = folder / f"{port}.log"
            nodes[port] = stack.enter_context(Child("node", command, log=log, env=environment))
        fleet = Fleet(site, url, issue_key(settings), resources, nodes)
        for child in nodes.values():
            child.wait_until(lambda: len(fleet.known()) == len(nodes), seconds=120)
        yield fleet


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"temperature": 3},
        {"stop": ["a"] * 17},
        {"prompt": []},
        {"prompt": [999]},
        {"prompt": ["a", [1]]},
        {"suffix": "x"},
        {"unknown": 1},
        {"logit_bias": {"999": 1}},
        {"prompt": "x" * 10_000},
    ],
)
def test_the_api_and_a_node_report_equal_errors(fleet: Fleet, wrong: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": "a", **wrong}
    node = f"http://127.0.0.1:{next(iter(fleet.known()))}"
    headers = {"Authorization": f"Bearer {SECRET}", "Deltadock-Base": fleet.site.base}
    answers = [
        httpx.post(f"{fleet.url}/v1/completions", json=body, headers=bearer(fleet.key)),
        httpx.post(f"{node}/v1/completions", json=body, headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"max_tokens": -1}, "invalid_input"),
        ({"prompt": ""}, "invalid_input"),
        ({"prompt": "x" * 10_000}, "context_length_exceeded"),
    ],
)
def test_the_generate_routes_report_problems(
    fleet: Fleet, wrong: dict[str, Any], code: str
) -> None:
    answer = httpx.post(
        f"{fleet.url}/v1/bases/tiny/generate",
        json={"prompt": "a", **wrong},
        headers=bearer(fleet.key),
    )
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert answer.headers["content-type"] == "application/problem+json"


def test_no_request_is_lost_while_nodes_are_killed_one_by_one(
    fleet: Fleet, generate: Any, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    site = fleet.site
    first, second = site.artifacts
    texts = {artifact: expected_text(site, artifact, generate, 16) for artifact in site.artifacts}
    assert {node["base"] for node in fleet.known().values()} == {site.base}
    assert {node["base_name"] for node in fleet.known().values()} == {"tiny"}

    # Requests for a delta go to the node that has it.
    fleet.publish("maths/skills", first)
    for _ in range(4):
        assert fleet.ask("maths/skills") == texts[first]
    wait_until(lambda: fleet.holding(first))
    assert len(fleet.holding(first)) == 1
    assert fleet.ask("tiny") == expected_text(site, None, generate, 16)

    # A conversation through the official client, with the delta's own template.
    chatty = write_delta(
        tmp_path / "chatty", site.models[None], scan_folder(site.home / "base-0").weights_digest, 1,
        **{"chat_template.jinja": TEMPLATE},
    )  # fmt: skip
    fleet.publish("talk/er", site.blobs.put_file(chatty))
    with fleet.client() as client:
        params: Any = {"model": "talk/er", "messages": TALK, "max_completion_tokens": 9, "seed": 7}
        whole = client.chat.completions.create(**params)
        stream = client.chat.completions.create(
            **params, stream=True, stream_options={"include_usage": True}
        )
        pieces = list(stream)
        assert whole.model == "talk/er"
        assert whole.usage == pieces[-1].usage
        assert whole.choices[0].message.content == "".join(
            piece.choices[0].delta.content for piece in pieces if piece.choices
        )
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="maths/skills", messages=TALK)

    # A request keeps the weights that its name resolved to at its start.
    [home] = fleet.holding(first)
    os.kill(fleet.nodes[home].pid, signal.SIGSTOP)
    asked = threads.submit(fleet.ask, "maths/skills")
    wait_until(lambda: fleet.sent() == 1)
    fleet.publish("maths/skills", second)
    os.kill(fleet.nodes[home].pid, signal.SIGCONT)
    assert asked.result(60) == texts[first]
    assert fleet.ask("maths/skills") == texts[second]
    assert fleet.ask("maths/skills:1") == texts[first]

    # If a node is killed while a request waits for the first byte, another answers.
    wait_until(lambda: fleet.holding(first))
    [home] = fleet.holding(first)
    os.kill(fleet.nodes[home].pid, signal.SIGSTOP)
    asked = threads.submit(fleet.ask, "maths/skills:1")
    wait_until(lambda: fleet.sent() == 1)
    os.kill(fleet.nodes[home].pid, signal.SIGKILL)
    assert asked.result(60) == texts[first]
    assert home not in fleet.known()

    # A node is killed while idle.
    wait_until(lambda: fleet.holding(first))
    [home] = fleet.holding(first)
    os.kill(fleet.nodes[home].pid, signal.SIGKILL)
    wait_until(lambda: fleet.nodes[home].poll() is not None)
    assert fleet.ask("maths/skills:1") == texts[first]
    [last] = fleet.known()

    # The last node gets SIGTERM: it finishes running requests, rejects new ones, deregisters.
    child = fleet.nodes[last]
    with fleet.client() as client:
        running = client.completions.create(
            model="maths/skills:1", prompt="a", max_tokens=100, stream=True, n=8, seed=1
        )
        chunks = [next(running)]
        child.request_stop()
        chunks += list(running)
        ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
        assert sum(end in {"stop", "length"} for end in ends) == 8
        child.wait_until(lambda: child.poll() is not None)
        assert child.poll() in {0, -signal.SIGTERM}
        assert fleet.known() == {}
        with pytest.raises(openai.InternalServerError, match="No inference node"):
            client.completions.create(model="tiny", prompt="a")


def test_api_and_nodes_require_the_secret(fleet: Fleet) -> None:
    body = {"url": "http://127.0.0.1:1", "capacity": 1, "admitted": 0, "delta_slots": 1,
            "lives_seconds": 9}  # fmt: skip
    answer = httpx.put(f"{fleet.url}/v1/nodes/node_x", json=body)
    assert answer.status_code == 401
