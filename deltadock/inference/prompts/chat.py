"""From a conversation to a prompt: each model's own chat template, rendered in a sandbox."""

import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deltadock.errors import InvalidInput, UnsupportedModel

SANDBOX: Final = Path(__file__).with_name("sandbox.py")
PAUSE_SECONDS: Final = 60.0
"""For a template that brought the sandbox down: others wait for it meanwhile."""
MAX_PAUSED: Final = 256


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to be answered, each with `role` and `content`."""

    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model was taught to read conversations."""

    template: str | None
    special_tokens: Mapping[str, str]
    """Text by role, such as `bos_token`."""


def chat_format(files: Mapping[str, str]) -> ChatFormat:
    """The chat template and special tokens of a checkpoint's text files, by name.

    `chat_template.jinja` comes before the template in tokenizer_config.json, as in transformers.

    Raises:
        ValueError, TypeError, AttributeError: the files are not what their names say.
    """
    config = json.loads(files.get("tokenizer_config.json", "{}"))
    named = json.loads(files.get("special_tokens_map.json", "{}")) | config
    special_tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in named.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    template = files.get("chat_template.jinja", config.get("chat_template"))
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default")
    if not isinstance(template, str | None):
        raise TypeError("chat_template is no text")
    return ChatFormat(template, special_tokens)


class TemplateSandbox:
    """The process in which chat templates run; started at first use, and again after its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._paused: OrderedDict[str, float] = OrderedDict()
        """Templates that may not run before a time."""

    def prompt(self, form: ChatFormat, conversation: Conversation) -> str:
        """The text that asks a model for its next answer. Blocks: async code uses threads.

        Raises:
            UnsupportedModel: the model has no chat template.
            InvalidInput: the template refuses the conversation, or takes too long or too much.
        """
        if form.template is None:
            raise UnsupportedModel(
                "The model has no chat template. Send a prompt to /v1/completions, or save the "
                "fine-tune again with a chat_template.jinja beside its tokenizer.json."
            )
        variables = {
            **form.special_tokens,
            "messages": conversation.messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        answer = self._ask(form.template, variables)
        if answer is None:
            raise InvalidInput(
                "The model's chat template took more time or memory than it may, and is not tried "
                "again for a minute. Send a prompt to /v1/completions."
            )
        if "error" in answer:
            raise InvalidInput(
                f"The model's chat template cannot be applied to the messages: {answer['error']}"
            )
        return answer["text"]

    def _ask(self, template: str, variables: Mapping[str, Any]) -> dict[str, str] | None:
        """The sandbox's answer; None if it did not survive the question."""
        request = json.dumps({"template": template, "variables": variables})
        with self._lock:
            if self._paused.get(template, 0.0) > time.monotonic():
                return None
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b""
            if not line:
                self._end()
                self._pause(template)
                return None
            answer: dict[str, str] = json.loads(line)
            return answer

    def _pause(self, template: str) -> None:
        self._paused[template] = time.monotonic() + PAUSE_SECONDS
        self._paused.move_to_end(template)
        if len(self._paused) > MAX_PAUSED:
            self._paused.popitem(last=False)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", SANDBOX],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={},
                start_new_session=True,  # a Ctrl-C for the node is not for it
            )
        return self._process

    def close(self) -> None:
        """End the process, if it runs."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes the pipes and waits
                self._process = None
