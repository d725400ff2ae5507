"""Task accuracy: greedy decoding of a checkpoint on exercises, first line, exact match."""

import json
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SPARE_TOKENS: Final = 4
"""Tokens decoded beyond the longest answer's, so that a longer answer is seen to be wrong."""


def read_exercises(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of each line of a .jsonl file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(str(row["prompt"]), str(row["answer"])) for row in rows]


@torch.inference_mode()
def accuracy(
    folder: Path, exercises: list[tuple[str, str]], device: str = "cpu", batch: int = 100
) -> float:
    """Share of exercises whose completion's first line is the answer."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    longest = max(len(tokenizer(f" {answer}")["input_ids"]) for _, answer in exercises)
    correct = 0
    for start in range(0, len(exercises), batch):
        part = exercises[start : start + batch]
        prompts = [prompt for prompt, _ in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        output = model.generate(
            **inputs.to(device),
            max_new_tokens=longest + SPARE_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        correct += sum(
            text.strip().split("\n")[0].strip() == answer
            for text, (_, answer) in zip(texts, part, strict=True)
        )
    return correct / len(exercises)
