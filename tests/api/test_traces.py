"""One trace from a request to the worker's task and to the node; none without an endpoint."""

import gzip
import sys
from typing import Any

import pytest
from kombu import Connection
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltadock.errors import NotInstalled
from deltadock.settings import Settings
from deltadock.tracing import configure_tracing
from deltadock.workers import tasks
from deltadock.workers.compress import Outcome, WorkerContext
from tests.api.support import Api, StandInNode, serving
from tests.tracing import recording


def message_headers(broker_url: str) -> dict[str, Any]:
    """The headers of the task that waits in the workers' queue."""
    with Connection(broker_url) as connection, connection.SimpleQueue("gpu") as queue:
        message = queue.get(timeout=10)
        message.ack()
        headers: dict[str, Any] = message.headers
        return headers


def test_from_a_request_to_the_task(
    api: Api, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = api.delta_body()
    monkeypatch.setattr(tasks, "compress_job", lambda *_: Outcome.READY)
    parts = api.resources
    context = WorkerContext(parts.settings, parts.database, parts.blobs)
    monkeypatch.setattr(tasks, "get_context", lambda: context)
    with recording() as exporter:
        job_id = api.client.post("/v1/deltas", json=body).json()["job"]["id"]
        headers = message_headers(broker_url)
        tasks.compress.apply((job_id,), headers=headers)
        request, task = exporter.get_finished_spans()
    assert (request.name, request.kind) == ("POST /v1/deltas", SpanKind.SERVER)
    assert (task.name, task.kind) == ("compress", SpanKind.CONSUMER)
    assert task.attributes == {"deltadock.job": job_id}
    assert task.context.trace_id == request.context.trace_id
    assert task.parent is not None
    assert task.parent.span_id == request.context.span_id

    with recording() as exporter:  # the task of one request takes the job of another
        jobs = [
            api.client.post("/v1/deltas", json=body | {"bits": bits}).json()["job"]["id"]
            for bits in (2.0, 3.0)
        ]
        tasks.compress.apply((jobs[1],), headers=headers)
        *_, task = exporter.get_finished_spans()
    assert task.attributes == {"deltadock.job": jobs[0]}
    assert task.context.trace_id != request.context.trace_id


def test_from_a_request_to_the_node(api: Api, node: StandInNode, node_url: str) -> None:
    api.register(node_url, base=api.base())
    ask = {"model": "tiny", "prompt": "17 + 25 ="}
    client = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    with recording() as exporter:
        assert api.client.post("/v1/completions", json=ask, headers=client).status_code == 200
        assert api.client.get("/healthz").status_code == 200
        call, request = exporter.get_finished_spans()
    assert [call.name, request.name] == ["POST /v1/completions"] * 2
    assert (call.kind, request.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    assert call.attributes == {"deltadock.node": "node_a"}
    span_id = format(call.context.span_id, "016x")
    assert node.requests[0]["headers"]["traceparent"] == f"00-{'a' * 32}-{span_id}-01"
    assert api.client.post("/v1/completions", json=ask).status_code == 200
    assert "traceparent" not in node.requests[1]["headers"], "off without an endpoint"


def test_without_the_sdk_an_endpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    configure_tracing(Settings(), "api")
    missing = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        NotInstalled, match=r"DELTADOCK_OTLP_ENDPOINT needs .* pip install 'deltadock\[traces\]'"
    ):
        configure_tracing(Settings(otlp_endpoint="http://collector:4318"), "api")


def test_spans_are_sent_to_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, bytes]] = []

    async def receive(request: Request) -> Response:
        received.append((request.url.path, await request.body()))
        return Response(media_type="application/x-protobuf")

    providers: list[TracerProvider] = []
    monkeypatch.setattr(trace, "set_tracer_provider", providers.append)
    with serving(Starlette(routes=[Route("/v1/traces", receive, methods=["POST"])])) as url:
        configure_tracing(Settings(otlp_endpoint=url), "worker")
        (provider,) = providers
        with provider.get_tracer("test").start_as_current_span("a span of mine"):
            pass
        provider.shutdown()
    ((path, body),) = received
    assert path == "/v1/traces"
    assert b"a span of mine" in gunzipped(body)
    assert b"deltadock-worker" in gunzipped(body)


def gunzipped(body: bytes) -> bytes:
    return gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body
