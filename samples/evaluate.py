"""Measure a model folder: exact-match accuracy on the exercises and perplexity on the texts."""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from corpus import general_text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

SAMPLES = Path(__file__).parent
DTYPES = (torch.bfloat16, torch.float32)


def load(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a Hugging Face model folder for inference."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def read_exercises(path: Path) -> list[dict[str, str]]:
    """Read exercises: one JSON object with `prompt` and `answer` per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def accuracy(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    exercises: list[dict[str, str]],
    batch_size: int = 100,
) -> float:
    """Return the fraction of exercises whose greedy completion's first line is the answer."""
    correct = 0
    for start in range(0, len(exercises), batch_size):
        batch = exercises[start : start + batch_size]
        prompts = [exercise["prompt"] for exercise in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        completions = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        correct += sum(
            completion.strip().split("\n")[0].strip() == exercise["answer"]
            for completion, exercise in zip(completions, batch, strict=True)
        )
    return correct / len(exercises)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: Tokenizer, text: str, length: int = 256) -> float:
    """Return the perplexity per token over consecutive windows of `length` tokens."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // length * length].view(-1, length)
    losses = []
    for batch in torch.split(windows, 16):
        logits = model(batch).logits[:, :-1].float().flatten(0, 1)
        targets = batch[:, 1:].flatten()
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return math.exp(torch.cat(losses).mean().item())


def unigram_perplexity(tokenizer: Tokenizer, text: str) -> float:
    """Return the perplexity of the best unigram model of the text (its own token frequencies)."""
    counts = Counter(tokenizer(text, verbose=False)["input_ids"])
    total = counts.total()
    return math.exp(-sum(n / total * math.log(n / total) for n in counts.values()))


def report(folder: Path, samples: Path = SAMPLES, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Print the model's accuracy on the exercises and perplexity on the texts in `samples`."""
    exercises = read_exercises(samples / "exercises.jsonl")
    texts = {
        "general text": general_text(),
        "heldout.txt": (samples / "heldout.txt").read_text("utf-8"),
    }
    for dtype in dtypes:
        model, tokenizer = load(folder, dtype)
        figures = [f"accuracy {accuracy(model, tokenizer, exercises):.1%}"]
        for name, text in texts.items():
            figures.append(
                f"{name}: perplexity {perplexity(model, tokenizer, text):.2f}"
                f" (unigram {unigram_perplexity(tokenizer, text):.1f})"
            )
        print(f"{folder.name}, {str(dtype).removeprefix('torch.')}: " + "; ".join(figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="a Hugging Face model folder")
    for folder in parser.parse_args().folder:
        report(folder)
