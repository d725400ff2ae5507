"""Renders chat templates; run as a process of its own, which a hostile template may bring down.

A template comes with a delta, so it is a stranger's program. Jinja's sandbox keeps it from the
interpreter; the kernel bounds the memory and the processor time of this process, whatever the
template does. One request a line of stdin, `{"template", "variables"}`; one answer a line of
stdout, `{"text"}` or `{"error"}`. On the standard library and Jinja alone.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_SECONDS: Final = 1.0
"""For one rendering; the process ends beyond it."""
MEMORY_BYTES: Final = 512 * 2**20
MAX_CHARACTERS: Final = 4 * 2**20
KEPT_TEMPLATES: Final = 64


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: marks the model's own words for training, and means nothing here."""

    tags = {"generation"}  # noqa: RUF012 (as in Jinja's own)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """A template's mutable object, without the names that lead into the interpreter."""

    def __init__(self, /, **values: Any) -> None:
        for name in values:
            _check_name(name)
        super().__init__(**values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"A namespace has no {name!r}.")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _make_dict(**values: Any) -> dict[str, Any]:
    return values


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: transformers' functions and ways with white space."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _make_dict,
        "namespace": PlainNamespace,
    }
    return environment


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text of a template.

    Raises:
        TemplateError: the template refuses, or its text is too long.
    """
    pieces, left = [], MAX_CHARACTERS
    for piece in template.generate(variables):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise jinja2.exceptions.TemplateError(f"The text exceeds {MAX_CHARACTERS} characters.")
    return "".join(pieces)


def _answer(compiled: Callable[[str], jinja2.Template], line: bytes) -> dict[str, str]:
    try:
        request = json.loads(line)
        return {"text": render(compiled(request["template"]), request["variables"])}
    except Exception as error:  # noqa: BLE001 (a stranger's program may raise anything)
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    """Answer until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    compiled = lru_cache(KEPT_TEMPLATES)(make_environment().from_string)
    for line in sys.stdin.buffer:
        # Nobody handles its signal, so it ends the process even within one long call.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(compiled, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
