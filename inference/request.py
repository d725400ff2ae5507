"""What is asked of the node: for which weights, which prompts, how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deltadock.errors import InvalidInput
from inference.engine.sampler import SamplingParams
from inference.prompts.chat import Conversation, TemplateSandbox
from inference.prompts.generation_config import SamplingDefaults
from inference.prompts.tokens import Tokenizer

Prompt = str | Sequence[int] | Conversation


@dataclass(frozen=True, slots=True)
class Target:
    """The weights that a request is for, by digest: a base, or one of its deltas."""

    base: str
    artifact: str | None = None

    @property
    def weights(self) -> str:
        """What is competed for and cached under."""
        return self.artifact or self.base


class Request(Protocol):
    """What a route asks of the node."""

    n: int
    """Answers to each prompt."""

    def prompts(self) -> Sequence[Prompt]:
        """What is to be continued or answered."""

    def sampling(self, defaults: SamplingDefaults, room: int) -> SamplingParams:
        """How; `room` is the number of tokens that the longest prompt leaves."""


def encode(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, templates: TemplateSandbox, vocabulary: int
) -> list[list[int]]:
    """The prompts' tokens. Blocks: async code uses threads.

    Raises:
        InvalidInput: a prompt is empty, or a token is not among the `vocabulary`.
        UnsupportedModel: a conversation, and the model has no chat template.
    """
    encoded = [_tokens(prompt, tokenizer, templates) for prompt in prompts]
    for tokens in encoded:
        if not tokens:
            raise InvalidInput("The prompt is empty; send at least one token.")
        if not all(0 <= token < vocabulary for token in tokens):
            raise InvalidInput(f"Token ids must lie in 0..{vocabulary - 1}.")
    return encoded


def _tokens(prompt: Prompt, tokenizer: Tokenizer, templates: TemplateSandbox) -> list[int]:
    if isinstance(prompt, Conversation):
        text = templates.prompt(tokenizer.chat, prompt)
        return tokenizer.encode(text, special_tokens=False)  # the template wrote its own
    return tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


def sampling_of(
    request: Request, defaults: SamplingDefaults, encoded: Sequence[Sequence[int]], context: int
) -> SamplingParams:
    """How the prompts are continued within a context of so many tokens.

    Raises:
        InvalidInput: a prompt and its answer do not fit.
    """
    longest = max(map(len, encoded))
    sampling = request.sampling(defaults, context - longest)
    if longest + sampling.max_tokens > context:
        raise InvalidInput(
            f"The prompt's {longest} tokens and max_tokens {sampling.max_tokens} exceed the "
            f"context of {context} tokens. Shorten one of them."
        )
    return sampling
