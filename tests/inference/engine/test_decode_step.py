"""Operators and launches of a decode step, outside its CUDA graph and inside."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltadock.inference.engine.model_runner import GraphDecoder, ModelRunner
from deltadock.inference.engine.sampler import sample_tokens
from deltadock.inference.engine.sampling import SampledToken
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.model.added_tokens import EMBEDDING, LM_HEAD
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.model.weight_deltas import NewRows
from deltadock.inference.prompts.tokenizer import Tokenizer
from deltadock.kernels import dispatch
from deltadock.kernels.decode_attention import triton as attention
from deltadock.kernels.decoder import triton as decoder
from deltadock.kernels.svd_delta import triton as svd_delta
from tests.inference.operators import counted_operators
from tests.inference.scheduling import make_sequence

ROWS = 16


@pytest.mark.parametrize(
    ("how", "bound"), [({"temperature": 0.0}, 13), ({"top_k": 20, "repetition_penalty": 1.1}, 60)]
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


class CountedKernel:
    """In place of a Triton kernel: counts its launches and computes nothing."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self._name, self._counts = name, counts

    def __getitem__(self, _: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *_: Any, **__: Any) -> None:
        self._counts[self._name] += 1


def launches(model: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Operators and kernels of a decode step of two rows, as a CUDA graph holds them."""
    base = DeltaModel(model.to(torch.bfloat16))
    graphs = GraphDecoder(base, base.make_cache(2, 32), 2)
    base.route([0, 1])
    kernels: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "on_gpu", lambda _: True)
        for module in (attention, decoder, svd_delta):
            for name in filter(lambda name: name.endswith("_kernel"), dir(module)):
                patch.setattr(module, name, CountedKernel(name, kernels))
        with torch.inference_mode(), counted_operators(monkeypatch) as counted:
            graphs._body(2)
    assert counted.reads == 0
    return kernels + counted.by_name


@pytest.mark.parametrize(
    ("family", "settings", "more"),
    [
        ("mistral", {}, {}),
        ("qwen3", {}, {}),
        ("gemma3_text", {}, {"rms_norm_kernel": 2}),
        ("phi3", {}, {}),
        ("smollm3", {}, {}),
        ("granite", {"residual_multiplier": 0.5}, {"mul": 2}),
        ("olmo2", {}, {"rms_norm_kernel": 2, "add": 2, "cat": 1}),
    ],
)
def test_launches_inside_the_graph(
    make_model: Any,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    settings: dict[str, Any],
    more: dict[str, int],
) -> None:
    """22 a layer, of which 12 are of its deltas; and what a family needs more."""
    one, two = (
        launches(make_model(family, num_hidden_layers=layers, **settings), monkeypatch)
        for layers in (1, 2)
    )
    assert two - one == Counter(more) + Counter({
        "linear": 4, "prepare_kernel": 4, "shrink_kernel": 4, "expand_kernel": 4,
        "rms_norm_kernel": 2, "rotate_and_store_kernel": 1, "gated_kernel": 1,
        "split_kernel": 1, "combine_kernel": 1,
    })  # fmt: skip
    assert (one - (two - one)).total() <= 13
