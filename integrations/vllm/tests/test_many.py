"""Many deltas in one engine: each request answers as its delta's merged checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from deltadock_vllm.many import hooks
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest

from deltadock.errors import UnsupportedModel
from integrations.vllm.tests.conftest import METHODS, write_with_template
from integrations.vllm.tests.engine import BASE, PROMPTS, Answers, answers, engine, write_quantized

NAMES = ("base", *METHODS)


def request(deltas: dict[str, Path], name: str) -> LoRARequest | None:
    return None if name == "base" else LoRARequest(name, NAMES.index(name), str(deltas[name]))


def mixed(
    llm: LLM, deltas: dict[str, Path], count: int, names: Sequence[str] = NAMES, **more: Any
) -> dict[str, Answers]:
    """Answers of all names to `count` prompts, neighbours in one batch."""
    asked = [(prompt, name) for prompt in PROMPTS[:count] for name in names]
    found = answers(
        llm, [prompt for prompt, _ in asked],
        lora_request=[request(deltas, name) for _, name in asked], **more,
    )  # fmt: skip
    return {name: found[number :: len(names)] for number, name in enumerate(names)}


@pytest.fixture(scope="module")
def llm(deltas: dict[str, Path]) -> LLM:
    """An engine with two slots, and room for three deltas in host memory."""
    return engine(enable_lora=True, max_loras=2, max_cpu_loras=3)


def test_each_row_of_a_batch_answers_as_its_merged_checkpoint(
    llm: LLM, deltas: dict[str, Path], expected: dict[str, Answers]
) -> None:
    found = mixed(llm, deltas, len(PROMPTS))
    for name in NAMES:
        same = sum(map(list.__eq__, found[name], expected[name]))
        # Base and difference are rounded to 16 bits one by one, and merged weights once: near ties.
        assert same >= len(PROMPTS) - 2, (name, same)


def test_a_vllm_without_a_hook_and_a_tensor_without_a_site_are_refused(llm: LLM) -> None:
    hooks.check_hooks()
    for method, parameters in (("no_such_method", ()), ("generate", ("no_such_parameter",))):
        with pytest.raises(RuntimeError, match=method):
            hooks.check_hooks({(LLM, method): parameters})
    (found,) = llm.collective_rpc(lambda worker: worker.model_runner.lora_manager._modules)
    expert = "model.layers.0.mlp.experts.0.up_proj.weight"
    with pytest.raises(UnsupportedModel, match="experts"):
        found.find({expert: {"kind": "svd"}})


def test_a_bad_delta_or_request_is_refused_and_the_engine_goes_on(
    llm: LLM, deltas: dict[str, Path], expected: dict[str, Answers], tmp_path: Path
) -> None:
    whole = deltas["bitdelta"].read_bytes()
    flipped = bytearray(whole)
    flipped[-1000] ^= 1
    write_with_template(deltas["bitdelta"], tmp_path / "template.delta")
    files = {
        "cut": whole[:-1000], "flipped": bytes(flipped), "empty": b"", "missing": None,
        "template": (tmp_path / "template.delta").read_bytes(),  # callers here render themselves
    }  # fmt: skip
    for number, (name, data) in enumerate(files.items(), 10):
        path = tmp_path / f"{name}.delta"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises((VLLMValidationError, VLLMNotFoundError)):
            answers(llm, PROMPTS[:1], lora_request=LoRARequest(name, number, str(path)))
    with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
        llm.generate(
            PROMPTS[:1], SamplingParams(max_tokens=1, prompt_logprobs=1),
            lora_request=request(deltas, "adamix"),
        )  # fmt: skip
    copy = tmp_path / "copy.delta"
    copy.write_bytes(deltas["optimix"].read_bytes())
    lost = LoRARequest("copy", 20, str(copy))
    assert answers(llm, PROMPTS[:8], lora_request=lost) == expected["optimix"][:8]
    copy.unlink()  # served while it is in memory
    assert answers(llm, PROMPTS[:8], lora_request=lost) == expected["optimix"][:8]
    mixed(llm, deltas, 2)
    with pytest.raises(VLLMNotFoundError, match="There is no file"):
        answers(llm, PROMPTS[:1], lora_request=lost)
    found = answers(llm, PROMPTS[:8], lora_request=request(deltas, "optimix"))
    assert found == expected["optimix"][:8]


@pytest.mark.parametrize("stored", [True, False])
def test_a_quantized_base_answers_with_each_delta(
    stored: bool, deltas: dict[str, Path], expected: dict[str, Answers], tmp_path: Path
) -> None:
    model, options = BASE, {"quantization": "fp8_per_channel"}
    if stored:
        model = write_quantized(tmp_path / "quantized")
        options = {"additional_config": {"deltadock": {"base": str(BASE)}}}
    llm = engine(model, enable_lora=True, max_loras=4, **options)
    found = mixed(llm, deltas, 24)
    for name in NAMES:
        same = sum(map(list.__eq__, found[name], expected[name]))
        # Eight bits of the base move near ties; of another delta's answers three are the same.
        assert same >= 16, (name, same)


def test_tensor_parallel_ranks_have_their_parts_of_each_delta(
    deltas: dict[str, Path], expected: dict[str, Answers]
) -> None:
    llm = engine(
        tensor_parallel_size=2, enable_lora=True, max_loras=4,
        # A rank's eighth of so small a model is less than what every rank has of a delta.
        additional_config={"deltadock": {"slot_bytes": 600_000}},
    )  # fmt: skip
    found = mixed(llm, deltas, 24)
    for name in NAMES:
        same = sum(map(list.__eq__, found[name], expected[name]))
        assert same >= 22, (name, same)
