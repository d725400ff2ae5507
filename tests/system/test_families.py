"""Models of other families than the sample's: pushed, compressed, and served over HTTP."""

import os
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Phi3Config,
    Phi3ForCausalLM,
)

from deltadock.artifacts.export import merge
from deltadock.client.blocking import Client

from .conftest import SAMPLES

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"partial_rotary_factor": 0.75}),
}


def save(family: str, folder: Path, tokenizer: Any, noise: float) -> None:
    """A random model with the sample's tokenizer; its fine-tune, if there is `noise`."""
    config_class, model_class, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **settings,
        }
    )
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fine_tune_is_pushed_and_chats(
    family: str, client: Client, url: str, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLES / "finetuned")
    save(family, tmp_path / "base", tokenizer, 0.0)
    save(family, tmp_path / "tuned", tokenizer, 0.05)
    client.create_base(family, client.upload_folder(tmp_path / "base").digest)
    name = f"families/{family}"
    pushed = client.push(tmp_path / "tuned", name, family, method="bitdelta")
    delta = pushed.wait(lambda _: None)
    client.download(delta.id, tmp_path / "delta")
    merge(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    messages: list[Any] = [{"role": "user", "content": "sort d a c b"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = reference.generate(**prompt, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    key = os.environ["DELTADOCK_API_KEY"]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as chat:
        assert {name, family} <= {model.id for model in chat.models.list()}
        said = chat.chat.completions.create(
            model=name, messages=messages, max_tokens=12, temperature=0.0
        )
    assert said.choices[0].message.content == expected
