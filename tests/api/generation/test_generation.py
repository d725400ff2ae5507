"""Generation routes: model resolution, forwarding and errors."""

import threading
from typing import Any

import httpx
import openai
import pytest
from starlette.responses import JSONResponse, Response

from deltadock.body_limit import MAX_BODY_BYTES
from tests.api.support import Api, StandInNode, weights

Ready = tuple[dict[str, Any], str, str]


@pytest.fixture
def api(api: Api, node_url: str) -> Api:
    """An api with a node."""
    api.register(node_url)
    return api


@pytest.fixture
def ready(api: Api) -> Ready:
    """A ready delta, its artifact's digest and its base's."""
    delta = api.delta()
    return delta, api.make_ready(delta), delta["base"]["checkpoint"]


def test_models_can_be_named_by_id_name_and_version(
    api: Api, node: StandInNode, ready: Ready
) -> None:
    delta, artifact, base = ready
    base_id = delta["base"]["id"]
    expected = {
        delta["id"]: artifact,
        "maths/skills": artifact,
        "maths/skills:1": artifact,
        "tiny": None,
        base_id: None,
    }
    for model, artifact_digest in expected.items():
        answer = api.client.post("/v1/completions", json={"model": model, "prompt": "17 + 25 ="})
        assert answer.status_code == 200
        assert answer.json()["model"] == model
        headers = node.requests[-1]["headers"]
        assert headers["deltadock-base"] == base
        assert headers["deltadock-base-name"] == "tiny"
        assert headers.get("deltadock-artifact") == artifact_digest


def test_what_nodes_do_not_serve_is_not_listed_and_not_tried(api: Api, ready: Ready) -> None:
    """Its pages say what to do with it."""
    config = {"config.json": b'{"model_type": "gpt2"}'}
    base, tuned = (
        api.upload("checkpoint", config | {"model.safetensors": weights(seed)})["checkpoint"]
        for seed in (3, 4)
    )
    api.client.post("/v1/bases", json={"name": "other", "checkpoint": base["digest"]})
    body = {"name": "a/b", "base": "other", "checkpoint": tuned["digest"], "method": "bitdelta"}
    delta = api.client.post("/v1/deltas", json=body).json()["delta"]
    api.make_ready(delta)
    listed = api.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "maths/skills"]
    assert [model["id"] for model in api.client.get("/v1/models?after=tiny").json()["data"]] == [
        "maths/skills"
    ]
    for page in ("/bases/other", f"/deltas/{delta['id']}"):
        text = api.client.get(page).text
        assert "are not served by nodes" in text
        assert "Generate" not in text
        assert "Add the fine-tune" not in text
    assert "deltadock.load_delta(model, " in text
    assert "deltadock merge --base ./base" in text
    assert "chat/completions" not in text
    for page in ("/bases/tiny", f"/deltas/{ready[0]['id']}"):
        assert "Generate" in api.client.get(page).text
    choices = api.client.get("/try").text
    assert 'value="a/b"' not in choices
    assert 'value="maths/skills"' in choices


def test_a_push_does_not_change_what_a_name_answers_until_the_default_moves(
    api: Api, node: StandInNode, ready: Ready
) -> None:
    second = api.delta(seed=2)
    assert second["version"] == 2
    ask = {"model": "maths/skills", "prompt": "x"}
    api.client.post("/v1/completions", json=ask)
    assert node.requests[-1]["headers"]["deltadock-artifact"] == ready[1]
    newer = api.make_ready(second, b"newer")
    api.client.post("/v1/completions", json=ask)
    assert node.requests[-1]["headers"]["deltadock-artifact"] == ready[1]
    alias = "/v1/registry/maths/skills/aliases/default"
    assert api.client.put(alias, json={"version": 2, "expected": 1}).status_code == 200
    api.client.post("/v1/completions", json=ask)
    assert node.requests[-1]["headers"]["deltadock-artifact"] == newer
    early = api.client.post("/v1/completions", json=ask | {"model": api.delta(seed=3)["id"]})
    assert early.json()["error"]["code"] == "not_ready"


def test_a_client_cannot_choose_weights_by_header(
    api: Api, node: StandInNode, ready: Ready
) -> None:
    headers = {"Deltadock-Base": "0" * 64, "Deltadock-Artifact": "1" * 64, "Cookie": "secret"}
    api.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=headers)
    received = node.requests[-1]["headers"]
    assert received["deltadock-base"] == ready[2]
    assert received["deltadock-base-name"] == "tiny"
    assert "deltadock-artifact" not in received
    assert "cookie" not in received


def test_the_body_is_forwarded_unchanged(api: Api, node: StandInNode, ready: Ready) -> None:
    body = {
        "model": "tiny", "prompt": [1, 2], "top_k": 5, "stop": ["a"], "temperature": 0,
        "logit_bias": {"7": -1.5}, "repetition_penalty": 1.1, "store": False, "n": None,
    }  # fmt: skip
    api.client.post("/v1/completions", json=body, headers={"X-Request-ID": "trace-1"})
    assert node.requests[-1]["body"] == body
    assert node.requests[-1]["headers"]["x-request-id"] == "trace-1"


def test_unknown_models(api: Api, ready: Ready, subtests: pytest.Subtests) -> None:
    for model in ("none", "dlt_x", "maths/skills:2", "maths/skills:x", "a/b", "tiny:1"):
        with subtests.test(model=model):
            answer = api.client.post("/v1/completions", json={"model": model, "prompt": "x"})
            assert answer.status_code == 404
            assert answer.headers["content-type"] == "application/json"
            error = answer.json()["error"]
            assert (error["code"], error["param"], error["type"]) == (
                "model_not_found",
                "model",
                "invalid_request_error",
            )


