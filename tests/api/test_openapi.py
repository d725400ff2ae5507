"""The OpenAPI document is valid, its examples match, and the running api conforms to it."""

import re
import secrets
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from pydantic import SecretStr
from schemathesis.specs.openapi.checks import positive_data_acceptance

from deltadock.api.dependencies import Resources
from deltadock.api.main import create_app
from deltadock.settings import Settings
from deltadock.storage.database import migrate
from deltadock.storage.repositories import NodeRepository
from tests.api.support import StandInNode, bearer, issue_key, serving

EXAMPLES = 8
ROOT = Path(__file__).parents[2]
METHODS = ("get", "put", "post", "delete", "head")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Any]:
    home: Path = tmp_path_factory.mktemp("home")
    # With a secret, no generated request can register a node that would receive others.
    secret = SecretStr(secrets.token_hex())
    configured = Settings(home=home, broker_url=redis_url, node_secret=secret)
    migrate(configured.sqlalchemy_url)
    app = create_app(configured)
    resources: Resources = app.state.resources
    with serving(StandInNode().app()) as node_url:
        with resources.database.session_scope() as session:
            NodeRepository(session).put(
                "node_a", node_url, lives_seconds=3600, base_digest=None, adopts=True,
                draining=False, capacity=8, admitted=0, delta_slots=4, deltas=[],
            )  # fmt: skip
        app.state.headers = bearer(issue_key(configured))
        yield app


@pytest.fixture(scope="module")
def document(app: Any) -> dict[str, Any]:
    described: dict[str, Any] = app.openapi()
    return described


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def api_schema(app: Any, url: str) -> Any:
    return schemathesis.openapi.from_url(
        f"{url}/openapi.json", headers=app.state.headers, wait_for_schema=60
    )


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield f"{method} {path}", item[method]


def test_the_document_is_valid(api_schema: Any) -> None:
    api_schema.validate()


def test_every_route_is_described(document: dict[str, Any]) -> None:
    names = dict(operations(document))
    assert len({operation["operationId"] for operation in names.values()}) == len(names)
    for name, operation in names.items():
        assert operation.get("description"), name
        assert operation.get("tags"), name
        assert operation["responses"].keys() >= {"500", "503"}, name
        assert not any("HTTPValidationError" in str(part) for part in operation.values()), name


def test_every_json_body_has_a_valid_example(document: dict[str, Any]) -> None:
    checked = 0
    for name, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" not in content:
            continue
        reference = content["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]
        assert schema.get("examples"), name
        validator = Draft202012Validator(
            {"$ref": reference, "components": document["components"]},
            format_checker=Draft202012Validator.FORMAT_CHECKER,
        )
        for example in schema["examples"]:
            validator.validate(example)
            checked += 1
    assert checked >= 5


def test_every_error_example_is_a_problem(document: dict[str, Any]) -> None:
    seen = set()
    for name, operation in operations(document):
        for status, response in operation["responses"].items():
            for media_type, content in response.get("content", {}).items():
                for code, example in content.get("examples", {}).items():
                    if media_type == "application/problem+json":
                        assert example["value"]["status"] == int(status), name
                        assert example["value"]["code"] == code, name
                        seen.add(code)
    assert seen >= {"not_found", "conflict", "hash_mismatch", "malformed_safetensors", "not_ready"}


def test_the_document_has_no_machine_paths(document: dict[str, Any]) -> None:
    assert not re.search(r"/(home|root|work)/", str(document))


def test_the_api_conforms_to_the_document(app: Any, api_schema: Any) -> None:
    """Generated requests: valid ones are taken, invalid ones refused, answers as described.

    `python -m benchmarks.contract` tries thousands, on a service with a worker and a node.
    """
    configured = tomllib.loads((ROOT / "schemathesis.toml").read_text(encoding="utf-8"))
    refusing = {name for group in configured["operations"] for name in group["include-name"]}
    tried = 0
    for result in api_schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def conforms(case: Any) -> None:
            beyond_schema = case.operation.label in refusing
            case.call_and_validate(
                excluded_checks=[positive_data_acceptance] if beyond_schema else [],
                headers=app.state.headers,
            )

        conforms()
        tried += 1
    assert tried >= 20


def test_allow_lists_all_methods_of_a_path(document: dict[str, Any], app: Any, url: str) -> None:
    with httpx.Client(base_url=url, headers=app.state.headers, timeout=60) as client:
        for path, item in document["paths"].items():
            concrete = re.sub(r"{[^}]*}", "maths/skills" if "{delta" in path else "x", path)
            answer = client.request("TRACE", concrete)
            allowed = set(answer.headers["Allow"].split(", "))
            assert (answer.status_code, allowed) == (405, {name.upper() for name in item}), path


def test_what_nodes_call_is_internal(document: dict[str, Any]) -> None:
    assert list(document["paths"]["/v1/nodes"]) == ["get"]
    assert "/v1/nodes/{node_id}" not in document["paths"]
