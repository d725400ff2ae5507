"""Engines of the tests, and what they answer; vLLM takes its time to import."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm import LLM

ROOT: Final = Path(__file__).parents[3]
BASE: Final = ROOT / "samples/base"
PROMPTS: Final = [
    json.loads(line)["prompt"]
    for line in (ROOT / "samples/exercises.jsonl").read_text().splitlines()[:48]
]

Answers = list[list[int]]
"""The token numbers of each answer."""


def engine(model: Path = BASE, **options: Any) -> "LLM":
    """A small eager engine."""
    from vllm import LLM

    return LLM(
        str(model), max_model_len=128, max_num_seqs=32, max_num_batched_tokens=512,
        enforce_eager=True, **options,
    )  # fmt: skip


def answers(llm: "LLM", prompts: Sequence[str] = PROMPTS, **more: Any) -> Answers:
    """The greedy answers to `prompts`."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=12, stop=["\n"])
    outputs = llm.generate(list(prompts), greedy, use_tqdm=False, **more)
    return [list(output.outputs[0].token_ids) for output in outputs]
