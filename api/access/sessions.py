"""Sessions of the dashboard: a signed cookie that names the key, and a token against CSRF."""

import hmac
import secrets
from functools import cached_property
from typing import Any, Final, NamedTuple

from fastapi import Request, Response
from itsdangerous import BadSignature, URLSafeTimedSerializer

from deltadock.errors import Forbidden, Unauthorized
from deltadock.settings import Settings
from deltadock.storage.api_keys import key_secret

COOKIE: Final = "deltadock_session"
SESSION_SECONDS: Final = 12 * 3600
LINK_SECONDS: Final = 3600
FORM_COOKIE: Final = "deltadock_form"
"""Binds the sign-in form to the browser that asked for it."""
FORM_SECONDS: Final = 3600


class DashboardSession(NamedTuple):
    """What the cookie holds; it is signed, and scripts cannot read it."""

    key_id: str
    csrf: str


class SignInLink(NamedTuple):
    """What the token of a one-time link holds."""

    key_id: str
    nonce: str


class Sessions:
    """Signs and checks the cookies, the forms and the one-time links of the sign-in."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def _cookies(self) -> URLSafeTimedSerializer:
        return URLSafeTimedSerializer(key_secret(self._settings), salt="session")

    @cached_property
    def _links(self) -> URLSafeTimedSerializer:
        return URLSafeTimedSerializer(key_secret(self._settings), salt="sign-in link")

    def start(self, request: Request, response: Response, key_id: str) -> None:
        """Set the cookie of a new session."""
        session = DashboardSession(key_id, secrets.token_urlsafe())
        value = self._cookies.dumps(session._asdict())
        _set_cookie(request, response, COOKIE, str(value), SESSION_SECONDS)

    def find(self, cookie: str) -> DashboardSession:
        """The session of a cookie.

        Raises:
            Unauthorized: the cookie is forged, or the session has expired.
        """
        return DashboardSession(**_load(self._cookies, cookie, SESSION_SECONDS))

    def link_token(self, key_id: str) -> str:
        """A token with which a browser signs in once, without seeing the key."""
        link = SignInLink(key_id, secrets.token_urlsafe(12))
        return str(self._links.dumps(link._asdict()))

    def link(self, token: str) -> SignInLink:
        """The link of a token.

        Raises:
            Unauthorized: it is forged, or has expired.
        """
        return SignInLink(**_load(self._links, token, LINK_SECONDS))


def start_form(request: Request, response: Response, token: str) -> None:
    """Bind a form with this token to the browser."""
    _set_cookie(request, response, FORM_COOKIE, token, FORM_SECONDS)


def check_token(expected: str | None, given: str | None) -> None:
    """Check the token of a form or request against the browser's.

    Raises:
        Forbidden: they differ, or one is missing.
    """
    if not expected or not given or not hmac.compare_digest(expected.encode(), given.encode()):
        raise Forbidden(
            "The form's token is missing or is another session's. Reload the page and try again."
        )


def end_session(response: Response) -> None:
    """Delete the session's cookie."""
    response.delete_cookie(COOKIE)


def _load(serializer: URLSafeTimedSerializer, text: str, seconds: int) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = serializer.loads(text, max_age=seconds)
    except BadSignature as error:
        raise Unauthorized("Your session or link has expired. Sign in again.") from error
    return loaded


def _set_cookie(request: Request, response: Response, name: str, value: str, seconds: int) -> None:
    response.set_cookie(
        name,
        value,
        max_age=seconds,
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
