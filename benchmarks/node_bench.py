"""A large random model on its engine, with as many deltas as one asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from benchmarks.serving import (
    Request,
    copied,
    prompt,
    random_changes,
    run,
    shapes_of,
    taken_over,
)
from deltadock.inference.deltas.reading import HostDelta
from deltadock.inference.engine.engine import Engine
from deltadock.inference.model.model import BaseModel
from deltadock.inference.model.routing import DeltaLimits
from deltadock.inference.model.weight_deltas import WeightDelta, pinned
from deltadock.inference.prompts.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    shape: dict[str, int]
    running: int = 12
    held: tuple[int, ...] = (32, 64)
    prompt: int = 160
    tokens: int = 64
    names: int = 500
    room: int = 32
    arrivals: int = 600
    answer: int = 32
    copied_bytes: int = 1 << 30


class Bench:
    """The model, its engine, and one delta in host memory."""

    def __init__(self, scale: Scale, device: torch.device, plain: Any) -> None:
        self.scale, self.device = scale, device
        slots = max(scale.held) + 1
        self.delta = random_changes(shapes_of(plain), str(device))
        self.weights_nbytes = sum(
            tensor.nbytes for name, tensor in plain.named_parameters() if "embed" not in name
        )
        self.model: BaseModel = taken_over(plain, DeltaLimits(slots=slots, rows=1024))
        self.engine = Engine(
            self.model, max_sequences=slots - 1, context_tokens=256, pass_tokens=1024
        )
        self.engine.start()
        host: dict[str, WeightDelta] = {name: it.to("cpu") for name, it in self.delta.items()}
        if device.type == "cuda":
            host = {name: pinned(change) for name, change in host.items()}
        tokenizer = Tokenizer({"tokenizer.json": FastTokenizer(models.BPE()).to_str()})
        size = sum(change.nbytes for change in self.delta.values())
        self.host = HostDelta(host, tokenizer, size)
        self._seed = 0

    def request(self, slot: int, weights: str, tokens: int, **how: Any) -> Request:
        """A prompt that nobody has seen."""
        self._seed += 1
        scale = self.scale
        new = prompt(scale.prompt, self._seed, scale.shape["vocab_size"])
        return Request(new, slot, weights, tokens, **how)

    def step_seconds(self, slots: Sequence[int]) -> float:
        """Seconds of a decode step with a sequence on each of the slots; the best of three runs."""
        best = float("inf")
        for _ in range(4):  # the first captures
            requests = [self.request(slot, f"slot {slot}", self.scale.tokens) for slot in slots]
            run(self.engine, requests)
            begin = max(request.first for request in requests)
            end = max(request.ended for request in requests)
            best = min(best, (end - begin) / (self.scale.tokens - 1))
        return best

    def hold(self, count: int) -> None:
        """Have deltas in slots 1 to `count`, each in memory of its own."""
        for slot in range(1, count + 1):
            self.model.remove(slot)
            self.model.install(slot, copied(self.delta))
