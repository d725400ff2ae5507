"""Rotary embeddings and norms' epsilons of their own for each delta of a batch."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deltadock.artifacts.configs import expand
from deltadock.errors import ArchitectureMismatch, InvalidArtifact
from deltadock.inference.engine.model_runner import ModelRunner
from deltadock.inference.model.rotary import context_limit

PROMPTS = ([1, 2, 3], list(range(20, 50)), [5] * 9)
ORIGINAL = 64
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, "factor": 2.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [8.0, 9.0, 10.0, 11.0],
}  # fmt: skip
SETTINGS: tuple[dict[str, Any], ...] = (
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_theta": 100.0, "rms_norm_eps": 0.1},
    {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {"rms_norm_eps": 0.02},
)  # fmt: skip


def two_ropes(sliding: float, full: float, **scaled: Any) -> dict[str, Any]:
    """Rotary parameters of two kinds of layers, by their bases."""
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
        "full_attention": {"rope_type": "default", "rope_theta": full, **scaled},
    }


TWO_KINDS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "tie_word_embeddings": False,
}
TWO_ROPES: tuple[dict[str, Any], ...] = (
    {"rope_parameters": two_ropes(100.0, 1e4)},
    {"rope_parameters": two_ropes(1e4, 100.0)},
    {"rope_parameters": two_ropes(1e4, 1e4, rope_type="linear", factor=4.0)},
    {"rms_norm_eps": 0.1},
)


def config_with(base: Any, settings: dict[str, Any]) -> Any:
    plain = base.config.to_dict()
    if settings.keys() & {"rope_scaling", "rope_theta"}:
        del plain["rope_parameters"]
    return expand(plain | settings)


def with_settings(base: Any, settings: dict[str, Any]) -> Any:
    """The same weights under another configuration, by transformers' own code."""
    model = type(base)(config_with(base, settings)).eval()
    model.load_state_dict(base.state_dict())
    return model


@pytest.mark.parametrize(
    ("family", "static"),
    [
        ("llama", False),
        ("mistral", False),
        ("qwen2", True),
        ("qwen3", True),
        ("gemma3_text", True),
    ],
)
def test_each_row_has_its_deltas_settings(
    make_bench: Any, make_model: Any, generate: Any, family: str, static: bool
) -> None:
    if family == "gemma3_text":
        base = make_model(family, **TWO_KINDS, rope_parameters=two_ropes(1e4, 1e4))
        changes: Sequence[dict[str, Any]] = TWO_ROPES
    else:
        base, changes = make_model(family), SETTINGS
    models = [base, *(with_settings(base, settings) for settings in changes)]
    expected = [[generate(model, prompt, 12) for prompt in PROMPTS] for model in models]
    equal = 1 if changes is SETTINGS else 0  # dynamic equals default
    assert len({str(answers) for answers in expected}) == len(models) - equal
    bench = make_bench(copy.deepcopy(base), max_sequences=6)
    engine = bench.engine
    engine._runner = ModelRunner(bench.model, engine._runner._cache, 6, static=static)
    for slot, settings in enumerate(changes, 1):
        bench.model.install(slot, {}, bench.model.row_settings(config_with(base, settings)))
    outcomes = [[bench.submit(prompt, slot) for prompt in PROMPTS] for slot in range(len(models))]
    bench.finish(*(one for answers in outcomes for one in answers))
    assert [[one.answer for one in answers] for answers in outcomes] == expected
    bench.model.route([2, len(changes)])
    assert bench.model.graph_key is not None
    for slot in range(1, len(models)):
        bench.model.remove(slot)
        assert bench.run(PROMPTS[1], slot).answer == expected[0][1]


def test_longrope_is_served_up_to_its_original_length(
    make_bench: Any, make_model: Any, generate: Any
) -> None:
    base = make_model("llama", rope_parameters={**LONGROPE, "rope_theta": 1e4})
    expected = [generate(base, prompt, 12) for prompt in PROMPTS]
    bench = make_bench(copy.deepcopy(base), context_tokens=128)
    assert bench.engine.context_tokens == ORIGINAL == context_limit(base.config)
    outcomes = [bench.submit(prompt) for prompt in PROMPTS]
    bench.finish(*outcomes)
    assert [one.answer for one in outcomes] == expected


def test_frequencies_that_change_within_the_context_are_refused(
    make_bench: Any, make_model: Any
) -> None:
    base = make_model("llama")
    model = make_bench(copy.deepcopy(base)).model
    with pytest.raises(ArchitectureMismatch, match=r"longrope.*beyond 64 tokens.*Merge"):
        model.row_settings(config_with(base, {"rope_scaling": LONGROPE}))
    short = {"rope_scaling": SETTINGS[3]["rope_scaling"], "max_position_embeddings": 32}
    with pytest.raises(ArchitectureMismatch, match=r"dynamic.*beyond 32 tokens"):
        model.row_settings(config_with(base, short))


@pytest.mark.parametrize(
    "settings", [{"rope_theta": "x"}, {"head_dim": 16}], ids=["no number", "another width"]
)
def test_frequencies_that_cannot_be_computed(
    make_bench: Any, make_model: Any, settings: dict[str, Any]
) -> None:
    base = make_model("llama")
    model = make_bench(copy.deepcopy(base)).model
    with pytest.raises(InvalidArtifact, match="rope_parameters"):
        model.row_settings(config_with(base, settings))


def test_merged_weights_keep_the_settings(make_bench: Any, make_model: Any, generate: Any) -> None:
    base = make_model("qwen2")
    settings = SETTINGS[1]
    expected = generate(with_settings(base, settings), PROMPTS[1], 12)
    bench = make_bench(copy.deepcopy(base))
    bench.model.install(1, {}, bench.model.row_settings(config_with(base, settings)))
    with torch.inference_mode():
        bench.model.merge(1)
    bench.model.use_merged(1)
    assert bench.run(PROMPTS[1], 1).answer == expected
