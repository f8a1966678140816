"""The guard: who may ask, and what every response carries. It stands before everything else.

A server on the loopback has no key by default, so a page in the user's browser must not be able to
use it. Its requests betray themselves: they carry the page's Origin, or, where the page's own name
was made to mean this machine (DNS rebinding), a Host that is not ours.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchwright.server.api_error import ApiError, failure

COOKIE = "batchwright"
OPEN_PATHS = ("/", "/health", "/favicon.ico")  # they tell nothing about anybody's rows
COOKIE_PATHS = ("/dashboard.json",)
COOKIE_SUFFIX = "/report"

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
_NO_CONTENT = "default-src 'none'; frame-ancestors 'none'"


class Guard:
    """Lets through what is allowed; turns what is raised into an error response.

    Args:
        app: what it guards.
        api_key: what clients have to show as `Authorization: Bearer`; None: nothing.
        hosts: names that the Host header may have (without port); None: any.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._key_digest = None if api_key is None else _digest(api_key)
        self._hosts = hosts
        self.session = secrets.token_urlsafe(32)
        """What the page's cookie holds: a pass of this process for reading, not the key."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        has_started = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Content-Security-Policy", _NO_CONTENT)
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_source(headers)
            self._check_key(scope["method"], scope["path"], headers)
            await self._app(scope, receive, send_guarded)
        except ApiError as error:
            if not has_started:
                await error.response()(scope, receive, send_guarded)
        except ClientDisconnect:
            pass
        except Exception as error:  # noqa: BLE001 - the server goes on
            told = failure(error)
            if not has_started:
                await told.response()(scope, receive, send_guarded)

    def _check_source(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            raise ApiError(
                403,
                f"Host is {host!r:.100}; this server answers to {', '.join(sorted(self._hosts))}",
                code="forbidden_host",
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "requests from other web pages are refused", code="foreign_origin")
        if origin is None and headers.get("sec-fetch-site") == "cross-site":
            mode = headers.get("sec-fetch-mode")
            if mode != "navigate":  # following a link to the page is fine
                raise ApiError(
                    403, "requests from other web pages are refused", code="foreign_origin"
                )

    def _check_key(self, method: str, path: str, headers: Headers) -> None:
        if self._key_digest is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_key(given.strip()):
            return
        may_use_cookie = path in COOKIE_PATHS or path.endswith(COOKIE_SUFFIX)
        if method in ("GET", "HEAD") and may_use_cookie and self._has_pass(headers):
            return
        raise ApiError(
            401,
            "a valid API key is needed, as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_key(self, given: str) -> bool:
        assert self._key_digest is not None
        return hmac.compare_digest(_digest(given), self._key_digest)  # both of one length

    def _has_pass(self, headers: Headers) -> bool:
        cookies: Mapping[str, str] = cookie_parser(headers.get("cookie", ""))
        return hmac.compare_digest(_digest(cookies.get(COOKIE, "")), _digest(self.session))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _name_of(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
