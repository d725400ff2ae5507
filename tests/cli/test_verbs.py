"""The commands that talk to a server, against one running service."""

import io
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from pydantic import SecretStr
from rich.console import Console
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope
from tokenizers import Tokenizer, models, pre_tokenizers

from deltadock.cli.jobs import follow
from deltadock.cli.outcome import UNAVAILABLE
from deltadock.cli.processes import free_ports
from deltadock.cli.push import _say_what_next
from deltadock.cli.server import State, complete_method
from deltadock.client.blocking import Client
from deltadock.client.connection import read_login
from deltadock.client.requests import ATTEMPTS
from deltadock.client.stopping import Stop
from deltadock.errors import Unauthorized, Unavailable
from deltadock.problems import error_response
from deltadock.storage.tables import JobState, Scope
from deltadock.trust import check_trusted
from tests.api.support import CONFIG, issue_key, serving, weights
from tests.cli.support import Command, Outcome
from tests.client.support import Service, running_service, write_finetune, write_text


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service"), redis_url) as service:
        yield service


@pytest.fixture(autouse=True)
def _connection(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTADOCK_API_URL", service.url)
    monkeypatch.setenv("DELTADOCK_API_KEY", service.key)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pushed(service: Service, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two ready versions of maths/skills."""
    folder = tmp_path_factory.mktemp("finetunes")
    with Client(service.url, service.key) as client:
        for seed in (1, 2):
            finetune = write_finetune(folder / str(seed), seed)
            found = client.push(finetune, "maths/skills", "tiny", method="bitdelta")
            service.api.make_ready(
                {"id": found.delta.id, "job": found.job.id}, b"bytes of it" * 99 * seed
            )
    return ["maths/skills:1", "maths/skills:2"]


@pytest.fixture
def call(deltadock: Command) -> Callable[..., Outcome]:
    """Run a command that must succeed."""

    def call(*arguments: object) -> Outcome:
        outcome = deltadock(*arguments)
        assert outcome.code == 0, outcome.stderr
        return outcome

    return call


def answered(outcome: Outcome) -> Any:
    """The JSON document of a command."""
    return json.loads(outcome.stdout)


@pytest.fixture
def worker(service: Service) -> Iterator[list[str]]:
    """Ends queued jobs as a worker would, while the test runs; the outcomes to come, if set."""
    stopping, outcomes = threading.Event(), list[str]()

    def work() -> None:
        with Client(service.url, service.key) as client:
            while not stopping.wait(0.02):
                for job in client.jobs(state=["queued"]):
                    if outcomes:
                        client.cancel(job.id)
                    else:
                        service.api.make_ready({"id": job.delta, "job": job.id}, job.id.encode())

    thread = threading.Thread(target=work)
    thread.start()
    yield outcomes
    stopping.set()
    thread.join()


def test_a_push_is_followed_to_its_figures(
    call: Callable[..., Outcome], worker: list[str], tmp_path: Path
) -> None:
    folder = write_finetune(tmp_path / "my-run", 3)
    text = write_text(tmp_path / "text.txt")
    options = ("--base", "tiny", "--method", "adamix", "--bits", 2, "--calibration", f"{text}:2")
    outcome = call("push", folder, *options)
    assert "finetunes/my-run:1 is queued: job job_" in outcome.stderr
    assert "100 %  ready" in outcome.stderr
    assert "Try it: deltadock run finetunes/my-run:1" in outcome.stderr
    assert "0.0100 nats per token" in outcome.stdout
    assert "\ntop-1 agreement      98.0 %\n" in outcome.stdout
    assert "It has no tokenizer." in outcome.stdout
    outcome = call("push", folder, *options, "--json", "--no-wait", "--commit", "abc")
    assert "Note" not in outcome.stderr
    again = answered(outcome)
    assert again["delta"]["state"] == "ready"
    assert again["delta"]["version"] == 1
    assert again["delta"]["lineage"]["commit"] == "abc"
    outcome = call("push", folder, *options, "--commit", "def")
    assert "Note: it was pushed before, of the commit abc, which stays." in outcome.stderr


def test_a_push_without_a_text_says_that_the_fine_tune_writes_it(
    call: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = write_finetune(tmp_path / "writes", 31)
    said = "Note: the fine-tune writes the calibration text itself"
    text = write_text(tmp_path / "text.txt")
    for options, told in (
        (("adamix",), True),
        (("adamix", "--calibration", text), False),
        (("exact",), False),
    ):
        outcome = call("push", folder, "-b", "tiny", "--no-wait", "--method", *options)
        assert (said in outcome.stderr) == told, options
        call("rm", outcome.stderr.split(" is queued")[0].split()[-1])


def test_a_size_out_of_reach_is_refused_before_the_upload(
    deltadock: Command, service: Service, tmp_path: Path
) -> None:
    folder = write_finetune(tmp_path / "finetune", 5)
    blobs = service.api.blobs()
    outcome = deltadock("push", folder, "-b", "tiny", "-n", "maths/small", "--target-bytes", 9)
    assert outcome.code == 1
    assert "error (invalid_goal): 9 bytes cannot be reached by 'optimix'" in outcome.stderr
    assert service.api.blobs() == blobs


def test_a_folder_that_names_no_base_is_refused_before_the_upload(
    deltadock: Command, service: Service, tmp_path: Path
) -> None:
    folder = write_finetune(tmp_path / "my base", 5)
    blobs = service.api.blobs()
    outcome = deltadock("bases", "add", folder)
    assert (outcome.code, "'my base' is not a name for a base" in outcome.stderr) == (1, True)
    assert service.api.blobs() == blobs


def test_what_the_files_tell_is_refused_before_the_upload(
    deltadock: Command, service: Service, tmp_path: Path
) -> None:
    folder = write_finetune(tmp_path / "finetune", 5)
    (folder / "model.safetensors").write_bytes(weights(5, rows=7))
    text = tmp_path / "text.txt"
    text.write_text("some words " * 30)
    blobs = service.api.blobs()
    outcome = deltadock("push", folder, "-b", "tiny", "--method", "exact")
    assert (outcome.code, "error (architecture_mismatch)" in outcome.stderr) == (1, True)
    assert "in the fine-tune, but" in outcome.stderr
    (folder / "model.safetensors").write_bytes(weights(5)[:-1])
    outcome = deltadock("push", folder, "-b", "tiny", "--method", "exact")
    assert (outcome.code, "its header tells of" in outcome.stderr) == (1, True)
    (folder / "model.safetensors").write_bytes(weights(5))
    tokenizer = Tokenizer(models.WordLevel({"some": 0, "words": 1}, "some"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(16)  # as training leaves them
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(folder / "tokenizer.json"))
    outcome = deltadock("push", folder, "-b", "tiny", "--calibration", text)
    assert "The calibration text has 60 tokens; at least 256 are needed" in outcome.stderr
    text.write_text("short")
    outcome = deltadock("push", folder, "-b", "tiny", "--calibration", text)
    assert "The calibration text text.txt has 5 bytes; at least 256 tokens" in outcome.stderr
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"foo": 1}')
    outcome = deltadock("push", folder, "-b", "tiny", "--calibration", lines)
    assert "Line 1 of the calibration file is not an object with `text`" in outcome.stderr
    assert service.api.blobs() == blobs


@pytest.mark.parametrize(
    ("step", "hint"),
    [
        ("base", "Nothing of the checkpoint has been sent: the same command starts over."),
        ("create_delta", "What has arrived is kept: the same command continues the upload."),
        ("delta", "The job goes on. Follow it: deltadock logs -f job_"),
    ],
)
def test_ctrl_c_says_what_is_kept_of_a_push(
    deltadock: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, hint: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder = write_finetune(tmp_path / "finetune", 6)
    monkeypatch.setattr(Client, step, interrupted)
    arguments = ("push", folder, "-b", "tiny", "-n", "maths/stopped", "--method", "exact")
    outcome = deltadock(*arguments, "--no-wait")
    assert outcome.code == 130
    assert outcome.stderr.count("Interrupted") == 1
    assert f"Interrupted. {hint}" in outcome.stderr


def test_a_push_that_is_cancelled_ends_with_4_and_can_be_retried(
    deltadock: Command, call: Callable[..., Outcome], worker: list[str], tmp_path: Path
) -> None:
    worker.append("cancel")
    folder = write_finetune(tmp_path / "finetune", 4)
    outcome = deltadock("push", folder, "-b", "tiny", "-n", "maths/cancelled", "--method", "exact")
    assert outcome.code == 4
    assert "error (cancelled)" in outcome.stderr
    assert "deltadock retry job_" in outcome.stderr
    listed = answered(call("jobs", "--delta", "maths/cancelled:1", "--json"))
    assert [job["state"] for job in listed] == ["cancelled"]
    assert deltadock("logs", "-f", "maths/cancelled").code == 4
    worker.clear()
    assert answered(call("retry", "maths/cancelled", "--wait", "--json"))["state"] == "ready"
    assert "is ready" in call("cancel", listed[0]["id"]).stderr


def test_a_followed_log_is_above_a_bar_in_a_terminal(
    call: Callable[..., Outcome], pushed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr("deltadock.cli.jobs.output", terminal)
    call("logs", "-f", pushed[0])
    shown = screen.getvalue()
    assert re.search(r"\d\d:\d\d:\d\d [A-Z+-]\S*  Ready\.", shown), shown
    assert "100 %" in shown
    assert "queued" not in shown
    screen.truncate(0)
    call("logs", pushed[0])
    assert "100 %" not in screen.getvalue()


def test_a_queued_job_that_is_followed_in_a_pipe_says_so(
    service: Service,
    call: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_finetune(tmp_path / "finetune", 9)
    options = ("-b", "tiny", "-n", "maths/piped", "--method", "exact", "--no-wait", "--json")
    delta = answered(call("push", folder, *options))["delta"]
    ended = list[str]()

    def work(_seconds: float) -> None:
        """End the job after it was read once."""
        if not ended:
            ended.append(delta["id"])
            service.api.make_ready({"id": delta["id"], "job": delta["job"]}, b"piped")

    monkeypatch.setattr("deltadock.client.blocking.time.sleep", work)
    outcome = call("logs", "-f", "maths/piped")
    assert re.fullmatch(r"  0 %  queued: number \d+\n", outcome.stderr)
    assert outcome.stdout.endswith("  Ready.\n")


def test_methods_are_completed() -> None:
    assert complete_method("bit") == ["bitdelta", "bitdelta-distilled"]


def test_lists_are_filtered_by_the_states_that_there_are() -> None:
    assert [*State] == [*JobState]


def test_ctrl_c_leaves_the_job_running(
    deltadock: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "wait", interrupted)
    folder = write_finetune(tmp_path / "finetune", 5)
    outcome = deltadock("push", folder, "-b", "tiny", "-n", "maths/left", "--method", "exact")
    assert outcome.code == 130
    assert "Interrupted. The job goes on. Follow it: deltadock logs -f job_" in outcome.stderr
    assert deltadock("cancel", "maths/left:1").code == 0


def test_what_nodes_do_not_serve_is_not_tried(capsys: pytest.CaptureFixture[str]) -> None:
    delta = SimpleNamespace(
        state="ready", reference="a/b:1", name="a/b", version=1, default_version=1
    )
    _say_what_next(delta, "llama")  # type: ignore[arg-type]
    assert "deltadock run a/b:1" in capsys.readouterr().err
    _say_what_next(delta, "gpt2")  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "deltadock run" not in said
    assert "deltadock merge" in said


def test_a_base_is_added_and_listed(call: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = write_finetune(tmp_path / "second-base", 6)
    assert "second-base is a base: llama" in call("bases", "add", folder).stderr
    (folder / "config.json").write_text('{"model_type": "made_up"}')
    said = call("bases", "add", folder, "-n", "other-base").stderr
    assert "Models of type 'made_up' cannot be calibrated yet" in said
    assert said.index("made_up") < said.index("other-base is a base")
    (folder / "config.json").write_bytes(CONFIG)
    assert answered(call("bases", "add", folder, "--json"))["name"] == "second-base"
    assert {base["name"] for base in answered(call("bases", "--json"))} >= {
        "tiny", "second-base",
    }  # fmt: skip
    assert "second-base" in call("bases").stdout
    assert "second-base" in call("bases", "ls").stdout
    assert "deltadock bases undo second-base" in call("bases", "rm", "second-base").stderr
    assert "second-base" not in call("bases").stdout
    assert "second-base is back" in call("bases", "undo", "second-base").stderr


def test_a_base_whose_name_is_taken_is_not_sent(deltadock: Command, tmp_path: Path) -> None:
    first, second = (write_finetune(tmp_path / str(seed), seed) for seed in (21, 22))
    assert deltadock("bases", "add", first, "-n", "taken").code == 0
    refused = deltadock("bases", "add", second, "-n", "taken")
    assert refused.code == 1
    assert "'taken' belongs to another checkpoint" in refused.stderr
    assert "uploading" not in refused.stderr
    assert deltadock("bases", "add", first, "-n", "taken").code == 0


def test_deltas_are_listed_and_shown(call: Callable[..., Outcome], pushed: list[str]) -> None:
    table = call("ls", "skills").stdout
    assert [name in table for name in pushed] == [True, True]
    assert [delta["version"] for delta in answered(call("ls", "--name", "maths/skills", "--json"))
            ] == [2, 1]  # fmt: skip
    for limited in (("ls", "--limit", 1), ("ls", "-n", 1, "--json"), ("jobs", "-n", 1, "--json")):
        assert call(*limited).stderr == "There are more: --limit 4 shows up to 4.\n"
    assert "No delta matches" in call("ls", "nothing-like-it").stderr
    assert "No job matches" in call("jobs", "--state", "failed", "--delta", pushed[0]).stderr
    shown = call("show", "maths/skills").stdout
    assert "maths/skills:1" in shown
    assert "It has no tokenizer." in shown
    assert "default" in shown
    assert answered(call("show", pushed[1], "--json"))["name"] == "maths/skills"
    assert answered(call("show", pushed[1], "--report"))["kl"] == 0.01


def test_a_delta_is_pulled_once(
    call: Callable[..., Outcome], deltadock: Command, pushed: list[str], tmp_path: Path
) -> None:
    assert call("pull", pushed[0]).stderr.splitlines()[-1].startswith("skills-1.delta: 1.09 kB, ")
    content = (tmp_path / "skills-1.delta").read_bytes()
    assert len(content) == 99 * 11
    assert call("pull", pushed[0]).stderr.startswith("skills-1.delta: already there, 1.09 kB, ")
    for other in (b"other", content[::-1]):
        (tmp_path / "skills-1.delta").write_bytes(other)
        refused = deltadock("pull", pushed[0])
        assert refused.code == 1
        assert "skills-1.delta exists, and is not maths/skills:1" in refused.stderr
        assert (tmp_path / "skills-1.delta").read_bytes() == other
        call("pull", pushed[0], "--force")
        assert (tmp_path / "skills-1.delta").read_bytes() == content
    out = tmp_path / "other.delta"
    assert answered(call("pull", pushed[1], "--out", out, "--json"))["path"] == str(out)


def test_aliases_are_moved_listed_and_removed(
    call: Callable[..., Outcome], deltadock: Command, pushed: list[str]
) -> None:
    moved = call("alias", pushed[1], "prod", "-m", "evaluated", "--expected", 0)
    assert "maths/skills@prod means version 2" in moved.stderr
    assert "prod" in call("alias", "maths/skills").stdout
    moves = call("alias", "maths/skills", "--history").stdout
    assert "evaluated" in moves
    assert "tests" in moves
    assert "key_" not in moves
    assert answered(call("alias", "maths/skills", "--history", "--json"))[0]["alias"] == "prod"
    of_default = answered(call("alias", "maths/skills", "default", "--history", "--json"))
    assert {move["alias"] for move in of_default} == {"default"}
    conflict = deltadock("alias", pushed[0], "prod", "--expected", 1)
    assert (conflict.code, "error (conflict)" in conflict.stderr) == (1, True)
    assert "is removed" in call("alias", "maths/skills", "prod", "--rm").stderr


def test_a_model_is_tagged_described_and_given_a_rule(
    call: Callable[..., Outcome], deltadock: Command, pushed: list[str], tmp_path: Path
) -> None:
    card = tmp_path / "card.md"
    card.write_text("# Skills\nSorts letters.", encoding="utf-8")
    call("model", "maths/skills", "--tag", "german", "--tag", "maths", "--card", card)
    shown = call("model", "maths/skills", "--tag", "maths", "--untag", "german", "--max-kl", 0.05)
    assert re.search(r"tags +maths\n", shown.stdout)
    assert "Sorts letters." in shown.stdout
    assert "if its KL is at most 0.05, and 0 above the default's" in shown.stdout
    assert [one["name"] for one in answered(call("ls", "--tag", "maths", "--json"))] == [
        "maths/skills"
    ] * len(pushed)
    model = answered(call("model", "maths/skills", "--no-rule", "--json"))
    assert (model["rule"], model["tags"]) == (None, ["maths"])
    call("alias", pushed[0], "default")  # the rule has moved it
    assert deltadock("model", "maths/skills", "--max-increase", 1).code == 2
    assert deltadock("model", "maths/skills", "--max-kl", 1, "--no-rule").code == 2
    assert "not_found" in deltadock("model", "maths/nothing", "--tag", "a").stderr


def test_webhooks_are_made_listed_and_deleted(
    service: Service, call: Callable[..., Outcome], pushed: list[str]
) -> None:
    made = call("webhooks", "create", "https://hooks.example.com/a", "--events", "alias.moved")
    assert made.stdout.startswith("whsec_")
    [webhook] = answered(call("webhooks", "list", "--json"))
    assert webhook["secret"] is None
    assert webhook["id"] in made.stderr
    assert webhook["url"] in call("webhooks", "list").stdout
    call("alias", pushed[0], "told")
    [message] = answered(call("webhooks", "messages", webhook["id"], "--json"))
    assert json.loads(message["body"])["type"] == "alias.moved"
    again = answered(call("webhooks", "resend", webhook["id"], message["id"], "--json"))
    assert (again["id"], again["state"]) == (message["id"], "pending")
    assert message["id"] in call("webhooks", "messages", webhook["id"]).stdout
    call("webhooks", "rm", webhook["id"])
    assert "no webhook yet" in call("webhooks", "list").stderr
    call("alias", "maths/skills", "told", "--rm")


def test_a_base_is_shared_with_every_tenant(call: Callable[..., Outcome]) -> None:
    for command, shared in (("share", True), ("unshare", False)):
        call("bases", command, "tiny")
        found = {base["name"]: base for base in answered(call("bases", "list", "--json"))}
        assert found["tiny"]["shared"] == shared


def test_what_is_deleted_comes_back(
    call: Callable[..., Outcome], deltadock: Command, pushed: list[str]
) -> None:
    assert "deltadock undo maths/skills:2" in call("rm", pushed[1]).stderr
    assert "was deleted; `deltadock undo maths/skills:2`" in deltadock("show", pushed[1]).stderr
    assert "maths/skills:2 is back, ready" in call("undo", pushed[1]).stderr
    refused = deltadock("rm", "--all", "maths/skills")
    assert (refused.code, "confirm with --yes" in refused.stderr) == (1, True)


def test_a_delta_that_is_deleted_while_it_is_compressed_cancels_its_job(
    call: Callable[..., Outcome], deltadock: Command, tmp_path: Path
) -> None:
    folder = write_finetune(tmp_path / "stopped", 8)
    pushed = call("push", folder, "-b", "tiny", "--no-wait", "--method", "exact", "--json")
    job = answered(pushed)["job"]
    name = "finetunes/stopped:1"
    assert name in call("show", "finetunes/stopped").stdout
    assert answered(call("show", "finetunes/stopped", "--json"))["state"] == "queued"
    refused = deltadock("rm", "finetunes/stopped")
    assert refused.code == 1
    assert f"See `deltadock logs {job}`. To delete it: deltadock rm {name}" in refused.stderr
    assert f"Deleted {name} and cancelled its job {job}." in call("rm", name).stderr
    followed = deltadock("logs", "-f", job)
    assert followed.code == 4
    assert f"{name} was deleted; `deltadock undo {name}` brings it back." in followed.stderr
    assert "retry" not in followed.stderr
    assert "cancelled" in call("undo", name).stderr
    assert f"Continue it: deltadock retry {job}" in deltadock("logs", "-f", job).stderr


def test_a_whole_model_is_deleted_and_comes_back(
    call: Callable[..., Outcome], deltadock: Command, tmp_path: Path
) -> None:
    folder = write_finetune(tmp_path / "gone", 7)
    call("push", folder, "-b", "tiny", "--no-wait", "--method", "exact")
    assert answered(call("rm", "--all", "finetunes/gone", "--yes", "--json"))[0]["last_version"]
    assert deltadock("show", "finetunes/gone:1").code == 1
    assert "finetunes/gone:1 (deleted)" in call("jobs").stdout
    assert "finetunes/gone:1 is back" in call("undo", "finetunes/gone").stderr


def test_deltas_are_compared(
    service: Service, call: Callable[..., Outcome], deltadock: Command, pushed: list[str]
) -> None:
    lines = call("compare", *pushed, "--prompt", "17 + 25 =").stdout.splitlines()
    marked = [line.split()[1] for line in lines if line.startswith("≠")]
    assert "sha256" in marked
    assert max(map(len, lines)) <= 100
    assert any("answer" in line and line.count("42") == 2 for line in lines)
    asked = [request["body"] for request in service.node.requests[-2:]]
    said = [{"role": "user", "content": "17 + 25 ="}]
    assert [(body["messages"], body["temperature"]) for body in asked] == [(said, 0)] * 2
    assert len(answered(call("compare", *pushed, "--json"))) == 2
    assert deltadock("compare", pushed[0]).code == 2


def test_a_delta_that_does_not_answer_is_compared_by_its_figures(
    service: Service, call: Callable[..., Outcome], pushed: list[str], tmp_path: Path
) -> None:
    with Client(service.url, service.key) as client:
        finetune = write_finetune(tmp_path / "waiting", 3)
        waiting = client.push(finetune, "maths/waiting", "tiny", method="bitdelta")
    compared = ("compare", pushed[0], "maths/waiting:1", "--prompt", "17 + 25 =")
    lines = call(*compared).stdout.splitlines()
    answers = next(line for line in lines if "answer" in line)
    assert "42" in answers
    assert "not ready" in answers
    assert any("sha256" in line for line in lines)
    ready, queued = answered(call(*compared, "--json"))
    assert ready["answer"].strip() == "42"
    assert "not ready" in queued["error"]
    assert "answer" not in queued
    call("cancel", waiting.job.id)


def test_answers_are_generated_and_streamed(
    service: Service,
    call: Callable[..., Outcome],
    pushed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert call("generate", pushed[0], "17 + 25 =", "--temperature", 0).stdout == " 42\n"
    whole = answered(call("generate", "tiny", "x", "--json", "--stop", r"\n"))
    assert whole["usage"]["completion_tokens"] == 3
    assert service.node.requests[-1]["body"]["stop"] == ["\n"]
    for prompt in ((), ("-",)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("17 + 25 ="))
        streamed = call("run", "--plain", "-v", pushed[0], *prompt)
        assert streamed.stdout == " 42\n"
        assert "3 tokens in" in streamed.stderr


def test_a_conversation_in_a_terminal(
    service: Service, call: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter([
        '"""two', 'lines"""', "/set temperature 0.5", "/set temperature 9", "/set top_k x", "again",
        "/clear", "/help", "/what", "/chat", "", KeyboardInterrupt, "after", EOFError,
    ])  # fmt: skip

    def read(_prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", read)
    service.node.requests.clear()
    outcome = call("chat", "tiny")
    assert "Talking to tiny. /help lists commands" in outcome.stderr
    assert "Ctrl-D or /bye ends" in outcome.stderr
    assert outcome.stderr.count("/clear ") == 1
    assert "There is no command /what. /help lists them." in outcome.stderr
    assert "temperature is 0.5." in outcome.stderr
    assert "temperature cannot be 9. Input should be less than or equal to 2." in outcome.stderr
    assert "top_k cannot be x." in outcome.stderr
    assert "A new conversation begins" in outcome.stderr
    bodies = [request["body"] for request in service.node.requests]
    said = [[message["content"] for message in body["messages"]] for body in bodies]
    assert said == [["two\nlines"], ["two\nlines", " 42", "again"], ["after"]]
    assert [body.get("temperature") for body in bodies] == [None, 0.5, 0.5]


class WithoutTemplate(Response):
    """A node's answers for a model without a chat template."""

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        error = {"message": "The model has no chat template.", "type": "x", "param": None}
        answer: Response = JSONResponse({"error": error | {"code": "no_chat_template"}}, 400)
        if "chat" not in scope["path"]:
            events = 'data: {"choices": [{"text": " there"}]}\n\ndata: [DONE]\n\n'
            answer = Response(events, media_type="text/event-stream")
        await answer(scope, receive, send)


def test_without_a_chat_template_text_is_continued(
    service: Service, call: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.node, "answer", WithoutTemplate())
    outcome = call("run", "tiny", "hello")
    assert outcome.stdout == " there\n"
    assert "has no chat template: it continues your text" in outcome.stderr
    assert json.loads(call("run", "tiny", "hello", "--json").stdout)["text"] == " there"


class Restarting(Response):
    """Refusals of a node, more than a client repeats its request; then the answers of one."""

    refusals = ATTEMPTS + 2

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        error = {"message": "The node is starting.", "type": "x", "param": None}
        answer: Response = JSONResponse(
            {"error": error | {"code": "unavailable"}}, 503, {"Retry-After": "0"}
        )
        if not self.refusals:
            events = 'data: {"choices": [{"text": " there"}]}\n\ndata: [DONE]\n\n'
            answer = Response(events, media_type="text/event-stream")
        self.refusals -= 1
        await answer(scope, receive, send)


def test_a_conversation_waits_for_a_node_that_restarts(
    service: Service,
    call: Callable[..., Outcome],
    deltadock: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service.node, "answer", Restarting())
    outcome = call("run", "--plain", "tiny", "hello")
    assert outcome.stdout == " there\n"
    assert outcome.stderr.startswith("The node is starting.\nWaiting 1 min")
    monkeypatch.setattr("deltadock.cli.chat.RESTART_SECONDS", -1)
    monkeypatch.setattr(Restarting, "refusals", 3 * ATTEMPTS)
    monkeypatch.setattr(service.node, "answer", Restarting())
    assert "error (unavailable): The node is starting." in deltadock("run", "tiny", "hello").stderr


def test_an_error_in_an_answer_has_a_line_of_its_own(
    service: Service, deltadock: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"message": "The node is gone.", "type": "x", "param": None, "code": "unavailable"}
    broken = (
        f'data: {{"choices": [{{"text": " the"}}]}}\n\ndata: {json.dumps({"error": error})}\n\n'
    )
    monkeypatch.setattr(service.node, "answer", Response(broken, media_type="text/event-stream"))
    outcome = deltadock("run", "--plain", "tiny", "hello")
    assert (outcome.code, outcome.stdout) == (UNAVAILABLE, " the\n")


def test_nodes_are_shown(service: Service, call: Callable[..., Outcome], pushed: list[str]) -> None:
    with Client(service.url, service.key) as client:
        artifact = client.delta(pushed[0]).artifact
    assert artifact is not None
    node = answered(call("ps", "--json"))[0]
    held = [
        {"digest": artifact.digest, "tier": "device", "bytes": 1089, "references": 2},
        {"digest": "0" * 64, "tier": "disk", "bytes": 1089},
    ]
    service.api.register(node["url"], deltas=held)
    outcome = call("ps")
    assert "1 of 4" in outcome.stdout
    assert "in flight" in outcome.stdout
    assert "maths/skills:1" in outcome.stdout
    assert "0" * 12 not in outcome.stdout
    assert outcome.stderr == "On disk only: 1 delta; --json lists them.\n"


def test_a_tenant_sees_whether_a_node_can_serve(
    service: Service, call: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = service.api.client.post("/v1/tenants", json={"name": "acme"}).json()["id"]
    monkeypatch.setenv("DELTADOCK_API_KEY", issue_key(service.api.resources.settings, tenant=acme))
    (node,) = answered(call("ps", "--json"))
    headings, row = call("ps").stdout.splitlines()
    assert headings.split() == ["node", "state", "base"]
    assert row.split() == [node["id"], "ready", "any,", "on", "request"]


def test_a_nodes_address_is_not_the_apis(deltadock: Command) -> None:
    with pytest.raises(Unauthorized) as asked:
        check_trusted(SecretStr("s3cret"), None, "127.0.0.1")
    refusal = error_response("/v1/deltas", asked.value)
    with serving(Starlette(routes=[Route("/v1/deltas", lambda _: refusal)])) as url:
        refused = deltadock("ls", "--url", url)
    assert refused.code == 1
    assert f"{url} is a node. Give the api's address, such as http://127" in refused.stderr
    assert "login" not in refused.stderr


def test_nodes_are_drained_resumed_and_relieved(
    service: Service, call: Callable[..., Outcome], deltadock: Command, pushed: list[str]
) -> None:
    (node,) = answered(call("ps", "--json"))
    url, address = node["url"], node["url"].removeprefix("http://")
    service.node.requests.clear()
    assert f"Undo: deltadock resume {address}" in call("drain", address).stderr
    assert answered(call("resume", node["id"], "--json"))["url"] == url
    with Client(service.url, service.key) as client:
        artifact = client.delta(pushed[0]).artifact
    assert artifact is not None
    assert f"removed from the memory of {url}" in call("evict", pushed[0]).stderr
    service.api.register(url, deltas=[{"digest": artifact.digest, "tier": "host", "bytes": 1}])
    assert answered(call("evict", artifact.digest[:12], "--node", url, "--json"))[0]["url"] == url
    assert [request["path"] for request in service.node.requests] == [
        "/v1/drain", "/v1/resume", *[f"/v1/deltas/{artifact.digest}/unload"] * 2,
    ]  # fmt: skip
    service.node.answer = JSONResponse({"code": "not_found", "detail": "No tier has it."}, 404)
    assert "No node has maths/skills:1 in memory" in deltadock("evict", pushed[0]).stderr
    service.node.answer = None
    outcome = deltadock("drain", "10.0.0.9")
    assert (outcome.code, f"Those that run: {url}." in outcome.stderr) == (1, True)
    service.api.register(url)


def test_a_login_is_checked_and_kept(
    service: Service,
    call: Callable[..., Outcome],
    deltadock: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DELTADOCK_API_URL")
    monkeypatch.delenv("DELTADOCK_API_KEY")
    refused = deltadock("login", service.url, "--key", "ddk_wrong")
    assert (refused.code, read_login()) == (1, None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{service.key}\n"))
    assert f"Logged in to {service.url}" in call("login", service.url).stderr
    assert read_login() == (service.url, service.key)
    assert answered(call("bases", "list", "--json"))
    made = answered(call("keys", "create", "--name", "ci", "--scopes", "read", "--json"))
    assert made["key"].startswith("ddk_")
    assert made["prefix"] in call("keys", "list").stdout
    rotated = call("keys", "rotate", made["prefix"], "--grace-hours", 0).stdout.strip()
    assert rotated.startswith("ddk_")
    assert "is revoked" in call("keys", "revoke", rotated[:12]).stderr
    assert answered(call("logout", "--json")) == {"url": service.url}
    assert "You are not logged in" in deltadock("logout").stderr


def test_doctor_says_what_is_wrong(
    service: Service, deltadock: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = deltadock("doctor", "--url", "here")
    assert "✗ server: 'here' (given) is not an address such as http://127" in outcome.stdout
    outcome = deltadock("doctor", "--json")
    found = {finding["check"]: finding for finding in answered(outcome)}
    assert found["server"]["text"].startswith(service.url)
    for check in ("database", "broker", "blobs", "key", "nodes"):
        assert found[check]["state"] == "ok", found
    assert found["nodes"]["text"] == "1 node runs"
    with monkeypatch.context() as full:
        full.setattr(service.api.resources.database, "_full_at", time.monotonic())
        outcome = deltadock("doctor")
    assert "✗ database: its disk is full" in outcome.stdout
    assert "nodes" not in outcome.stdout, "the server does not look for them then"
    monkeypatch.setenv("DELTADOCK_API_KEY", issue_key(service.api.resources.settings,
                                                      scopes=[Scope.INFER]))  # fmt: skip
    outcome = deltadock("doctor")
    assert outcome.code == 0
    assert "✓ key: accepted, from DELTADOCK_API_KEY; without the scope read" in outcome.stdout
    monkeypatch.setenv("DELTADOCK_API_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    outcome = deltadock("doctor")
    assert outcome.code == 1
    assert "does not answer" in outcome.stdout
    assert "`deltadock up` starts one here" in outcome.stdout


def test_doctor_finds_a_full_disk(
    deltadock: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTADOCK_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    outcome = deltadock("doctor")
    assert (outcome.code, f"✗ home: {tmp_path}, 4" in outcome.stdout) == (1, True)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("API_PROCESSES", "hidden", "DELTADOCK_API_PROCESSES: Input should be a valid integer"),
        ("NODE_DELTAS", "hidden", 'error parsing value for field "node_deltas"'),
    ],
)
def test_a_wrong_setting_is_one_line(
    deltadock: Command, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(f"DELTADOCK_{variable}", value)
    outcome = deltadock("ls")
    assert outcome.code == 1
    assert outcome.stderr.startswith(f"error (invalid_input): Wrong settings: {words}")
    assert len(outcome.stderr.splitlines()) == 1
    assert value not in outcome.stderr
    outcome = deltadock("doctor")
    assert (outcome.code, f"✗ settings: Wrong settings: {words}" in outcome.stdout) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("show", "skills"), 1, "'skills' is not the name of a delta. Write project/model"),
        (("push", "{finetune}", "-b", "tiny", "-n", "skills"), 1, "of the form project/model"),
        (("push", "{finetune}", "-b", "huge"), 1, "There is no base 'huge'. There are: "),
        (("push", "{finetune}", "-b", "{finetune}"), 1, "deltadock bases add"),
        (("push", "nowhere", "-b", "tiny"), 2, "nowhere"),
        (("push", "{empty}", "-b", "tiny"), 1, "empty: There is no .safetensors file"),
        (("push", "{finetune}"), 2, "--base"),
        (("lost",), 2, "No such command 'lost'"),
        (("push", "{finetune}", "-b", "tiny", "--method", "lost"), 1, "no method 'lost'"),
        (("push", "{finetune}", "-b", "tiny", "--priority", "now"), 2, "--priority"),
        (("push", "{finetune}", "-b", "tiny", "--calibration", "no.txt"), 2, "--calibration"),
        (("bases", "add", "{finetune}", "-n", "a/b"), 1, "is not a name for a base"),
        (("ls", "--sort", "best"), 2, "--sort"),
        (("alias", "maths/skills:1", "Prod!"), 1, "cannot be an alias"),
        (("alias", "maths/skills@prod", "--rm"), 2, "`deltadock alias maths/skills prod --rm`"),
        (("alias", "maths/skills:1", "-m", "evaluated"), 2, "name the alias too"),
        (("undo", "maths/skills:9"), 1, "no deleted delta"),
        (("logs", "job_none"), 1, "There is no job 'job_none'"),
        (("logs", "`client.x()`"), 1, "'`client.x()`' is not the name of a delta"),
        (("run", "nothing", "x"), 1, "error (model_not_found)"),
        (("rm", "maths/skills:9"), 1, "maths/skills has no version 9; its newest is 2."),
        (("run", "maths/skills@nope", "x"), 1, "no alias @nope. It has: @default."),
        (
            ("push", "{finetune}", "-b", "tiny", "--bits", "1", "--ratio", "4"),
            1,
            "bits and ratio exclude each other",
        ),
        (("show", "none/such"), 1, "no delta 'none/such'; `deltadock ls` lists them"),
        (("show", "maths/skils:1"), 1, "'maths/skils:1'. Did you mean 'maths/skills'? `deltadock"),
        (("run", "tny", "x"), 1, "There is no model 'tny'. Did you mean 'tiny'? `deltadock ls`"),
        (("alias", "math/skills"), 1, "'math/skills'. Did you mean 'maths/skills'? `deltadock ls`"),
        (("ls", "--base", "tinny"), 1, "'tinny'. Did you mean 'tiny'? `deltadock bases` lists"),
        (("push", "{finetune}", "-b", "tiny", "--seed", "-1"), 2, "a whole number from 0 to 2**53"),
        (("ls", "--state", "lost"), 2, "'lost' is not one of 'queued', 'validating', "),
        (("jobs", "--state", "lost"), 2, "'lost' is not one of 'queued', 'validating', "),
        (("ls", "--url", "127.0.0.1:8000"), 1, "is not an address such as http://127.0.0.1:8000"),
        (("--url", "127.0.0.1:8000", "ls"), 1, "'127.0.0.1:8000' (given) is not an address"),
        (("pull", "maths/skills:1", "-o", "nowhere/x.delta"), 1, "There is no folder nowhere."),
        (("pull", "maths/skills:1", "-o", "-"), 1, "is written to a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_errors_name_what_is_wrong(
    deltadock: Command, pushed: list[str], tmp_path: Path, arguments: tuple[str, ...], code: int,
    words: str,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    finetune = write_finetune(tmp_path / "finetune")
    named = {"finetune": finetune, "empty": tmp_path / "empty"}
    outcome = deltadock(*(argument.format(**named) for argument in arguments))
    assert (outcome.code, outcome.stdout) == (code, "")
    *progress, error = outcome.stderr.strip().splitlines()
    assert words in error
    assert progress in ([], ["checking and hashing"])


def test_tenants_are_made_limited_and_listed(
    call: Callable[..., Outcome], deltadock: Command, pushed: list[str]
) -> None:
    made = call("tenants", "create", "acme-2", "--max-bytes", "1.5GB", "--max-jobs", 2)
    assert "deltadock keys create --tenant acme-2 --name admin" in made.stderr
    changed = call("tenants", "set", "acme-2", "--max-deltas", 10, "--max-jobs", "none")
    assert changed.stdout.splitlines()[1].split() == [
        "acme-2", "0", "B", "of", "1.50", "GB", "0", "of", "10", "0", "–", "–",
    ]  # fmt: skip
    listed = {tenant["name"]: tenant for tenant in answered(call("tenants", "list", "--json"))}
    assert listed["acme-2"]["limits"]["max_bytes"] == 1_500_000_000
    assert listed["acme-2"]["limits"]["max_jobs"] is None
    assert listed["local"]["usage"]["deltas"] >= len(pushed)
    refused = deltadock("tenants", "set", "acme-2", "--max-deltas", "10GB")
    assert (refused.code, "neither a number nor 'none'" in refused.stderr) == (2, True)
    assert deltadock("tenants", "set", "acme-2").code == 2


def test_a_rate_limit_is_waited_for_aloud(
    service: Service, call: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = service.api.client
    acme = tenants.post("/v1/tenants", json={"name": "slow", "requests_per_minute": 0}).json()["id"]
    monkeypatch.setenv("DELTADOCK_API_KEY", issue_key(service.api.resources.settings, tenant=acme))

    def sleep(_: Stop, seconds: float) -> None:
        assert 1 <= seconds <= 60
        tenants.patch("/v1/tenants/slow", json={"requests_per_minute": None})

    monkeypatch.setattr("deltadock.client.blocking.LONG_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(Stop, "sleep", sleep)
    told = call("bases", "list").stderr
    assert re.match(r"Waiting \d.*: Your tenant may use 0 requests a minute\. ", told), told


def test_no_server_and_no_key_say_so(
    service: Service, deltadock: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTADOCK_API_KEY", "ddk_wrong")
    outcome = deltadock("ls")
    assert outcome.code == 1
    assert "The key is from DELTADOCK_API_KEY" in outcome.stderr
    monkeypatch.setattr(time, "sleep", lambda _: None)
    elsewhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    for arguments in (("ls", "--url", elsewhere), ("--url", elsewhere, "ls")):
        outcome = deltadock(*arguments)
        assert outcome.code == 3
        assert f"{elsewhere}/ does not answer" in outcome.stderr


def test_a_server_that_stops_ends_following_not_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(*_: object) -> None:
        raise Unavailable("It does not answer.")

    monkeypatch.setattr(Client, "wait", wait)
    with Client("http://127.0.0.1:9", "key") as client, pytest.raises(typer.Exit) as ended:
        follow(client, "job_1")
    assert ended.value.exit_code == UNAVAILABLE
    assert "The job goes on once the server runs again" in capsys.readouterr().err
