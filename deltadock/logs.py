"""Structured logging: one JSON object per line, or aligned text for a console.

A module's logger is `log`: structlog's, or the standard library's in what runs in others' programs
too (the client, and all of the node below its process), where nobody may have configured structlog.
"""

import logging
import sys

import structlog
from opentelemetry import trace

from deltadock.settings import Settings


def configure_logging(settings: Settings, **context: str) -> None:
    """Route structlog's and the standard library's records to stderr in one format.

    `context` (for instance `process="api"`) is added to every record of this process.
    """

    def add_process_context(
        _logger: object, _method: str, event: structlog.types.EventDict
    ) -> structlog.types.EventDict:
        # Not a context variable: new threads start with an empty context.
        return {**context, **event}

    def add_trace(
        _logger: object, _method: str, event: structlog.types.EventDict
    ) -> structlog.types.EventDict:
        found = trace.get_current_span().get_span_context()
        return {**event, "trace_id": format(found.trace_id, "032x")} if found.is_valid else event

    shared: list[structlog.types.Processor] = [
        add_process_context,
        structlog.contextvars.merge_contextvars,
        add_trace,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderers: list[structlog.types.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if settings.log_format == "json"
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                # The default prints all local variables, including tensors and secrets.
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
