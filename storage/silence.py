"""Connections to Postgres that give up a server which sends nothing: a frozen one, not a lost one.

The system sees nothing wrong there, and the server's own timeouts are frozen with it.
"""

import time
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from sqlalchemy import Engine, event

if TYPE_CHECKING:
    from psycopg.abc import PQGen

T = TypeVar("T")


def give_up_silent(engine: Engine, seconds: float) -> None:
    """Have the engine's connections fail when the server is silent for so long."""

    class Impatient(psycopg.Connection[Any]):
        def wait(self, gen: "PQGen[T]", *args: Any, **kwargs: Any) -> T:
            return super().wait(_unless_silent(gen, self, seconds), *args, **kwargs)

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, args: Any, kwargs: Any) -> psycopg.Connection[Any]:
        return Impatient.connect(*args, **kwargs)


def _unless_silent(
    steps: "PQGen[T]", connection: psycopg.Connection[Any], seconds: float
) -> "PQGen[T]":
    """The steps of one statement, whose waits psycopg interrupts several times a second."""
    heard = time.monotonic()
    try:
        wanted = next(steps)
        while True:
            ready = yield wanted
            if ready:
                heard = time.monotonic()
            elif time.monotonic() - heard > seconds:
                connection.pgconn.finish()  # or a rollback would wait again
                raise psycopg.OperationalError(f"The server sent nothing for {seconds:g} s.")
            wanted = steps.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result
