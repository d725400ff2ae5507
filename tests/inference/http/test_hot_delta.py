"""A node merges its hot delta; all answers stay the same."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltadock.inference.deltas import hot_delta
from tests.inference.support import PROMPT, RunningNode, Site, expected_text, start


def test_the_hot_delta_is_merged(
    site: Site, tmp_path: Path, generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_delta, "MIN_TOKENS", 50)
    monkeypatch.setattr(hot_delta, "WINDOW_TOKENS", 150)
    first, second = site.artifacts
    expected = {artifact: expected_text(site, artifact, generate, 24) for artifact in site.models}
    with start(site, tmp_path, node_max_deltas=3, node_merge=True) as node:

        def ask(artifact: str | None) -> None:
            with node.client(site.base, artifact) as client:
                answer = client.completions.create(
                    model="m", prompt=PROMPT, max_tokens=24, temperature=0
                )
            assert answer.choices[0].text == expected[artifact]

        def all_at_once() -> None:
            with ThreadPoolExecutor(6) as pool:
                list(pool.map(ask, [*site.models, *site.models]))

        all_at_once()
        assert merged(node) is None, "no delta has most of the traffic"
        until(lambda: merged(node) == first, lambda: ask(first))
        metrics = httpx.get(f"{node.url}/metrics").text
        assert "deltadock_node_merged_deltas 1.0" in metrics
        ask(first)
        all_at_once()
        assert merged(node) == first
        base = node.node.base
        assert base is not None
        assert base.users == 0, "a finished merge does not keep the base in use"
        until(lambda: merged(node) == second, lambda: ask(second))
        ask(second)
        all_at_once()


def merged(node: RunningNode) -> str | None:
    base = node.node.base
    assert base is not None
    return base.deltas.merged


def until(happens: Callable[[], bool], do: Callable[[], None]) -> None:
    end = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < end
        do()
