"""What is refused by configurations alone."""

from typing import Any

import pytest

from deltadock.artifacts.checkpoint import ADAPTER_TYPE
from deltadock.compression.checks import check_compressible
from deltadock.compression.families import CALIBRATED
from deltadock.compression.options import METHODS, goal_for
from deltadock.errors import Conflict, InvalidAdapter, UnsupportedModel

UNKNOWN = {"model_type": "made_up"}
ADAPTER = {"model_type": ADAPTER_TYPE, "peft_type": "LORA", "r": 4, "lora_alpha": 8}


def check(
    base: dict[str, Any],
    method: str,
    tuned: dict[str, Any] | None = None,
    *,
    has_text: bool = False,
    **goals: float,
) -> None:
    check_compressible(base, tuned or base, *goal_for(method, **goals), has_text=has_text)


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if not m.imports_adapter])
def test_a_family_that_cannot_be_run_takes_the_methods_that_run_nothing(method: str) -> None:
    if METHODS[method].needs_calibration:
        with pytest.raises(UnsupportedModel, match=r"'made_up' cannot be calibrated yet.*'exact'"):
            check(UNKNOWN, method)
    else:
        check(UNKNOWN, method)
        with pytest.raises(UnsupportedModel):
            check(UNKNOWN, method, has_text=True)


def test_a_bound_runs_the_model() -> None:
    check(UNKNOWN, "low-rank", ratio=4.0)
    with pytest.raises(UnsupportedModel):
        check(UNKNOWN, "low-rank", max_kl=0.1)


@pytest.mark.parametrize("kind", sorted(CALIBRATED))
def test_known_families_pass(kind: str) -> None:
    check({"model_type": kind}, "optimix")


def test_a_vision_model_is_known_by_its_language_model() -> None:
    check({"model_type": "llava", "text_config": {"model_type": "qwen2"}}, "optimix")
    with pytest.raises(UnsupportedModel, match="around a 'made_up' model"):
        check({"model_type": "llava", "text_config": UNKNOWN}, "optimix")


def test_quantized_weights_are_stored_exactly_only() -> None:
    base = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    check(base, "exact")
    with pytest.raises(UnsupportedModel, match="quantized"):
        check(base, "bitdelta")


def test_an_adapter_of_any_family_is_imported() -> None:
    check(UNKNOWN, "lora", ADAPTER)
    with pytest.raises(Conflict, match="give 'lora'"):
        check(UNKNOWN, "optimix", ADAPTER)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_adapters_of_other_kinds_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidAdapter, match=words):
        check({"model_type": "llama"}, "lora", ADAPTER | change)
