"""Models, arguments and outcomes for the tests of the commands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

QUERY = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Inputs:
    """Two checkpoints and two texts on disk."""

    base: Path
    finetuned: Path
    calibration: Path
    text: Path


@dataclass(frozen=True)
class Delta:
    """A delta file written by the command, its report and the command's output."""

    path: Path
    report: dict[str, Any]
    stdout: str


@dataclass(frozen=True)
class Outcome:
    """Exit status and output of a command."""

    code: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


def save_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: id_ for id_, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def save_model(folder: Path, kind: type = Qwen2Config, noise: float = 0.0, **other: Any) -> Path:
    """Write a random model with 256 tokens, plus noise of standard deviation `noise`."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **other})).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def compress(inputs: Inputs, out: Path, *more: object, **instead: object) -> list[object]:
    """Arguments that compress the pair."""
    named = {
        "base": inputs.base,
        "finetuned": inputs.finetuned,
        "calibration": inputs.calibration,
        "method": "adamix",
        "out": out,
        **instead,
    }
    options = [(f"--{name}", value) for name, value in named.items() if value is not None]
    return ["compress", *(part for option in options for part in option), *more]


def evaluate(inputs: Inputs, delta: Path, *more: object, **instead: object) -> list[object]:
    """Arguments that evaluate a delta."""
    named = {
        "base": inputs.base,
        "finetuned": inputs.finetuned,
        "delta": delta,
        "text": inputs.text,
        **instead,
    }
    return ["evaluate", *(part for name, value in named.items() for part in (f"--{name}", value)),
            *more]  # fmt: skip
