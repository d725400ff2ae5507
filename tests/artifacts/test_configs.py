"""Which config.json files mean the same forward pass."""

from typing import Any

import pytest

from deltadock.artifacts.configs import check_same_forward, differences, expand
from deltadock.errors import ArchitectureMismatch, UnsupportedModel

BASE: dict[str, Any] = {"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_theta": 1e4},
        {"torch_dtype": "bfloat16", "_name_or_path": "x", "transformers_version": "4.1"},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 3},
        {"head_dim": 8},
        {"attention_dropout": 0.1, "unsloth_version": "2025.1", "vocab_size": 7},
        {"max_position_embeddings": 64},
    ],
)
def test_what_changes_no_answer(settings: dict[str, Any]) -> None:
    assert differences(BASE, BASE | settings) == []


def test_what_only_training_reads_changes_no_answer() -> None:
    opt = {"model_type": "opt"}
    assert differences(opt, opt | {"dropout": 0.0, "layerdrop": 0.1}) == []


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_parameters"),
        ({"rope_theta": 1e6}, "rope_parameters"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ],
)
def test_what_a_delta_has_for_itself(settings: dict[str, Any], key: str) -> None:
    assert [one.key for one in check_same_forward(BASE, BASE | settings)] == [key]
    assert [one.key for one in check_same_forward(BASE | settings, BASE)] == [key]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_attention_heads": 8}, "head_dim = 4 .*8 for the base"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True, "max_window_layers": 0}, "layer_types"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ArchitectureMismatch, match=words):
        check_same_forward(BASE, BASE | settings)


def test_windows_that_hide_something_are_compared() -> None:
    base = {"model_type": "mistral", "max_position_embeddings": 8192, "sliding_window": None}
    assert not differences(base, base | {"sliding_window": 8192})
    with pytest.raises(ArchitectureMismatch, match=r"sliding_window = 4096 .*None for the base"):
        check_same_forward(base, base | {"sliding_window": 4096})


def test_the_length_matters_to_rotary_embeddings_that_depend_on_it() -> None:
    base = BASE | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert differences(base, base | {"max_position_embeddings": 64})


def test_the_length_matters_where_the_factor_follows_from_it() -> None:
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    base = BASE | {"rope_scaling": scaling, "max_position_embeddings": 64}
    found = check_same_forward(base, base | {"max_position_embeddings": 128})
    assert [one.key for one in found] == ["rope_parameters"]


def test_the_rotated_fraction_of_a_head_is_the_models() -> None:
    base = {"model_type": "phi", "partial_rotary_factor": 0.5}
    assert not differences({"model_type": "phi"}, base)
    for other in ({"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 1.0}):
        with pytest.raises(ArchitectureMismatch, match=r"partial_rotary_factor"):
            check_same_forward(base, base | other)


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("gemma3n", {"text_config": {"hidden_activation": "relu"}}),
        ("gemma4", {"text_config": {"hidden_activation": "relu"}}),
        ("gemma4_text", {"hidden_activation": "relu", "vocab_size_per_layer_input": 262_144}),
        ("swin", {"hidden_act": "relu"}),
    ],
)
def test_types_with_settings_per_layer(kind: str, other: dict[str, Any]) -> None:
    base = {"model_type": kind}
    assert not differences(base, base | {"use_cache": False})
    assert [one.key.rpartition(".")[2] for one in differences(base, base | other)] == [
        "hidden_activation" if "gemma" in kind else "hidden_act"
    ]


def test_a_vision_models_language_model_may_have_its_own() -> None:
    base = {"model_type": "gemma3"}
    text = base | {"text_config": {"rms_norm_eps": 1e-3}}
    assert [one.key for one in check_same_forward(base, text)] == ["text_config.rms_norm_eps"]
    vision = base | {"vision_config": {"layer_norm_eps": 1e-3}}
    with pytest.raises(ArchitectureMismatch, match=r"vision_config\.layer_norm_eps"):
        check_same_forward(base, vision)


def test_unknown_types_are_compared_as_spelled() -> None:
    base = {"model_type": "own", "heads": 4, "use_cache": True}
    assert not differences(base, base | {"use_cache": False, "torch_dtype": "float16"})
    assert not differences(base, base | {"rope_scaling": {"rope_type": "default"}})
    with pytest.raises(ArchitectureMismatch, match="heads = 8"):
        check_same_forward(base, base | {"heads": 8})


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "own"},
        BASE | {"num_hidden_layers": 10**9},
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
        BASE | {"rope_scaling": 7},
        BASE | {"rope_scaling": {"rope_type": "linear"}},
    ],
)
def test_a_config_that_cannot_be_read(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        expand(config)
