"""Both clients against a running api: push, wait, page, stream, download, aliases, keys."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

import deltadock
from deltadock.client import loading
from deltadock.client.asynchronous import AsyncClient
from deltadock.client.blocking import Client
from deltadock.client.progress import in_notebook
from deltadock.client.resources import Delta, Job
from deltadock.errors import (
    ArchitectureMismatch,
    BaseMismatch,
    BitsOutOfRange,
    Cancelled,
    Conflict,
    Forbidden,
    HashMismatch,
    InvalidAdapter,
    InvalidCalibration,
    InvalidGoal,
    InvalidInput,
    NotFound,
    NotReady,
    Unauthorized,
    UnknownMethod,
    UnsupportedModel,
)
from deltadock.storage.tables import Scope
from tests.api.support import issue_key, weights
from tests.client.support import Service, write_finetune, write_text
from tests.client.test_loading import load, make_base, make_delta


@pytest.fixture
def finetune(tmp_path: Path) -> Path:
    return write_finetune(tmp_path / "finetuned")


@pytest.fixture
def ready(service: Service, client: Client, tmp_path: Path) -> Delta:
    """A ready delta, of bytes of its own."""
    name = f"maths/m{len(list(client.models()))}"
    pushed = client.push(write_finetune(tmp_path / "ready"), name, "tiny", method="bitdelta")
    if pushed.job.state != "ready":  # another test has pushed the same fine-tune
        service.api.make_ready({"id": pushed.delta.id, "job": pushed.job.id}, b"some bytes" * 500)
    return client.delta(pushed.delta.id)


def test_a_size_that_unchanged_tensors_bring_within_reach_is_accepted(
    client: Client, service: Service, tmp_path: Path
) -> None:
    large = {"model.layers.0.mlp.up_proj.weight": (64, 512)}
    base = service.api.checkpoint(weights(0, **large))
    client.create_base("large", base)
    changed = write_finetune(tmp_path / "changed")
    (changed / "model.safetensors").write_bytes(weights(1, **large))
    with pytest.raises(InvalidGoal, match="ratio 40 cannot be reached"):
        client.push(changed, "maths/changed", "large", method="adamix", ratio=40.0)
    same = write_finetune(tmp_path / "same")
    (same / "model.safetensors").write_bytes(weights(0, **large))
    (same / "generation_config.json").write_text("{}")
    pushed = client.push(same, "maths/same", "large", method="adamix", ratio=40.0)
    assert pushed.delta.version == 1
    client.delete(pushed.delta.id)
    client.delete_base("large")


def test_a_push_is_awaited_and_shows_where_it_is(
    service: Service, client: Client, finetune: Path, tmp_path: Path
) -> None:
    sent: dict[str, int] = {}
    pushed = client.push(
        finetune,
        "maths/pushed",
        "tiny",
        bits=2.0,
        method="adamix",
        calibration={write_text(tmp_path / "a.txt"): 2.0, "sampled": 1.0},
        recipe={"epochs": 3},
        progress=lambda name, done, _: sent.update({name: done}),
    )
    assert sent.keys() == {"config.json", "model.safetensors"}
    assert (pushed.delta.reference, pushed.job.state) == ("maths/pushed:1", "queued")
    assert pushed.delta.lineage is not None
    assert pushed.delta.lineage.recipe == {"epochs": 3}
    states: list[str] = []

    def finish(job: Job) -> None:
        states.append(job.state)
        if job.state == "queued":
            service.api.make_ready({"id": pushed.delta.id, "job": job.id})

    delta = pushed.wait(finish)
    assert states[0] == "queued"
    assert states[-1] == "ready"
    assert (delta.state, delta.goal and str(delta.goal)) == ("ready", "bits 2")
    assert client.report(delta.id).kl == 0.01
    assert [line.message for line in client.log(pushed.job.id, follow=True)]
    again = client.push(finetune, "maths/pushed", "tiny", bits=2.0, method="adamix",
                        calibration={tmp_path / "a.txt": 2.0, "sampled": 1.0})  # fmt: skip
    assert again.wait().id == delta.id


def test_a_cancelled_push_raises(client: Client, finetune: Path) -> None:
    pushed = client.push(finetune, "maths/cancelled", "tiny", method="low-rank")
    assert client.cancel(pushed.job.id).state == "cancelled"
    with pytest.raises(Cancelled, match=r"was cancelled\. `retry` continues it"):
        pushed.wait()
    assert client.retry(pushed.job.id).state == "queued"
    assert [job.id for job in client.jobs(state=["queued"], delta=pushed.delta.id)]
    assert client.cancel(pushed.job.id).is_final
    with pytest.raises(NotReady):
        client.download(pushed.delta.id, finetune / "x")


def test_a_push_is_refused_before_anything_is_uploaded(
    service: Service, client: Client, finetune: Path
) -> None:
    files = {"config.json": b'{"model_type": "made_up"}', "model.safetensors": weights(0)}
    unknown = service.api.upload("checkpoint", files)["checkpoint"]["digest"]
    client.create_base("unknown", unknown)
    sent: list[object] = []
    note = sent.append
    with pytest.raises(InvalidInput, match="project/model"):
        client.push(finetune, "skills", "tiny", progress=lambda *_: note(1))
    with pytest.raises(NotFound, match="no base 'huge'"):
        client.push(finetune, "maths/skills", "huge", progress=lambda *_: note(1))
    with pytest.raises(NotFound, match=r"no calibration file .*nowhere\.txt"):
        client.push(finetune, "maths/skills", "tiny", calibration=finetune / "nowhere.txt",
                    progress=lambda *_: note(1))  # fmt: skip
    with pytest.raises(NotFound, match="no delta 'maths/parent:7'"):
        client.push(finetune, "maths/skills", "tiny", parent="maths/parent:7",
                    progress=lambda *_: note(1))  # fmt: skip
    asked: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"bits": 1.0, "ratio": 4.0}, InvalidGoal),
        ({"max_kl": -1.0}, InvalidGoal),
        ({"bits": 12.0}, BitsOutOfRange),
        ({"method": "optimax"}, UnknownMethod),
        ({"method": "bitdelta", "bits": 1.0}, BitsOutOfRange),
        ({"method": "lora"}, Conflict),
        ({"calibration": {"sampled": -1.0}}, InvalidCalibration),
    ]
    for options, refusal in asked:
        with pytest.raises(refusal):
            client.push(finetune, "maths/skills", "tiny", progress=lambda *_: note(1), **options)
    config = finetune / "config.json"
    with pytest.raises(UnsupportedModel, match="'made_up' cannot be calibrated"):
        client.push(finetune, "maths/skills", "unknown", progress=lambda *_: note(1))
    client.delete_base("unknown")
    adapter = finetune.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    (adapter / "adapter_model.safetensors").write_bytes(weights(1))
    with pytest.raises(InvalidAdapter, match="use_dora"):
        client.push(adapter, "maths/skills", "tiny", progress=lambda *_: note(1))
    config.write_text(config.read_text().replace("llama", "gemma"))
    with pytest.raises(ArchitectureMismatch, match="base is a 'llama' model, the fine-tune a 'ge"):
        client.push(finetune, "maths/skills", "tiny", progress=lambda *_: note(1))
    assert sent == []


def test_lists_are_fetched_page_by_page(service: Service, client: Client, ready: Delta) -> None:
    for number in range(3):
        client.create_delta(f"paged/m{number}", "tiny", ready.checkpoint, method="bitdelta")
    asked: list[str] = []
    client._http.event_hooks["request"].append(lambda request: asked.append(str(request.url)))
    deltas = client.deltas(text="paged", limit=2)
    assert asked == []
    assert next(deltas).name == "paged/m2"
    assert len(asked) == 1
    assert [delta.name for delta in deltas] == ["paged/m1", "paged/m0"]
    assert len(asked) == 2
    assert [model.name for model in client.models(text="paged", limit=1)] == [
        f"paged/m{number}" for number in range(3)
    ]
    assert [base.name for base in client.bases()] == ["tiny"]
    assert any(method.default for method in client.methods())
    preview = client.preview("tiny", ready.checkpoint, method="adamix", bits=1.0)
    assert preview.artifact_bytes > 0


def test_answers_come_whole_or_in_pieces(client: Client, ready: Delta) -> None:
    whole = client.generate(ready.reference, "17 + 25 =", max_tokens=8, temperature=0.0)
    assert (str(whole), whole.usage and whole.usage.completion_tokens) == (" 42", 3)
    pieces = list(client.stream(ready.reference, "17 + 25 ="))
    assert "".join(map(str, pieces)) == " 42"
    assert pieces[-1].usage is not None
    with pytest.raises(NotFound, match="nothing"):
        list(client.stream("nothing", "x"))


def test_a_delta_is_downloaded_verified_and_resumed(
    service: Service, client: Client, ready: Delta, tmp_path: Path
) -> None:
    path, seen = tmp_path / "it.delta", list[int]()
    assert ready.artifact is not None
    client.download(ready.reference, path, lambda *sizes: seen.append(sizes[1]))
    resolved = client.resolve(ready.reference)
    assert client.resolve(resolved.digest).digest == resolved.digest  # of several names, one
    assert (resolved.delta, resolved.bytes) == (ready.id, path.stat().st_size)
    whole = path.read_bytes()
    assert seen[-1] == len(whole) == ready.artifact.bytes
    path.unlink()
    part = tmp_path / f"it.delta.{ready.artifact.digest[:16]}.part"
    part.write_bytes(whole[:4000])
    client.download(ready.id, path, lambda *sizes: seen.append(sizes[1]))
    assert path.read_bytes() == whole
    assert not part.exists()
    part.write_bytes(b"x" * len(whole))
    with pytest.raises(HashMismatch, match="Download it again"):
        client.download(ready.id, path)
    assert not part.exists()
    with pytest.raises(NotFound, match="There is no folder"):
        client.download(ready.id, tmp_path / "nowhere" / "it.delta")


def test_aliases_move_and_deletions_are_undone(client: Client, ready: Delta) -> None:
    model = client.move_alias(ready.name, "prod", ready.version, reason="tested", expected=0)
    assert {alias.alias: alias.version for alias in model.aliases or ()}["prod"] == 1
    assert client.delta(f"{ready.name}@prod").id == ready.id
    assert next(client.alias_moves(ready.name)).reason == "tested"
    client.remove_alias(ready.name, "prod")
    client.delete(ready.reference)
    with pytest.raises(NotFound):
        client.delta(ready.reference)
    assert client.restore(ready.id).reference == ready.reference


def test_keys_are_made_used_and_revoked(service: Service, client: Client) -> None:
    made = client.create_key("ci", ["read"])
    assert made.key is not None
    with Client(service.url, made.key) as reader:
        assert list(reader.bases())
        with pytest.raises(Forbidden, match="scope"):
            reader.create_base("x", "0" * 64)
    assert (made.id, "valid") in [(key.id, key.state) for key in client.keys(limit=1)]
    client.revoke_key(made.id)
    assert [(key.id, key.state) for key in client.keys(prefix=made.prefix)] == [
        (made.id, "revoked")
    ]
    with Client(service.url, "ddk_wrong") as stranger, pytest.raises(Unauthorized):
        stranger.nodes()
    key = issue_key(service.api.resources.settings, scopes=[Scope.INFER])
    with Client(service.url, key) as talker:
        assert talker.generate("tiny", "x").text == " 42"


def test_the_asynchronous_client_does_the_same(
    service: Service, finetune: Path, tmp_path: Path
) -> None:
    async def collect(items: AsyncIterator[Any]) -> list[Any]:
        return [item async for item in items]

    async def run() -> None:
        async with AsyncClient(service.url, service.key) as client:
            pushed = await client.push(finetune, "maths/async", "tiny", method="bitdelta")
            if not pushed.job.is_final:
                service.api.make_ready({"id": pushed.delta.id, "job": pushed.job.id})
            delta = await pushed.wait()
            assert delta.state == "ready"
            assert delta.id in {found.id for found in await collect(client.deltas(limit=1))}
            pieces = await collect(client.stream(delta.id, "17 + 25 ="))
            assert "".join(piece.text for piece in pieces) == " 42"
            await collect(client.log(delta.job, follow=True))
            await client.download(delta.id, tmp_path / "a.delta")
            with pytest.raises(NotFound):
                await client.delta("maths/none")

    anyio.run(run)
    assert (tmp_path / "a.delta").exists()


def test_another_base_is_refused_by_the_names_of_delta_and_base(
    service: Service, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pushed = client.push(write_finetune(tmp_path / "tuned", 91), "maths/named", "tiny", bits=2.0)
    artifact = make_delta(make_base("llama", tmp_path / "base"), tmp_path / "a.delta").read_bytes()
    service.api.make_ready({"id": pushed.delta.id, "job": pushed.job.id}, artifact)
    other = make_base("qwen2", tmp_path / "other")
    said = r"^maths/named:1 needs the base with .* On the server that base is 'tiny'\.$"
    for _ in range(2):  # the client stays open
        with pytest.raises(BaseMismatch, match=said):
            deltadock.load_delta(load(other), "maths/named", client=client)
    with pytest.raises(BaseMismatch, match=said.replace("needs", "belongs to")):
        deltadock.from_pretrained(other, "maths/named@default", client=client)


def test_load_delta_fetches_a_name_once(
    service: Service, client: Client, ready: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("DELTADOCK_API_URL", service.url)
    monkeypatch.setenv("DELTADOCK_API_KEY", service.key)
    path = loading.fetch(ready.reference)
    assert ready.artifact is not None
    assert path.name == f"{ready.artifact.digest}.delta"
    changed = path.stat().st_mtime_ns
    assert loading.fetch(f"{ready.name}@default", client).stat().st_mtime_ns == changed
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert loading.fetch(ready.reference).read_bytes() == whole, "hashed at every use"
    (tmp_path / ready.name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert loading.fetch(ready.name).read_bytes() == whole, "a folder is no delta"
    with pytest.raises(NotFound, match="neither a delta file nor a name"):
        deltadock.load_delta(None, "nowhere.delta")
    with pytest.raises(NotFound, match="neither a delta file nor a name"):
        deltadock.load_delta(None, Path(ready.name))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for IPython in a notebook's kernel, and what it shows."""
    shown: list[str] = []

    def display(job: Job, display_id: bool) -> SimpleNamespace:
        assert display_id
        shown.append(job._repr_html_())
        return SimpleNamespace(update=lambda job: shown.append(job._repr_html_()))

    shell = SimpleNamespace(kernel=object())
    module = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython", module)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", module.display)
    return shown


def test_in_a_notebook_a_push_shows_a_bar(
    service: Service, client: Client, finetune: Path, notebook: list[str]
) -> None:
    assert in_notebook()
    pushed = client.push(finetune, "maths/notebook", "tiny", method="bitdelta")
    if not pushed.job.is_final:
        service.api.make_ready({"id": pushed.delta.id, "job": pushed.job.id})
    pushed.wait()
    assert "<progress max='100' value='100.0'>" in notebook[-1]
    assert "maths/notebook:1" in pushed._repr_html_()
