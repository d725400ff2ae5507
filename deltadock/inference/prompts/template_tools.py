"""Tools and their calls where a chat template reads them, if not where OpenAI's requests have them.

Phi-4-mini's reads tools in the system message, SmolLM3's in a variable of its own. Those two and
Granite 3's leave out the calls of earlier turns. FunctionGemma's names the function of a result.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from deltadock.inference.prompts.tool_calls import tool_form

IN_SYSTEM_MESSAGE: Final = re.compile(r"message(?:\.tools\b|\[['\"]tools['\"]\])")
SYSTEM_PROMPT: Final = "You are a helpful assistant with some tools."
"""Phi-4-mini's, where a conversation has none."""


def place_tools(
    template: str, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Put tools and calls into the messages, if the template reads them there.

    Returns further variables for the template.
    """
    _name_results(messages)
    if "tool_calls" not in template:
        _write_calls(template, messages)
    if tools and IN_SYSTEM_MESSAGE.search(template):
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
        functions = [tool["function"] for tool in tools]
        messages[0]["tools"] = json.dumps(functions, ensure_ascii=False)
    return {"xml_tools": tools} if tools and "xml_tools" in template else {}


def _name_results(messages: Sequence[dict[str, Any]]) -> None:
    """Name the function in each result of a call, which has the call's id alone at OpenAI."""
    names = {
        call["id"]: call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls", ())
    }
    for message in messages:
        if message["role"] == "tool" and (name := names.get(message.get("tool_call_id"))):
            message.setdefault("name", name)


def _write_calls(template: str, messages: list[dict[str, Any]]) -> None:
    """Append each turn's calls to its text, as the model writes them."""
    form = tool_form(template)
    if form is None or form.written is None:
        return
    before, between, after = form.written
    for message in messages:
        if calls := message.get("tool_calls"):
            written = (json.dumps(call["function"], ensure_ascii=False) for call in calls)
            message["content"] += f"{before}{between.join(written)}{after}"
