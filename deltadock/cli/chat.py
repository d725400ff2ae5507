"""`deltadock run` (also `chat`) and `generate`: talk to a delta or a base."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deltadock.cli.interrupts import forget_interrupts
from deltadock.cli.output import AsJson, print_resources, say
from deltadock.cli.server import Reference, Url, connect
from deltadock.errors import DeltadockError, InvalidInput, NoChatTemplate, Unavailable
from deltadock.words import counted, duration

if TYPE_CHECKING:
    from deltadock.client.blocking import Client
    from deltadock.client.resources import Generated
    from deltadock.client.routes import Sampling

HELP: Final = """\
  /clear            forget the conversation
  /set NAME VALUE   temperature, top_p, top_k, max_tokens or seed; without VALUE its default
  /plain, /chat     continue text as it is, or converse by the model's chat template
  /bye              leave; Ctrl-D does too
  \"\"\"               begin and end a prompt of several lines
  Ctrl-C            stop the answer"""
SETTINGS: Final = ("temperature", "top_p", "top_k", "max_tokens", "seed")
QUOTES: Final = '"""'
PLAIN_TOKENS: Final = 64
RESTART_SECONDS: Final = 60.0
"""A node that was killed serves again by then: `up` restarts it."""

MaxTokens = Annotated[int | None, typer.Option(min=1, help="Maximum tokens of an answer.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, max=2, help="0 is greedy; by default the model's own.")
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Only the likeliest tokens that have this probability."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same answer.")]

Stop = Annotated[
    list[str] | None,
    typer.Option(help=r"End before this text, in which \n is a line break; may be repeated."),
]


def _escaped(stop: list[str] | None) -> list[str] | None:
    return [text.replace(r"\n", "\n") for text in stop] if stop else None


class Conversation:
    """One talk with a model, by its chat template or, without one, as continued text."""

    def __init__(
        self,
        client: "Client",
        model: str,
        sampling: "Sampling",
        *,
        plain: bool,
        as_json: bool = False,
    ) -> None:
        self.plain = plain
        self._as_json = as_json
        self.sampling = sampling
        self._client = client
        self._model = model
        self._messages: list[dict[str, str]] = []

    def clear(self) -> None:
        """Forget what was said."""
        self._messages.clear()

    def answer(self, prompt: str) -> "Generated":
        """Print the answer to a prompt as it is generated, or whole as JSON; Ctrl-C ends it.

        Raises:
            DeltadockError: there is none.
        """
        if self.plain:
            sampling: Sampling = {**self.sampling}
            if sampling.get("max_tokens") is None:  # else continued text has no end
                sampling["max_tokens"] = PLAIN_TOKENS
            return self._print(self._pieces(prompt, sampling))
        messages = [*self._messages, {"role": "user", "content": prompt}]
        try:
            answered = self._print(self._pieces(messages, self.sampling))
        except NoChatTemplate:
            say(f"{self._model} has no chat template: it continues your text as it is.")
            self.plain = True
            return self.answer(prompt)
        self._messages = [*messages, {"role": "assistant", "content": answered.text}]
        return answered

    def _pieces(
        self, prompt: "str | list[dict[str, str]]", sampling: "Sampling"
    ) -> "Iterator[Generated]":
        """The answer's parts; waits for a node if none serves the model, as while one restarts.

        Raises:
            DeltadockError: there is no answer, or it breaks off.
        """
        deadline, begun = None, False
        while True:
            try:
                for piece in self._client.stream(self._model, prompt, **sampling):
                    begun = True
                    yield piece
            except Unavailable as error:
                refused = type(error) is Unavailable and error.details.get("status") == error.status
                if begun or not refused or time.monotonic() > (deadline or math.inf):
                    raise
                if deadline is None:
                    deadline = time.monotonic() + RESTART_SECONDS
                    waits = (
                        f"Waiting {duration(RESTART_SECONDS)} for a node to start; Ctrl-C ends it."
                    )
                    say(f"{error.message}\n{waits}")
            else:
                return

    def _print(self, pieces: "Iterable[Generated]") -> "Generated":
        from deltadock.client.resources import Generated

        text, last, reason = "", Generated(text=""), None
        try:
            for piece in pieces:
                if not self._as_json:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
                text += piece.text
                last, reason = piece, piece.finish_reason or reason
        except KeyboardInterrupt:
            forget_interrupts()
            reason = "interrupted"
        except DeltadockError:
            if text and not self._as_json:
                sys.stdout.write("\n")  # the error has a line of its own
            raise
        answered = last.model_copy(update={"text": text, "finish_reason": reason})
        if self._as_json:
            print_resources(answered)
        else:
            sys.stdout.write("\n")
            sys.stdout.flush()
        return answered


