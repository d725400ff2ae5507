"""Errors of one delta do not affect requests for others."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from deltadock.artifacts.folder import scan_folder
from deltadock.errors import Unavailable
from deltadock.inference.base import ServedBase
from tests.inference.support import (
    PROMPT,
    RunningNode,
    Site,
    expected_text,
    hold,
    start,
    write_delta,
)


@pytest.fixture
def node(site: Site, tmp_path: Path) -> Iterator[RunningNode]:
    with start(site, tmp_path, node_max_deltas=3) as running:
        with running.client(site.base, site.artifacts[0]) as client:
            client.completions.create(model="m", prompt="a", max_tokens=1)
        yield running


def base_of(node: RunningNode) -> ServedBase:
    assert node.node.base is not None
    return node.node.base


def refused(node: RunningNode, base: str, artifact: str) -> openai.APIStatusError:
    with node.client(base, artifact) as client, pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="m", prompt="a")
    return caught.value


@pytest.fixture
def others(site: Site, node: RunningNode, generate: Any) -> Iterator[Callable[[], None]]:
    """Checks answers of the base and a good delta before, during and after the test."""
    expected = {a: expected_text(site, a, generate, 24) for a in (None, site.artifacts[0])}
    answers: list[tuple[str | None, str]] = []
    enough = threading.Event()

    def ask() -> None:
        for artifact in expected:
            with node.client(site.base, artifact) as client:
                answer = client.completions.create(
                    model="m", prompt=PROMPT, max_tokens=24, temperature=0
                )
            answers.append((artifact, answer.choices[0].text))

    def keep_asking() -> None:
        while not enough.is_set():
            ask()

    thread = threading.Thread(target=keep_asking)
    ask()
    thread.start()

    def check() -> None:
        enough.set()
        thread.join()
        ask()
        assert len(answers) >= 4
        assert [text for artifact, text in answers if text != expected[artifact]] == []

    yield check
    enough.set()
    thread.join()


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TWO = np.ones((2, 32), np.float32)


@pytest.mark.parametrize(
    ("added", "says", "words"),
    [
        ({EMBEDDING: TWO}, 266, "2 tokens to the embedding, but 0 to the head"),
        ({EMBEDDING: TWO, HEAD: TWO[:1]}, 266, "2 tokens to the embedding, but 1 to the head"),
        ({EMBEDDING: TWO, HEAD: TWO}, 267, "states 267 tokens"),
        ({EMBEDDING: TWO, HEAD: TWO}, 264, "states 264 tokens"),
        ({}, 266, "states 266 tokens"),
        ({"model.layers.0.mlp.up_proj.weight": TWO}, 264, "not have one row per token"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    site: Site,
    node: RunningNode,
    others: Callable[[], None],
    tmp_path: Path,
    added: dict[str, Any],
    says: int,
    words: str,
) -> None:
    folder = site.home / "base-0"
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": says}
    digest = scan_folder(folder).weights_digest
    path, files = tmp_path / "a.delta", {"config.json": json.dumps(config)}
    write_delta(path, site.models[None], digest, 5, added=added, **files)
    error = refused(node, site.base, site.blobs.put_file(path))
    assert error.code == "invalid_artifact"
    assert words in error.message
    others()


def test_a_corrupt_artifact_is_refused_and_fetched_again(
    site: Site, node: RunningNode, others: Callable[[], None], tmp_path: Path, generate: Any
) -> None:
    artifact = site.artifacts[1]
    blob = site.blobs.path(artifact)
    good = tmp_path / "good"
    shutil.copyfile(blob, good)
    try:
        blob.unlink()
        shutil.copyfile(site.home / "delta-1", blob)  # intact, but not the named artifact
        error = refused(node, site.base, artifact)
        assert (error.status_code, error.code) == (502, "damaged_blob")
        assert "damaged" in error.message
        assert not list((tmp_path / "cache").rglob(f"*{artifact}*")), "nothing of it is cached"
    finally:
        blob.unlink()
        shutil.copyfile(good, blob)
    with node.client(site.base, artifact) as client:
        answer = client.completions.create(model="m", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected_text(site, artifact, generate, 8)
    others()


def test_a_delta_for_another_base_is_refused(
    site: Site, node: RunningNode, others: Callable[[], None]
) -> None:
    error = refused(node, site.base, site.foreign)
    assert (error.status_code, error.code) == (409, "base_mismatch")
    others()


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (RuntimeError("half of it fits"), 500, "inference_failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), 503, "unavailable"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503, "unavailable"),
    ],
)
def test_a_load_that_fails_halfway_is_cleaned_up_and_retried(
    site: Site,
    node: RunningNode,
    others: Callable[[], None],
    generate: Any,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    status: int,
    code: str,
) -> None:
    model, artifact = base_of(node).model, site.artifacts[1]
    install, slots = model.install, []

    def broken(slot: int, deltas: Any, settings: Any) -> None:
        half = dict(list(deltas.items())[: len(deltas) // 2])
        install(slot, half, settings)
        slots.append(slot)
        raise fault

    monkeypatch.setattr(model, "install", broken)
    error = refused(node, site.base, artifact)
    assert (error.status_code, error.code) == (status, code)
    monkeypatch.setattr(model, "install", install)
    tiers = base_of(node).deltas
    assert artifact not in tiers.slots.residents
    [slot] = slots
    with node.client(site.base, site.artifacts[1]) as client:
        answer = client.completions.create(model="m", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected_text(site, artifact, generate, 8)
    assert tiers.slots.residents[artifact].slot == slot, "the slot is free again"
    others()


def test_a_slow_load_does_not_block_other_requests(
    site: Site, node: RunningNode, others: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    read = site.blobs._place

    def slow(digest: str, target: Path) -> None:
        assert may_end.wait(60)
        read(digest, target)

    monkeypatch.setattr(site.blobs, "_place", slow)
    loaded: list[int] = []

    def load() -> None:
        answer = httpx.post(f"{node.url}/v1/deltas/{site.artifacts[1]}/load", timeout=60)
        loaded.append(answer.status_code)

    thread = threading.Thread(target=load)
    thread.start()
    others()
    assert loaded == []
    may_end.set()
    thread.join()
    assert loaded == [200]


def test_a_broken_base_is_reported_and_released(site: Site, node: RunningNode) -> None:
    base_of(node).engine.stop()
    assert httpx.get(f"{node.url}/readyz").status_code == 503
    assert httpx.get(f"{node.url}/healthz").status_code == 200


def test_a_stopping_node_finishes_running_requests_and_rejects_new_ones(
    site: Site, node: RunningNode
) -> None:
    go_on = hold(node)
    with node.client(site.base, site.artifacts[0]) as client:
        running = client.completions.create(model="m", prompt="a", max_tokens=9, stream=True)
        asyncio.run_coroutine_threadsafe(node.node.announce_stop(), node._loop).result(10)
        assert httpx.post(f"{node.url}/v1/resume").status_code == 409, "it stops all the same"
        error = refused(node, site.base, site.artifacts[0])
        assert (error.status_code, error.code) == (Unavailable.status, "unavailable")
        assert httpx.get(f"{node.url}/readyz").status_code == 503
        go_on.set()
        ends = [choice.finish_reason for chunk in running for choice in chunk.choices]
    assert ends[-1] in {"stop", "length"}
