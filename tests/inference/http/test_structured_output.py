"""Answers that must follow a JSON schema, regex, choice or grammar, by a random model."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import openai
import pytest

from deltadock.inference.prompts.tokenizer import BYTE_CHARACTERS
from tests.inference.grammars import AMBIGUOUS
from tests.inference.support import PROMPT, RunningNode, Site, start

BYTES = sorted(BYTE_CHARACTERS)
"""The tests' tokens by id."""
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["x", "yé"]}, "on": {"type": "boolean"}},
    "required": ["kind", "on"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def node(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with start(site, tmp_path_factory.mktemp("home")) as running:
        yield running


def is_instance(text: str) -> bool:
    found = json.loads(text)
    return found.keys() == {"kind", "on"} and found["kind"] in {"x", "yé"}


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": NAMED}, is_instance),
    ({"guided_json": SCHEMA}, is_instance),
    ({"guided_json": json.dumps(SCHEMA)}, is_instance),
    ({"guided_regex": "[ab]{3}é?c"}, lambda text: re.fullmatch("[ab]{3}é?c", text)),
    ({"guided_choice": ["yes", 'no "really"', "é"]}, {"yes", 'no "really"', "é"}.__contains__),
    ({"guided_grammar": 'root ::= "(" root ")" | "x"'}, re.compile(r"\(*x\)*").fullmatch),
]


@pytest.mark.parametrize(("form", "follows"), FORMS)
@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_follow_their_grammar(
    site: Site, node: RunningNode, form: dict[str, Any], follows: Any, temperature: float
) -> None:
    """For base and delta, in one batch with an answer that follows none."""
    for artifact in (None, site.artifacts[0]):
        with node.client(site.base, artifact) as client:
            free = client.completions.create(model="m", prompt=PROMPT, max_tokens=4, seed=3)
            answer = client.completions.create(
                model="m", prompt=PROMPT, max_tokens=90, temperature=temperature, seed=3, n=3,
                extra_body=form,
            )  # fmt: skip
            again = client.completions.create(model="m", prompt=PROMPT, max_tokens=4, seed=3)
        assert again.choices[0].text == free.choices[0].text
        for choice in answer.choices:
            if choice.finish_reason == "stop":
                assert follows(choice.text), choice.text
        if "guided_grammar" not in form or temperature:
            assert "stop" in {choice.finish_reason for choice in answer.choices}


def test_a_stop_token_of_the_grammar_ends_it(site: Site, node: RunningNode) -> None:
    with node.client(site.base) as client:
        answer = client.completions.create(
            model="m", prompt=PROMPT, max_tokens=9, logprobs=0,
            extra_body={"guided_regex": "(ab){3}", "stop_token_ids": [BYTES.index("b")]},
        )  # fmt: skip
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert (choice.text, choice.finish_reason) == ("a", "stop")
    assert choice.logprobs.tokens == ["a", "b"]


def test_any_json_object(site: Site, node: RunningNode) -> None:
    with node.client(site.base) as client:
        answer = client.completions.create(
            model="m", prompt=PROMPT, max_tokens=90, seed=1, n=8,
            extra_body={"response_format": {"type": "json_object"}},
        )  # fmt: skip
    finished = [choice.text for choice in answer.choices if choice.finish_reason == "stop"]
    assert all(isinstance(json.loads(text), dict) for text in finished)
    assert all(choice.text.lstrip().startswith("{") for choice in answer.choices)


@pytest.mark.parametrize(
    ("form", "param", "message"),
    [
        ({"guided_regex": "(a"}, "guided_regex", "parenthesis"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json", "nonsense"),
        ({"guided_grammar": "root ::= "}, "guided_grammar", "EBNF"),
        (
            {"response_format": NAMED | {"json_schema": {"schema": {"type": 3}}}},
            "response_format",
            "cannot be used",
        ),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(
    site: Site, node: RunningNode, form: dict[str, Any], param: str, message: str
) -> None:
    with (
        node.client(site.base) as client,
        pytest.raises(openai.BadRequestError, match=message) as refused,
    ):
        client.completions.create(model="m", prompt="a", extra_body=form)
    assert refused.value.param == param


def test_a_grammar_without_bounds_fails_its_request_alone(site: Site, node: RunningNode) -> None:
    """While another request, of the same weights, is answered."""
    with node.client(site.base) as client, ThreadPoolExecutor(1) as threads:
        ask = partial(client.completions.create, model="m", prompt=PROMPT, temperature=0)
        free = ask(max_tokens=20).choices[0].text
        bound = threads.submit(
            ask, max_tokens=110, logit_bias={str(BYTES.index("a")): 100},
            extra_body={"guided_grammar": AMBIGUOUS},
        )  # fmt: skip
        while not bound.done():
            assert ask(max_tokens=20).choices[0].text == free
        with pytest.raises(openai.BadRequestError, match="ambiguous") as refused:
            bound.result()
    assert refused.value.code == "grammar_too_complex"
