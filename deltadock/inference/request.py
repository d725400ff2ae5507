"""What is asked of the node: for which weights, which prompts, how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deltadock.errors import ContextExceeded, InvalidInput
from deltadock.inference.engine.sampler import SamplingParams
from deltadock.inference.prompts.chat import Conversation, TemplateSandbox
from deltadock.inference.prompts.generation_config import SamplingDefaults
from deltadock.inference.prompts.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Conversation


@dataclass(frozen=True, slots=True)
class Target:
    """The weights that a request is for, by digest: a base, or one of its deltas."""

    base: str
    artifact: str | None = None

    @property
    def model_key(self) -> str:
        """What is competed for and cached under."""
        return self.artifact or self.base


class Request(Protocol):
    """What a route asks of the node."""

    @property
    def answers(self) -> int:
        """How many to each prompt."""

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
    for prompt, tokens in zip(prompts, encoded, strict=True):
        param = "messages" if isinstance(prompt, Conversation) else "prompt"
        if not tokens:
            raise InvalidInput(
                "A prompt has no tokens, so there is nothing to go on from. Send at least one "
                "character or token id.",
                param=param,
            )
        unknown = [token for token in tokens if not 0 <= token < vocabulary]
        if unknown:
            raise InvalidInput(
                f"`{param}` holds the token id {unknown[0]}; the model has 0 to {vocabulary - 1}.",
                param=param,
            )
    return encoded


def _tokens(prompt: Prompt, tokenizer: Tokenizer, templates: TemplateSandbox) -> list[int]:
    if isinstance(prompt, Conversation):
        text = templates.prompt(tokenizer.chat, prompt)
        return tokenizer.encode(text, special_tokens=False)  # the template wrote its own
    return tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


def sampling_of(
    request: Request,
    defaults: SamplingDefaults,
    encoded: Sequence[Sequence[int]],
    context: int,
    vocabulary: int,
) -> SamplingParams:
    """How the prompts are continued within a context of so many tokens.

    Raises:
        ContextExceeded: a prompt and its answer do not fit.
        InvalidInput: a bias is none of the `vocabulary`'s.
    """
    longest = max(map(len, encoded))
    if longest >= context:
        chat = any(isinstance(prompt, Conversation) for prompt in request.prompts())
        raise ContextExceeded(
            f"The prompt has {longest} tokens; together with its answer it must fit the context of "
            f"{context} tokens. Shorten it.",
            param="messages" if chat else "prompt",
        )
    sampling = request.sampling(defaults, context - longest)
    if longest + sampling.max_tokens > context:
        raise ContextExceeded(
            f"The prompt's {longest} tokens and max_tokens {sampling.max_tokens} exceed the "
            f"context of {context} tokens. Shorten one of them.",
            param="max_tokens",
        )
    unknown = [token for token in sampling.logit_bias if token >= vocabulary]
    if unknown:
        raise InvalidInput(
            f"`logit_bias` names the token id {unknown[0]}; the model has 0 to {vocabulary - 1}.",
            param="logit_bias",
        )
    return sampling
