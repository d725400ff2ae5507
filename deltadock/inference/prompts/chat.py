"""Renders a conversation with the model's chat template, in sandboxed processes."""

import json
import queue
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deltadock.artifacts.tokenizers import default_tokens, named_tokens
from deltadock.errors import InvalidInput, NoChatTemplate
from deltadock.inference.prompts.template_tools import place_tools

SANDBOX: Final = Path(__file__).with_name("sandbox.py")
PROCESSES: Final = 4
"""Templates that render at the same time."""
WALL_SECONDS: Final = 5.0
"""Limit of a rendering, beside its CPU time (`sandbox.CPU_SECONDS`)."""
MAX_VALUES: Final = 200_000
"""JSON values in what a template is given: some 60,000 messages."""
PAUSE_SECONDS: Final = 60.0
"""A template that cannot render even `TRIVIAL` is refused for this long."""
MAX_PAUSED: Final = 256
TRIVIAL: Final = ({"role": "user", "content": "a"},)

RESERVED: Final = frozenset({"messages", "add_generation_prompt", "tools", "documents"})
"""Variables of a template that `chat_template_kwargs` cannot set."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with `role` and `content`, to be answered.

    Attributes:
        messages: the turns.
        tools: the functions that may be called, as OpenAI describes them.
        add_generation_prompt: whether the prompt opens the assistant's turn.
        continue_final_message: whether the answer continues the last message, whose turn stays
            open.
        variables: further variables of the template.
    """

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A model's chat template and special tokens."""

    template: str | None
    special_tokens: Mapping[str, str]
    """Text by name, such as `bos_token`."""
    tool_template: str | None = None
    """The template of conversations with tools, if they have one of their own."""

    def template_for(self, *, tools: bool) -> str | None:
        """The template of a conversation, with `tools` or without."""
        return self.tool_template if tools and self.tool_template is not None else self.template


def chat_format(files: Mapping[str, str]) -> ChatFormat:
    """The chat templates and special tokens of a checkpoint's text files, by name.

    `chat_template.jinja` overrides the templates in tokenizer_config.json, as in transformers.

    Raises:
        ValueError, TypeError, AttributeError: a file cannot be parsed.
    """
    config = json.loads(files.get("tokenizer_config.json", "{}"))
    special_tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in named_tokens(files).items()
        if name.endswith("_token") and isinstance(token, str | dict)
    } | default_tokens(files)
    template, tool_template = config.get("chat_template"), None
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        template, tool_template = by_name.get("default"), by_name.get("tool_use")
    if "chat_template.jinja" in files:
        template, tool_template = files["chat_template.jinja"], None
    if not isinstance(template, str | None) or not isinstance(tool_template, str | None):
        raise TypeError("chat_template is not a string")
    return ChatFormat(template, special_tokens, tool_template)


def _exceeds(value: object, limit: int) -> bool:
    """Whether JSON has more than `limit` values."""
    pending = [value]
    for _ in range(limit):
        if not pending:
            return False
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)
    return bool(pending)


def _open_final_message(text: str, content: str) -> str:
    """The rendered text up to the end of the last message's content, as in transformers.

    Raises:
        InvalidInput: there is none, or the template changes it beyond stripping it.
    """
    content = content if content in text else content.strip()
    if not content or content not in text:
        raise InvalidInput(
            "continue_final_message needs a last message with content that the chat template does "
            "not change.",
            param="continue_final_message",
        )
    return text[: text.rindex(content) + len(content)]


def _variables(form: ChatFormat, template: str, conversation: Conversation) -> dict[str, Any]:
    """What a template is rendered with."""
    messages = [dict(message) for message in conversation.messages]
    if "developer" not in template:
        # OpenAI's newer name for the system role; a template that does not know it drops it.
        for message in messages:
            message["role"] = message["role"].replace("developer", "system")
    return {
        "documents": None,
        **form.special_tokens,
        **place_tools(template, messages, conversation.tools),
        **conversation.variables,
        "tools": conversation.tools or None,
        "messages": messages,
        "add_generation_prompt": conversation.add_generation_prompt,
    }


def _line(template: str, variables: Mapping[str, Any]) -> bytes:
    """A request as a process reads it."""
    return json.dumps({"template": template, "variables": variables}).encode() + b"\n"


class _Sandbox:
    """One process that renders; started on first use and restarted when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def request(self, line: bytes) -> bytes:
        """The process's answer to a line; empty if the request killed it."""
        process = self._ensure_process()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(WALL_SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
            timer.join()  # it must not kill the next request's process
        if not answer or process.poll() is not None:
            self.kill()
        return answer

    def _ensure_process(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.kill()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", SANDBOX],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={},
                start_new_session=True,  # Ctrl-C must not reach it
            )
        return self._process

    def kill(self) -> None:
        """Stop the process, if it runs."""
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes the pipes and waits
                self._process = None


class TemplateSandbox:
    """The processes that render chat templates, each one template at a time.

    A conversation that exceeds a limit fails alone: clients choose its variables and tools, and the
    fine-tunes of a base share their template. A template that exceeds it on a trivial conversation
    too is refused to its tenant for a while.
    """

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[_Sandbox] = queue.LifoQueue()
        for _ in range(PROCESSES):
            self._idle.put(_Sandbox())
        self._lock = threading.Lock()
        self._paused: OrderedDict[tuple[str | None, str], float] = OrderedDict()
        """Monotonic seconds until which a tenant's template is refused."""

    def prompt(
        self, form: ChatFormat, conversation: Conversation, tenant: str | None = None
    ) -> str:
        """Render the prompt for the model's next turn. Blocks: async code uses threads.

        Raises:
            NoChatTemplate: the model has none.
            InvalidInput: the template raises, or exceeds its time or memory limit.
        """
        template = form.template_for(tools=bool(conversation.tools))
        if template is None:
            raise NoChatTemplate(
                "The model has no chat template. Send a prompt to /v1/completions, or save the "
                "fine-tune again with a chat_template.jinja beside its tokenizer.json."
            )
        if reserved := RESERVED & conversation.variables.keys():
            raise InvalidInput(
                f"chat_template_kwargs cannot set {min(reserved)!r}.", param="chat_template_kwargs"
            )
        answer = self._render(tenant, form, template, _variables(form, template, conversation))
        if "error" in answer:
            raise InvalidInput(
                f"The model's chat template cannot be applied to the messages: {answer['error']}"
            )
        if not conversation.continue_final_message:
            return answer["text"]
        return _open_final_message(answer["text"], conversation.messages[-1]["content"])

    def _render(
        self, tenant: str | None, form: ChatFormat, template: str, variables: Mapping[str, Any]
    ) -> dict[str, str]:
        """A process's answer.

        Raises:
            InvalidInput: a limit ended the process, or the template is refused.
        """
        if _exceeds(variables, MAX_VALUES):
            raise InvalidInput(
                f"Messages, tools and chat_template_kwargs have more than {MAX_VALUES} JSON "
                "values. Send fewer."
            )
        request = _line(template, variables)
        self._check_paused(tenant, template)
        sandbox = self._idle.get()
        try:
            self._check_paused(tenant, template)  # another request may have paused it meanwhile
            line = sandbox.request(request)
            if not line:
                trivial = _variables(form, template, Conversation(TRIVIAL))
                if not sandbox.request(_line(template, trivial)):
                    self._pause(tenant, template)
        finally:
            self._idle.put(sandbox)
        if not line:
            self._check_paused(tenant, template)
            raise InvalidInput(
                "The model's chat template took more time or memory than allowed for this "
                "conversation. Shorten it, or send a prompt to /v1/completions."
            )
        answer: dict[str, str] = json.loads(line)
        return answer

    def _check_paused(self, tenant: str | None, template: str) -> None:
        """Raises InvalidInput while the tenant's template is refused."""
        with self._lock:
            paused_until = self._paused.get((tenant, template), 0.0)
        if paused_until > time.monotonic():
            raise InvalidInput(
                "The model's chat template took more time or memory than allowed, and is refused "
                "for a minute. Send a prompt to /v1/completions."
            )

    def _pause(self, tenant: str | None, template: str) -> None:
        with self._lock:
            self._paused[tenant, template] = time.monotonic() + PAUSE_SECONDS
            self._paused.move_to_end((tenant, template))
            if len(self._paused) > MAX_PAUSED:
                self._paused.popitem(last=False)

    def close(self) -> None:
        """Stop the processes, once none renders."""
        for sandbox in [self._idle.get() for _ in range(PROCESSES)]:
            sandbox.kill()
            self._idle.put(sandbox)
