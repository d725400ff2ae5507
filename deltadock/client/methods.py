"""The methods that both clients have, made of the routes."""

from collections.abc import Awaitable, Callable
from functools import wraps
from inspect import Parameter, Signature, iscoroutinefunction, signature
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args

P = ParamSpec("P")
T = TypeVar("T")
Awaited = Awaitable[T]
ClientT = TypeVar("ClientT")
RequestT = TypeVar("RequestT")


def method_of(
    build: Callable[P, RequestT], send: Callable[[ClientT, RequestT], T]
) -> Callable[Concatenate[ClientT, P], T]:
    """A client's method that sends what a route builds, with the route's name and signature."""

    @wraps(build)
    def method(client: ClientT, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return send(client, build(*args, **kwargs))

    own = Parameter("self", Parameter.POSITIONAL_ONLY)
    parameters = [own, *signature(build).parameters.values()]
    vars(method)["__signature__"] = Signature(
        parameters, return_annotation=_returned(signature(build), send)
    )
    return method


def _returned(route: Signature, send: Callable[..., Any]) -> Any:
    """What `send` makes of a route's `Call`, `Pages` or `Events`, for `help` and notebooks."""
    (kind,) = get_args(route.return_annotation)
    made: Any = None if kind is type(None) else kind
    form: Any = Awaited if iscoroutinefunction(send) else signature(send).return_annotation
    return made if isinstance(form, TypeVar) else form[made]