def test_malformed_requests_are_400_as_at_openai(
    api: Api, node: StandInNode, subtests: pytest.Subtests
) -> None:
    for body, param in (
        ({"model": "tiny"}, "prompt"),
        ({"prompt": "x"}, "model"),
        ({"model": "tiny", "prompt": 1}, "prompt"),
        ({"model": "tiny", "prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"model": "tiny", "prompt": "x", "best_of": 2}, "best_of"),
        ({"model": "tiny", "prompt": "x", "unknown": 1}, "unknown"),
        ([1], None),
    ):
        with subtests.test(body=body):
            answer = api.client.post("/v1/completions", json=body)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_input")
            assert error["param"] == param
    assert node.requests == []


@pytest.mark.parametrize(
    "extra",
    ['"min_p": NaN', '"user": "\\ud800"', '"n": -Infinity', '"\\ud800": 1'],
)
def test_values_that_are_not_json_are_rejected(
    api: Api, node: StandInNode, ready: Ready, extra: str
) -> None:
    headers = {"Content-Type": "application/json"}
    body = f'{{"model": "tiny", "prompt": "x", {extra}}}'
    answer = api.client.post("/v1/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_input")
    for url in ("/v1/bases/tiny/generate", f"/v1/deltas/{ready[0]['id']}/generate"):
        body = f'{{"prompt": "x", {extra}}}'
        answer = api.client.post(url, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")
    assert node.requests == []


def test_chat_requests_are_forwarded_like_completions(
    api: Api, node: StandInNode, ready: Ready
) -> None:
    delta, artifact, base = ready
    messages = [{"role": "user", "content": "17 + 25 =", "name": "Ada"}]
    body = {"model": delta["id"], "messages": messages, "max_completion_tokens": 3, "top_k": 2}
    assert api.client.post("/v1/chat/completions", json=body).status_code == 200
    asked = node.requests[-1]
    assert (asked["path"], asked["body"]) == ("/v1/chat/completions", body)
    assert asked["headers"]["deltadock-artifact"] == artifact
    assert asked["headers"]["deltadock-base"] == base
    for bad in ({"messages": messages}, {"model": "tiny"}, {"model": "tiny", "messages": []}):
        answer = api.client.post("/v1/chat/completions", json=bad)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = api.client.post("/v1/chat/completions", json={"model": "none", "messages": messages})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_responses_are_forwarded_like_completions(
    api: Api, node: StandInNode, ready: Ready
) -> None:
    delta, artifact, _ = ready
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    body = {"model": delta["id"], "input": "x", "text": {"format": form}, "max_output_tokens": 3}
    assert api.client.post("/v1/responses", json=body).status_code == 200
    asked = node.requests[-1]
    assert asked["path"] == "/v1/responses"
    assert asked["body"] == {**body, "input": [{"role": "user", "content": "x"}]}
    assert asked["headers"]["deltadock-artifact"] == artifact
    answer = api.client.post("/v1/responses", json={**body, "store": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "store")


def test_the_openai_package(api: Api, ready: Ready) -> None:
    delta, _, _ = ready
    with openai.OpenAI(
        base_url=f"{api.client.base_url}/v1", api_key=api.key, max_retries=0
    ) as client:
        models = {model.id for model in client.models.list()}
        assert models == {"tiny", "maths/skills"}
        for model in (*models, delta["id"], "maths/skills:1"):
            assert client.models.retrieve(model).id == model
        with pytest.raises(openai.NotFoundError, match="There is no delta 'maths/none'"):
            client.models.retrieve("maths/none")
        whole = client.completions.create(model=delta["id"], prompt="17 + 25 =", max_tokens=8)
        assert whole.choices[0].text == " 42"
        parts = client.completions.create(model=delta["id"], prompt="17 + 25 =", stream=True)
        assert "".join(part.choices[0].text for part in parts) == " 42"
        with pytest.raises(
            openai.BadRequestError, match="`suffix` is not supported yet"
        ) as refused:
            client.completions.create(model=delta["id"], prompt="x", suffix="y")
        assert refused.value.param == "suffix"
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="none", prompt="x")
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("refused", "status", "code", "message"),
    [
        (lambda client: client.embeddings.create(model="m", input="x"), 404, "route_not_found",
         "There is no route /v1/embeddings. Of OpenAI's there are /v1/chat/completions"),
        (lambda client: client.chat.completions.retrieve("c"), 404, "route_not_found",
         "There is no route /v1/chat/completions/c."),
        (lambda client: client.with_options(base_url=str(client.base_url)[:-3]).models.list(), 404,
         "route_not_found", "There is no route /models. The base_url of OpenAI's client must end"),
        (lambda client: client.with_options(api_key="x").embeddings.create(model="m", input="x"),
         401, "unauthorized", "This is not an API key"),
        (lambda client: client.models.delete("tiny"), 405, "method_not_allowed", "DELETE is not"),
        (lambda client: client.completions.create(model="m", prompt="x" * MAX_BODY_BYTES), 413,
         "too_large", "The body is larger"),
    ],
)  # fmt: skip
def test_the_openai_package_shows_what_is_wrong(
    api: Api, refused: Any, status: int, code: str, message: str
) -> None:
    with (
        openai.OpenAI(
            base_url=f"{api.client.base_url}/v1", api_key=api.key, max_retries=0
        ) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        refused(client)
    error = caught.value
    assert str(error).startswith(f"Error code: {status} - {message}")
    assert (error.status_code, error.code) == (status, code)
    assert (error.type, error.param) == ("invalid_request_error", None)
    assert error.request_id


def test_generating_by_url(api: Api, node: StandInNode, ready: Ready) -> None:
    delta, artifact, base = ready
    body = {"prompt": "17 + 25 =", "max_tokens": 8, "temperature": 0, "stop": "\n", "top_k": 5}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "number"}}}
    body |= {"response_format": form}
    answer = api.client.post(f"/v1/deltas/{delta['id']}/generate", json=body)
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert answer.json() == {
        "delta": delta["id"],
        "text": " 42",
        "finish_reason": "stop",
        "usage": usage,
    }
    assert node.requests[-1]["headers"]["deltadock-artifact"] == artifact
    assert node.requests[-1]["body"] == {"model": delta["id"]} | body
    answer = api.client.post("/v1/bases/tiny/generate", json=body)
    assert answer.json()["base"] == "tiny"
    assert node.requests[-1]["headers"]["deltadock-base"] == base
    assert "deltadock-artifact" not in node.requests[-1]["headers"]


