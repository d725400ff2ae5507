"""Renders chat templates in a separate process, which a hostile template may kill.

A template comes with a delta and is untrusted code. Jinja's sandbox isolates it from the
interpreter; the kernel limits this process's memory and CPU time. Each line of stdin is a request
`{"template", "variables"}`, each line of stdout an answer `{"text"}` or `{"error"}`. Needs only the
standard library and Jinja.
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
"""Per rendering; the kernel kills the process beyond it."""
MEMORY_BYTES: Final = 512 * 2**20
MAX_CHARACTERS: Final = 4 * 2**20
MAX_CACHED_TEMPLATES: Final = 64


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's tokens for training; ignored here."""

    tags = {"generation"}  # noqa: RUF012 (as in Jinja's own)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Parse the block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """A template's `namespace()`, without underscore names, which lead into the interpreter."""

    def __init__(self, /, **values: Any) -> None:
        for name in values:
            _check_name(name)
        super().__init__(**values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"A namespace cannot have the attribute {name!r}.")


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
    """The environment that chat templates expect: transformers' functions and whitespace rules."""
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
    """Render a template.

    Raises:
        TemplateError: the template raises, or its output is too long.
    """
    pieces, left = [], MAX_CHARACTERS
    for piece in template.generate(variables):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise jinja2.exceptions.TemplateError(
                f"The output exceeds {MAX_CHARACTERS} characters."
            )
    return "".join(pieces)


def _answer(compiled: Callable[[str], jinja2.Template], line: bytes) -> dict[str, str]:
    try:
        request = json.loads(line)  # its time is the client's fault, not the template's
        # Its signal has no handler, so it kills the process even inside one long C call.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        return {"text": render(compiled(request["template"]), request["variables"])}
    except Exception as error:  # noqa: BLE001 (untrusted code may raise anything)
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Serve requests until stdin is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    compiled = lru_cache(MAX_CACHED_TEMPLATES)(make_environment().from_string)
    for line in sys.stdin.buffer:
        answer = _answer(compiled, line)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
