"""The number of operators of a decode step outside its CUDA graph does not depend on the rows."""

from typing import Any

import pytest
import torch

from deltadock.inference.engine.model_runner import GraphDecoder, ModelRunner
from deltadock.inference.engine.sampler import sample_tokens
from deltadock.inference.engine.sampling import SampledToken
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.model.added_tokens import EMBEDDING, LM_HEAD
from deltadock.inference.model.weight_deltas import NewRows
from deltadock.inference.prompts.tokenizer import Tokenizer
from tests.inference.operators import counted_operators
from tests.inference.scheduling import make_sequence

ROWS = 16


@pytest.mark.parametrize(
    ("how", "bound"), [({"temperature": 0.0}, 18), ({"top_k": 20, "repetition_penalty": 1.1}, 66)]
)
@pytest.mark.parametrize("deltas", [0, 3])
def test_operators_outside_the_graph(
    make_bench: Any,
    make_model: Any,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, Any],
    bound: int,
    deltas: int,
) -> None:
    base = make_model("llama")
    bench = make_bench(base)
    for slot in range(1, deltas + 1):
        bench.install(
            slot, {name: NewRows(None, torch.randn(2, 32)) for name in (EMBEDDING, LM_HEAD)}
        )
    hidden = torch.randn(1, ROWS, base.config.hidden_size)
    monkeypatch.setattr(GraphDecoder, "_capture", lambda *_: lambda: hidden)
    runner = ModelRunner(bench.model, bench.model.make_cache(ROWS, 64), ROWS, static=True)
    sequences = [
        make_sequence(tokenizer, [5, 6, 7 + place], place % (deltas + 1), **how)
        for place in range(ROWS)
    ]
    sequences.sort(key=lambda sequence: sequence.delta_slot)
    for place, sequence in enumerate(sequences):
        sequence.kv_slot = place

    def step(active: list[Any]) -> None:
        logits = runner.logits([ScheduledChunk(one, 2, 3) for one in active])
        sampled = sample_tokens(logits, [one.sampling_row for one in active])
        assert all(isinstance(token, SampledToken) for token in sampled)

    counts = []
    for active in (sequences[::4], sequences):
        with torch.inference_mode():
            step(active)
            with counted_operators(monkeypatch) as counted:
                step(active)
        assert counted.reads == 1
        counts.append(counted.by_name)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) <= bound + 10 * deltas
