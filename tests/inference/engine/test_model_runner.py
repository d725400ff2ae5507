"""Decoding on static buffers matches packed passes and reads only these buffers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from deltadock.inference.engine.model_runner import GraphDecoder, ModelRunner
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.model.weight_deltas import NewRows, TensorDelta
from deltadock.inference.prompts.tokenizer import Tokenizer
from tests.inference.merging import make_delta
from tests.inference.scheduling import make_sequence
from tests.kernels.svd_delta import support as kernels

TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
FAMILIES = [
    ("llama", {}),
    ("mistral", {"sliding_window": 8}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gemma2", TWO_KINDS),
    ("gemma3_text", TWO_KINDS | {"tie_word_embeddings": False}),
]


@pytest.fixture
def static_bench(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`make_bench`, whose engines decode on static buffers."""
    start = ModelRunner.__init__

    def static(self: ModelRunner, *rest: Any) -> None:
        start(self, *rest, static=True)

    monkeypatch.setattr(ModelRunner, "__init__", static)
    return make_bench


def packed_delta(model: Any) -> dict[str, TensorDelta]:
    """Deltas that a graph can hold: packed factors and norms; and two added tokens."""
    changes: dict[str, TensorDelta] = {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 2:
            changed = kernels.make_delta(tuple(parameter.shape), [(6, 3, 3)], seed).packed
            proj = "proj.weight" in name
            changes[name] = changed if proj else NewRows(changed, torch.randn(2, 32))
        elif parameter.ndim == 1 and name.endswith("norm.weight"):
            changes[name] = parameter.detach() * 1.5
    return changes


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_static_decoding_matches_packed_passes(
    make_bench: Any, make_model: Any, tokenizer: Tokenizer, family: str, settings: dict[str, Any]
) -> None:
    base = make_model(family, **settings)
    bench = make_bench(base)
    bench.install(1, packed_delta(base))
    results = []
    for static in (False, True):
        passes = ModelRunner(bench.model, bench.model.make_cache(12, 64), 8, static=static)
        sequences = [
            make_sequence(tokenizer, list(range(3, 3 + length)), slot)
            for length, slot in ((20, 0), (3, 1), (9, 1), (12, 0), (1, 1))
        ]
        for sequence, place in zip(sequences, (4, 1, 9, 0, 10), strict=True):
            sequence.kv_slot = place
        logits = []
        with torch.inference_mode():
            passes.logits([ScheduledChunk(one, 0, len(one.tokens)) for one in sequences])
            for token in (7, 264, 9):
                for one in sequences:
                    one.tokens.append(token if one.delta_slot else 8)
                work = [
                    ScheduledChunk(one, len(one.tokens) - 1, len(one.tokens)) for one in sequences
                ]
                logits += passes.logits(work).rows()
                sequences.pop()
        results.append(logits)
    assert bench.model.graph_key is not None
    assert {len(row) for row in results[0]} == {264, 266}
    for packed, static_logits in zip(*results, strict=True):
        torch.testing.assert_close(static_logits, packed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_a_captured_pass_replays_every_pass_of_its_shape(
    static_bench: Any,
    make_model: Any,
    generate: Any,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    settings: dict[str, Any],
) -> None:
    recorded = []

    def record(self: GraphDecoder, key: Any) -> Callable[[], torch.Tensor]:
        """Like a CUDA graph: record the operations and replay them without the Python code."""
        recorded.append(key)
        replay: Callable[[], torch.Tensor] = make_fx(lambda: self._body(key[0]))()
        return replay

    monkeypatch.setattr(GraphDecoder, "_capture", record)
    base = make_model(family, **settings)
    bench = static_bench(base, context_tokens=128, cache_slots=6)
    prompts = [[1, 2, 3], [5] * 17, [7], list(range(20, 60)), [4, 4], [9] * 6, [1, 2, 4]]
    outcomes = [bench.submit(prompt, max_tokens=24) for prompt in prompts]
    bench.finish(*outcomes)
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert outcome.answer == generate(base, prompt, 24)
    assert 0 < len(recorded) == len(set(recorded)) <= 4


def test_deltas_that_cannot_be_captured_are_served_without_graphs(
    static_bench: Any, make_model: Any, make_bench: Any
) -> None:
    base = make_model("llama")
    bench = static_bench(base)
    bench.install(1, make_delta(base, 1, low_rank=False))  # whole weights
    outcomes = [bench.submit([1, 2, 3], slot) for slot in (0, 1)]
    bench.finish(*outcomes)
    assert outcomes[0].answer != outcomes[1].answer
    for slot, outcome in enumerate(outcomes):
        assert bench.run([1, 2, 3], slot).answer == outcome.answer
