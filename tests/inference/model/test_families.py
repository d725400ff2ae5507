"""Each family's logits, with deltas, are those of transformers' own modelling code."""

import copy
from collections.abc import Mapping
from typing import Any, Final

import pytest
import torch

from deltadock.inference.engine.model_runner import ModelRunner
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.model.weight_deltas import TensorDelta
from deltadock.inference.prompts.tokenizer import Tokenizer
from deltadock.kernels.svd_delta import PackedDelta, reference
from deltadock.model_target import SERVED
from tests.inference.conftest import VOCABULARY
from tests.inference.merging import make_delta, merge
from tests.inference.scheduling import make_sequence
from tests.kernels.svd_delta import support as kernels

TWO_KINDS: Final = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
CASES: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma with biases": ("gemma", {"attention_bias": True, "hidden_act": "gelu"}),
    "gemma2": ("gemma2", {**TWO_KINDS, "query_pre_attn_scalar": 20}),
    "gemma2, caps that matter": (
        "gemma2",
        {**TWO_KINDS, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3_text": ("gemma3_text", {**TWO_KINDS, "query_pre_attn_scalar": 20}),
    "gemma3_text, capped and untied": (
        "gemma3_text",
        {
            **TWO_KINDS,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 0.5,  # which transformers ignores
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
        },
    ),
}
PROMPTS: Final = ([1, 2, 3], list(range(30, 57)), [5] * 9)
DECODED: Final = (7, 9, 11)
ADDED: Final = 3


def packed(model: Any) -> tuple[dict[str, TensorDelta], Any]:
    """Packed deltas of all matrices, and the model that they are merged into."""
    changes: dict[str, TensorDelta] = {}
    merged = copy.deepcopy(model)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 2:
            delta = kernels.make_delta(tuple(parameter.shape), [(6, 3, 3)], seed).packed
            changes[name] = delta
            with torch.no_grad():
                merged.get_parameter(name).add_(reference.dense(delta))
    return changes, merged


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == set(SERVED)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_has_the_logits_of_each_merged_model(
    make_bench: Any, make_model: Any, tokenizer: Tokenizer, case: str
) -> None:
    """The base, packed and low-rank deltas, replaced tensors and added tokens in each pass."""
    family, settings = CASES[case]
    base = make_model(family, **settings, initializer_range=0.2)
    model = make_bench(copy.deepcopy(base)).model
    changes, merged = packed(base)
    deltas = [
        changes,
        make_delta(base, 1),
        make_delta(base, 2, low_rank=False),
        make_delta(base, 3, added=ADDED),
    ]
    references = [base, merged, *(merge(base, delta) for delta in deltas[1:])]
    for slot, delta in enumerate(deltas, 1):
        assert any(isinstance(change, PackedDelta) for change in delta.values()) == (slot == 1)
        model.install(slot, model.prepare(delta))
    sequences = [
        make_sequence(tokenizer, [*prompt, VOCABULARY + 1] if slot == 4 else list(prompt), slot)
        for slot in range(len(references))
        for prompt in PROMPTS
    ]
    for place, sequence in enumerate(sequences):
        sequence.kv_slot = place
    runner = ModelRunner(model, model.make_cache(len(sequences), 48), 16)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]

    def step(work: list[ScheduledChunk]) -> None:
        with torch.inference_mode():
            rows = iter(runner.logits(work).rows())
        for chunk in work:
            if chunk.samples:
                logits[chunk.sequence.kv_slot].append(next(rows))

    for begin in range(0, 32, 8):  # prompts in chunks
        step(
            [
                ScheduledChunk(one, begin, min(begin + 8, len(one.tokens)))
                for one in sequences
                if begin < len(one.tokens)
            ]
        )
    for token in DECODED:
        for one in sequences:
            one.tokens.append(token)
        step([ScheduledChunk(one, len(one.tokens) - 1, len(one.tokens)) for one in sequences])
    model.merge(1)
    model.use_merged(1)
    alone = [one for one in sequences if one.delta_slot == 1]
    for one in alone:
        one.tokens.append(3)
    step([ScheduledChunk(one, len(one.tokens) - 1, len(one.tokens)) for one in alone])
    for one, own in zip(sequences, logits, strict=True):
        with torch.inference_mode():
            expected = references[one.delta_slot](torch.tensor([one.tokens])).logits[0]
        assert len(own) == len(DECODED) + 1 + (one.delta_slot == 1)
        torch.testing.assert_close(torch.stack(own), expected[-len(own) :], rtol=1e-4, atol=1e-4)
