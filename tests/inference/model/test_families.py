"""Each family's logits, with deltas, are those of transformers' own modelling code."""

import copy
from typing import Any, Final

import pytest
import torch

from deltadock.inference.engine.model_runner import ModelRunner
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.model.families import FAMILIES
from deltadock.inference.model.layers import DeltaNorm
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.model.routing import DeltaLimits
from deltadock.inference.model.weight_deltas import TensorDelta
from deltadock.inference.prompts.tokenizer import Tokenizer
from deltadock.kernels.svd_delta import PackedDelta, reference
from deltadock.model_target import SERVED
from tests.inference.conftest import VOCABULARY
from tests.inference.families import CASES
from tests.inference.merging import make_delta, merge
from tests.inference.scheduling import make_sequence
from tests.kernels.svd_delta import support as kernels

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


@pytest.mark.parametrize("case", CASES)
def test_norms_and_rotation_round_as_transformers_does(make_model: Any, case: str) -> None:
    """In bfloat16, where it matters when a norm rounds and what cosines are."""
    family, settings = CASES[case]
    reference = make_model(family, **settings).to(torch.bfloat16)
    model = DeltaModel(copy.deepcopy(reference), DeltaLimits(slots=2, rows=64))
    rows = 40
    model.route([0] * rows)
    for name, module in model.model.named_modules():
        if isinstance(module, DeltaNorm):
            x = torch.randn(1, rows, module.width, dtype=torch.bfloat16)
            with torch.inference_mode():
                assert torch.equal(module(x), reference.get_submodule(name)(x)), name
    attention = reference.model.layers[-1].self_attn
    if not getattr(attention, "use_rope", True):
        return
    positions = torch.arange(rows)
    dtype = torch.float32 if FAMILIES[family].float32_rotation else torch.bfloat16
    kinds = () if hasattr(reference.model.rotary_emb, "inv_freq") else ("full_attention",)
    x = torch.zeros(1, dtype=torch.bfloat16)
    expected = reference.model.rotary_emb(x, positions[None], *kinds)
    for ours, theirs in zip(model._rotary(positions, dtype)[-1], expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs[0])
