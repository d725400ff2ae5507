"""From an OpenAI request to prompt tokens and sampling parameters."""

import json
import math
from collections.abc import Sequence
from typing import Any, Final, TypeVar

from deltadock.errors import ContextExceeded, InvalidInput
from deltadock.inference.engine.sampling import SamplingParams
from deltadock.inference.prompts.chat import Conversation, TemplateSandbox
from deltadock.inference.prompts.grammar import GrammarSpec
from deltadock.inference.prompts.json_schema import moved
from deltadock.inference.prompts.tokenizer import SamplingDefaults, Tokenizer
from deltadock.openai.chat import ChatRequest
from deltadock.openai.completions import CompletionRequest
from deltadock.openai.fields import JsonObjectFormat, JsonSchemaFormat
from deltadock.openai.tools import Tool

GenerationRequest = CompletionRequest | ChatRequest
Prompt = str | Sequence[int] | Conversation

COMPLETION_TOKENS: Final = 16
"""OpenAI's default `max_tokens` of completions."""

Value = TypeVar("Value")


def prompts_of(request: GenerationRequest) -> Sequence[Prompt]:
    """The request's prompts, as a list even if there is one."""
    if isinstance(request, ChatRequest):
        continues = bool(request.continue_final_message)
        return [
            Conversation(
                tuple(message.plain() for message in request.messages),
                add_generation_prompt=_or_default(request.add_generation_prompt, not continues),
                continue_final_message=continues,
                variables=request.template_variables,
                tools=tuple(tool.model_dump(exclude_none=True) for tool in request.offered_tools),
            )
        ]
    if isinstance(request.prompt, str):
        return [request.prompt]
    items: list[str | list[int] | int] = [*request.prompt]
    tokens = [item for item in items if isinstance(item, int)]
    return [tokens] if tokens else [item for item in items if not isinstance(item, int)]


def encode(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    templates: TemplateSandbox,
    context: int,
    vocabulary: int,
    tenant: str | None,
) -> list[list[int]]:
    """The prompts' tokens. Blocks: async code uses threads.

    Raises:
        ContextExceeded: a prompt's characters alone show that it exceeds the `context`.
        InvalidInput: a prompt is empty, or a token is not in the `vocabulary`.
        NoChatTemplate: a conversation, and the model has no chat template.
    """
    encoded = [_tokens(prompt, tokenizer, templates, context, tenant) for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        param = "messages" if isinstance(prompt, Conversation) else "prompt"
        if not tokens:
            raise InvalidInput(
                "A prompt has no tokens to continue from. Send at least one character or token id.",
                param=param,
            )
        unknown = [token for token in tokens if not 0 <= token < vocabulary]
        if unknown:
            raise InvalidInput(
                f"`{param}` contains the token id {unknown[0]}; the model has 0 to "
                f"{vocabulary - 1}.",
                param=param,
            )
    return encoded


def _tokens(
    prompt: Prompt,
    tokenizer: Tokenizer,
    templates: TemplateSandbox,
    context: int,
    tenant: str | None,
) -> list[int]:
    if isinstance(prompt, Conversation):
        text = templates.prompt(tokenizer.chat, prompt, tenant)
        _check_length(text, tokenizer, context, "messages")
        return tokenizer.encode(text, special_tokens=False)  # the template wrote its own
    if isinstance(prompt, str):
        _check_length(prompt, tokenizer, context, "prompt")
        return tokenizer.encode(prompt)
    return list(prompt)


def _check_length(text: str, tokenizer: Tokenizer, context: int, param: str) -> None:
    """Refuse a text of which no encoding fits the context: to encode it may take seconds."""
    least = math.ceil(len(text) / tokenizer.longest_token)
    if least >= context:
        raise _context_exceeded(f"at least {least}", context, param)


def _context_exceeded(tokens: str, context: int, param: str) -> ContextExceeded:
    return ContextExceeded(
        f"The prompt has {tokens} tokens; together with its answer it must fit the context of "
        f"{context} tokens. Shorten it.",
        param=param,
    )


def grammar_of(request: GenerationRequest) -> GrammarSpec | None:
    """The grammar that the answers must follow, if any."""
    if isinstance(request, ChatRequest) and (tools := request.forced_tools):
        schema = _calls_schema(tools, at_most_one=request.at_most_one_call)
        return GrammarSpec("compact_json_schema", json.dumps(schema), "tools")
    form = request.response_format
    if isinstance(form, JsonObjectFormat):
        return GrammarSpec("json_object", "", "response_format")
    if isinstance(form, JsonSchemaFormat):
        return GrammarSpec("json_schema", json.dumps(form.json_schema.schema_), "response_format")
    if request.guided_json is not None:
        guided = request.guided_json
        text = guided if isinstance(guided, str) else json.dumps(guided)
        return GrammarSpec("json_schema", text, "guided_json")
    if request.guided_regex is not None:
        return GrammarSpec("regex", request.guided_regex, "guided_regex")
    if request.guided_grammar is not None:
        return GrammarSpec("ebnf", request.guided_grammar, "guided_grammar")
    if request.guided_choice is not None:
        quoted = (json.dumps(choice, ensure_ascii=False) for choice in request.guided_choice)
        choices = " | ".join(quoted)
        return GrammarSpec("choice", f"root ::= {choices}", "guided_choice")
    return None


def _calls_schema(tools: Sequence[Tool], *, at_most_one: bool) -> dict[str, Any]:
    """The JSON schema of one or more calls of these tools, as `tool_calls.parse_calls` reads it."""
    parameters = [tool.function.parameters or {"type": "object"} for tool in tools]
    return {
        "$defs": {
            str(number): moved(schema, f"#/$defs/{number}")
            for number, schema in enumerate(parameters)
        },
        "type": "array",
        "minItems": 1,
        **({"maxItems": 1} if at_most_one else {}),
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": tool.function.name},
                        "parameters": {"$ref": f"#/$defs/{number}"},
                    },
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
                for number, tool in enumerate(tools)
            ]
        },
    }


