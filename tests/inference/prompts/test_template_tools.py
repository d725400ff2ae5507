"""Templates get tools and calls where they read them."""

import json
from typing import Any

import pytest

from deltadock.inference.prompts.chat import ChatFormat, Conversation, _variables
from deltadock.inference.prompts.sandbox import make_environment, render

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "description": "é"}}
FUNCTION = json.dumps(TOOL["function"], ensure_ascii=False)
CALLS = [
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
    {"id": "d", "type": "function", "function": {"name": "g", "arguments": {}}},
]
WRITTEN = ['{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "arguments": {}}']
PHI_4_MINI = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'system' and 'tools' in message %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}<|end|>{% endfor %}"
)
SMOLLM3 = (
    "{% if xml_tools %}For each call: <tool_call>{% for tool in xml_tools %}{{ tool | tojson }}"
    "{% endfor %}{% endif %}{% for m in messages %}|{{ m.content }}{% endfor %}"
)
GRANITE_3 = (
    "{% if tools %}respond only with <|tool_call|>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}|{{ m.content }}{% endfor %}"
)


def rendered(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    conversation = Conversation(tuple(messages), **more)
    variables = _variables(ChatFormat(template, {}), template, conversation)
    return render(make_environment().from_string(template), json.loads(json.dumps(variables)))


def test_phi_4_mini_reads_tools_in_the_system_message() -> None:
    user = {"role": "user", "content": "x"}
    tools = f"<|tool|>[{FUNCTION}]<|/tool|><|end|><|user|>x<|end|>"
    assert rendered(PHI_4_MINI, [user], tools=(TOOL,)) == (
        f"<|system|>You are a helpful assistant with some tools.{tools}"
    )
    system = {"role": "system", "content": "Be."}
    assert rendered(PHI_4_MINI, [system, user], tools=(TOOL,)) == f"<|system|>Be.{tools}"
    assert rendered(PHI_4_MINI, [user]) == "<|user|>x<|end|>"


def test_smollm3_reads_tools_in_a_variable_of_its_own() -> None:
    user = {"role": "user", "content": "x"}
    expected = f"For each call: <tool_call>{json.dumps(TOOL, ensure_ascii=False)}|x"
    assert rendered(SMOLLM3, [user], tools=(TOOL,)) == expected
    mine = {"xml_tools": ["mine"]}
    assert rendered(SMOLLM3, [user], tools=(TOOL,), variables=mine).endswith('"mine"|x')
    assert rendered(SMOLLM3, [user]) == "|x"


@pytest.mark.parametrize(
    ("template", "calls"),
    [
        (SMOLLM3, "|So.{}|1".format("\n".join(f"<tool_call>\n{w}\n</tool_call>" for w in WRITTEN))),
        (GRANITE_3, f"|So.<|tool_call|>[{', '.join(WRITTEN)}]|1"),
        (
            PHI_4_MINI,
            f"<|assistant|>So.<|tool_call|>[{', '.join(WRITTEN)}]<|/tool_call|><|end|>"
            "<|tool|>1<|end|>",
        ),
        ("{% for m in messages %}|{{ m.content }}{% endfor %}", "|So.|1"),
        (
            "<tool_call>{% for m in messages %}|{{ m.content }}"
            "{{ m.tool_calls | length }}{% endfor %}",
            "<tool_call>|So.2|10",
        ),
    ],
)
def test_calls_of_earlier_turns_are_in_the_prompt(template: str, calls: str) -> None:
    turns = [
        {"role": "assistant", "content": "So.", "tool_calls": CALLS},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    assert rendered(template, turns) == calls
    assert turns[0]["content"] == "So."


def test_results_have_the_names_of_their_functions() -> None:
    template = "{% for m in messages %}|{{ m.name }}{% endfor %}"
    turns = [{"role": "assistant", "content": "", "tool_calls": CALLS}]
    turns += [{"role": "tool", "content": "", "tool_call_id": key} for key in "dcx"]
    turns += [{"role": "tool", "content": "", "tool_call_id": "c", "name": "mine"}]
    assert rendered(template, turns) == "||g|f||mine"
