"""What the node's benchmarks share: random models, random deltas, and requests to an engine."""

import dataclasses
import threading
import time
from collections.abc import Sequence as Rows
from typing import Any

import torch

from benchmarks.kernel_layers import random_delta
from inference.attention import ATTENTION
from inference.changes import Change
from inference.engine import Engine
from inference.layers import DeltaLimits
from inference.model import FAMILIES, BaseModel
from inference.sampler import SamplingParams
from inference.sequence import Event, Sequence
from inference.tokens import TextStream
from kernels.svd_delta import PackedDelta


def random_model(family: str, device: str, dtype: torch.dtype, **shape: Any) -> Any:
    """A causal language model of transformers' with random weights and without an end of text."""
    config_class, model_class = FAMILIES[family]
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = config_class(**shape, **ends)
    torch.manual_seed(0)
    with torch.device(device):
        return model_class._from_config(config, dtype=dtype).eval()


def taken_over(model: Any, limits: DeltaLimits) -> BaseModel:
    """The same model, on the same weights, as the node runs it."""
    model.set_attn_implementation(ATTENTION)
    return BaseModel(model, limits)


def random_changes(model: BaseModel, device: str) -> dict[str, Change]:
    """A delta of one bit a weight for every linear layer of the blocks."""
    generator = torch.Generator(device).manual_seed(0)
    return {
        name: random_delta(parameter.shape[0], parameter.shape[1], device, generator)
        for name, parameter in model._parameters.items()
        if name.endswith("_proj.weight")
    }


def copied(changes: dict[str, Change]) -> dict[str, Change]:
    """The same delta again, in memory of its own."""
    return {
        name: dataclasses.replace(change, words=change.words.clone())
        for name, change in changes.items()
        if isinstance(change, PackedDelta)
    }


def packed_bytes(changes: dict[str, Change]) -> int:
    """Bytes of a delta as a kernel reads it."""
    return sum(change.nbytes for change in changes.values() if isinstance(change, PackedDelta))


class _Dots(TextStream):
    """A dot for every token: tokenizers are not what is measured."""

    def __init__(self) -> None:
        self.stopped = False

    def push(self, token: int) -> str:
        return "."

    def finish(self) -> str:
        return ""


class Request:
    """One greedy answer of `tokens` tokens, and when it came (seconds of the monotonic clock)."""

    def __init__(self, prompt: list[int], slot: int, weights: str, tokens: int) -> None:
        self.sent = self.first = self.ended = 0.0
        self.error: Exception | None = None
        self.done = threading.Event()
        self.sequence = Sequence(
            tokens=list(prompt),
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0),
            delta_slot=slot,
            weights=weights,
            eos_ids=frozenset(),
            stream=_Dots(),
            emit=self._receive,
        )

    def send(self, engine: Engine) -> None:
        """Submit the request."""
        self.sent = time.monotonic()
        engine.submit(self.sequence)

    def _receive(self, event: Event) -> None:
        now = time.monotonic()
        if event.tokens and not self.first:
            self.first = now
        if event.finish is not None:
            self.ended, self.error = now, event.error
            self.done.set()

    def wait(self) -> None:
        """Wait for the end; raise what the request failed with."""
        self.done.wait()
        if self.error is not None:
            raise self.error


def run(engine: Engine, requests: Rows[Request]) -> float:
    """Send all at once and wait for all; returns the seconds it took."""
    began = time.monotonic()
    for request in requests:
        request.send(engine)
    for request in requests:
        request.wait()
    return time.monotonic() - began


def prompt(length: int, seed: int, vocabulary: int) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (length,), generator=generator).tolist()
