"""One delta per engine, merged as vLLM loads or swapped in place, answers as its checkpoint."""

from pathlib import Path

import pytest
from vllm import LLM

from integrations.vllm.tests.engine import PROMPTS, Answers, answers, engine

SWAPPING = {
    "load_format": "deltadock",
    "worker_extension_cls": "deltadock_vllm.swap.DeltaSwap",
}


@pytest.fixture(scope="module")
def llm(deltas: dict[str, Path]) -> LLM:
    """An engine that starts with adamix's delta."""
    return engine(model_loader_extra_config={"delta": str(deltas["adamix"])}, **SWAPPING)


def swap(llm: LLM, delta: Path | None) -> None:
    (seconds,) = llm.collective_rpc("deltadock_swap", args=(delta and str(delta),))
    assert seconds > 0
    assert llm.reset_prefix_cache()


def test_a_delta_is_merged_at_the_start_and_swapped_in_place(
    llm: LLM, deltas: dict[str, Path], expected: dict[str, Answers]
) -> None:
    assert answers(llm) == expected["adamix"]
    assert expected["adamix"] != expected["base"]
    for name in ("bitdelta", "lora", "optimix", "base", "adamix"):
        swap(llm, deltas.get(name))
        assert answers(llm) == expected[name], name


def test_what_cannot_be_served_is_refused_and_changes_nothing(
    llm: LLM, deltas: dict[str, Path], expected: dict[str, Answers], tmp_path: Path
) -> None:
    swap(llm, deltas["adamix"])
    whole = deltas["bitdelta"].read_bytes()
    flipped = bytearray(whole)
    flipped[-1000] ^= 1
    files = {"cut.delta": whole[:-1000], "flipped.delta": bytes(flipped), "empty.delta": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in [*files, "missing.delta"]:
        with pytest.raises(Exception, match="delta"):
            llm.collective_rpc("deltadock_swap", args=(str(tmp_path / name),))
        ((refusal,),) = [llm.collective_rpc("deltadock_refusal", args=(str(tmp_path / name),))]
        assert refusal["code"] in {"invalid_artifact", "not_found"}, name
    assert answers(llm) == expected["adamix"]


def test_the_sum_is_quantized_as_vllm_loads_it(
    deltas: dict[str, Path], expected: dict[str, Answers]
) -> None:
    llm = engine(
        quantization="fp8_per_channel", model_loader_extra_config={"delta": str(deltas["adamix"])},
        **SWAPPING,
    )  # fmt: skip
    for name in ("adamix", "bitdelta"):
        same = sum(map(list.__eq__, answers(llm, PROMPTS[:24]), expected[name]))
        assert same >= 16, (name, same)  # eight bits of the sum move near ties
        swap(llm, deltas["bitdelta"])


def test_tensor_parallel_ranks_merge_the_same_delta(
    deltas: dict[str, Path], expected: dict[str, Answers]
) -> None:
    llm = engine(
        tensor_parallel_size=2, model_loader_extra_config={"delta": str(deltas["adamix"])},
        **SWAPPING,
    )  # fmt: skip
    same = sum(map(list.__eq__, answers(llm), expected["adamix"]))
    assert same >= len(expected["adamix"]) - 1  # sums of two ranks round otherwise
    assert llm.collective_rpc("deltadock_served")[0] == llm.collective_rpc("deltadock_served")[1]
