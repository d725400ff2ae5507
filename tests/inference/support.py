"""A blob store with bases and deltas, and nodes on real sockets."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.artifacts.encodings import (
    SvdMatrix,
    Vectors,
    encode_exact,
    encode_new_rows,
    encode_svd,
    quantize_rows_midrise,
)
from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.writer import write_artifact
from deltadock.inference.node import InferenceNode
from deltadock.inference.server import create_app
from deltadock.settings import Settings
from deltadock.storage.blobs.local import LocalBlobStore

EOS = 261
PROMPT = "Hällo, wörld"


def make_vectors(generator: np.random.Generator, ranks: int, length: int) -> Vectors:
    return Vectors(
        codes=generator.integers(0, 16, (ranks, length), np.uint8),
        bits=np.full(ranks, 4),
        zero=np.full(ranks, 8, np.float16),
    )


def write_delta(
    path: Path,
    model: Any,
    base_digest: str,
    seed: int,
    *,
    added: Mapping[str, Any] = MappingProxyType({}),
    **files: str | None,
) -> Path:
    """An artifact with several encodings: matrices svd, the embedding rows, the norm exact.

    `added` maps names of matrices to float32 rows that the base lacks.
    """
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        if name == "model.embed_tokens.weight":
            noise = generator.normal(0, 0.2, parameter.shape).astype(np.float32)
            tensors[name] = quantize_rows_midrise(noise, 4, "F32")
        elif parameter.ndim == 2:
            rows, columns = parameter.shape
            matrix = SvdMatrix(
                make_vectors(generator, 4, rows),
                np.full(4, 0.002, np.float32),
                make_vectors(generator, 4, columns),
            )
            tensors[name] = encode_svd(matrix, "F32", {})
    for name, rows in added.items():
        tensors[name] = encode_new_rows(tensors[name], rows, len(model.get_parameter(name)), "F32")
    norm = model.model.norm.weight.detach().numpy() * generator.uniform(0.5, 1.5, 32)
    tensors["model.norm.weight"] = encode_exact(norm.astype(np.float32), "F32", (32,))
    manifest = {
        "base_digest": base_digest,
        "method": "test",
        "files": files,
        "checkpoint_bytes": 0,
        "parameters": 0,
        "nominal_bits": None,
    }
    write_artifact(path, tensors, manifest)
    return path


@dataclass
class Site:
    """A blob store with two bases and deltas of the first, and the merged models."""

    blobs: LocalBlobStore
    home: Path
    base: str
    other_base: str
    artifacts: list[str]
    foreign: str
    models: dict[str | None, Any]


def make_site(home: Path, make_model: Any, save_checkpoint: Callable[..., Path]) -> Site:
    """Two bases and three deltas in a new store."""
    blobs = LocalBlobStore(home / "blobs")

    def put(seed: int) -> tuple[Any, Path, CheckpointManifest]:
        model = make_model("qwen2", seed, eos_token_id=EOS)
        folder = save_checkpoint(model, home / f"base-{seed}", eos=EOS)
        manifest = scan_folder(folder)
        for file in manifest.files:
            blobs.put_file(folder / file.path)
        blobs.put_bytes(manifest.to_json())
        return model, folder, manifest

    model, folder, manifest = put(0)
    _, _, other = put(1)
    models: dict[str | None, Any] = {None: model}
    artifacts = []
    for seed in (1, 2):
        path = write_delta(home / f"delta-{seed}", model, manifest.weights_digest, seed)
        artifacts.append(blobs.put_file(path))
        merge(folder, path, home / f"merged-{seed}")
        models[artifacts[-1]] = type(model).from_pretrained(home / f"merged-{seed}")
    foreign = blobs.put_file(write_delta(home / "foreign", model, other.weights_digest, 3))
    return Site(blobs, home, manifest.digest, other.digest, artifacts, foreign, models)


class RunningNode(uvicorn.Server):
    """A node behind a real socket, in a thread."""

    def __init__(self, settings: Settings, blobs: LocalBlobStore) -> None:
        self.app = create_app(settings, blobs)
        super().__init__(uvicorn.Config(self.app, log_config=None, lifespan="on"))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._up = threading.Event()
        self._thread = threading.Thread(target=self.run, args=([self._socket],))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._up.set()

    @property
    def node(self) -> InferenceNode:
        node: InferenceNode = self.app.state.node
        return node

    def __enter__(self) -> "RunningNode":
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.should_exit = True
        self._thread.join()
        self._socket.close()

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the node's event loop, soon."""
        self._loop.call_soon_threadsafe(function, *args)

    def client(self, base: str, artifact: str | None = None) -> openai.OpenAI:
        headers = {"Deltadock-Base": base} | (
            {"Deltadock-Artifact": artifact} if artifact is not None else {}
        )
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            default_headers=headers,
            max_retries=0,
            http_client=httpx.Client(verify=False),  # loading certificates takes 50 ms
        )


def hold(node: RunningNode) -> threading.Event:
    """Block the engine until the event is set."""
    go_on, held = threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        go_on.wait(30)

    node.node.base.engine._inbox.put(wait)
    assert held.wait(30)
    return go_on


def start(site: Site, home: Path, **settings: Any) -> RunningNode:
    return RunningNode(
        Settings(home=home, device="cpu", node_context_tokens=120, **settings), site.blobs
    )


def expected_text(site: Site, artifact: str | None, generate: Any, count: int) -> str:
    """transformers' greedy answer to PROMPT as text, up to the end of sequence."""
    ids = json.loads((site.home / "base-0" / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = {number: piece for piece, number in ids.items()}
    decoder = {ord(piece): byte for byte, piece in _byte_alphabet().items()}
    encode = [ids[_byte_alphabet()[byte]] for byte in PROMPT.encode()]
    answer = generate(site.models[artifact], encode, count)
    if EOS in answer:
        answer = answer[: answer.index(EOS)]
    raw = bytes(decoder[ord(pieces[token])] for token in answer if token in pieces)
    return raw.decode(errors="replace")


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