def test_generate_needs_an_existing_ready_model(api: Api) -> None:
    delta = api.delta()
    for url, status, code in (
        (f"/v1/deltas/{delta['id']}/generate", 409, "not_ready"),
        ("/v1/deltas/dlt_x/generate", 404, "not_found"),
        ("/v1/bases/none/generate", 404, "not_found"),
    ):
        answer = api.client.post(url, json={"prompt": "x"})
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    for bad in ({}, *({"prompt": "x"} | wrong for wrong in (
        {"temperature": -1}, {"unknown": 1}, {"max_tokens": -1}, {"stop": ["a"] * 17},
        {"guided_regex": "a", "guided_choice": ["a"]},
    ))):  # fmt: skip
        assert api.client.post("/v1/bases/tiny/generate", json=bad).status_code == 422


@pytest.mark.parametrize(
    ("status", "node_code", "expected", "code"),
    [
        (409, "base_mismatch", 409, "base_mismatch"),
        (429, "overloaded", 429, "overloaded"),
        (400, "invalid_input", 422, "invalid_input"),
        (400, "something", 422, "invalid_input"),
        (500, "internal_error", 503, "unavailable"),
    ],
)
def test_errors_of_the_node(
    api: Api,
    node: StandInNode,
    ready: Ready,
    status: int,
    node_code: str,
    expected: int,
    code: str,
) -> None:
    error = {"error": {"message": "no", "type": "x", "param": None, "code": node_code}}
    node.answer = JSONResponse(error, status, {"Retry-After": "7"})
    answer = api.client.post(f"/v1/deltas/{ready[0]['id']}/generate", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["code"]) == (expected, code)
    passed = api.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert (passed.status_code, passed.json()) == (status, error)
    assert passed.headers["retry-after"] == "7"


def test_a_response_that_is_not_json(api: Api, node: StandInNode, ready: Ready) -> None:
    node.answer = Response("<html>", media_type="text/html")
    answer = api.client.post("/v1/bases/tiny/generate", json={"prompt": "x"})
    assert answer.json()["code"] == "unavailable"


def test_a_client_disconnect_cancels_the_request_at_the_node(
    api: Api, node: StandInNode, ready: Ready
) -> None:
    node.gate = threading.Event()
    with pytest.raises(httpx.ReadTimeout):
        api.client.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": "x"},
            timeout=httpx.Timeout(10, read=1),
        )
    assert node.gate.is_set()
    assert node.gone.wait(10)


class TestNodeDown:
    @pytest.fixture
    def node_url(self) -> str:
        return "http://127.0.0.1:1"

    def test_requests_are_unavailable(self, api: Api, ready: Ready) -> None:
        answer = api.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert answer.headers["retry-after"] == "1"
        answer = api.client.post("/v1/bases/tiny/generate", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert "deltadock node" in answer.json()["detail"], "the dead node is not tried again"

    def test_the_api_stays_ready(self, api: Api, ready: Ready) -> None:
        assert api.client.get("/readyz").json()["checks"]["node"] == "ok", (
            "its registration is still valid"
        )
        api.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        answer = api.client.get("/readyz")
        assert (answer.status_code, answer.json()["checks"]["node"]) == (200, "unavailable")
