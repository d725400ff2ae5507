"""Engines of the tests, and what they answer; vLLM takes its time to import.

python -m integrations.vllm.tests.engine MODEL ANSWERS.json ...
"""

import gc
import json
import shutil
import sys
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


def write_quantized(folder: Path) -> Path:
    """The sample base with projections of 8 bits, activations too, as llm-compressor stores it."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {}
    for name, tensor in load_file(BASE / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor.float() / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors")
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = json.loads((BASE / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def answers(llm: "LLM", prompts: Sequence[str] = PROMPTS, **more: Any) -> Answers:
    """The greedy answers to `prompts`."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=12, stop=["\n"])
    outputs = llm.generate(list(prompts), greedy, use_tqdm=False, **more)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(models: Sequence[str], paths: Sequence[str]) -> None:
    """Write each model's answers to its path."""
    for model, path in zip(models, paths, strict=True):
        Path(path).write_text(json.dumps(answers(engine(Path(model)))))
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1::2], sys.argv[2::2])
