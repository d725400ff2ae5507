"""What the node's benchmarks share: random models, random deltas, and requests to an engine."""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from typing import Any

import torch

from benchmarks.kernel_layers import random_delta
from deltadock.inference.engine.engine import Engine
from deltadock.inference.engine.sampler import SamplingParams
from deltadock.inference.engine.sequence import Event, Sequence
from deltadock.inference.model.attention import ATTENTION
from deltadock.inference.model.loading import FAMILIES
from deltadock.inference.model.model import BaseModel
from deltadock.inference.model.routing import DeltaLimits
from deltadock.inference.model.weight_deltas import WeightDelta
from deltadock.inference.prompts.tokenizer import TextStream
from deltadock.kernels.svd_delta import PackedDelta


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


def shapes_of(model: Any) -> dict[str, torch.Size]:
    """Name and shape of the linear layers of the blocks, which a delta changes."""
    return {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.weight")
    }


def random_changes(shapes: Mapping[str, torch.Size], device: str) -> dict[str, PackedDelta]:
    """A delta of one bit a weight."""
    generator = torch.Generator(device).manual_seed(0)
    return {
        name: random_delta(h_out, h_in, device, generator) for name, (h_out, h_in) in shapes.items()
    }


def copied(changes: Mapping[str, PackedDelta]) -> dict[str, WeightDelta]:
    """The same delta again, in memory of its own."""
    return {
        name: dataclasses.replace(change, words=change.words.clone())
        for name, change in changes.items()
    }


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

    def __init__(
        self,
        prompt: list[int],
        slot: int,
        weights: str,
        tokens: int,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`ended` is called from the engine's thread."""
        self.sent = self.first = self.ended = 0.0
        self.error: Exception | None = None
        self.done = threading.Event()
        self._tell_end = ended
        self.sequence = Sequence(
            tokens=list(prompt),
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0),
            delta_slot=slot,
            model_key=weights,
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
            self._tell_end()

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