def sampling_params(
    request: GenerationRequest,
    defaults: SamplingDefaults,
    prompts: Sequence[Sequence[int]],
    context: int,
    vocabulary: int,
) -> list[SamplingParams]:
    """Sampling parameters for each encoded prompt, within a context of `context` tokens.

    Raises:
        ContextExceeded: a prompt leaves no room for an answer in the context.
        InvalidInput: a bias is for a token that is not in the `vocabulary`.
    """
    longest = max(map(len, prompts))
    if longest >= context:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise _context_exceeded(str(longest), context, param)
    sampling = [requested_sampling(request, defaults, context - len(one)) for one in prompts]
    unknown = [token for token in sampling[0].logit_bias if token >= vocabulary]
    if unknown:
        raise InvalidInput(
            f"`logit_bias` names the token id {unknown[0]}; the model has 0 to {vocabulary - 1}.",
            param="logit_bias",
        )
    return sampling


def requested_sampling(
    request: GenerationRequest, defaults: SamplingDefaults, room: int
) -> SamplingParams:
    """The request's sampling parameters; unset ones are the model's `defaults`.

    `room` is the number of tokens that the prompt leaves; the answer ends where it does.
    Without a limit, an answer to a conversation may fill it, and a completion has OpenAI's 16
    tokens.
    """
    logprobs: int | None
    if isinstance(request, ChatRequest):
        max_tokens = request.max_completion_tokens or request.max_tokens or room
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        echo = False
    else:
        max_tokens = _or_default(request.max_tokens, COMPLETION_TOKENS)
        logprobs = request.logprobs
        echo = bool(request.echo)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return SamplingParams(
        max_tokens=min(max_tokens, room),
        temperature=_or_default(request.temperature, defaults.temperature),
        top_p=_or_default(request.top_p, defaults.top_p),
        top_k=max(_or_default(request.top_k, defaults.top_k), 0),
        min_p=_or_default(request.min_p, defaults.min_p),
        repetition_penalty=_or_default(request.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        seed=request.seed,
        stop=tuple(text for text in stop if text),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=_or_default(request.skip_special_tokens, True),
        logprobs=logprobs,
        prompt_logprobs=echo and logprobs is not None,
    )


def _or_default(value: Value | None, default: Value) -> Value:
    return default if value is None else value
