"""Ways to use a delta outside the dashboard, as text to copy, and examples of prompts."""

import json
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

CHAT: Final = "chat"
PLAIN: Final = "plain"
PROMPTS: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {CHAT: ("Explain in one sentence what a LoRA adapter is.",), PLAIN: ("Once upon a time",)}
)
"""By the kind of request."""
SAMPLE_BASE: Final = "670b60609ce9e72370aeb1da55cba53052faafd9591ed8034184296617dab227"
"""The checkpoint's digest of samples/base."""
SAMPLE_PROMPTS: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {CHAT: ("sort h b d a",), PLAIN: ("Q: sort h b d a =\nA:",)}
)
"""What the sample's fine-tune has learned to answer."""


def prompts(checkpoints: Iterable[Collection[str]]) -> Mapping[str, Sequence[str]]:
    """Examples by the kind of request, for models with checkpoints of these digests."""
    is_sample = any(SAMPLE_BASE in digests for digests in checkpoints)
    return {
        kind: (*(SAMPLE_PROMPTS[kind] if is_sample else ()), *general)
        for kind, general in PROMPTS.items()
    }


def environment(url: str, key_file: Path | None) -> str:
    """Commands by which all that is run in a terminal finds the server and a key.

    `key_file` holds the server's own key; the terminal must be on its machine then.
    """
    key = f"$(cat {shlex.quote(str(key_file))})" if key_file else "ddk_..."
    return f'export DELTADOCK_API_URL={url}\nexport DELTADOCK_API_KEY="{key}"'


def _merging(reference: str) -> str:
    return f"""\
deltadock pull {reference} --out model.delta
deltadock merge --base ./base --delta model.delta --out ./merged"""


def loading(reference: str) -> Mapping[str, str]:
    """The same for a delta that no node serves."""
    merged = _merging(reference)
    return {
        "Python": f"""\
import deltadock
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("./base")
deltadock.load_delta(model, "{reference}")""",
        "CLI": merged,
        "vLLM": f"{merged}\nvllm serve ./merged",
    }


def examples(reference: str, checkpoints: Collection[str], *, chats: bool) -> Mapping[str, str]:
    """Code and commands by the name of what runs them; they need `environment`."""
    prompt = prompts([checkpoints])[CHAT if chats else PLAIN][0]
    name, given, route, answer = "prompt", json.dumps(prompt), "completions", "text"
    if chats:
        name, given = "messages", f'[{{"role": "user", "content": {given}}}]'
        route, answer = "chat/completions", "message.content"
    return {
        "curl": f"""\
curl "$DELTADOCK_API_URL/v1/{route}" \\
  -H "Authorization: Bearer $DELTADOCK_API_KEY" \\
  --json '{{"model": "{reference}", "{name}": {given}, "max_tokens": 64}}'""",
        "Python": f"""\
import deltadock

with deltadock.Client() as client:
    for piece in client.stream("{reference}", {given}):
        print(piece.text, end="", flush=True)""",
        "OpenAI": f"""\
import os

from openai import OpenAI

url, key = os.environ["DELTADOCK_API_URL"], os.environ["DELTADOCK_API_KEY"]
client = OpenAI(base_url=f"{{url}}/v1", api_key=key)
answer = client.{route.replace("/", ".")}.create(
    model="{reference}", {name}={given}, max_tokens=64
)
print(answer.choices[0].{answer})""",
        "CLI": f"""\
deltadock run {reference} {shlex.quote(prompt)}
deltadock pull {reference} --out model.delta""",
        "vLLM": f"{_merging(reference)}\nvllm serve ./merged",
    }