def answer_greedily(client: "Client", model: str, prompt: str, max_tokens: int) -> str:
    """The likeliest answer, by the chat template or, without one, as continued text."""
    message = {"role": "user", "content": prompt}
    sampling: Sampling = {"max_tokens": max_tokens, "temperature": 0.0}
    try:
        return client.generate(model, [message], **sampling).text
    except NoChatTemplate:
        return client.generate(model, prompt, **sampling).text


def run(
    name: Reference,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="Answer this and end; - reads standard input. Else converse."
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue text as it is, without the chat template.")
    ] = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tokens per second.")] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Talk to a delta or a base; answers are streamed. A prompt may also come from a pipe."""
    sampling: Sampling = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
        "stop": _escaped(stop),
    }  # fmt: skip
    with connect(url) as client:
        talk = Conversation(client, name, sampling, plain=plain, as_json=as_json)
        if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
            prompt = sys.stdin.read()
            if not prompt.strip():
                raise InvalidInput("There is no prompt: give one as an argument or through a pipe.")
        if as_json and prompt is None:
            raise InvalidInput(
                "--json is for one prompt: give it as an argument or through a pipe."
            )
        if prompt is not None:
            _timed(talk, prompt, verbose=verbose)
            return
        client.check_served(name)  # before the first prompt is typed
        say(f"Talking to {name}. /help lists commands, /bye ends.")
        _converse(talk, verbose=verbose)


def _converse(talk: Conversation, *, verbose: bool) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history of input())
    while True:
        try:
            typed = _read()
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            forget_interrupts()
            say("\nCtrl-D or /bye ends.")
            continue
        if typed.startswith("/"):
            if typed.split()[0] in ("/bye", "/exit", "/quit"):
                return
            _command(talk, typed)
        elif typed.strip():
            try:
                _timed(talk, typed, verbose=verbose)
            except DeltadockError as error:
                say(f"error ({error.code}): {error.message}")


def _read() -> str:
    """One prompt from the terminal; three quotes begin and end several lines."""
    typed = input(">>> ")
    if not typed.startswith(QUOTES):
        return typed
    text = typed.removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + input("... ")
    return text.rstrip().removesuffix(QUOTES).strip("\n")


def _command(talk: Conversation, typed: str) -> None:
    name, *arguments = typed.split()
    match name, arguments:
        case "/clear", []:
            talk.clear()
            say("The conversation is forgotten.")
        case (("/plain" | "/chat"), []):
            talk.plain = name == "/plain"
            talk.clear()
            say(
                "Text is continued as it is; the conversation is forgotten."
                if talk.plain
                else "A new conversation begins, by the model's chat template."
            )
        case "/set", [setting, *values] if setting in SETTINGS and len(values) <= 1:
            try:
                value = _checked(setting, values[0]) if values else None
            except InvalidInput as error:
                say(error.message)
                return
            talk.sampling[setting] = value  # type: ignore[literal-required]
            say(f"{setting} is {'its default' if value is None else value}.")
        case (("/help" | "/set" | "/clear" | "/plain" | "/chat"), _):
            say(HELP)
        case _:
            say(f"There is no command {name}. /help lists them.")


def _checked(setting: str, text: str) -> float:
    """The value of a setting of answers, as requests may have it.

    Raises:
        InvalidInput: it is none.
    """
    from pydantic import TypeAdapter, ValidationError

    from deltadock.openai import fields

    kinds: dict[str, Any] = {
        "temperature": fields.Temperature,
        "top_p": fields.TopP,
        "top_k": fields.TopK,
        "max_tokens": fields.MaxTokens,
        "seed": fields.Seed,
    }
    try:
        value: float = TypeAdapter(kinds[setting]).validate_python(text)
    except ValidationError as error:
        raise InvalidInput(f"{setting} cannot be {text}. {error.errors()[0]['msg']}.") from None
    return value


def _timed(talk: Conversation, prompt: str, *, verbose: bool) -> None:
    began = time.monotonic()
    answered = talk.answer(prompt)
    seconds = max(time.monotonic() - began, 1e-9)
    if verbose and answered.usage is not None:
        tokens = answered.usage.completion_tokens
        say(
            f"{counted(tokens, 'token')} in {seconds:.1f} s, {tokens / seconds:.1f} per second; "
            f"{answered.usage.prompt_tokens} in the prompt"
        )


def generate(
    name: Reference,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads standard input.")
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens.")] = PLAIN_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Continue one prompt, as it is, and print the continuation."""
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    text = sys.stdin.read() if prompt == "-" else prompt
    with connect(url) as client:
        found = client.generate(name, text, max_tokens=max_tokens, stop=_escaped(stop), **options)
    if as_json:
        print_resources(found)
    else:
        sys.stdout.write(f"{found.text}\n")
