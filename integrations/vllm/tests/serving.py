"""`vllm serve` in a process of its own, for the tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from integrations.vllm.tests.engine import BASE

START_SECONDS = 600


@contextmanager
def serving(log: Path, *options: str, **environment: str) -> Iterator[httpx.Client]:
    """A client, with its key, of a server of the sample base as `it`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE),
        "--served-model-name", "it", "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "128", "--max-num-seqs", "32", "--max-num-batched-tokens", "512",
        "--enforce-eager", "--api-key", "secret", *options,
    ]  # fmt: skip
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | environment,
        ) as process,
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": "Bearer secret"},
            timeout=300,
        ) as client,
    ):
        try:
            _wait_until_ready(client, process, log)
            yield client
        finally:
            process.terminate()


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(log.read_text()[-4000:])
