"""OpenTelemetry traces from a request over the api to the worker and the node.

Off unless an endpoint is set: without one nothing is recorded, and every call here does nothing.
FastAPI opens the spans of requests itself, and continues the trace that a request's `traceparent`
header names.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind

from deltadock.extras import needed_extras
from deltadock.settings import Settings
from deltadock.version import __version__

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

UNTRACED: Final = ("/healthz", "/readyz", "/metrics", "/static/", "/sign-in")
"""Probes and files; and the sign-in, whose URL may have a token."""


def telemetry() -> "TelemetryConfig":
    """The argument of `FastAPI(telemetry=...)`: one span a request, and nothing else."""
    return {
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope["path"].startswith(UNTRACED),
    }


def configure_tracing(settings: Settings, process: str) -> None:
    """Send this process's spans to the settings' collector, if there is one.

    Raises:
        NotInstalled: the SDK is missing.
    """
    if settings.otlp_endpoint is None:
        return
    with needed_extras("DELTADOCK_OTLP_ENDPOINT"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    names = {"service.name": f"deltadock-{process}", "service.version": __version__}
    provider = TracerProvider(resource=Resource.create(names))
    exporter = OTLPSpanExporter(f"{settings.otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


@contextmanager
def span(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    attributes: Mapping[str, str],
    carrier: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """A span around the block.

    Args:
        name: what the block does.
        kind: the span's role.
        attributes: what the block is about.
        carrier: headers of a message, whose trace it continues; by default the current one.
    """
    with trace.get_tracer("deltadock", __version__).start_as_current_span(
        name,
        context=None if carrier is None else propagate.extract(carrier),
        kind=kind,
        attributes=attributes,
    ):
        yield


def trace_headers() -> dict[str, str]:
    """Headers by which another process continues the current trace, if there is one."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers
