"""Tiny random models, a byte-level tokenizer, and engines to run them on."""

import json
import queue
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from deltadock.artifacts.folder import scan_folder
from deltadock.inference.engine.engine import Engine
from deltadock.inference.engine.sampling import SamplingParams, make_draws
from deltadock.inference.engine.sequence import Event, Sequence
from deltadock.inference.model.families import FAMILIES
from deltadock.inference.model.loading import load_base
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.model.weight_deltas import TensorDelta
from deltadock.inference.prompts.tokenizer import TextStream, Tokenizer
from tests.inference.grammars import Grammars

if TYPE_CHECKING:
    from tests.inference.support import Site

VOCABULARY = 264
EOS = 257


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """Every byte is a token, so that most characters are spread over tokens; 256.. are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = FastTokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<special-{i}>" for i in range(VOCABULARY - len(alphabet))])
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: str) -> Tokenizer:
    """The tokenizer alone, without an end-of-sequence id."""
    return Tokenizer({"tokenizer.json": tokenizer_json})


@pytest.fixture(scope="session")
def grammars() -> Iterator[Grammars]:
    """Grammars for a tokenizer with one token per byte."""
    made = Grammars()
    yield made
    made.processes.close()


def random_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """A random causal language model of transformers' own classes, float32."""
    config = FAMILIES[family].config_class(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "vocab_size": VOCABULARY,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": 0.3,
            "max_position_embeddings": 128,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **settings,
        }
    )
    torch.manual_seed(seed)
    model = FAMILIES[family].model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start out constant
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """The tokens that transformers' greedy `generate` appends to `prompt`."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def _save(model: Any, folder: Path, tokenizer_json: str, eos: int | None = None) -> Path:
    """Write a checkpoint folder as Hugging Face would."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(family, seed, **config)`: a random model of transformers' own classes."""
    return random_model


@pytest.fixture(scope="session")
def generate() -> Callable[[Any, list[int], int], list[int]]:
    """`generate(model, prompt, count)`: transformers' own greedy answer."""
    return _generate


@pytest.fixture(scope="session")
def save_checkpoint(tokenizer_json: str) -> Callable[..., Path]:
    """`save_checkpoint(model, folder, eos)`: write a checkpoint folder."""
    return partial(_save, tokenizer_json=tokenizer_json)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[..., Path]) -> "Site":
    """A blob store with two bases and deltas of the first, and the merged models."""
    from tests.inference.support import make_site  # the engine's tests do without a web server

    return make_site(tmp_path_factory.mktemp("site"), random_model, save_checkpoint)


@dataclass
class Outcome:
    """A sequence and its events."""

    sequence: Sequence
    events: list[Event] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.sequence.tokens[self.sequence.prompt_length :]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def finish(self) -> str | None:
        return self.events[-1].finish if self.events else None


class Bench:
    """An engine with a model, for tests to submit sequences to."""

    def __init__(self, model: DeltaModel, tokenizer: Tokenizer, **limits: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.engine = Engine(
            model, **{"max_sequences": 4, "context_tokens": 64, "pass_tokens": 16, **limits}
        )
        self._events: queue.SimpleQueue[tuple[Outcome, Event]] = queue.SimpleQueue()
        self.engine.start()

    def install(self, slot: int, changes: Mapping[str, TensorDelta]) -> None:
        """Prepare and install deltas in a slot."""
        self.model.install(slot, self.model.prepare(changes))

    def submit(
        self, prompt: list[int], slot: int = 0, choice: int = 0, matcher: Any = None, **how: Any
    ) -> Outcome:
        """Submit a sequence, greedy by default."""
        sampling = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **how})
        outcome = Outcome(
            Sequence(
                tokens=list(prompt),
                sampling=sampling,
                delta_slot=slot,
                queue_key=f"digest-{slot}",
                end_ids=self.tokenizer.eos_ids,
                stream=TextStream(self.tokenizer, prompt, sampling.stop),
                emit=lambda event: self._events.put((outcome, event)),
                draws=make_draws(sampling, choice),
                matcher=matcher,
            )
        )
        self.engine.submit(outcome.sequence)
        return outcome

    def step(self) -> Outcome:
        """Wait for the next event of any sequence."""
        outcome, event = self._events.get(timeout=30)
        outcome.events.append(event)
        return outcome

    def finish(self, *outcomes: Outcome) -> None:
        """Wait until all of these have ended."""
        while any(outcome.finish is None for outcome in outcomes):
            self.step()

    def run(self, prompt: list[int], slot: int = 0, **how: Any) -> Outcome:
        """Run one sequence to its end."""
        outcome = self.submit(prompt, slot, **how)
        self.finish(outcome)
        return outcome


BenchMaker = Callable[..., Bench]


@pytest.fixture
def make_bench(tmp_path: Path, tokenizer: Tokenizer, tokenizer_json: str) -> Iterator[BenchMaker]:
    """`make_bench(model)`: a Bench with a transformers model, loaded from a checkpoint folder."""
    benches: list[Bench] = []

    def make(reference: Any, *, eos: int | None = None, **limits: int) -> Bench:
        folder = _save(reference, tmp_path / f"model-{len(benches)}", tokenizer_json, eos)
        model = load_base(folder, scan_folder(folder), torch.device("cpu"))
        ids = tokenizer
        if eos is not None:
            files = {"tokenizer.json": tokenizer_json, "config.json": f'{{"eos_token_id": {eos}}}'}
            ids = Tokenizer(files)
        benches.append(Bench(model, ids, **limits))
        return benches[-1]

    yield make
    for bench in benches:
        bench.engine.stop()
